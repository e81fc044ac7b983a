"""Initializers for quantised tensors, none of which is loaded before the model is written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from passes._emit import Names, initializer_value
from passes._w4a8_function import CODES, GROUP_SCALES, LORC_V, LORC_V_SCALE, ROW_SCALES
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan
from zqfp_compile.weights import release


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


def decoded_weight(plan: QuantPlan, site: LinearSite, tensors: LinearTensors) -> ir.TensorProtocol:
    """Return the decoded weight [N, K] without row scales, computed each time it is read and never kept.

    FLOAT8E4M3FN, w8 of DESIGN section 2; FLOAT under the constraint ``none``, whose row scales are 1.
    """
    if plan.precision(site).weight_format == "fp8":
        return tensors.codes
    rounded = plan.scale_constraint != "none"
    dtype = ir.DataType.FLOAT8E4M3FN if rounded else ir.DataType.FLOAT

    def compute() -> ir.TensorProtocol:
        values = plan.quantized_weight(site, tensors).fp8_weight()
        release(tensors.codes, tensors.group_scales, tensors.row_scales)
        return ir.tensor(E4M3FN.encode(values) if rounded else np.ascontiguousarray(values), dtype=dtype)

    return ir.LazyTensor(compute, dtype, ir.Shape([site.n, site.k]))


def decoded_factor(node: ir.Node, index: int, dtype: ir.DataType) -> ir.TensorProtocol:
    """Return an FP8 LoRC factor of ``node`` times its scales, in ``dtype``, computed each time it is read.

    The same two roundings as in the function body: the product in float32, then to ``dtype``.

    Args:
        node: A ``W4A8Linear`` with factors in FP8.
        index: ``LORC_V`` or ``LORC_U``.
        dtype: Type of y.

    Raises:
        PassError: When the factor or its scale is not an initializer.
    """
    stored, scale = (
        None if value is None else value.const_value
        for value in (node.inputs[index], node.inputs[index + LORC_V_SCALE - LORC_V])
    )
    if stored is None or scale is None:
        raise PassError(f"layer {node.name!r}: its LoRC factors are no initializers; lower the artifact")
    shape = (1, -1) if index == LORC_V else (-1, 1)

    def compute() -> ir.TensorProtocol:
        values = stored.numpy().astype(np.float32) * scale.numpy().reshape(shape)
        release(stored, scale)
        return ir.tensor(values.astype(dtype.numpy()), dtype=dtype)

    return ir.LazyTensor(compute, dtype, ir.Shape(stored.shape.numpy()))


def fp4_weight(tensors: LinearTensors) -> ir.TensorProtocol:
    """Return E2M1 codes in their standard type, FLOAT4E2M1 [N, Kp], lazily: sign in bit 3, index below."""

    def compute() -> ir.TensorProtocol:
        index = tensors.codes.numpy().astype(np.int8)
        release(tensors.codes, tensors.group_scales, tensors.row_scales)
        bits = (np.abs(index) | np.where(index < 0, 8, 0)).astype(np.uint8)
        return ir.tensor(bits.view(ml_dtypes.float4_e2m1fn), dtype=ir.DataType.FLOAT4E2M1)

    return ir.LazyTensor(compute, ir.DataType.FLOAT4E2M1, ir.Shape(tensors.codes.shape.numpy()))
