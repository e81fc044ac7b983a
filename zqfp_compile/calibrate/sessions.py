"""In-memory models in ONNX Runtime, for calibration: beside their external data, errors in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch.utils.dlpack import from_dlpack

from zqfp_compile.backends.ort import check_memory, create_session, import_onnxruntime, is_large
from zqfp_compile.errors import ModelError
from zqfp_compile.memory import return_large_blocks
from zqfp_compile.model_io import data_folder

Array = npt.NDArray[Any]

_BF16 = ir.DataType.BFLOAT16.numpy()
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")


def open_model(
    model: ir.Model, providers: Sequence[str] = ("CPUExecutionProvider",), *, arena: bool = True
) -> Any:
    """Open the in-memory model beside its external data; ``arena`` as for :func:`create_session`.

    Raises:
        ModelError: When its weights lie in several folders, or ONNX Runtime cannot open it.
    """
    folder = data_folder(model)
    content = ir.to_proto(model).SerializeToString()
    large = is_large(model)
    if large:
        return_large_blocks()
    try:
        return create_session(
            content,
            providers=providers,
            arena=arena,
            spin=False,
            external_data=folder,
            low_memory=large,
        )
    except Exception as error:
        raise _ort_error("open", error) from error


def run_session(session: Any, feed: Mapping[str, Array]) -> list[Array]:
    """Return all outputs; bfloat16 inputs are fed as float32 (``calibrate/widen.py``).

    Raises:
        ModelError: When ONNX Runtime fails.
    """
    try:
        outputs: list[Array] = session.run(None, {name: widened(value) for name, value in feed.items()})
    except Exception as error:
        raise _ort_error("run", error) from error
    return outputs


def run_bound(session: Any, feed: Mapping[str, torch.Tensor], device: str) -> list[torch.Tensor]:
    """Run with tensors where they are: nothing is copied between ``device`` and the host but shapes.

    Args:
        session: A session whose first provider computes on ``device``.
        feed: Inputs, on ``device`` or the host.
        device: Where floating-point outputs stay; the others (shapes, masks) come to the host.

    Raises:
        ModelError: When ONNX Runtime fails.
    """
    ort = import_onnxruntime()
    binding = session.io_binding()
    for name, tensor in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.from_dlpack(tensor.contiguous()))
    for output in session.get_outputs():
        binding.bind_output(output.name, device if output.type in _FLOATS else "cpu")
    if device == "cuda":
        torch.cuda.synchronize()  # ONNX Runtime has a stream of its own
    try:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
    except Exception as error:
        raise _ort_error("run", error) from error
    # A copy: memory that the session lent would keep its whole arena alive.
    return [from_dlpack(value).clone() for value in binding.get_outputs()]


def widened(array: Array) -> Array:
    """Return a bfloat16 array as float32, any other as it is."""
    return array.astype(np.float32) if array.dtype == _BF16 else array


def _ort_error(action: str, error: Exception) -> Exception:
    """Turn ONNX Runtime's exceptions into one line; let everything else through."""
    if not type(error).__module__.startswith("onnxruntime"):
        return error
    check_memory(error)
    reason = " ".join(str(error).split())
    return ModelError(
        f"calibration: ONNX Runtime cannot {action} the model ({reason}); check it with onnx.checker"
    )
