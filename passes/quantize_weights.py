"""Pass ``quantize-weights``: planned linears become ``zqfp::W4A8Linear`` nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._emit import Names, initializer_value, replace_node
from passes._sites import layer_tensors, planned_nodes
from passes._tensors import TensorSharer
from passes._w4a8_function import DOMAIN, INPUTS, OP_TYPE, Variant, X, add_function
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import LinearSite, QuantPlan


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Replace each planned linear and its float weight by one node with packed weights.

    Before::

        x8 -> DequantizeLinear(a) -> [Mul(a) per token] -> [Cast] -> MatMul(W) or Gemm(W, C) -> y

    After::

        zqfp::W4A8Linear(x8, a, codes, group_scales, row_scales, bias, "", "", "", "", "") -> y

    The op's model-local function (one overload per variant) is standard ONNX. The node is named after the
    layer and keeps the old node's metadata; y keeps its name and type. Gemm's C, times beta, becomes the bias
    [N]; a following Add stays. Layers that share a quantised tensor share its initializer. Without activation
    quantisation x itself takes the place of x8 and ``a`` is empty. The float weight and the orphaned Q/DQ
    nodes are left for remove-unused. No weight is loaded.

    A layer whose weight format (``plan.precision``) is ``none`` is left alone, and one that is a
    ``W4A8Linear`` already.

    Attributes:
        plan: Linears and their quantised tensors.
    """

    name: ClassVar[str] = "quantize-weights"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a planned linear, its tensors, its bias or its quantised activation is missing, or
                the opset is below 21.
        """
        if not self.plan.quantizes_weights:
            return PassResult(model, modified=False)
        if model.graph.opset_imports.get("", 0) < 21:
            raise PassError("quantize-weights: the model's opset is below 21; run raise-opset first")
        names = Names(model.graph)
        sharer = TensorSharer(model.graph, names)
        biases: dict[tuple[str, float, ir.DataType], ir.Value] = {}
        modified = False
        for site, node in planned_nodes(model, self.plan):
            if node.op_type not in ("MatMul", "Gemm") or self.plan.precision(site).weight_format == "none":
                continue
            bias = self._bias(model.graph, names, biases, site)
            self._replace(model, names, sharer, site, node, bias)
            modified = True
        return PassResult(model, modified)

    def _replace(
        self,
        model: ir.Model,
        names: Names,
        sharer: TensorSharer,
        site: LinearSite,
        node: ir.Node,
        bias: ir.Value | None,
    ) -> None:
        tensors = layer_tensors(self.plan, site.name)
        x8, a = self._activation(site, node)
        variant = Variant.of(self.plan, site, bias=bias is not None, lorc="")
        scales = tensors.group_scales
        weight = [
            sharer.value(f"{site.name}.codes", tensors.codes),
            None if scales is None else sharer.value(f"{site.name}.group_scales", scales),
            sharer.value(f"{site.name}.row_scales", tensors.row_scales),
        ]
        linear = ir.Node(
            DOMAIN,
            OP_TYPE,
            [x8, a, *weight, bias, *[None] * (len(INPUTS) - X)],
            variant.attributes(),
            overload=variant.overload,
            metadata_props=dict(node.metadata_props),
        )
        linear.outputs[0].dtype = site.dtype
        add_function(model, variant)
        replace_node(model.graph, node, [linear], linear.outputs[0])
        names.claim_node(linear, site.name)

    def _activation(self, site: LinearSite, node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
        """Walk back from the linear's input over what quantize-activations inserted, to x8 and its scale."""
        value = node.inputs[0]
        if value is None:
            raise PassError(f"layer {site.name!r}: node {site.node!r} has no input; repair the model")
        if self.plan.activation_format == "none":
            return value, None
        scale = None
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast":
            producer = _producer(producer.inputs[0])
        if self.plan.per_token and producer is not None and producer.op_type == "Mul":
            scale = producer.inputs[1]
            producer = _producer(producer.inputs[0])
        if producer is None or producer.op_type != "DequantizeLinear" or producer.inputs[0] is None:
            raise PassError(
                f"layer {site.name!r}: its input is not quantised; run quantize-activations first"
            )
        return producer.inputs[0], scale if self.plan.per_token else producer.inputs[1]

    def _bias(
        self,
        graph: ir.Graph,
        names: Names,
        known: dict[tuple[str, float, ir.DataType], ir.Value],
        site: LinearSite,
    ) -> ir.Value | None:
        """Return Gemm's ``beta * C`` as an initializer [N], computed when it is written."""
        if site.bias is None:
            return None
        source = graph.initializers.get(site.bias)
        if source is None or source.const_value is None:
            raise PassError(
                f"layer {site.name!r}: its bias {site.bias!r} is no initializer; exclude the layer"
            )
        if site.bias_scale == 1.0 and tuple(source.const_value.shape) == (site.n,):
            return source
        key = (site.bias, site.bias_scale, site.dtype)
        if key not in known:
            tensor = _scaled_bias(source.const_value, site.bias_scale, site.n)
            known[key] = initializer_value(names.value(f"{site.name}.bias"), tensor)
            graph.register_initializer(known[key])
        return known[key]


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _scaled_bias(source: ir.TensorProtocol, scale: float, n: int) -> ir.TensorProtocol:
    def compute() -> ir.TensorProtocol:
        array = source.numpy()
        row = np.broadcast_to(array.reshape(-1), (n,)).astype(np.float32) * np.float32(scale)
        return ir.tensor(row.astype(array.dtype), dtype=source.dtype)

    return ir.LazyTensor(compute, source.dtype, ir.Shape([n]))
