"""Pass ``lower-weights-fp4``: the standard-types FP4 form, for tools that target Blackwell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._emit import Emitter, initializer_value
from passes._lowering import lower_linears
from passes._sites import is_w4a8
from passes._tensors import fp4_weight, w4a8_tensors
from passes._w4a8_function import CODES, GROUP_SCALES, ROW_SCALES, Variant, emit_rounded
from passes.raise_opset import RaiseOpset
from passes.remove_unused import RemoveUnused
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import QuantPlan

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
    constraint ``none`` multiplies by R unrounded. What nothing reads is removed and the opset raised.

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
            PassError: When the weights are not E2M1, or a ``W4A8Linear`` is not in the plan.
        """
        if not any(is_w4a8(node) for node in model.graph):
            return PassResult(model, modified=False)
        if self.plan.weight_format != "e2m1":
            raise PassError(
                f"--emit fp4: ONNX's 4-bit float type is E2M1 and the weights are {self.plan.weight_format}; "
                "use --weights fp4 --fp4-format e2m1, or drop --emit fp4"
            )
        lower_linears(model, self.plan, _Fp4Weights(model.graph).emit)
        RemoveUnused().call(model)  # raise-opset would inline the functions it finds
        RaiseOpset(minimum=OPSET).call(model)
        model.ir_version = max(model.ir_version, IR_VERSION)
        return PassResult(model, modified=True)


@dataclass
class _Fp4Weights:
    graph: ir.Graph
    known: dict[int, ir.Value] = field(default_factory=dict)

    def emit(self, emit: Emitter, variant: Variant, node: ir.Node, k: int) -> ir.Value:
        scales, rows = node.inputs[GROUP_SCALES], node.inputs[ROW_SCALES]
        assert scales is not None and rows is not None
        if variant.constrained:
            one = emit.constant("one", np.array(1, np.float32))
            scales = emit.op("DequantizeLinear", [scales, one], "scales", ir.DataType.FLOAT)
        blocks = {"axis": 1, "block_size": variant.group_size}
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
