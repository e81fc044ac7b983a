"""Pass ``lower-weights-plugin``: linears become ops of our kernel's hosts, weights in the kernel's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._emit import Emitter, Names, insert_after, replace_node, replace_nodes
from passes._lowering import lower_linears
from passes._packed_tensors import PackedTensors
from passes._plugin_ops import (
    LARGEST_RANK,
    LINEAR,
    QUANTIZE_STATIC,
    QUANTIZE_TOKENS,
    Linears,
    Product,
    activation_source,
    linear_attributes,
    plugin_node,
    products,
    refusal,
)
from passes._sites import is_w4a8, w4a8_nodes
from passes._w4a8_function import X8, A
from passes.lower_weights_fp8 import DecodedWeights
from zqfp_compile.pass_base import Declined, Pass, PassError, PassResult
from zqfp_compile.plan import QuantPlan


@dataclass(frozen=True)
class LowerWeightsPlugin(Pass):
    """Turn every ``W4A8Linear`` the kernel takes into ops of its hosts, the others into standard nodes.

    Before, static scale::

        x -> [Cast] -> QuantizeLinear(a) -> x8 -> W4A8Linear(x8, a, codes, group_scales, row_scales,
                                                             bias, x, V, U) -> y

    After, codes and group scales in the kernel's own order (INT4 and FLOAT8E4M3FN, one dimension)::

        x -> QuantizeActivation(a, V) -> x8, xv
        PackedW4A8Linear(x8, a, codes, group_scales, row_scales, bias, xv, U) -> y

    After, per token::

        x -> QuantizeTokens(V) -> x8, a, xv

    All linears of one x8 share the quantiser, and up to four of one type become one product with an output
    each, their rows below each other (q/k/v, gate/up)::

        PackedW4A8Linear(x8, a, codes, group_scales, row_scales, bias, xv, U) -> q, k, v

    so that few tokens cost one launch that fills the GPU, and no Split copies outputs. Every number is that
    of the layers apart. Missing biases are zeros, U is block-diagonal. N must be a multiple of 64 in all but
    one of them, and the ranks 64 in all at most (``_plugin_ops.products``).

    Before, gate and up of one x8, operands in any order, also ``QuickGelu`` (com.microsoft) and ``Swish``
    with alpha 1::

        W4A8Linear(x8, ...) -> gate -> Sigmoid -> Mul(gate) -> Mul(up) -> h
        W4A8Linear(x8, ...) -> up

    After, N the rows of both, eight of gate and eight of up in turns, h [..., N / 2]::

        PackedW4A8Linear(x8, a, codes, group_scales, row_scales, bias, xv, U; gated=1) -> h

    which is half the bytes to write and to read again. gate and up are rounded to their type as before, h
    once, from float32: it differs from that of the nodes by their roundings. N need not be a multiple of 64,
    and h may be read by anything and be an output of the graph. Not gated are gate and up of which one, or a
    value between them and h, is an output of the graph or has another reader, a ``Shape`` node included; of
    which one alone has LoRC, or the ranks exceed 64 in all; of which the kernel does not take one; whose
    product is in a branch of an If. They stay apart then, or become one product with two outputs.

    V of several layers is their factors side by side, and a Split hands each product its xv. The quantiser
    takes rank 64; products beyond that get ``MatMul(x, V)`` instead. Ranks are padded with zeros to multiples
    of 8. x8 is bit for bit that of the standard nodes.

    Not for layers whose weights, activations, scales or sizes the kernel does not have; the reason is
    reported and they are lowered as ``lower-weights-fp8`` does. No weight is loaded before the model is
    written.

    Attributes:
        plan: The plan the nodes were made from.
        only_half: Whether layers of type FLOAT are declined as well: the kernel of the GPU writes FLOAT16 and
            BFLOAT16; the one of ONNX Runtime's CPU provider writes any type.
    """

    name: ClassVar[str] = "lower-weights-plugin"
    plan: QuantPlan
    only_half: bool = False

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a ``W4A8Linear`` is not in the plan.
        """
        groups: dict[ir.Value, Linears] = {}
        declined = []
        for site, node in w4a8_nodes(model, self.plan):
            reason, x8 = refusal(self.plan, site, node, self.only_half), node.inputs[X8]
            if reason is not None or x8 is None:
                declined.append(Declined(site.name, f"{reason}; its weights are decoded to FP8 instead"))
            else:
                groups.setdefault(x8, []).append((site, node))
        lowering = _Lowering(model.graph, self.plan)
        for x8, linears in groups.items():
            lowering.lower(x8, linears)
        rest = lower_linears(model, self.plan, DecodedWeights(model.graph, self.plan).emit)
        return PassResult(model, bool(groups) or rest.modified, tuple(declined))


class _Lowering:
    """Puts the kernel's ops in the place of linears, one distinct input at a time."""

    def __init__(self, graph: ir.Graph, plan: QuantPlan) -> None:
        self._graph = graph
        self._plan = plan
        self._names = Names(graph)
        self._tensors = PackedTensors(graph, plan, self._names)

    def lower(self, x8: ir.Value, linears: Linears) -> None:
        """Replace the quantiser of ``x8`` and the linears that read it, given in the order of the graph."""
        x = activation_source(self._plan, *linears[0])
        if x is None:
            raise PassError(f"layer {linears[0][0].name!r}: its activation was replaced before it; a bug")
        scale, parts = linears[0][1].inputs[A], products(linears)
        fused: list[Product] = []
        for part in parts:
            if 0 < part.rank <= LARGEST_RANK - sum(other.rank for other in fused):
                fused.append(part)
        v = self._tensors.v([item for part in fused for item in part.linears]) if fused else None
        quantized, xv = self._quantize(x, x8, scale, v)
        columns = {} if xv is None else self._split(xv, fused)
        for part in parts:
            # Behind the first of its layers: the readers of any come later.
            place = next(node for _, node in linears if node in part.nodes)
            if part.rank > 0 and part not in fused:
                columns[part.name] = self._project(x, part, place)
            self._linear(part, place, quantized, columns.get(part.name))

    def _quantize(
        self, x: ir.Value, x8: ir.Value, scale: ir.Value | None, v: ir.Value | None
    ) -> tuple[ir.Value, ir.Value | None]:
        """Put the kernel's quantiser in the place of the one that makes ``x8``; return x8 and xv."""
        old, tokens = x8.producer(), self._plan.per_token
        if old is None or scale is None:
            raise PassError(f"activation {x8.name!r}: it is not quantised; run quantize-activations first")
        inputs = [value for value in (x, None if tokens else scale, v) if value is not None]
        rank = 0 if v is None or v.shape is None else int(v.shape.numpy()[1])
        node = plugin_node(
            QUANTIZE_TOKENS if tokens else QUANTIZE_STATIC,
            inputs,
            {"lorc_rank": rank},
            1 + tokens + (v is not None),
            dict(old.metadata_props),
        )
        new = node.outputs[0]
        new.shape = None if x8.shape is None else x8.shape.copy()
        replace_node(self._graph, old, [node], new)
        self._names.name_node(node, f"{x.name}.quantize")
        if tokens:
            self._replace_scale(scale, node.outputs[1], x)
        xv = None if v is None else self._name(node.outputs[-1], f"{x.name}.xv", x, rank)
        return new, xv

    def _replace_scale(self, old: ir.Value, new: ir.Value, x: ir.Value) -> None:
        """Let the linears read the kernel's scales; what computed them is left to remove-unused."""
        self._name(new, f"{x.name}.token_scale", x, 1)
        new.dtype = ir.DataType.FLOAT
        for use in tuple(old.uses()):
            if is_w4a8(use.node):
                use.node.replace_input_with(use.idx, new)

    def _name(self, value: ir.Value, name: str, x: ir.Value, width: int) -> ir.Value:
        """Name a value that has x's type and shape but for its last dimension."""
        value.name = self._names.value(name)
        if x.dtype is not None:
            value.dtype = x.dtype
        if x.shape is not None:
            value.shape = ir.Shape([*x.shape[:-1], width])
        return value

    def _split(self, xv: ir.Value, parts: list[Product]) -> dict[str, ir.Value]:
        """Hand each product its columns of ``xv``."""
        if len(parts) == 1:
            return {parts[0].name: xv}
        ranks = [part.rank for part in parts]
        emit = Emitter(self._graph, self._names)
        sizes = emit.constant("split_" + "_".join(map(str, ranks)), np.array(ranks))
        node = ir.Node("", "Split", [xv, sizes], [ir.AttrInt64("axis", -1)], num_outputs=len(ranks))
        self._names.name_node(node, f"{xv.name}.split")
        columns = {}
        for part, value in zip(parts, node.outputs, strict=True):
            columns[part.name] = self._name(value, f"{part.name}/xv", xv, part.rank)
        insert_after(self._graph, xv, [node])
        return columns

    def _project(self, x: ir.Value, product: Product, place: ir.Node) -> ir.Value:
        """Emit x @ V in front of the product."""
        site, node = product.linears[0]
        emit = Emitter(self._graph, self._names, f"{product.name}/", node.metadata_props)
        xv = emit.op("MatMul", [x, self._tensors.v(product.linears)], "lorc_down", site.dtype)
        self._graph.insert_before(place, emit.nodes)
        return xv

    def _linear(self, product: Product, place: ir.Node, x8: ir.Value, xv: ir.Value | None) -> None:
        """Replace a product by a node ``<layer>/MatMul`` as in every lowering; of several, joined by +."""
        node, tensors = product.linears[0][1], self._tensors
        inputs = [x8, node.inputs[A], *tensors.weight(product)]
        inputs += [tensors.row_scales(product), tensors.bias(product)]
        if xv is not None:
            inputs += [xv, tensors.u(product)]
        new = plugin_node(
            LINEAR,
            [value for value in inputs if value is not None],
            linear_attributes(product, self._plan),
            len(product.outputs),
            dict(node.metadata_props),
        )
        replace_nodes(self._graph, place, product.nodes, [new], product.outputs, new.outputs)
        self._names.claim_node(new, "+".join(f"{site.name}/MatMul" for site, _ in product.linears))
