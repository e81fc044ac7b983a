"""Pass ``lower-weights-fp4``: the standard-types FP4 form, for tools that target Blackwell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._emit import Emitter, initializer_value
from passes._lowering import lower_linears
from passes._sites import is_w4a8, w4a8_nodes
from passes._tensors import fp4_weight, w4a8_tensors
from passes._w4a8_function import CODES, GROUP_SCALES, ROW_SCALES, Variant, emit_rounded
from passes.lower_weights_fp8 import DecodedWeights
from passes.raise_opset import RaiseOpset
from passes.remove_unused import RemoveUnused
from zqfp_compile.formats.quantized import group_width
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import LinearSite, QuantPlan

OPSET = 23  # the first with FLOAT4E2M1
IR_VERSION = 11


@dataclass(frozen=True)
class LowerWeightsFp4(Pass):
    """Turn every ``W4A8Linear`` into standard ONNX with FLOAT4E2M1 weights, for ``--emit fp4``.

    Before::

        W4A8Linear(x8, a, codes, group_scales, row_scales, bias, x, V, U) -> y

    After, in opset 23 and IR 11::

        group_scales -> DequantizeLinear(1) -> s
        w4 -> DequantizeLinear(s, axis 1, block_size g) -> [Slice to K] -> QuantizeLinear(ones, axis 0)
           -> DequantizeLinear(row_scales, axis 0) -> Transpose -> MatMul
        x8 -> DequantizeLinear(a) ------------------------------+  -> ... -> y

    w4 is FLOAT4E2M1 [N, Kp]; the group scales keep their 8 bits. The weight is bit for bit the
    ``W4A8Linear``'s, for which the rounding to E4M3 is needed (constraint ``e4m3``); it also keeps a
    block-scaled weight from feeding a quantised MatMul directly, which TensorRT-RTX plans wrongly. The
    constraint ``none`` multiplies by R unrounded. Layers with FP8 weights get the form of
    ``lower-weights-fp8``. What nothing reads is removed and the opset raised.

    For Blackwell tools only: ONNX Runtime has no FLOAT4E2M1 kernel, and TensorRT-RTX below SM120 refuses the
    type. Nothing happens without ``W4A8Linear`` nodes.

    Attributes:
        plan: The plan the nodes were made from.
    """

    name: ClassVar[str] = "lower-weights-fp4"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When no layer's weight is E2M1, a layer's is neither E2M1 nor FP8, or a ``W4A8Linear``
                is not in the plan.
        """
        if not any(is_w4a8(node) for node in model.graph):
            return PassResult(model, modified=False)
        formats = {self.plan.precision(site).weight_format for site, _ in w4a8_nodes(model, self.plan)}
        if "e2m1" not in formats or not formats <= {"e2m1", "fp8"}:
            raise PassError(
                "--emit fp4: ONNX's 4-bit float type is E2M1 and the weights are "
                f"{', '.join(sorted(formats))}; "
                "use --weights fp4 --fp4-format e2m1, or drop --emit fp4"
            )
        fp8 = DecodedWeights(model.graph, self.plan)
        lower_linears(model, self.plan, _Fp4Weights(model.graph, fp8).emit)
        RemoveUnused().call(model)  # raise-opset would inline the functions it finds
        RaiseOpset(minimum=OPSET).call(model)
        model.ir_version = max(model.ir_version, IR_VERSION)
        return PassResult(model, modified=True)


@dataclass
class _Fp4Weights:
    graph: ir.Graph
    fp8: DecodedWeights
    known: dict[int, ir.Value] = field(default_factory=dict)

    def emit(self, emit: Emitter, variant: Variant, site: LinearSite, node: ir.Node) -> ir.Value:
        if variant.weight_format == "fp8":
            return self.fp8.emit(emit, variant, site, node)
        scales, rows = node.inputs[GROUP_SCALES], node.inputs[ROW_SCALES]
        assert scales is not None and rows is not None
        if variant.constrained:
            one = emit.constant("one", np.array(1, np.float32))
            scales = emit.op("DequantizeLinear", [scales, one], "scales", ir.DataType.FLOAT)
        blocks = {"axis": 1, "block_size": group_width(site.k, variant.group_size)}
        weight = self._weight(emit, node)
        scaled = emit.op("DequantizeLinear", [weight, scales], "w_scaled", ir.DataType.FLOAT, **blocks)
        return emit_rounded(emit, variant, scaled, rows)

    def _weight(self, emit: Emitter, node: ir.Node) -> ir.Value:
        codes = node.inputs[CODES]
        if id(codes) not in self.known:
            value = initializer_value(emit.value_name("w4"), fp4_weight(w4a8_tensors(node)))
            self.graph.register_initializer(value)
            self.known[id(codes)] = value
        return self.known[id(codes)]
