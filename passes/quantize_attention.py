"""Pass ``quantize-attention``: both matrix products of attention on FP8 operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._emit import Emitter, Names, replace_node
from passes._static_scales import register_scale
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import AttentionSite, QuantPlan

# Probabilities lie in 0..1: the scale that maps 1 to E4M3's largest number needs no calibration.
PROBABILITY_SCALE = np.float32(1 / 448)
_FP8 = ir.DataType.FLOAT8E4M3FN
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Quantise queries, keys, probabilities and values, each by one static scale.

    Before::

        mix = MatMul(Softmax(mask(scale(MatMul(q, k)))), v)

    After, on each operand of the two products::

        q -> [Cast to float] -> QuantizeLinear(s) -> DequantizeLinear(s) -> MatMul -> [Cast back]

    The scale of probabilities is 1/448, the others are calibrated (``plan.attention_scales``). Keys and
    values of an FP8 cache have the cache's scale, so they are not rounded twice. The products run in FLOAT
    whatever the model's type: with half output an engine stores the unscaled FP8 accumulator, which
    overflows (DESIGN section 5).

    Nothing happens for a product whose operands are dequantised already.

    Attributes:
        plan: Attentions and scales.
    """

    name: ClassVar[str] = "quantize-attention"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a product of the plan is not in the graph, an operand has no scale, or the opset
                is below 21.
        """
        if self.plan.attentions and model.graph.opset_imports.get("", 0) < 21:
            raise PassError("quantize-attention: the model's opset is below 21; run raise-opset first")
        names = Names(model.graph)
        nodes = {node.name: node for node in model.graph}
        modified = False
        for site in self.plan.attentions:
            for product, operands in ((site.scores, (site.q, site.k)), (site.mix, (None, site.v))):
                node = nodes.get(product)
                if node is None or node.op_type != "MatMul":
                    raise PassError(
                        f"attention {site.name!r}: its MatMul {product!r} is not in the graph; "
                        "use this model's plan"
                    )
                if not all(map(_is_quantized, node.inputs)):
                    self._rewrite(model.graph, names, site, node, operands)
                    modified = True
        return PassResult(model, modified)

    def _rewrite(
        self,
        graph: ir.Graph,
        names: Names,
        site: AttentionSite,
        node: ir.Node,
        operands: tuple[str | None, str],
    ) -> None:
        """Replace the MatMul ``node``; ``operands`` name the values their scales come from (None: 1/448)."""
        name, y = str(node.name), node.outputs[0]
        emit = Emitter(graph, names, f"{name}/", node.metadata_props)
        inputs = []
        for side, value, source in zip(("left", "right"), node.inputs, operands, strict=True):
            assert value is not None
            if source is None:
                scale = emit.constant("probability_scale", np.array(PROBABILITY_SCALE))
            else:
                scale = register_scale(graph, names, f"{name}/{side}_scale", self.plan, source)
            if site.dtype != _FLOAT:
                value = emit.op("Cast", [value], f"{side}_float", _FLOAT, to=int(_FLOAT))
            x8 = emit.op("QuantizeLinear", [value, scale], f"{side}_x8", _FP8, output_dtype=int(_FP8))
            inputs.append(emit.op("DequantizeLinear", [x8, scale], f"{side}_dequantized", _FLOAT))
        result = emit.op("MatMul", inputs, "MatMul", _FLOAT)
        names.claim_node(emit.nodes[-1], name)
        if site.dtype != _FLOAT:
            result = emit.op("Cast", [result], "y_cast", site.dtype, to=int(site.dtype))
        result.shape = y.shape
        replace_node(graph, node, emit.nodes, result)


def _is_quantized(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"
