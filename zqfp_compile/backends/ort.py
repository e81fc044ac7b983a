"""ONNX Runtime sessions with the one preset that runs FP8 Q/DQ correctly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zqfp_compile.errors import MissingDependencyError


def import_onnxruntime() -> Any:
    """Return the ``onnxruntime`` module.

    Raises:
        MissingDependencyError: When it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX Runtime is not installed; run: pip install 'zqfp-compile[cpu]' (or [gpu])"
        ) from error
    return onnxruntime


def create_session(
    model: str | Path | bytes,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    optimize: bool = True,
    fold_constants: bool = True,
    threads: int = 0,
    external_data: str | Path | None = None,
) -> Any:
    """Open an ``onnxruntime.InferenceSession``.

    The default optimiser breaks FP8 Q/DQ graphs (silently wrong fp16 bias), so ``session.disable_quant_qdq``
    is always set (DESIGN section 5).

    Args:
        model: Path of an ONNX file, or serialised bytes.
        providers: Execution providers; each must really be in use afterwards.
        optimize: ``False`` is ``ORT_DISABLE_ALL``, the slow cross-check.
        fold_constants: Folding decodes quantised weights to float once: faster runs, more memory.
        threads: Intra-op threads; 0 lets ONNX Runtime choose.
        external_data: Folder of the external data when ``model`` is bytes.

    Raises:
        MissingDependencyError: When ONNX Runtime is missing or a provider silently fell back to the CPU.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if external_data is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(external_data))
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    disabled = [] if fold_constants else ["ConstantFolding"]
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=list(providers), disabled_optimizers=disabled)
    missing = [name for name in providers if name not in session.get_providers()]
    if missing:
        raise MissingDependencyError(
            f"ONNX Runtime cannot use {missing[0]} here (it has {', '.join(session.get_providers())}); "
            "install onnxruntime-gpu with its CUDA libraries, or run on the CPU"
        )
    return session
