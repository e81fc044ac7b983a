"""All operators, by ``op_type`` or, outside of ONNX's own domain, ``domain::op_type``."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from zqfp_compile.errors import ModelError
from zqfp_compile.torch_graph import ops_math, ops_nn, ops_quant, ops_shape
from zqfp_compile.torch_graph.call import Function

OPS: dict[str, Function] = {**ops_math.OPS, **ops_nn.OPS, **ops_quant.OPS, **ops_shape.OPS}

# Inputs that say what to do, not what with: sizes, axes, indices of slices. They are read on the host.
HOST_INPUTS: dict[str, frozenset[int]] = {
    "ConstantOfShape": frozenset({0}),
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "Reshape": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "TopK": frozenset({1}),
    "Trilu": frozenset({1}),
    "Unsqueeze": frozenset({1}),
    "ScaledAttention": frozenset({4}),
    **{
        f"Reduce{name}": frozenset({1})
        for name in ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
}
# torch takes a host scalar beside tensors of the GPU in these; Gather takes it as the index.
HOST_SCALARS = frozenset(
    {"Add", "Div", "Equal", "Gather", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mul", "Pow", "Sub"}
)
# These multiply matrices.
PRODUCTS = frozenset({"Attention", "Einsum", "Gemm", "MatMul", "zqfp.torch::ScaledAttention"})
# The shape of what these return depends on the numbers they are given.
DATA_DEPENDENT = frozenset({"NonZero"})


def operator(node: ir.Node) -> Function:
    """Return the function that computes ``node``.

    Raises:
        ModelError: When there is none.
    """
    found = OPS.get(_key(node))
    if found is None:
        raise ModelError(
            f"node {node.name!r}: operator {_key(node)} is not supported in torch; "
            "export without it, or calibrate with ONNX Runtime (--device cpu)"
        )
    return found


def unsupported(model: ir.Model, nodes: Iterable[ir.Node]) -> list[str]:
    """Return the operators among ``nodes``, and in the functions of ``model`` they call, that torch lacks."""
    return sorted(_operators(model, nodes) - OPS.keys())


def multiplies(model: ir.Model, nodes: Iterable[ir.Node]) -> bool:
    """Return whether there are products of matrices among ``nodes``, or in the functions they call."""
    return not PRODUCTS.isdisjoint(_operators(model, nodes))


def _operators(model: ir.Model, nodes: Iterable[ir.Node]) -> set[str]:
    found, seen, rest = set(), set(), list(nodes)
    while rest:
        node = rest.pop()
        identifier = node.op_identifier()
        if identifier in seen:
            continue
        seen.add(identifier)
        if identifier in model.functions:
            rest.extend(model.functions[identifier])
        else:
            found.add(_key(node))
    return found


def _key(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
