"""From the artifact to what runs: lowered ONNX files and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from zqfp_compile import triton_repository
from zqfp_compile.backends.capability import settle_capability
from zqfp_compile.backends.host_libraries import HOSTS, copy_libraries, host_library
from zqfp_compile.backends.profiles import Profile, default_profiles, position_limit
from zqfp_compile.backends.target import TargetChoice
from zqfp_compile.backends.tensorrt import EngineResult, build_engine, keep_log
from zqfp_compile.backends.trt_api import LABELS, import_runtime
from zqfp_compile.calibrate.causal_lm import InputSpec, graph_inputs
from zqfp_compile.calibrate.widen import uses_bfloat16
from zqfp_compile.companions import companion_folder
from zqfp_compile.disk import format_bytes
from zqfp_compile.errors import BuilderError, MissingDependencyError, UsageError
from zqfp_compile.model_io import load_model, save_model
from zqfp_compile.output_folder import ORT_MODEL, OutputFolder
from zqfp_compile.pass_runner import PassRunner
from zqfp_compile.plan import QuantPlan
from zqfp_compile.progress import StepTimer
from zqfp_compile.recipe import Recipe
from zqfp_compile.report.model import EngineProfile, EngineReport, LintReport
from zqfp_compile.specs import Phase

_BUILDERS = ("tensorrt", "tensorrt-rtx")
_ENGINE_ONNX = "engine.onnx"
_FP4_ONNX = "model.fp4.onnx"
# --weight-lowering -> the pass that makes the engine-ready model.
_FP8, PLUGIN = "lower-weights-fp8", "lower-weights-plugin"
_CASTS, _INLINE = "qdq-to-casts", "inline-functions"
_SHAPES, _UNUSED = "infer-shapes", "remove-unused"
_FUSE, _JOIN = "fuse-quantizers", "join-quantizers"
# What a graph is behind a pass; an engine's by default.
_PHASES: dict[str, Phase] = {_SHAPES: "quantized", _CASTS: "onnxruntime"}
_LOWERINGS = {"auto": _FP8, "fp8": _FP8, "int4": _INLINE, "plugin": PLUGIN}


@dataclass(frozen=True)
class Workplace:
    """Where lowered models come from and go to.

    Attributes:
        source: The model that was given.
        folder: The output folder being made.
        artifact: The artifact in it.
        plan: What was quantised, with its tensors.
        runner: Runs the lowering passes.
        timer: Times the steps.
    """

    source: Path
    folder: OutputFolder
    artifact: Path
    plan: QuantPlan
    runner: PassRunner
    timer: StepTimer


def check_options(recipe: Recipe, choice: TargetChoice) -> None:
    """Refuse what cannot be lowered, before any work is done.

    Raises:
        MissingDependencyError: ``--weight-lowering plugin``, and our kernel's host is not built.
        UsageError: ``--emit fp4`` for weights that are not E2M1, or a GPU architecture that the builder does
            not know.
    """
    if recipe.weight_lowering == "plugin" and choice.target in HOSTS:
        try:
            host_library(choice.target)
        except MissingDependencyError as error:
            raise MissingDependencyError(f"--weight-lowering plugin: {error}; or use fp8 or int4") from error
    e2m1 = recipe.weights == "fp4" and recipe.fp4_format == "e2m1"
    if "fp4" in recipe.emit and not e2m1:
        raise UsageError("--emit fp4: only e2m1 weights have a FLOAT4E2M1 form; use --weights fp4")
    if choice.target in _BUILDERS:
        # An explicit target was checked with the recipe; "auto" is settled only here.
        Recipe.from_dict({**recipe.to_dict(), "target": choice.target})
        trt = import_runtime(choice.target)
        settle_capability(trt, recipe.compute_capability, f"{LABELS[choice.target]} {trt.__version__}")


def check_model_options(recipe: Recipe, choice: TargetChoice, model: ir.Model, source: Path) -> list[str]:
    """Check the engine options against the model, before any work is done; return warnings.

    Raises:
        UsageError: The shapes do not fit the model's inputs, or Triton cannot serve them.
    """
    inputs = graph_inputs(model)
    if "triton-repository" in recipe.emit:
        triton_repository.check(recipe, choice.target, inputs)
    shapes = recipe.min_shapes or recipe.opt_shapes or recipe.max_shapes
    unused = {"--min/opt/max-shapes": shapes, "--compute-capability": recipe.compute_capability}
    if choice.target in _BUILDERS:
        _profiles(recipe, inputs, source)
        unused = {}
    if choice.target != "tensorrt":
        unused["--timing-cache"] = recipe.timing_cache
    given = [flag for flag, value in unused.items() if value]
    warnings = [f"{flag} has no effect with target {choice.target}" for flag in given]
    if "onnxruntime" in (choice.target, *recipe.emit) and uses_bfloat16(model):
        warnings.append(
            f"{ORT_MODEL} computes in bfloat16, which ONNX Runtime's CPU provider cannot: there only Engine "
            "and the zqfp commands run it, in float32; for others export the model in float16 or float32"
        )
    return warnings


def _profiles(recipe: Recipe, inputs: Sequence[InputSpec], source: Path) -> tuple[Profile, ...]:
    return default_profiles(
        [(spec.name, spec.dims) for spec in inputs],
        min_shapes=recipe.min_shapes,
        opt_shapes=recipe.opt_shapes,
        max_shapes=recipe.max_shapes,
        max_positions=position_limit(companion_folder(source)),
    )


def runnable_model(place: Workplace, recipe: Recipe, choice: TargetChoice) -> Path:
    """Return the model ONNX Runtime should run: FP8 weights, so that loading decodes nothing (made once).

    For ONNX Runtime as the target it is what will be deployed: it runs in anybody's session, whatever the
    options, if that has our custom ops with ``--weight-lowering plugin``.
    """
    deployed = choice.target == "onnxruntime"
    hosted = deployed and recipe.weight_lowering == "plugin"
    lowering = _fp8_lowering(place)
    if hosted and lowering:
        lowering = [_SHAPES, PLUGIN, _UNUSED, _FUSE, _JOIN]
    if not (lowering or deployed):
        return place.artifact
    path = (place.folder.path if deployed else place.folder.scratch) / ORT_MODEL
    if not path.exists():
        _lower(place, path, *lowering, *([_CASTS] if deployed else []))
    return path


def _fp8_lowering(place: Workplace) -> list[str]:
    return [_FP8] if place.plan.quantizes_weights else []


def build(
    place: Workplace, recipe: Recipe, choice: TargetChoice, inputs: Sequence[InputSpec]
) -> EngineReport:
    """Build the engine and write the extra files of ``--emit``.

    Args:
        place: Where everything is.
        recipe: Options.
        choice: The settled target.
        inputs: Graph inputs of the model.

    Raises:
        BuilderError: When the builder fails or the plan fails the lint.
    """
    if "fp4" in recipe.emit:
        _lower(place, place.folder.path / _FP4_ONNX, "lower-weights-fp4")
    engine_onnx = _engine_onnx(place, recipe, choice)
    if "onnxruntime" in recipe.emit and choice.target != "onnxruntime":
        _emit_onnxruntime(place)
    report = _deployed(place, recipe, choice, engine_onnx, inputs)
    if "triton-repository" not in recipe.emit:
        return report
    name = place.folder.final.name.removesuffix(".zqfp")
    with place.timer.step("triton repository"):
        served = _served(place, recipe, choice, engine_onnx, inputs)
        repository = triton_repository.write_repository(place.folder.path, name, served)
    return replace(report, repository=repository.name)


def _emit_onnxruntime(place: Workplace) -> None:
    """Write the model for anybody's session, from the FP8 form where evaluation or builder had it made."""
    path, lowered = place.folder.path / ORT_MODEL, place.folder.scratch / ORT_MODEL
    if lowered.exists():
        _lower(place, path, _CASTS, source=lowered)
    else:
        _lower(place, path, *_fp8_lowering(place), _CASTS)


def _served(
    place: Workplace,
    recipe: Recipe,
    choice: TargetChoice,
    engine_onnx: Path | None,
    inputs: Sequence[InputSpec],
) -> triton_repository.Served:
    """Return what Triton loads: TensorRT's engine, else the model for ONNX Runtime."""
    if choice.target == "tensorrt" and engine_onnx is not None:
        engine = place.folder.path / f"{choice.target}.engine"
        return triton_repository.Served(engine_onnx, engine, _profiles(recipe, inputs, place.source))
    return triton_repository.Served(place.folder.path / ORT_MODEL, place.folder.path / ORT_MODEL)


def _deployed(
    place: Workplace,
    recipe: Recipe,
    choice: TargetChoice,
    engine_onnx: Path | None,
    inputs: Sequence[InputSpec],
) -> EngineReport:
    """Make what the target runs."""
    if choice.target == "none":
        return EngineReport("none", choice.reason)
    if recipe.weight_lowering == "plugin":
        copy_libraries(choice.target, place.folder.path)
    if choice.target == "onnxruntime":
        path = runnable_model(place, recipe, choice)
        size = sum(file.stat().st_size for file in place.folder.path.glob(f"{path.name}*"))
        return EngineReport(choice.target, choice.reason, path.name, size)
    if engine_onnx is None:
        raise RuntimeError("no engine-ready ONNX was made for a builder target")
    return _build_engine(place, recipe, choice, engine_onnx, inputs)


def _engine_onnx(place: Workplace, recipe: Recipe, choice: TargetChoice) -> Path | None:
    """Make the engine-ready ONNX where it is asked for or needed."""
    emitted = "engine-onnx" in recipe.emit
    if not emitted and choice.target not in _BUILDERS:
        return None
    name = _LOWERINGS[recipe.weight_lowering]
    if not emitted and name == _FP8:
        return runnable_model(place, recipe, choice)
    path = (place.folder.path if emitted else place.folder.scratch) / _ENGINE_ONNX
    _lower(place, path, name)
    return path


def _lower(place: Workplace, path: Path, *names: str, source: Path | None = None) -> None:
    """Run the passes on a copy of the artifact, or of ``source``, and write it."""
    model = load_model(source or place.artifact)
    if _INLINE not in names:  # functions that the model came with
        place.runner.run(model, _INLINE, "quantized", keep_ours=True)
    for name in names:
        options: dict[str, object] = {"plan": place.plan} if name.startswith("lower-weights") else {}
        if name == PLUGIN:
            options["only_half"] = path.name != ORT_MODEL
        phase = _PHASES.get(name, "engine")
        place.runner.run(model, name, phase, **options)
    place.runner.run(model, _UNUSED, phase)
    with place.timer.step(f"save {path.name}"):
        save_model(model, path, progress=place.timer.reporter.update)


def _build_engine(
    place: Workplace, recipe: Recipe, choice: TargetChoice, onnx: Path, inputs: Sequence[InputSpec]
) -> EngineReport:
    plan = place.plan
    profiles = _profiles(recipe, inputs, place.source)
    quantized = [site for site in plan.linears if plan.precision(site).weight_format != "none"]
    fp8 = plan.activation_format == "e4m3"
    with place.timer.step("engine"):
        result = build_engine(
            onnx,
            place.folder.path / f"{choice.target}.engine",
            target=choice.target,
            profiles=profiles,
            compute_capability=recipe.compute_capability,
            timing_cache=None if recipe.timing_cache is None else Path(recipe.timing_cache),
            linears=[f"{site.name}/MatMul" for site in quantized] if fp8 else [],
            plugin=host_library(choice.target) if recipe.weight_lowering == "plugin" else None,
            timeout_s=recipe.builder_timeout,
            memory_gb=recipe.builder_memory_gb,
            on_progress=lambda text: place.timer.reporter.update(0, None, text),
        )
    place.timer.reporter.detail(
        f"{choice.target} {result.version} for SM{result.compute_capability}, "
        f"{format_bytes(result.peak_bytes)} of memory at most; log: {result.log_path.name}"
    )
    if not result.lint.ok:
        more = f" (and {len(result.lint.problems) - 1} more)" if len(result.lint.problems) > 1 else ""
        log = keep_log(result.log_path)
        raise BuilderError(f"engine: {result.lint.problems[0]}{more}; the plan lint refuses this engine{log}")
    return _engine_report(result, choice, profiles)


def _engine_report(result: EngineResult, choice: TargetChoice, profiles: Sequence[Profile]) -> EngineReport:
    lint = result.lint
    return EngineReport(
        target=choice.target,
        reason=choice.reason,
        path=result.path.name,
        bytes=result.bytes,
        profiles=tuple(
            EngineProfile(profile.name, profile.shapes, counts.fp8_linears, counts.fp8_gemms)
            for profile, counts in zip(profiles, lint.profiles, strict=True)
        ),
        fp8_linears=lint.fp8_linears,
        fp8_gemms=lint.fp8_gemms,
        lint=LintReport(lint.ok, lint.problems),
    )
