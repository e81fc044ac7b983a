"""Which engine to build here, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from zqfp_compile.backends import gpu
from zqfp_compile.backends.trt_api import LABELS, MODULES, import_runtime
from zqfp_compile.errors import MissingDependencyError, UsageError

_BUILDERS = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class TargetChoice:
    """A target and the reason it was taken.

    Attributes:
        target: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime`` or ``none``.
        reason: One sentence for the user.
    """

    target: str
    reason: str


def resolve_target(requested: str) -> TargetChoice:
    """Settle ``--target``.

    ``auto`` is TensorRT where it imports and a GPU is there (it builds for the GPU it runs on), else
    TensorRT-RTX where it imports (it builds without a GPU), else ONNX Runtime.

    Raises:
        UsageError: When ``requested`` is no target.
        MissingDependencyError: When an explicit target cannot work here, or ``auto`` finds no runtime at all.
    """
    missing: dict[str, MissingDependencyError] = {}
    for target in _BUILDERS if requested == "auto" else (requested,):
        if target in MODULES:
            try:
                import_runtime(target)
            except MissingDependencyError as error:
                missing[target] = error
    has_ort = importlib.util.find_spec("onnxruntime") is not None
    return decide(requested, missing=missing, gpus=gpu.compute_capabilities(), has_onnxruntime=has_ort)


def decide(
    requested: str,
    *,
    missing: dict[str, MissingDependencyError],
    gpus: tuple[str, ...],
    has_onnxruntime: bool,
) -> TargetChoice:
    """Take the decision of :func:`resolve_target` from what was found on the machine.

    Args:
        requested: Value of ``--target``.
        missing: Why each asked-for builder does not import; a builder that is not a key imports.
        gpus: Compute capability of each GPU.
        has_onnxruntime: Whether ``onnxruntime`` can be imported.
    """
    if requested == "auto":
        return _automatic(missing, gpus, has_onnxruntime)
    if requested == "none":
        return TargetChoice("none", "no engine was asked for")
    if requested == "onnxruntime":
        if not has_onnxruntime:
            raise MissingDependencyError(
                "--target onnxruntime: it is not installed; run: pip install 'zqfp-compile[cpu]'"
            )
        return TargetChoice(requested, "asked for")
    if requested not in _BUILDERS:
        choices = f"auto, {', '.join(_BUILDERS)}, onnxruntime, none"
        raise UsageError(f"--target: {requested!r} is not one of {choices}")
    if requested in missing:
        raise MissingDependencyError(f"--target {requested}: {missing[requested]}")
    if requested == "tensorrt" and not gpus:
        raise MissingDependencyError(
            "--target tensorrt: it builds on the GPU the engine will run on, and there is none here (or no "
            "driver); use --target tensorrt-rtx, which builds without one"
        )
    return TargetChoice(requested, "asked for")


def _automatic(
    missing: dict[str, MissingDependencyError], gpus: tuple[str, ...], has_onnxruntime: bool
) -> TargetChoice:
    if "tensorrt" not in missing and gpus:
        return TargetChoice("tensorrt", f"TensorRT is installed and a GPU (SM{gpus[0]}) is here")
    why_not = "no GPU is here for TensorRT" if "tensorrt" not in missing else "TensorRT cannot be used"
    if "tensorrt-rtx" not in missing:
        return TargetChoice("tensorrt-rtx", f"{why_not}; {LABELS['tensorrt-rtx']} is installed")
    if has_onnxruntime:
        return TargetChoice("onnxruntime", f"{why_not} and {LABELS['tensorrt-rtx']} cannot be used")
    raise MissingDependencyError(
        "--target auto: no runtime is installed; run: pip install 'zqfp-compile[cpu]', or use --target none"
    )
