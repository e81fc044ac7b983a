"""ONNX element types in torch."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.errors import ModelError
from zqfp_compile.quantize.copies import to_device
from zqfp_compile.weights import release

# Half types are computed in float32. Integers that torch lacks get a type that holds their values; 4-bit
# integers take a byte each.
_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float32,
    ir.DataType.BFLOAT16: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT4: torch.int8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.UINT16: torch.int32,
    ir.DataType.INT32: torch.int32,
    ir.DataType.UINT32: torch.int64,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT64: torch.int64,
}
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# Types that numpy has no number for: same bytes, and the torch type that reads them.
_BYTES = {
    ir.DataType.BFLOAT16.numpy(): (np.int16, torch.bfloat16),
    ir.DataType.FLOAT8E4M3FN.numpy(): (np.uint8, torch.float8_e4m3fn),
    ir.DataType.FLOAT8E5M2.numpy(): (np.uint8, torch.float8_e5m2),
}
_HALF = (torch.float16, torch.bfloat16)
# Whoever releases a tensor closes the mapping that others may be about to read.
_reading = threading.Lock()


def torch_type(dtype: ir.DataType | int) -> torch.dtype:
    """Return the type in which values of an ONNX type are held.

    Raises:
        ModelError: For strings, complex numbers and the like.
    """
    found = _TORCH.get(ir.DataType(dtype))
    if found is None:
        raise ModelError(
            f"values of type {ir.DataType(dtype).name} are not supported in torch; export without"
        )
    return found


def from_array(array: npt.NDArray[np.generic], device: str = "cpu") -> torch.Tensor:
    """Return a tensor on ``device`` that shares no memory with ``array``; half types become float32."""
    on_gpu = torch.device(device).type == "cuda"
    own = (
        array if on_gpu and array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")
    )
    if array.dtype in _BYTES:
        plain, dtype = _BYTES[array.dtype]
        return computed(to_device(torch.from_numpy(own.view(plain)).view(dtype), device))
    return computed(to_device(torch.from_numpy(own), device))


def from_onnx(tensor: ir.TensorProtocol, device: str = "cpu") -> torch.Tensor:
    """Load a weight or a constant to ``device``; its file is closed again.

    Raises:
        ModelError: When its type has no form in torch.
    """
    if tensor.dtype == ir.DataType.FLOAT4E2M1:
        return from_array(tensor.numpy().astype(np.float32), device)
    dtype = torch_type(tensor.dtype)
    with _reading:
        array = tensor.numpy()
        if array.dtype in _BYTES or array.dtype == np.float16:
            loaded = from_array(array, device)
        else:
            loaded = from_array(array.astype(_numpy_type(dtype), copy=False), device)
        del array
        release(tensor)
    return loaded


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of half precision as float32, any other as it is."""
    return tensor.to(torch.float32) if tensor.dtype in _HALF else tensor


def on_host(tensor: torch.Tensor) -> bool:
    """Return whether the numbers can be read without waiting for a GPU."""
    return tensor.device.type == "cpu"


def convert(x: torch.Tensor, dtype: torch.dtype, saturate: bool = True) -> torch.Tensor:
    """ONNX Cast: towards zero to integers, to the nearest FP8 number, saturating unless told otherwise."""
    if dtype in FP8_MAX:
        x = computed(x).to(torch.float32)
        return (x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]) if saturate else x).to(dtype)
    return x.to(dtype)


def _numpy_type(dtype: torch.dtype) -> npt.DTypeLike:
    found: npt.DTypeLike = torch.empty(0, dtype=dtype).numpy().dtype
    return found
