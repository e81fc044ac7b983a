"""Pass ``quantize-activations``: one QuantizeLinear per distinct input of the planned linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._emit import Emitter, Names, initializer_value, insert_after
from passes._sites import planned_nodes
from passes._w4a8_function import ACTIVATION_TYPES
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import QuantPlan

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
# Keeps the scale of an all-zero token a normal, positive float32; real activations are far above it.
SMALLEST_RANGE = 1e-30


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Give every planned linear a quantised input.

    Before::

        x -> MatMul(W)          (each of q, k, v)

    After, static scale (``plan.activation_scales[x]``, float32 > 0)::

        x -> [Cast to float] -> QuantizeLinear(a) -> x8 -> DequantizeLinear(a) -> [Cast back] -> MatMul(W)

    After, per token (``a`` [..., 1] = max(amax |x|, tiny) / largest, over the last axis)::

        x -> [Cast to float] -+-> Div(a) -> QuantizeLinear(1) -> x8 -> DequantizeLinear(1) -> Mul(a)
                              +-> Abs -> ReduceMax -> Max -> Div -> a                      -> [Cast back]

    Q and DQ always run in FLOAT, since half precision overflows there (DESIGN section 5). All consumers of x
    that the plan names share one Q and one DQ; the others keep reading x. The result is a legal standard QDQ
    model. Nothing happens when ``plan.activation_format`` is ``none``, a linear is already quantised, or
    ``plan.precisions`` leaves it in float.

    Attributes:
        plan: Linears, activation format and scales.
    """

    name: ClassVar[str] = "quantize-activations"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a planned linear is missing, an activation has no positive finite scale, or the
                opset is below 21.
        """
        if self.plan.activation_format == "none":
            return PassResult(model, modified=False)
        if model.graph.opset_imports.get("", 0) < 21:
            raise PassError("quantize-activations: the model's opset is below 21; run raise-opset first")
        names = Names(model.graph)
        quantized: dict[ir.Value, ir.Value] = {}
        modified = False
        for site, node in planned_nodes(model, self.plan):
            x = node.inputs[0]
            if node.op_type not in ("MatMul", "Gemm") or x is None or x.name != site.activation:
                continue
            if x not in quantized:
                quantized[x] = self._quantize(model.graph, names, x, site.dtype)
            node.replace_input_with(0, quantized[x])
            modified = True
        return PassResult(model, modified)

    def _quantize(self, graph: ir.Graph, names: Names, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Insert the Q/DQ pair of ``x`` behind its producer and return what the linears read."""
        emit = Emitter(graph, names, prefix=f"{x.name}.")
        as_float = x
        if dtype != ir.DataType.FLOAT:
            as_float = emit.op("Cast", [x], "float", ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        if self.plan.per_token:
            result = self._per_token(emit, as_float)
        else:
            scale = initializer_value(names.value(f"{x.name}.scale"), ir.tensor(self._scale(str(x.name))))
            graph.register_initializer(scale)
            result = self._pair(emit, as_float, scale)
        if dtype != ir.DataType.FLOAT:
            result = emit.op("Cast", [result], "quantized", dtype, to=int(dtype))
        insert_after(graph, x, emit.nodes)
        return result

    def _scale(self, activation: str) -> np.ndarray:
        scale = np.array(self.plan.activation_scales.get(activation, 0.0), np.float32)
        if not (scale > 0 and np.isfinite(scale)):
            raise PassError(
                f"activation {activation!r}: no positive calibrated scale; "
                "calibrate on inputs that reach it, or use --activation-scale token"
            )
        return scale

    def _per_token(self, emit: Emitter, as_float: ir.Value) -> ir.Value:
        largest = LARGEST[self.plan.activation_format]
        last_axis = emit.constant("last_axis", np.array([-1]))
        magnitude = emit.op("Abs", [as_float], "abs", ir.DataType.FLOAT)
        amax = emit.op("ReduceMax", [magnitude, last_axis], "amax", ir.DataType.FLOAT, keepdims=1)
        floor = emit.constant("smallest_range", np.array(SMALLEST_RANGE, np.float32))
        positive = emit.op("Max", [amax, floor], "range", ir.DataType.FLOAT)
        limit = emit.constant(f"largest_{self.plan.activation_format}", np.array(largest, np.float32))
        scale = emit.op("Div", [positive, limit], "scale", ir.DataType.FLOAT)
        scaled = emit.op("Div", [as_float, scale], "scaled", ir.DataType.FLOAT)
        unscaled = self._pair(emit, scaled, emit.constant("one", np.array(1, np.float32)))
        return emit.op("Mul", [unscaled, scale], "rescaled", ir.DataType.FLOAT)

    def _pair(self, emit: Emitter, value: ir.Value, scale: ir.Value) -> ir.Value:
        x8_type = ACTIVATION_TYPES[self.plan.activation_format]
        x8 = emit.op("QuantizeLinear", [value, scale], "x8", x8_type, output_dtype=int(x8_type))
        x8.shape = None if value.shape is None else value.shape.copy()
        return emit.op("DequantizeLinear", [x8, scale], "dequantized", ir.DataType.FLOAT)
