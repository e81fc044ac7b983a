"""What the weight lowerings share: a ``W4A8Linear`` becomes standard nodes around a weight of their own."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from passes._emit import Emitter, Names, insert_after, replace_node
from passes._sites import w4a8_nodes
from passes._w4a8_function import BIAS, LORC_V, X8, A, Variant, emit_activation, emit_output
from zqfp_compile.pass_base import PassResult
from zqfp_compile.plan import QuantPlan

WeightEmitter = Callable[[Emitter, Variant, ir.Node, int], ir.Value]


def lower_linears(model: ir.Model, plan: QuantPlan, emit_weight: WeightEmitter) -> PassResult:
    """Replace every ``W4A8Linear`` by standard nodes ``<layer>/...``, its main product ``<layer>/MatMul``.

    Args:
        model: Changed in place. The functions and packed initializers it no longer uses stay in it.
        plan: The plan the nodes were made from.
        emit_weight: Called with (emitter, variant, node, K); emits the decoded weight FLOAT [N, K].

    Raises:
        PassError: When a ``W4A8Linear`` is not in the plan.
    """
    names = Names(model.graph)
    activations: dict[ir.Value, ir.Value] = {}
    modified = False
    for site, node in w4a8_nodes(model, plan):
        variant = Variant.of(
            plan, site, bias=node.inputs[BIAS] is not None, lorc=node.inputs[LORC_V] is not None
        )
        x = _activation(model.graph, names, activations, variant, node)
        emit = Emitter(model.graph, names, f"{site.name}/", node.metadata_props)
        w_hat = emit_weight(emit, variant, node, site.k)
        y = emit_output(emit, variant, x, w_hat, list(node.inputs))
        replace_node(model.graph, node, emit.nodes, y)
        modified = True
    return PassResult(model, modified)


def _activation(
    graph: ir.Graph, names: Names, known: dict[ir.Value, ir.Value], variant: Variant, node: ir.Node
) -> ir.Value:
    """Return the dequantised x8: one DequantizeLinear per x8, behind its producer, whoever consumes it."""
    x8 = node.inputs[X8]
    assert x8 is not None
    if variant.activation_format == "none":
        return x8
    if x8 not in known:
        emit = Emitter(graph, names, f"{x8.name}.")
        known[x8] = emit_activation(emit, variant, x8, node.inputs[A])
        insert_after(graph, x8, emit.nodes)
    return known[x8]
