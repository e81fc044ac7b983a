"""What the weight lowerings share: a ``W4A8Linear`` becomes standard nodes around a weight of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from passes._emit import Emitter, Names, initializer_value, insert_after, replace_node
from passes._sites import w4a8_nodes
from passes._tensors import decoded_factor
from passes._w4a8_function import INPUTS, LORC_U, LORC_V, X8, A, Variant, emit_activation, emit_output
from zqfp_compile.pass_base import PassResult
from zqfp_compile.plan import LinearSite, QuantPlan

WeightEmitter = Callable[[Emitter, Variant, LinearSite, ir.Node], ir.Value]


def lower_linears(model: ir.Model, plan: QuantPlan, emit_weight: WeightEmitter) -> PassResult:
    """Replace every ``W4A8Linear`` by standard nodes ``<layer>/...``, its main product ``<layer>/MatMul``.

    Args:
        model: Changed in place. The functions and packed initializers it no longer uses stay in it.
        plan: The plan the nodes were made from.
        emit_weight: Called with (emitter, variant, site, node); emits the decoded weight FLOAT [N, K].

    Raises:
        PassError: When a ``W4A8Linear`` is not in the plan.
    """
    names = Names(model.graph)
    activations: dict[ir.Value, ir.Value] = {}
    factors: dict[tuple[ir.Value | None, ir.DataType], ir.Value] = {}
    modified = False
    for site, node in w4a8_nodes(model, plan):
        variant = Variant.of_node(plan, site, node)
        x = _activation(model.graph, names, activations, variant, node)
        emit = Emitter(model.graph, names, f"{site.name}/", node.metadata_props)
        w_hat = emit_weight(emit, variant, site, node)
        inputs = list(node.inputs)
        if variant.lorc == "lorc8":
            _decode_factors(model.graph, emit, factors, node, inputs, variant.dtype)
            variant = dataclasses.replace(variant, lorc="lorc")
        y = emit_output(emit, variant, x, w_hat, inputs)
        product = next(made for made in emit.nodes if made.op_type == "MatMul")
        names.claim_node(product, f"{site.name}/MatMul")  # the plan lint looks for it
        replace_node(model.graph, node, emit.nodes, y)
        modified = True
    return PassResult(model, modified)


def _decode_factors(
    graph: ir.Graph,
    emit: Emitter,
    known: dict[tuple[ir.Value | None, ir.DataType], ir.Value],
    node: ir.Node,
    inputs: list[ir.Value | None],
    dtype: ir.DataType,
) -> None:
    """Put initializers of y's type in the place of FP8 LoRC factors; layers that share those share these.

    TensorRT-RTX takes FP8 factors, but decodes them at every step and no longer merges the small products of
    layers with one input (measured: q and v in one half GEMM become two fused decode kernels).
    """
    for index in (LORC_V, LORC_U):
        key = (node.inputs[index], dtype)
        if key not in known:
            name = emit.value_name(INPUTS[index])
            known[key] = initializer_value(name, decoded_factor(node, index, dtype))
            graph.register_initializer(known[key])
        inputs[index] = known[key]


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
