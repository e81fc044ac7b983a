"""Arrays of numpy, of torch and of whoever speaks DLPack, seen as one another without a copy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch.utils.dlpack import from_dlpack

from zqfp_compile.calibrate.causal_lm import InputSpec
from zqfp_compile.errors import UsageError

Array = npt.NDArray[Any]

# What numpy knows only through ml_dtypes: the same bits under the name each library has for them.
_NARROW: dict[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
}
_FROM_NUMPY = {narrow: dtype for dtype, narrow in _NARROW.items()}
_BITS = {1: torch.uint8, 2: torch.int16}


def as_torch(name: str, array: Any) -> torch.Tensor:
    """Return a tensor that shares the memory of ``array``, on the device it is on.

    Args:
        name: What it is, for the message.
        array: ``numpy.ndarray``, ``torch.Tensor``, or an object with ``__dlpack__``.

    Raises:
        UsageError: When it is none of these.
    """
    if isinstance(array, torch.Tensor):
        return array.detach()
    if isinstance(array, np.ndarray):
        return from_numpy(array)
    if hasattr(array, "__dlpack__"):
        return from_dlpack(array)
    raise UsageError(
        f"input {name!r} is a {type(array).__name__}; give a numpy array, a torch tensor or a DLPack object"
    )


def from_numpy(array: Array) -> torch.Tensor:
    """Return a tensor over the memory of ``array``; a copy when that is read-only or runs backwards."""
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    dtype = _FROM_NUMPY.get(array.dtype)
    if dtype is None:
        return torch.from_numpy(array)
    bits = np.uint8 if array.dtype.itemsize == 1 else np.int16
    return torch.from_numpy(array.view(bits)).view(dtype)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return an array over the memory of a tensor; one on another device is copied to the host."""
    tensor = tensor.detach().cpu()
    narrow = _NARROW.get(tensor.dtype)
    if narrow is None:
        return tensor.numpy()
    return tensor.view(_BITS[tensor.element_size()]).numpy().view(narrow)


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """Return torch's name of an ONNX element type."""
    return from_numpy(np.empty(0, dtype.numpy())).dtype


def check_fits(spec: InputSpec, tensor: torch.Tensor) -> None:
    """Compare a value with the input it is for.

    Raises:
        UsageError: When element type, rank or a fixed dimension differ.
    """
    wanted = torch_dtype(spec.dtype)
    fits = len(spec.dims) == tensor.ndim and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(spec.dims, tensor.shape, strict=True)
    )
    if tensor.dtype != wanted or not fits:
        dims = ", ".join("?" if dim is None else str(dim) for dim in spec.dims)
        raise UsageError(
            f"input {spec.name!r} is {_name(tensor.dtype)} {list(tensor.shape)}, "
            f"the model takes {_name(wanted)} [{dims}]"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
