"""bfloat16 graphs for ONNX Runtime's CPU provider, which has no bfloat16 kernels but can cast."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

_BF16, _F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def uses_bfloat16(model: ir.Model) -> bool:
    """Return whether any input, initializer or Cast of ``model`` is bfloat16."""
    for graph in _all_graphs(model):
        if any(value.dtype == _BF16 for value in (*graph.inputs, *graph.initializers.values())):
            return True
    return any(_casts_to_bfloat16(node) for node in _all_nodes(model))


def widen_bfloat16(model: ir.Model) -> None:
    """Make ``model`` compute in float32 wherever it says bfloat16, in place.

    Before::

        W (bfloat16 initializer) -> MatMul;    Cast(to=bfloat16);    past_key (bfloat16 input)

    After::

        W -> Cast(to=float32) -> MatMul;       Cast(to=float32);     past_key (float32 input)

    Weights stay where they are, in external data. Nothing is rounded to 8 significant bits any more, so
    values are at least as precise as before.
    """
    for node in _all_nodes(model):
        _widen_node(node)
        for output in node.outputs:
            _widen_type(output)
    for graph in list(_all_graphs(model)):
        for value in graph.inputs:
            if value.name not in graph.initializers:  # a default is stored in its type
                _widen_type(value)
        for value in list(graph.initializers.values()):
            if value.dtype == _BF16:
                _cast_initializer(graph, value)


def _cast_initializer(graph: ir.Graph, value: ir.Value) -> None:
    users = list(value.uses())
    cast = ir.node("Cast", [value], {"to": _F32})
    for user, index in users:
        user.replace_input_with(index, cast.outputs[0])
    cast.outputs[0].name = f"{value.name}.zqfp_float"
    graph.insert_before(graph[0], cast)


def _all_graphs(model: ir.Model) -> Iterable[ir.Graph]:
    """The main graph and every subgraph, those in function bodies included."""
    yield from model.graphs()
    for function in model.functions.values():
        yield from function.graph.subgraphs()


def _all_nodes(model: ir.Model) -> Iterable[ir.Node]:
    yield from list(model.graph.all_nodes())
    for function in model.functions.values():
        yield from list(function.all_nodes())


def _casts_to_bfloat16(node: ir.Node) -> bool:
    attribute = node.attributes.get("to")
    return node.op_type == "Cast" and attribute is not None and attribute.value == _BF16


def _widen_node(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
            array = attribute.value.numpy().astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))
        elif name in ("to", "dtype", "output_dtype", "stash_type") and attribute.value == _BF16:
            node.attributes[name] = ir.AttrInt64(name, int(_F32))


def _widen_type(value: ir.Value) -> None:
    if value.dtype == _BF16:
        # A new object: a cloned graph shares its type objects with the graph it came from.
        value.type = ir.TensorType(_F32)
