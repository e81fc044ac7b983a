"""QuantizeLinear and DequantizeLinear: integers and FP8; per tensor, per axis, in blocks."""

from __future__ import annotations

import onnx_ir as ir
import torch

from zqfp_compile.torch_graph.call import Call, Function
from zqfp_compile.torch_graph.dtypes import FP8_MAX, convert, torch_type

Tensor = torch.Tensor
_INTEGERS = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
}


def _aligned(call: Call, factor: Tensor, x: Tensor) -> Tensor:
    """Return a scale or zero point so that it broadcasts to x."""
    if factor.ndim == 0 or factor.numel() == 1:
        return factor.reshape(())
    axis = call.get("axis", 1) % x.ndim
    if factor.ndim == 1 and not call.get("block_size", 0):
        return factor.reshape([-1 if index == axis else 1 for index in range(x.ndim)])
    if factor.ndim != x.ndim:
        raise call.unsupported(f"a scale of rank {factor.ndim} for a tensor of rank {x.ndim}")
    block = call.get("block_size", 0) or -(-x.shape[axis] // factor.shape[axis])
    return factor.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


def _quantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    target = _target(call, zero_point)
    dtype = torch_type(target)
    scaled = x.to(torch.float32) / _aligned(call, scale, x)
    if dtype in FP8_MAX:
        return convert(scaled, dtype, bool(call.get("saturate", 1)))
    if target not in _INTEGERS:
        raise call.unsupported(f"output type {target.name}")
    rounded = torch.round(scaled)
    if zero_point is not None:
        rounded = rounded + _aligned(call, zero_point.to(torch.float32), x)
    return rounded.clamp(*_INTEGERS[target]).to(dtype)


def _target(call: Call, zero_point: Tensor | None) -> ir.DataType:
    """Return the type to quantise to: the attribute, the zero point's, or uint8."""
    if call.get("output_dtype", 0):
        return ir.DataType(call.get("output_dtype"))
    if zero_point is None:
        return ir.DataType.UINT8
    declared = call.input_types[2]
    if declared is not None:
        return declared
    for dtype in (*_INTEGERS, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2):
        if dtype.bitwidth >= 8 and torch_type(dtype) == zero_point.dtype:
            return dtype
    raise call.unsupported("a zero point of unknown type")


def _dequantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    values = x.to(torch.float32)
    if zero_point is not None:
        values = values - _aligned(call, zero_point.to(torch.float32), x)
    return values * _aligned(call, scale, x)


OPS: dict[str, Function] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
