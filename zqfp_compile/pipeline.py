"""The compile, as a straight line of named steps. ``docs/architecture.md`` has the map."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile import __version__, engines
from zqfp_compile.backends.ort import import_onnxruntime
from zqfp_compile.backends.target import TargetChoice, resolve_target
from zqfp_compile.calibrate.causal_lm import CausalLm, find_vocab_size, graph_inputs
from zqfp_compile.calibrate.samples import EvalTokens, Samples, load_eval_tokens, load_samples
from zqfp_compile.calibrate.statistics import activation_scales, collect
from zqfp_compile.certificate import Certificate, certify
from zqfp_compile.device import torch_device
from zqfp_compile.distill.memory import check_memory
from zqfp_compile.distill.student import is_trainable
from zqfp_compile.distill.train import Distillation, distill
from zqfp_compile.errors import AccuracyError, ModelError, UsageError
from zqfp_compile.evaluate import Evaluation, evaluate
from zqfp_compile.model_io import load_model, save_model
from zqfp_compile.output_folder import OutputFolder
from zqfp_compile.pass_runner import PassRunner
from zqfp_compile.plan import QuantPlan
from zqfp_compile.precision.auto import Chooser, sensitivities
from zqfp_compile.precision.sensitivity import Statistics
from zqfp_compile.progress import Reporter, SilentReporter, StepTimer
from zqfp_compile.quantize_model import quantize_embeddings, quantize_model, quantize_while_walking
from zqfp_compile.recipe import Recipe
from zqfp_compile.report.assemble import Facts, assemble, tool_versions, worst_histograms
from zqfp_compile.report.html import write_html
from zqfp_compile.report.json_report import write_json
from zqfp_compile.report.model import EngineReport, Report
from zqfp_compile.specs import Phase
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import find_nonfinite, read_bias, read_weight

ARTIFACT = "model.zqfp.onnx"
DOMAIN = "zqfp"
MARK = "zqfp.version"  # metadata of every model we write
_ACTIVATION_FORMATS = {"fp8": "e4m3", "fp8-e5m2": "e5m2", "int8": "int8", "none": "none"}
_RANDOM_ROWS = 16
# Calibration windows kept for measuring a perplexity to reach.
_HELD_OUT = 4
# One window in so many is held out of distillation, to decide whether it helped.
_DISTILL_SHARE = 16

Rows = Mapping[str, npt.NDArray[np.float32]]


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

    def summary(self) -> list[str]:
        """Return the lines the command line prints at the end."""
        return [*self.report.summary_lines(), f"output: {self.folder}"]


@dataclass
class _Compilation:
    """State of one run; each step reads what earlier steps left here."""

    source: Path
    recipe: Recipe
    folder: OutputFolder
    timer: StepTimer
    runner: PassRunner
    store: TensorStore
    choice: TargetChoice
    explain: bool
    model: ir.Model
    plan: QuantPlan = field(default_factory=QuantPlan)
    samples: Samples | None = None
    held_out: Samples | None = None
    distill_samples: tuple[Samples, Samples] | None = None
    chooser: Chooser | None = None
    distillation: Distillation | None = None
    rows: Rows = field(default_factory=dict)
    energies: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    certificate: Certificate | None = None
    evaluation: Evaluation | None = None
    eval_text: EvalTokens | None = None
    engine: EngineReport | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def reporter(self) -> Reporter:
        return self.timer.reporter

    @property
    def walks(self) -> bool:
        """Whether calibration and quantisation are one step, layer by layer."""
        return self.recipe.algorithm == "gptq" and self.plan.quantizes_weights

    @property
    def artifact(self) -> Path:
        return self.folder.path / ARTIFACT

    @property
    def place(self) -> engines.Workplace:
        return engines.Workplace(self.source, self.folder, self.artifact, self.plan, self.runner, self.timer)

    def warn(self, lines: Sequence[str]) -> None:
        self.warnings.extend(lines)
        for line in lines:
            self.reporter.warn(line)


def compile_model(
    path: str | Path,
    recipe: Recipe | None = None,
    *,
    output: str | Path | None = None,
    reporter: Reporter | None = None,
    dump_after: tuple[str, ...] = (),
    explain: bool = False,
) -> CompileResult:
    """Compile an LLM in ONNX into a W4A8 floating-point model, an engine and a report.

    Args:
        path: The ONNX model; its external data lies beside it.
        recipe: Options; ``None`` is the default recipe.
        output: Output folder, by default ``<path without .onnx>.zqfp``. An earlier run's folder is replaced.
        reporter: Told about progress; ``None`` is silent.
        dump_after: Names of passes after which the model is written into ``<output>/dump``.
        explain: Tell the reporter for each linear layer why it was or was not rewritten.

    Raises:
        UsageError: An option does not fit the model.
        ModelError: The model cannot be compiled.
        AccuracyError: The accuracy gate failed, or the certificate found a mismatch.
        BuilderError: The engine could not be built or fails the plan lint.
        MissingDependencyError: A library, a GPU, memory or disk space is missing.
    """
    source = Path(path)
    recipe = recipe or Recipe()
    torch_device(recipe.device)  # a missing GPU is said before the work
    choice = resolve_target(recipe.target)
    engines.check_options(recipe, choice)
    import_onnxruntime()  # calibration and certificate need it: say so before the work
    final = Path(output) if output is not None else source.with_suffix(".zqfp")
    timer = StepTimer(reporter or SilentReporter())
    with timer.step("load"):
        model = load_model(source)
    with OutputFolder(final) as folder, TensorStore(folder.scratch) as store:
        runner = PassRunner(timer, dump_after, folder.path / "dump")
        run = _Compilation(source, recipe, folder, timer, runner, store, choice, explain, model)
        for step in _STEPS:
            step(run)
        report = _write_report(run)
        with timer.step("write"):
            folder.commit(_manifest(report))
    return CompileResult(folder.final, report)


def _prepare(run: _Compilation) -> None:
    # Lowered forms have no node of ours any more, but the mark.
    if MARK in run.model.metadata_props or any(node.domain == DOMAIN for node in run.model.graph):
        raise ModelError(f"{run.source}: was compiled by zqfp-compile already; give the original model")
    run.reporter.info(f"target {run.choice.target}: {run.choice.reason}")
    run.reporter.detail(", ".join(f"{name} {version}" for name, version in tool_versions().items()))
    run.warn(engines.check_model_options(run.recipe, run.choice, graph_inputs(run.model), run.source))
    run.runner.run(run.model, "strip-metadata", "exported")
    run.runner.run(run.model, "raise-opset", "exported")


def _select(run: _Compilation) -> None:
    recipe = run.recipe
    options = {
        "include": recipe.include,
        "exclude": recipe.exclude,
        "quantize_lm_head": recipe.quantize_lm_head,
    }
    plan = run.runner.run(run.model, "select-linears", "exported", **options).plan
    if plan is None:
        raise RuntimeError("select-linears returned no plan")
    weight_format = recipe.fp4_format if recipe.weights == "fp4" else recipe.weights
    run.plan = plan.replace(
        weight_format=weight_format,
        activation_format=_ACTIVATION_FORMATS[recipe.activations],
        per_token=recipe.activation_scale == "token",
        group_size=recipe.group_size,
        scale_constraint=recipe.scale_constraint,
        scale_rows=recipe.scale_rows,
        lorc_rank=recipe.lorc_rank,
        lorc_format="fp8" if recipe.lorc_format == "fp8" else "float",
    )
    _select_attention(run)
    _select_embedding(run)
    if run.explain:
        for site in plan.linears:
            run.reporter.info(f"rewritten  {site.name} [{site.n}x{site.k}]")
        for skipped in plan.skipped:
            run.reporter.info(f"left alone {skipped.name}: {skipped.reason}")
    if not plan.linears:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in plan.skipped[:3])
        raise ModelError(f"{run.source}: no linear layer can be rewritten ({reasons}); see --explain")


def _select_attention(run: _Compilation) -> None:
    kv_cache, attention = run.recipe.kv_cache_dtype == "fp8", run.recipe.attention == "fp8"
    if not (kv_cache or attention):
        return
    options = {"plan": run.plan, "kv_cache": kv_cache, "attention": attention}
    result = run.runner.run(run.model, "select-attention", "exported", **options)
    if result.plan is None:
        raise RuntimeError("select-attention returned no plan")
    run.plan = result.plan
    run.warn([f"{item.place} stays as it is, not FP8: {item.reason}" for item in result.declined])


def _select_embedding(run: _Compilation) -> None:
    if not run.recipe.quantize_embedding:
        return
    result = run.runner.run(run.model, "select-embedding", "exported", plan=run.plan)
    if result.plan is None:
        raise RuntimeError("select-embedding returned no plan")
    run.plan = result.plan
    if run.explain:
        for site in run.plan.embeddings:
            run.reporter.info(f"rewritten  {site.name} [{site.rows}x{site.width}], embedding")
    run.warn([f"embedding {item.place} stays as it is: {item.reason}" for item in result.declined])


def _calibrate(run: _Compilation) -> None:
    """Run text through the original: ranges and energies of activations, rows for the per-layer checks."""
    recipe = run.recipe
    activations = list(dict.fromkeys(site.activation for site in run.plan.linears))
    static = run.plan.activation_format != "none" and not run.plan.per_token
    lorc = recipe.lorc_rank > 0 and run.plan.weight_format != "none"
    attention = run.plan.attention_values
    if run.walks:
        activations = []  # measured while they are quantised
    elif not (static or lorc or attention or recipe.evaluate or recipe.mixed):
        run.rows = _random_rows(run.plan, recipe.seed)
        return
    with run.timer.step("calibrate"):
        run.samples = _load_samples(run)
        with _naming_nonfinite(run):
            result = collect(
                run.model,
                [*activations, *attention],
                run.samples.feeds,
                seed=recipe.seed,
                progress=run.reporter.update,
            )
    run.reporter.detail(f"calibrated on {run.samples.description}")
    run.warn(run.samples.warnings)
    run.rows = result.rows
    run.energies = result.energies
    if static and not run.walks:
        _set_activation_scales(run, {name: result.ranges[name] for name in activations})
    _set_attention_scales(run, result.ranges)


@contextlib.contextmanager
def _naming_nonfinite(run: _Compilation) -> Iterator[None]:
    """Name the tensor that is to blame when a weight's NaN or infinity spoils activations."""
    try:
        yield
    except ModelError as error:
        culprit = find_nonfinite(run.model, run.plan)
        if culprit is None:
            raise
        raise ModelError(f"{run.source}: {culprit} holds NaN or infinity; export the model again") from error


def _set_activation_scales(run: _Compilation, ranges: Mapping[str, float]) -> None:
    scales, warnings = activation_scales(ranges, run.plan.activation_format)
    run.warn(warnings)
    run.plan = run.plan.replace(activation_scales=scales)


def _set_attention_scales(run: _Compilation, ranges: Mapping[str, float]) -> None:
    wanted = {name: ranges[name] for name in run.plan.attention_values}
    scales, warnings = activation_scales(wanted, "e4m3")
    run.warn(warnings)
    run.plan = run.plan.replace(attention_scales=scales)


def _load_samples(run: _Compilation) -> Samples:
    """Return the calibration samples; for a perplexity to reach, others are kept in ``run.held_out``."""
    recipe = run.recipe
    goal = recipe.goal
    measures = goal is not None and goal.kind == "perplexity"
    from_npz = recipe.calibration is not None and recipe.calibration.endswith(".npz")
    try:
        interface = CausalLm.from_model(run.model)
    except UsageError:
        if not from_npz:
            raise
        interface = None
    samples = _windows(run, interface, recipe.calibration_samples + (_HELD_OUT if measures else 0))
    if measures:
        samples, run.held_out = samples.hold_out(_HELD_OUT)
    return samples


def _windows(run: _Compilation, interface: CausalLm | None, count: int) -> Samples:
    return load_samples(
        run.recipe.calibration,
        tokenizer_path=_tokenizer(run.source),
        interface=interface,
        inputs=graph_inputs(run.model),
        samples=count,
        length=run.recipe.calibration_length,
        seed=run.recipe.seed,
        vocab_size=find_vocab_size(run.model),
    )


def _random_rows(plan: QuantPlan, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    widths = {site.activation: site.k for site in plan.linears}
    return {name: random.standard_normal((_RANDOM_ROWS, k), dtype=np.float32) for name, k in widths.items()}


def _assign(run: _Compilation) -> None:
    """Choose the format and the rank of every layer (``--auto``, ``--lorc-budget``)."""
    recipe = run.recipe
    if not recipe.mixed:
        return
    if run.samples is None:
        raise RuntimeError("the assignment needs calibration samples")
    with run.timer.step("assign"):
        layers = sensitivities(
            run.model,
            run.plan,
            run.samples.feeds,
            _statistics(run),
            max_rank=recipe.lorc_rank,
            seed=recipe.seed,
            device=torch_device(recipe.device),
            progress=run.reporter.update,
        )
    run.chooser = Chooser(run.plan, layers, recipe.goal, recipe.lorc_budget)
    _choose(run, run.chooser)


def _choose(run: _Compilation, chooser: Chooser) -> None:
    choice = chooser.choose()
    run.plan = run.plan.replace(precisions=choice.precisions, tensors={})
    run.reporter.info(choice.summary)


def _statistics(run: _Compilation) -> Statistics:
    """What calibration measured; the walk measures later than the assignment needs it."""
    activations = list(dict.fromkeys(site.activation for site in run.plan.linears))
    if run.samples is None or all(name in run.energies for name in activations):
        return Statistics(run.energies, run.rows, run.plan.activation_scales)
    with _naming_nonfinite(run):
        result = collect(
            run.model, activations, run.samples.feeds, seed=run.recipe.seed, progress=run.reporter.update
        )
    static = run.plan.activation_format != "none" and not run.plan.per_token
    scales = activation_scales(result.ranges, run.plan.activation_format)[0] if static else {}
    return Statistics(result.energies, result.rows, scales)


def _reach_perplexity(run: _Compilation) -> None:
    """Measure what the chosen precisions cost on text that was held out, and adjust them (``--auto``)."""
    chooser = run.chooser
    if chooser is None or chooser.search is None or run.held_out is None:
        return
    while True:
        loss = _held_out_loss(run, run.held_out)
        run.reporter.info(f"perplexity on held-out calibration text: {100 * math.expm1(loss):+.2f}%")
        if not chooser.adjust(loss):
            break
        _choose(run, chooser)
        _quantize(run)
        _distill(run)
        _rewrite(run)
    run.warn(chooser.warnings)


def _held_out_loss(run: _Compilation, samples: Samples) -> float:
    """Return by how much the loss rises on held-out windows, nats per token."""
    windows = [feed["input_ids"][0].astype(np.int64) for feed in samples.feeds]
    runnable = engines.runnable_model(run.place, run.choice)
    with run.timer.step("measure"):
        result = evaluate(
            run.source,
            runnable,
            np.concatenate(windows),
            length=len(windows[0]),
            progress=run.reporter.update,
        )
    for path in (runnable, runnable.with_name(f"{runnable.name}.data")):
        if runnable != run.artifact:
            path.unlink(missing_ok=True)  # the evaluation makes it from the final artifact
    if result.nll_compiled is None:
        raise RuntimeError("two models were compared")
    return result.nll_compiled - result.nll_original


def _quantize(run: _Compilation) -> None:
    if run.plan.embeddings and not run.plan.embedding_tensors:
        with run.timer.step("quantize"):
            run.plan = quantize_embeddings(run.model, run.plan, run.store)
    if run.walks:
        _walk(run)
        return
    if not run.plan.quantizes_weights:
        return
    with run.timer.step("quantize"):
        run.plan = quantize_model(
            run.model,
            run.plan,
            run.store,
            energies=run.energies,
            seed=run.recipe.seed,
            progress=run.reporter.update,
        )


def _walk(run: _Compilation) -> None:
    """Calibrate and quantise layer by layer, each seeing its predecessors quantised."""
    if run.samples is None:
        raise RuntimeError("the walk needs calibration samples")
    with run.timer.step("quantize"), _naming_nonfinite(run):
        run.plan, result = quantize_while_walking(
            run.model,
            run.plan,
            run.store,
            run.samples.feeds,
            scratch=run.folder.scratch,
            device=torch_device(run.recipe.device),
            seed=run.recipe.seed,
            progress=run.reporter.update,
        )
    run.rows = result.rows
    if run.plan.activation_format != "none" and not run.plan.per_token:
        _set_activation_scales(run, result.ranges)


def _prepare_distillation(run: _Compilation) -> None:
    """Read its text, and refuse what does not fit into memory, before hours of work."""
    recipe = run.recipe
    if not recipe.distill_tokens:
        return
    interface = CausalLm.from_model(run.model)
    length = interface.sequence_length or recipe.calibration_length
    wanted = -(-recipe.distill_tokens // length)
    held_out = max(2, -(-wanted // _DISTILL_SHARE))
    samples = _windows(run, interface, wanted + held_out)
    run.warn(samples.warnings)
    share = held_out / (wanted + held_out)  # the text may be short
    run.distill_samples = samples.hold_out(max(1, round(share * len(samples.feeds))))
    length = max(feed["input_ids"].size for feed in samples.feeds)
    check_memory(run.model, run.plan, interface, length, torch_device(recipe.device))


def _distill(run: _Compilation) -> None:
    """Train row scales and LoRC factors against the original's predictions."""
    if run.distill_samples is None:
        return
    if not is_trainable(run.plan):  # the precisions of --auto
        run.warn(["distillation is left out: no layer has LoRC factors or row scales of any value"])
        return
    train, held_out = run.distill_samples
    with run.timer.step("distill"):
        run.plan, run.distillation = distill(
            run.model,
            run.plan,
            run.store,
            feeds=train.feeds,
            held_out=held_out.feeds,
            logits=CausalLm.from_model(run.model).logits,
            tokens=run.recipe.distill_tokens,
            device=torch_device(run.recipe.device),
            seed=run.recipe.seed,
            progress=run.reporter.update,
        )
    if not run.distillation.improved:
        run.warn(["distillation did not help on held-out text and is left out; give more --distill-tokens"])


def _rewrite(run: _Compilation) -> None:
    """Make the artifact: rewrite a fresh copy, so that original weights stay readable for the checks."""
    model = run.model.clone()
    phase: Phase = "exported"
    if run.plan.activation_format != "none":
        run.runner.run(model, "quantize-activations", phase, plan=run.plan)
    if run.plan.quantizes_weights:
        phase = "quantized"
        run.runner.run(model, "quantize-weights", phase, plan=run.plan)
        if any(tensors.lorc_v is not None for tensors in run.plan.tensors.values()):
            run.runner.run(model, "add-lorc", phase, plan=run.plan)
    if run.plan.stored_embeddings:
        phase = "quantized"
        run.runner.run(model, "quantize-embedding", phase, plan=run.plan)
    for name in ("quantize-kv-cache", "quantize-attention"):
        if run.plan.caches if name == "quantize-kv-cache" else run.plan.attentions:
            run.runner.run(model, name, phase, plan=run.plan)
    run.runner.run(model, "remove-unused", phase)
    model.metadata_props[MARK] = __version__
    with run.timer.step("save"):
        save_model(model, run.artifact, progress=run.reporter.update)
        tokenizer = _tokenizer(run.source)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, run.folder.path / tokenizer.name)


def _explain_embeddings(run: _Compilation) -> None:
    """Say which embeddings mixed precision leaves in float, now that it has decided."""
    stored = run.plan.stored_embeddings
    kept = [site for site in run.plan.embeddings if site not in stored]
    run.warn(
        [f"embedding {site.name} stays as it is: --auto keeps {site.linears[0]} in float" for site in kept]
    )


def _certify(run: _Compilation) -> None:
    """Compare every rewritten linear, read back from disk, with the numpy reference."""
    with run.timer.step("certificate"):
        artifact = load_model(run.artifact)
        run.certificate = certify(
            artifact,
            run.plan,
            run.rows,
            original_weight=lambda site: read_weight(run.model, site.weight),
            original_bias=lambda site: read_bias(run.model, site),
            original_table=lambda site: read_weight(run.model, site.source),
            progress=run.reporter.update,
        )
    if run.certificate.mismatches:
        bad = [layer.name for layer in run.certificate.layers if not layer.ok]
        raise AccuracyError(
            f"certificate: {len(bad)} of {run.certificate.layers_checked} layers differ from the reference, "
            f"first {bad[0]}; this is a bug in zqfp-compile or the runtime, please report it"
        )


def _load_eval_text(run: _Compilation) -> None:
    """Read the text now: a wrong file must not show after hours of work."""
    recipe = run.recipe
    if not recipe.evaluate:
        return
    try:
        interface = CausalLm.from_model(run.model)
    except UsageError as error:
        run.warn([f"perplexity is not measured: {error}"])
        return
    run.eval_text = load_eval_tokens(
        recipe.eval_text,
        tokenizer_path=_tokenizer(run.source),
        interface=interface,
        max_tokens=recipe.eval_tokens,
        seed=recipe.seed,
        vocab_size=find_vocab_size(run.model),
    )
    run.warn(run.eval_text.warnings)


def _evaluate(run: _Compilation) -> None:
    recipe, text = run.recipe, run.eval_text
    if text is None:
        return
    runnable = engines.runnable_model(run.place, run.choice)
    with run.timer.step("evaluate"):
        run.evaluation = evaluate(
            run.source,
            runnable,
            text.tokens,
            length=recipe.eval_length,
            progress=run.reporter.update,
        )
    _check_gate(run.evaluation, recipe)


def _check_gate(evaluation: Evaluation, recipe: Recipe) -> None:
    before, after = evaluation.perplexity_original, evaluation.perplexity_compiled
    if recipe.max_perplexity_increase is None or after is None:
        return
    increase = 100.0 * (after / before - 1.0)
    if not increase <= recipe.max_perplexity_increase:
        raise AccuracyError(
            f"perplexity rose by {increase:.2f}% ({before:.3f} -> {after:.3f}), the gate allows "
            f"{recipe.max_perplexity_increase:g}%; try --algorithm gptq, --lorc-rank 32, "
            "--activation-scale token or --exclude"
        )


def _build(run: _Compilation) -> None:
    run.engine = engines.build(run.place, run.recipe, run.choice, graph_inputs(run.model))
    run.warn([f"--dump-after {name}: these options do not run it" for name in run.runner.not_dumped])


_STEPS = (
    _prepare,
    _select,
    _load_eval_text,
    _prepare_distillation,
    _calibrate,
    _assign,
    _quantize,
    _distill,
    _rewrite,
    _reach_perplexity,
    _explain_embeddings,
    _certify,
    _evaluate,
    _build,
)


def _write_report(run: _Compilation) -> Report:
    with run.timer.step("report"):
        facts = Facts(
            source=run.source,
            recipe=run.recipe,
            plan=run.plan,
            model=run.model,
            artifact=run.artifact,
            samples=run.samples,
            distillation=run.distillation,
            certificate=run.certificate,
            evaluation=run.evaluation,
            eval_description="" if run.eval_text is None else run.eval_text.description,
            engine=run.engine,
            warnings=tuple(run.warnings),
            seconds=run.timer.seconds,
        )
        report = assemble(facts)
        write_json(report, run.folder.path / "report.json")
        write_html(report, run.folder.path / "report.html", worst_histograms(report, facts))
        (run.folder.path / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    return report


def _manifest(report: Report) -> dict[str, object]:
    return {
        "schema_version": 1,
        "source": report.model,
        "source_sha256": report.source_sha256,
        "created": report.created,
        "versions": dict(report.versions),
        "recipe": dict(report.recipe),
    }


def _tokenizer(source: Path) -> Path | None:
    path = source.parent / "tokenizer.json"
    return path if path.is_file() else None
