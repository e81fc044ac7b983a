"""Follows a MatMul or Gemm operand back to the constant it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Their result differs from run to run, so they are no constants although they have no inputs.
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"})


@dataclass(frozen=True)
class ConstantRoot:
    """A float operand that is an initializer (or Constant) seen through Identity, Cast and Transpose.

    Attributes:
        value: Initializer, or output of a Constant node.
        shape: Shape of the stored tensor.
        flipped: Whether an odd number of matrix transposes lies between it and the operand.
        casts: float16 and bfloat16 roundings on the way, in order.
        dtype: Element type of the operand.
    """

    value: ir.Value
    shape: tuple[int, ...]
    flipped: bool
    casts: tuple[ir.DataType, ...]
    dtype: ir.DataType


def constant_values(graph: ir.Graph) -> set[ir.Value]:
    """Values, in ``graph`` and its subgraphs, that no graph input can change.

    Initializers that are graph inputs as well count as constant: the caller declines them with a reason.
    """
    constant: set[ir.Value] = set()
    for inner in (graph, *graph.subgraphs()):
        constant.update(inner.initializers.values())
    for node in ir.traversal.RecursiveGraphIterator(graph):
        inputs = [value for value in node.inputs if value is not None]
        has_subgraph = any(subgraphs_of(attr) for attr in node.attributes.values())
        if not has_subgraph and node.op_type not in _RANDOM and constant.issuperset(inputs):
            constant.update(node.outputs)
    return constant


def subgraphs_of(attr: ir.Attr) -> tuple[ir.Graph, ...]:
    """The graphs that one attribute of a control-flow node holds."""
    if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
        return (attr.as_graph(),)
    return tuple(attr.as_graphs()) if attr.type == ir.AttributeType.GRAPHS and not attr.is_ref() else ()


def find_root(operand: ir.Value) -> ConstantRoot | str:
    """Follow a constant ``operand`` to its tensor; a string is the reason why it is no plain weight."""
    transposes = 0
    casts: list[ir.DataType] = []
    value = operand
    while (node := value.producer()) is not None and node.op_type != "Constant":
        following = _step(node)
        if isinstance(following, str):
            return following
        if node.op_type == "Cast":
            casts.insert(0, ir.DataType(node.attributes["to"].as_int()))
        transposes += node.op_type == "Transpose" and not _keeps_order(node)
        value = following
    return _root(value, transposes % 2 == 1, casts)


def _step(node: ir.Node) -> ir.Value | str:
    """The input of a node that only passes a weight on, or the reason why ``node`` does more."""
    op = node.op_type
    if op == "DequantizeLinear":
        return "the weight is already quantised"
    if node.domain != "" or op not in ("Identity", "Cast", "Transpose"):
        return f"the weight is computed in the graph (by {op} {node.name!r}); fold constants before compiling"
    value = node.inputs[0]
    if value is None:
        return f"the weight's {op} {node.name!r} has no input"
    return value


def _keeps_order(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return perm is not None and list(perm.as_ints()) == sorted(perm.as_ints())


def _root(value: ir.Value, flipped: bool, casts: list[ir.DataType]) -> ConstantRoot | str:
    tensor = constant_tensor(value)
    if tensor is None:
        return "the weight has no tensor in the model"
    if value.is_graph_input():
        return (
            "the weight is also a graph input, which a caller may override; export it as a plain initializer"
        )
    for dtype in (tensor.dtype, *casts):
        if dtype.bitwidth <= 8 and dtype.is_floating_point():
            return f"the weight is already quantised ({dtype})"
        if dtype not in FLOATS:
            return f"the weight has type {dtype}; only FLOAT, FLOAT16 and BFLOAT16 are compiled"
    roundings: list[ir.DataType] = []
    current = tensor.dtype
    for dtype in casts:
        if dtype not in (current, ir.DataType.FLOAT):
            roundings.append(dtype)
        current = dtype
    shape = tuple(tensor.shape.numpy())
    return ConstantRoot(value, shape, flipped, tuple(roundings), current)


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output."""
    node = value.producer()
    if node is None:
        return value.const_value
    attribute = node.attributes.get("value")
    return attribute.as_tensor() if node.op_type == "Constant" and attribute is not None else None


def lift_constant(graph: ir.Graph, value: ir.Value) -> bool:
    """Turn a Constant node of ``graph`` into an initializer of the same name; False when it was one."""
    node = value.producer()
    tensor = constant_tensor(value)
    if node is None or node.graph is None or tensor is None:  # graph is None: another layer lifted it
        return False
    lifted = ir.val(str(value.name), const_value=tensor)
    value.replace_all_uses_with(lifted, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    graph.register_initializer(lifted)
    return True
