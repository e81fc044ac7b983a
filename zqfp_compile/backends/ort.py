"""ONNX Runtime sessions with the one preset that runs FP8 Q/DQ correctly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.errors import MissingDependencyError

# Above this, weights stay in their file: decoded or widened to float32 they would take 2 to 8 GiB.
LOW_MEMORY_BYTES = 1 << 30

# Both decode or widen every weight once, when the session opens.
_FOLDING = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")


def is_large(model: ir.Model) -> bool:
    """Return whether a model's weights are so many that a session should be opened with ``low_memory``."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) > LOW_MEMORY_BYTES


# ONNX Runtime's name of an FP8 tensor -> the type; in numpy it knows the bytes only.
_FP8_TYPES = {
    "tensor(float8e4m3fn)": ir.DataType.FLOAT8E4M3FN,
    "tensor(float8e5m2)": ir.DataType.FLOAT8E5M2,
}
_FP8_ARRAYS = {dtype.numpy(): dtype for dtype in _FP8_TYPES.values()}


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
    arena: bool = True,
    low_memory: bool = False,
    threads: int = 0,
    spin: bool = True,
    external_data: str | Path | None = None,
    custom_ops: Path | None = None,
    tf32: bool = True,
) -> Any:
    """Open an ``onnxruntime.InferenceSession``.

    The default optimiser breaks FP8 Q/DQ graphs (silently wrong fp16 bias), so ``session.disable_quant_qdq``
    is always set (DESIGN section 5).

    Args:
        model: Path of an ONNX file, or serialised bytes.
        providers: Execution providers; each must really be in use afterwards.
        optimize: ``False`` is ``ORT_DISABLE_ALL``, the slow cross-check.
        fold_constants: Folding decodes quantised weights to float once: faster runs, more memory.
        arena: Keep the memory of one run for the next. Without it two SmolLM2 sessions side by side peak at
            2.4 GiB instead of 2.9, in the same time.
        low_memory: Leave external weights mapped from their file and widen or decode one at a time, at every
            run. Measured on 1.0e9 fp16 weights, two cores: 0.6 GiB instead of 4.6, opened in 0.1 s instead of
            20; a run of 512 tokens takes 1.5 times as long, short ones several times.
        threads: Intra-op threads; 0 lets ONNX Runtime choose.
        spin: Let threads that wait for each other use up their cores meanwhile. Calibrating 1.2e8 weights on
            two cores at a load of 7 took 47 s with it and 15.6 of processor time, 17 and 11.0 without.
        external_data: Folder of the external data when ``model`` is bytes.
        custom_ops: Custom-op library the model needs (``host_libraries.host_library``).
        tf32: Let a GPU round the operands of float32 products to 10 bits, as ONNX Runtime does by default.

    Raises:
        MissingDependencyError: When ONNX Runtime is missing or a provider silently fell back to the CPU.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its exceptions say the same as its log of errors
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Between runs the cores belong to torch and numpy.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if external_data is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(external_data))
    if custom_ops is not None:
        options.register_custom_ops_library(str(custom_ops))
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = arena
    disabled = [] if fold_constants else ["ConstantFolding"]
    if low_memory:
        _save_memory(ort, options)
        disabled = list(_FOLDING)
    source = model if isinstance(model, bytes) else str(model)
    with_options = [(name, {} if tf32 or "CUDA" not in name else {"use_tf32": "0"}) for name in providers]
    session = ort.InferenceSession(source, options, providers=with_options, disabled_optimizers=disabled)
    missing = [name for name in providers if name not in session.get_providers()]
    if missing:
        raise MissingDependencyError(
            f"ONNX Runtime cannot use {missing[0]} here (it has {', '.join(session.get_providers())}); "
            "install onnxruntime-gpu with its CUDA libraries, or run on the CPU"
        )
    return session


def check_memory(error: Exception) -> None:
    """Check that what ONNX Runtime raised is not about memory.

    Raises:
        MissingDependencyError: When it is.
    """
    if any(sign in str(error) for sign in ("bad_alloc", "Failed to allocate memory")):
        reason = " ".join(str(error).split())[:200]
        raise MissingDependencyError(
            f"memory ran out in ONNX Runtime ({reason}); close other programs, or lower --calibration-length "
            "or --eval-length"
        ) from error


def run_session(
    session: Any, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """Run a session whose inputs and outputs may be FP8 (a quantised KV cache).

    Args:
        session: An ``onnxruntime.InferenceSession``.
        names: Outputs to return; ``None`` is all of them.
        feed: Arrays by input name, FP8 ones of ``ml_dtypes``' types.

    Returns:
        The outputs, FP8 ones of ``ml_dtypes``' types.
    """
    outputs = session.run(names, {name: _to_runtime(array) for name, array in feed.items()})
    narrow = {arg.name: _FP8_TYPES[arg.type] for arg in session.get_outputs() if arg.type in _FP8_TYPES}
    if not narrow:
        return list(outputs)
    wanted = names or [arg.name for arg in session.get_outputs()]
    return [
        array.view(narrow[name].numpy()) if name in narrow else array
        for name, array in zip(wanted, outputs, strict=True)
    ]


def _to_runtime(array: npt.NDArray[Any]) -> Any:
    dtype = _FP8_ARRAYS.get(array.dtype)
    if dtype is None:
        return array
    content = np.ascontiguousarray(array).view(np.uint8)
    return import_onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(content, int(dtype))


def _save_memory(ort: Any, options: Any) -> None:
    """Keep no second form of a weight beyond the node that needs it."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    # The default order runs the casts of all weights first; this one runs each before its consumer.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # Both would keep a float32 weight's place between runs.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
