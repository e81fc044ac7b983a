"""Initializers for quantised tensors, none of which is loaded before the model is written."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import onnx_ir as ir

from passes._emit import Names, initializer_value
from passes._w4a8_function import CODES, GROUP_SCALES, ROW_SCALES
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import LinearTensors, QuantPlan


class TensorSharer:
    """Registers tensors as initializers, the same tensor once.

    The quantize step hands out one tensor object for layers that share a weight, so the graph holds it once.
    """

    def __init__(self, graph: ir.Graph, names: Names) -> None:
        self._graph = graph
        self._names = names
        self._known = {
            id(value.const_value): value
            for value in graph.initializers.values()
            if value.const_value is not None
        }

    def value(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the initializer that holds ``tensor``; a new one is called ``name``, made unique."""
        if id(tensor) not in self._known:
            value = initializer_value(self._names.value(name), tensor)
            self._graph.register_initializer(value)
            self._known[id(tensor)] = value
        return self._known[id(tensor)]


def w4a8_tensors(node: ir.Node) -> LinearTensors:
    """Return the weight tensors of a ``W4A8Linear``, unloaded.

    Raises:
        PassError: When one of them is not an initializer.
    """
    codes, scales, rows = (
        None if value is None else value.const_value
        for value in (node.inputs[CODES], node.inputs[GROUP_SCALES], node.inputs[ROW_SCALES])
    )
    if codes is None or rows is None:
        raise PassError(f"layer {node.name!r}: its packed weight is no initializer; lower the artifact")
    return LinearTensors(codes, scales, rows)


def decoded_weight(plan: QuantPlan, tensors: LinearTensors, k: int) -> ir.TensorProtocol:
    """Return the decoded weight [N, K] without row scales, computed each time it is read and never kept.

    FLOAT8E4M3FN, w8 of DESIGN section 2; FLOAT under the constraint ``none``, whose row scales are 1.
    """
    if plan.weight_format == "fp8":
        return tensors.codes
    rounded = plan.scale_constraint != "none"
    dtype = ir.DataType.FLOAT8E4M3FN if rounded else ir.DataType.FLOAT

    def compute() -> ir.TensorProtocol:
        values = _quantized(plan, tensors, k).fp8_weight()
        _release(tensors)
        return ir.tensor(E4M3FN.encode(values) if rounded else np.ascontiguousarray(values), dtype=dtype)

    return ir.LazyTensor(compute, dtype, ir.Shape([tensors.row_scales.size, k]))


def _quantized(plan: QuantPlan, tensors: LinearTensors, k: int) -> QuantizedWeight:
    assert tensors.group_scales is not None
    return QuantizedWeight(
        codes=tensors.codes.numpy().astype(np.int8),
        group_scales=tensors.group_scales.numpy().astype(np.float32),
        row_scales=tensors.row_scales.numpy(),
        k=k,
        weight_format=plan.weight_format,
        group_size=plan.group_size,
        scale_constraint=plan.scale_constraint,
    )


def _release(tensors: LinearTensors) -> None:
    """Drop what reading has mapped and unpacked, which onnx-ir would keep for every layer."""
    for tensor in (tensors.codes, tensors.group_scales, tensors.row_scales):
        if isinstance(tensor, ir.ExternalTensor):
            with contextlib.suppress(BufferError):  # somebody else still looks at it
                tensor.release()


def fp4_weight(tensors: LinearTensors) -> ir.TensorProtocol:
    """Return E2M1 codes in their standard type, FLOAT4E2M1 [N, Kp], lazily: sign in bit 3, index below."""

    def compute() -> ir.TensorProtocol:
        index = tensors.codes.numpy().astype(np.int8)
        _release(tensors)
        bits = (np.abs(index) | np.where(index < 0, 8, 0)).astype(np.uint8)
        return ir.tensor(bits.view(ml_dtypes.float4_e2m1fn), dtype=ir.DataType.FLOAT4E2M1)

    return ir.LazyTensor(compute, ir.DataType.FLOAT4E2M1, ir.Shape(tensors.codes.shape.numpy()))
