"""The compile, as a straight line of named steps. ``docs/architecture.md`` has the map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from zqfp_compile import engines
from zqfp_compile.backends.ort import import_onnxruntime
from zqfp_compile.backends.target import resolve_target
from zqfp_compile.companions import companion_folder, find_companions
from zqfp_compile.compilation import Compilation
from zqfp_compile.device import torch_devices
from zqfp_compile.graphsurgeon import to_graphsurgeon
from zqfp_compile.memory import MemoryWatch
from zqfp_compile.model_io import load_model
from zqfp_compile.model_source import AnyModel, describe, output_path, write_model
from zqfp_compile.output_folder import ARTIFACT, OutputFolder
from zqfp_compile.parallel.choice import Workers
from zqfp_compile.pass_runner import PassRunner
from zqfp_compile.progress import Reporter, SilentReporter, StepTimer
from zqfp_compile.recipe import Recipe
from zqfp_compile.report.model import Report
from zqfp_compile.steps.assign import assign, explain_embeddings
from zqfp_compile.steps.build import build
from zqfp_compile.steps.calibrate import calibrate
from zqfp_compile.steps.certify import certify
from zqfp_compile.steps.distill import distill, prepare_distillation
from zqfp_compile.steps.estimate import estimate
from zqfp_compile.steps.evaluate import evaluate, load_eval_text
from zqfp_compile.steps.prepare import prepare
from zqfp_compile.steps.quantize import quantize
from zqfp_compile.steps.reach_perplexity import reach_perplexity
from zqfp_compile.steps.report import manifest, write_report
from zqfp_compile.steps.rewrite import rewrite
from zqfp_compile.steps.select import select
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.work_folder import WorkFolder
from zqfp_compile.work_key import work_key

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_STEPS = (
    prepare,
    select,
    estimate,
    load_eval_text,
    prepare_distillation,
    calibrate,
    assign,
    quantize,
    distill,
    rewrite,
    reach_perplexity,
    explain_embeddings,
    certify,
    evaluate,
    build,
)


@dataclass(frozen=True)
class CompileResult:
    """What a compile made.

    Attributes:
        folder: The output folder, complete and on disk.
        report: Everything measured, as in ``report.json``.
    """

    folder: Path
    report: Report

    @property
    def artifact(self) -> Path:
        """The portable model ``model.zqfp.onnx``."""
        return self.folder / ARTIFACT

    @property
    def engine(self) -> Path | None:
        """The engine or the ORT-ready model; ``None`` for ``target="none"``."""
        engine = self.report.engine
        return None if engine is None or engine.path is None else self.folder / engine.path

    def graph(self) -> gs.Graph:
        """Return the portable model as a ``gs.Graph``; its weights stay in ``folder``.

        Raises:
            MissingDependencyError: When graphsurgeon is not installed.
        """
        return to_graphsurgeon(load_model(self.artifact))

    def summary(self) -> list[str]:
        """Return the lines the command line prints at the end."""
        return [*self.report.summary_lines(), f"output: {self.folder}"]


def compile_model(
    model: AnyModel,
    recipe: Recipe | None = None,
    *,
    output: str | Path | None = None,
    folder: str | Path | None = None,
    reporter: Reporter | None = None,
    dump_after: tuple[str, ...] = (),
    explain: bool = False,
    jobs: int | None = None,
    cluster: str | None = None,
    fresh: bool = False,
) -> CompileResult:
    """Compile an LLM in ONNX into a W4A8 floating-point model, an engine and a report.

    Args:
        model: The path of the ONNX model, beside which its external data lies; or an ``onnx.ModelProto``, an
            ``onnx_ir.Model`` or a ``gs.Graph``. Such a model is first written to the disk, beside the output,
            and a killed compile of it starts over.
        recipe: Options; ``None`` is the default recipe.
        output: Output folder, by default ``<path without .onnx>.zqfp``; a model that is not a file needs one.
            An earlier run's folder is replaced.
        folder: For a model that is not a file: where ``tokenizer.json``, ``config.json`` and the like are,
            and external data that is not loaded. ``None``: no such files, and data in the current folder.
        reporter: Told about progress; ``None`` is silent.
        dump_after: Names of passes after which the model is written into ``<output>/dump``.
        explain: Tell the reporter for each linear layer why it was or was not rewritten.
        jobs: Processes that round weights to nearest; ``None`` is one per core where that pays. No result
            depends on it, or on ``cluster``.
        cluster: Address of a Ray cluster to do it on, whose machines see the model under the same path.
        fresh: Do not go on from what a killed or interrupted compile into the same output has finished.

    Raises:
        UsageError: An option does not fit the model.
        ModelError: The model cannot be compiled.
        AccuracyError: The accuracy gate failed, or the certificate found a mismatch.
        BuilderError: The engine could not be built or fails the plan lint.
        MissingDependencyError: A library, a GPU, memory or disk space is missing.
    """
    recipe = recipe or Recipe()
    devices = torch_devices(recipe.device, recipe.listed_devices)  # a missing GPU is said before the work
    choice = resolve_target(recipe.target)
    engines.check_options(recipe, choice)
    import_onnxruntime()  # calibration and certificate need it: say so before the work
    workers = Workers(jobs, cluster)
    name, final = describe(model), output_path(model, output)
    timer = StepTimer(reporter or SilentReporter())
    # What is wrong with a file is said before anything is written.
    loaded = _load(Path(model), timer) if isinstance(model, (str, Path)) else None
    with OutputFolder(final) as out:
        if loaded is None:
            loaded = _load(write_model(model, out.scratch / "source", folder), timer)
        key = work_key(*loaded, recipe, devices[0].partition(":")[0])
        with (
            WorkFolder(out.work, key, fresh=fresh) as work,
            TensorStore(work.path) as store,
            MemoryWatch(lambda: timer.running) as memory,
        ):
            _tell_what_is_there(work, timer.reporter)
            runner = PassRunner(timer, dump_after, out.path / "dump")
            run = Compilation(
                *loaded, name, recipe, out, timer, runner, work, store, workers, memory, choice, explain
            )
            for step in _STEPS:
                step(run)
            report = write_report(run)
            with timer.step("write"):
                out.commit(manifest(report))
    return CompileResult(out.final, report)


def _load(path: Path, timer: StepTimer) -> tuple[Path, ir.Model]:
    with timer.step("load"):
        model = load_model(path)
        find_companions(companion_folder(path))  # checked before they are read or copied
        return path, model


def _tell_what_is_there(work: WorkFolder, reporter: Reporter) -> None:
    if work.finished:
        reporter.info(f"going on from {work.path} (--fresh starts over)")
    if work.discarded:
        reporter.info(f"{work.path}: unfinished work of another model or other options is removed")
