"""Recognises one node as a linear layer ``y = scale * x @ W^T (+ beta * C)``, or says why it is none."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import onnx_ir as ir

from passes._weight_chain import ConstantRoot, constant_tensor, find_root

# Linears in other clothes: their weights are packed or fused by a runtime, so there is nothing to read.
_QUANTISED_OPS = {
    ("", "MatMulInteger"): 1,
    ("", "QLinearMatMul"): 3,
    ("com.microsoft", "MatMulNBits"): 1,
    ("com.microsoft", "MatMulBnb4"): 1,
    ("com.microsoft", "MatMulFpQ4"): 1,
    ("com.microsoft", "MatMulBlockQuantizedFp4Weight"): 1,
    ("com.microsoft", "MatMulBlockQuantizedFp8Weight"): 1,
    ("com.microsoft", "MatMulIntegerToFloat"): 1,
    ("com.microsoft", "DynamicQuantizeMatMul"): 1,
    ("com.microsoft", "QGemm"): 3,
    ("com.microsoft", "QAttention"): 1,
    ("zqfp", "W4A8Linear"): 2,
}
_FUSED_OPS = {
    ("com.microsoft", "Attention"): 1,
    ("com.microsoft", "FusedGemm"): 1,
    ("com.microsoft", "FusedMatMul"): 1,
    ("com.microsoft", "FusedMatMulActivation"): 1,
    ("com.microsoft", "GemmFastGelu"): 1,
    ("com.microsoft", "GemmFloat8"): 1,
}


@dataclass(frozen=True)
class LinearForm:
    """A recognised linear.

    Attributes:
        root: The stored weight.
        transposed: Whether the stored tensor is [K, N].
        scale: Factor on the weight (Gemm ``alpha``).
        bias: Initializer or Constant output that is Gemm's C, broadcasting to [N], or ``None``.
        bias_scale: Gemm ``beta``.
        k: Input features.
        n: Output features.
    """

    root: ConstantRoot
    transposed: bool
    scale: float
    bias: ir.Value | None
    bias_scale: float
    k: int
    n: int


def recognise(node: ir.Node, constant: Set[ir.Value]) -> LinearForm | str | None:
    """Classify ``node``: a linear, the reason why a linear-like node is left alone, or ``None`` for the rest.

    A product of two activations is no linear. ``constant`` comes from ``constant_values``.
    """
    key = (node.domain, node.op_type)
    for table, reason in (
        (_QUANTISED_OPS, "the weight is already quantised ({op})"),
        (_FUSED_OPS, "{op} is specific to ONNX Runtime; export the model without its fusions"),
    ):
        if key in table and _operand(node, table[key]) in constant:
            return reason.format(op="::".join(filter(None, key)))
    if key not in (("", "MatMul"), ("", "Gemm")):
        return None
    left, right = _operand(node, 0), _operand(node, 1)
    if right not in constant:
        return "the constant is the left operand; only x @ W is compiled" if left in constant else None
    if left in constant:
        return "both operands are constant; fold constants before compiling"
    assert left is not None and right is not None
    root = find_root(right)
    if isinstance(root, str):
        return root
    if len(root.shape) != 2:
        return f"the weight has rank {len(root.shape)}; only matrices are compiled"
    if 0 in root.shape:
        return "the weight is empty"
    return _matmul(left, root) if node.op_type == "MatMul" else _gemm(node, root, constant)


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _matmul(x: ir.Value, root: ConstantRoot) -> LinearForm | str:
    if x.shape is not None and len(x.shape) < 2:
        return "the activation is a vector; only [..., K] of rank 2 or more is compiled"
    transposed = not root.flipped
    k, n = root.shape if transposed else root.shape[::-1]
    return LinearForm(root, transposed, 1.0, None, 1.0, k, n)


def _gemm(node: ir.Node, root: ConstantRoot, constant: Set[ir.Value]) -> LinearForm | str:
    if node.attributes.get_int("transA", 0):
        return "Gemm has transA=1; only x @ W is compiled"
    trans_b = bool(node.attributes.get_int("transB", 0))
    transposed = root.flipped == trans_b
    k, n = root.shape if transposed else root.shape[::-1]
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    c = _operand(node, 2)
    if c is None or beta == 0.0:
        return LinearForm(root, transposed, alpha, None, 1.0, k, n)
    bias = _bias(c, root.dtype, n, constant)
    if isinstance(bias, str):
        return bias
    return LinearForm(root, transposed, alpha, bias, beta, k, n)


def _bias(c: ir.Value, dtype: ir.DataType, n: int, constant: Set[ir.Value]) -> ir.Value | str:
    """The stored C, when it is one row for all tokens; else the reason."""
    if c not in constant:
        return "Gemm's C is an activation; only a constant bias is compiled"
    while (node := c.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        c = node.inputs[0]
    tensor = constant_tensor(c)
    if tensor is None or c.is_graph_input():
        return "Gemm's C is no plain initializer; fold constants before compiling"
    if tensor.dtype != dtype:
        return f"Gemm's C has type {tensor.dtype}, its weight {dtype}"
    shape = tuple(tensor.shape.numpy())
    if shape not in ((n,), (1, n), (), (1,), (1, 1)):
        return f"Gemm's C has shape {list(shape)}; only a bias [N] is compiled"
    return c
