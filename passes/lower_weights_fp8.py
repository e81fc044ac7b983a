"""Pass ``lower-weights-fp8``: weights decoded to FP8 initializers at compile time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from passes._emit import Emitter, initializer_value
from passes._lowering import lower_linears
from passes._tensors import decoded_weight, w4a8_tensors
from passes._w4a8_function import CODES, GROUP_SCALES, ROW_SCALES, Variant
from zqfp_compile.pass_base import Pass, PassResult
from zqfp_compile.plan import LinearSite, QuantPlan


@dataclass(frozen=True)
class LowerWeightsFp8(Pass):
    """Turn every ``W4A8Linear`` into a standard QDQ linear, value for value the same.

    Before::

        W4A8Linear(x8, a, codes, group_scales, row_scales, bias, x, V, U) -> y

    After, with w8 = E4M3(code-book value * group scale) as a FLOAT8E4M3FN initializer [N, K]::

        x8 -> DequantizeLinear(a) ------------------------------------+
        w8 -> DequantizeLinear(row_scales, axis 0) -> Transpose -> MatMul -> [Mul(a) per token] -> [Cast]
           -> [Add (x @ V) @ U] -> [Add bias] -> y

    LoRC factors in FP8 become initializers V and U in the type of y. The MatMul is named ``<layer>/MatMul``;
    all linears of one x8 share its DequantizeLinear, and layers that share codes share w8. With the
    constraint ``none`` there is no E4M3 weight and the initializer is FLOAT.
    Weights are computed when the model is written, one at a time, and never kept. Packed tensors and
    functions are left for remove-unused.

    Attributes:
        plan: The plan the nodes were made from.
    """

    name: ClassVar[str] = "lower-weights-fp8"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a ``W4A8Linear`` is not in the plan.
        """
        return lower_linears(model, self.plan, DecodedWeights(model.graph, self.plan).emit)


@dataclass
class DecodedWeights:
    """Emits weights decoded to FP8; ``lower-weights-fp4`` stores its FP8 layers so as well.

    Attributes:
        graph: Graph the initializers go to.
        plan: The plan the nodes were made from.
        known: Initializers made so far, by the packed weight they came from.
    """

    graph: ir.Graph
    plan: QuantPlan
    known: dict[tuple[int, int], ir.Value] = field(default_factory=dict)

    def emit(self, emit: Emitter, variant: Variant, site: LinearSite, node: ir.Node) -> ir.Value:
        """Emit W_hat = R * w8; under the constraint ``none``, where R is 1, it is the initializer."""
        weight = self._weight(emit, variant, site, node)
        if not variant.constrained:
            return weight
        rows = node.inputs[ROW_SCALES]
        return emit.op("DequantizeLinear", [weight, rows], "w_hat", ir.DataType.FLOAT, axis=0)

    def _weight(self, emit: Emitter, variant: Variant, site: LinearSite, node: ir.Node) -> ir.Value:
        codes = node.inputs[CODES]
        if variant.weight_format == "fp8" and codes is not None:
            return codes
        key = (id(codes), id(node.inputs[GROUP_SCALES]))
        if key not in self.known:
            name = emit.value_name("w8" if variant.constrained else "w_hat")
            tensor = decoded_weight(self.plan, site, w4a8_tensors(node))
            self.known[key] = initializer_value(name, tensor)
            self.graph.register_initializer(self.known[key])
        return self.known[key]
