"""The operator ``zqfp::W4A8Linear``: its variants and their model-local function bodies in standard ONNX.

The equations are DESIGN section 2, the choice of ops section 3. The pieces a lowering needs as well
(:func:`emit_activation`, :func:`emit_output`) are functions of an :class:`Emitter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from passes._emit import Emitter
from zqfp_compile.formats.codebook import CODE_BOOKS
from zqfp_compile.formats.quantized import WHOLE_ROW, group_width
from zqfp_compile.plan import LinearSite, QuantPlan

DOMAIN = "zqfp"
OP_TYPE = "W4A8Linear"
INPUTS = (
    *("x8", "a", "codes", "group_scales", "row_scales", "bias"),
    *("x", "lorc_v", "lorc_u", "lorc_v_scale", "lorc_u_scale"),
)
X8, A, CODES, GROUP_SCALES, ROW_SCALES, BIAS = range(6)
X, LORC_V, LORC_U, LORC_V_SCALE, LORC_U_SCALE = range(6, len(INPUTS))

# The LoRC branch of a layer: none, factors in the layer's type, or in FP8 with scales.
Lorc: TypeAlias = Literal["", "lorc", "lorc8"]

ACTIVATION_TYPES = {
    "e4m3": ir.DataType.FLOAT8E4M3FN,
    "e5m2": ir.DataType.FLOAT8E5M2,
    "int8": ir.DataType.INT8,
}
_ACTIVATION_NAMES = {"e4m3": "fp8", "e5m2": "fp8e5m2", "int8": "int8"}
_LARGEST_CODE = 7


@dataclass(frozen=True)
class Variant:
    """What decides the body of a ``W4A8Linear``.

    Attributes:
        weight_format: ``e2m1``, ``e3m0``, ``int4`` or ``fp8``.
        group_size: Weights per group scale along K; 0: the whole row, and for ``fp8`` no groups.
        constrained: Whether decoded weights are rounded to E4M3 (every scale constraint but ``none``).
        activation_format: ``e4m3``, ``e5m2``, ``int8`` or ``none``.
        per_token: Whether ``a`` is [..., 1] instead of a scalar.
        dtype: Type of y.
        bias: Whether the bias input is present.
        lorc: ``lorc``: x, lorc_v and lorc_u are present; ``lorc8``: lorc_v_scale and lorc_u_scale as well.
        k: Input features, when the group size does not divide them and the codes are padded; else ``None``.
    """

    weight_format: str
    group_size: int
    constrained: bool
    activation_format: str
    per_token: bool
    dtype: ir.DataType
    bias: bool = False
    lorc: Lorc = ""
    k: int | None = None

    @classmethod
    def of(cls, plan: QuantPlan, site: LinearSite, *, bias: bool, lorc: Lorc) -> Variant:
        """Return the variant that ``site`` of ``plan`` needs."""
        weight_format = plan.precision(site).weight_format
        grouped = weight_format != "fp8"
        return cls(
            weight_format=weight_format,
            group_size=plan.group_size if grouped else 0,
            constrained=plan.scale_constraint != "none" or not grouped,
            activation_format=plan.activation_format,
            per_token=plan.per_token and plan.activation_format != "none",
            dtype=site.dtype,
            bias=bias,
            lorc=lorc,
            k=site.k if grouped and site.k % group_width(site.k, plan.group_size) else None,
        )

    @classmethod
    def of_node(cls, plan: QuantPlan, site: LinearSite, node: ir.Node) -> Variant:
        """Return the variant of ``node``, the ``W4A8Linear`` of ``site``."""
        return cls.of(plan, site, bias=node.inputs[BIAS] is not None, lorc=_lorc(node))

    @property
    def activation(self) -> str:
        """The node attribute ``activation``: ``fp8_tensor``, ``int8_tensor``... or ``none``."""
        if self.activation_format == "none":
            return "none"
        return f"{_ACTIVATION_NAMES[self.activation_format]}_{'token' if self.per_token else 'tensor'}"

    @property
    def overload(self) -> str:
        """The ONNX overload, such as ``e2m1_g64_fp8_tensor_float16_bias_lorc``."""
        group = "" if self.weight_format == "fp8" else f"g{self.group_size or 'row'}"
        parts = [
            self.weight_format,
            group,
            "" if self.constrained else "unrounded",
            self.activation,
            self.dtype.name.lower(),
        ]
        parts += ["bias" if self.bias else "", self.lorc, f"k{self.k}" if self.k else ""]
        return "_".join(filter(None, parts))

    def attributes(self) -> list[ir.Attr]:
        """Return the node attributes a kernel or plugin needs besides its inputs' shapes and types."""
        return [
            ir.AttrString("weight_format", self.weight_format),
            ir.AttrInt64("group_size", self.group_size),
            ir.AttrString("activation", self.activation),
        ]


def _lorc(node: ir.Node) -> Lorc:
    if node.inputs[LORC_V] is None:
        return ""
    return "lorc" if node.inputs[LORC_V_SCALE] is None else "lorc8"


def w4a8_function(variant: Variant, opset: int) -> ir.Function:
    """Return the function body of ``variant`` in ONNX opset ``opset`` (21 or later).

    The value ``w_hat`` of the body is the decoded weight, FLOAT [N, K].
    """
    inputs = [ir.Value(name=name) for name in INPUTS]
    emit = Emitter()
    w_hat = _emit_w_hat(emit, variant, inputs[CODES], inputs[GROUP_SCALES], inputs[ROW_SCALES])
    x = emit_activation(emit, variant, inputs[X8], inputs[A])
    y = emit_output(emit, variant, x, w_hat, list(inputs))
    y.name = "y"
    body = ir.Graph(inputs, [y], nodes=emit.nodes, opset_imports={"": opset}, name=OP_TYPE)
    declared = [ir.Attr(attr.name, attr.type, None) for attr in variant.attributes()]
    return ir.Function(DOMAIN, OP_TYPE, variant.overload, graph=body, attributes=declared)


def add_function(model: ir.Model, variant: Variant) -> None:
    """Add the function of ``variant`` to ``model`` once, with what it needs: domain import and IR 10."""
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    model.ir_version = max(model.ir_version, 10)
    key = (DOMAIN, OP_TYPE, variant.overload)
    if key not in model.functions:
        model.functions[key] = w4a8_function(variant, model.graph.opset_imports[""])


def emit_activation(emit: Emitter, variant: Variant, x8: ir.Value, a: ir.Value | None) -> ir.Value:
    """Return the MatMul's left side: x8 dequantised by ``a``; per token by 1, and ``a`` follows it."""
    if variant.activation_format == "none":
        return x8
    scale = emit.constant("one", np.array(1, np.float32)) if variant.per_token else a
    return emit.op("DequantizeLinear", [x8, scale], "x_hat", ir.DataType.FLOAT)


def emit_output(
    emit: Emitter, variant: Variant, x: ir.Value, w_hat: ir.Value, inputs: list[ir.Value | None]
) -> ir.Value:
    """Return y from the MatMul's left side ``x`` and the weight ``w_hat`` [N, K].

    The MatMul runs in FLOAT whatever the model's type, because an FP8 GEMM with half output stores the
    unscaled accumulator and overflows (DESIGN section 5). With unquantised activations it runs in that type.
    """
    cast = variant.dtype != ir.DataType.FLOAT
    if cast and variant.activation_format == "none":
        w_hat = emit.op("Cast", [w_hat], "w_cast", variant.dtype, to=int(variant.dtype))
    weight = emit.op("Transpose", [w_hat], "w_transposed", w_hat.dtype, perm=[1, 0])
    y = emit.op("MatMul", [x, weight], "MatMul", w_hat.dtype)
    if variant.per_token:
        y = emit.op("Mul", [y, inputs[A]], "y_scaled", ir.DataType.FLOAT)
    if cast and variant.activation_format != "none":
        y = emit.op("Cast", [y], "y_cast", variant.dtype, to=int(variant.dtype))
    if variant.lorc:
        v, u = _emit_factors(emit, variant, inputs)
        down = emit.op("MatMul", [inputs[X], v], "lorc_down", variant.dtype)
        up = emit.op("MatMul", [down, u], "lorc_up", variant.dtype)
        y = emit.op("Add", [y, up], "y_lorc", variant.dtype)
    if variant.bias:
        y = emit.op("Add", [y, inputs[BIAS]], "y_bias", variant.dtype)
    return y


def _emit_factors(
    emit: Emitter, variant: Variant, inputs: list[ir.Value | None]
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return V [K, r] and U [r, N] in y's type; FP8 factors are scaled in FLOAT and rounded to it once."""
    if variant.lorc != "lorc8":
        return inputs[LORC_V], inputs[LORC_U]
    factors = []
    for name, factor, scale, axis in (("v", LORC_V, LORC_V_SCALE, 1), ("u", LORC_U, LORC_U_SCALE, 0)):
        stored = [inputs[factor], inputs[scale]]
        value = emit.op("DequantizeLinear", stored, f"lorc_{name}_hat", ir.DataType.FLOAT, axis=axis)
        if variant.dtype != ir.DataType.FLOAT:
            value = emit.op("Cast", [value], f"lorc_{name}_cast", variant.dtype, to=int(variant.dtype))
        factors.append(value)
    return factors[0], factors[1]


def _emit_w_hat(
    emit: Emitter, variant: Variant, codes: ir.Value, group_scales: ir.Value, row_scales: ir.Value
) -> ir.Value:
    """Decode the weight [N, K]; exact, since every intermediate value is a short dyadic number."""
    if variant.weight_format == "fp8":
        return _per_row(emit, codes, row_scales)
    one = emit.constant("one", np.array(1, np.float32))
    index = emit.op("DequantizeLinear", [codes, one], "index", ir.DataType.FLOAT)
    decoded = _emit_code_book(emit, variant.weight_format, index)
    scaled = _emit_scaled(emit, variant, decoded, group_scales)
    return emit_rounded(emit, variant, scaled, row_scales)


def emit_rounded(emit: Emitter, variant: Variant, scaled: ir.Value, row_scales: ir.Value) -> ir.Value:
    """Return W_hat [N, K] from code-book value times group scale [N, Kp]: unpad, round to E4M3, times R."""
    if variant.k is not None:
        bounds = [emit.constant(f"int_{i}", np.array([i])) for i in (0, variant.k, 1)]
        scaled = emit.op("Slice", [scaled, *bounds], "w_unpadded", ir.DataType.FLOAT)
    if not variant.constrained:
        last_axis = emit.constant("last_axis", np.array([-1]))
        rows = emit.op("Unsqueeze", [row_scales, last_axis], "rows", ir.DataType.FLOAT)
        return emit.op("Mul", [scaled, rows], "w_hat", ir.DataType.FLOAT)
    # A vector of ones, not a scalar: TensorRT-RTX crashes on per-tensor Q between blocked and per-channel DQ.
    one = emit.constant("one", np.array(1, np.float32))
    zeros = emit.op("Sub", [row_scales, row_scales], "zeros", ir.DataType.FLOAT)
    ones = emit.op("Add", [zeros, one], "ones", ir.DataType.FLOAT)
    e4m3 = ir.DataType.FLOAT8E4M3FN
    w8 = emit.op("QuantizeLinear", [scaled, ones], "w8", e4m3, axis=0, output_dtype=int(e4m3))
    return _per_row(emit, w8, row_scales)


def _per_row(emit: Emitter, w8: ir.Value, row_scales: ir.Value) -> ir.Value:
    return emit.op("DequantizeLinear", [w8, row_scales], "w_hat", ir.DataType.FLOAT, axis=0)


def _emit_code_book(emit: Emitter, weight_format: str, index: ir.Value) -> ir.Value:
    """Map code indices -7..7 to code-book values.

    The book is an odd, piecewise linear function of the index: ``f(i) = t*i - sum_b d_b * clip(i, -b, b)``
    with the slope t after the last break and the slope change d_b at break b. For E2M1 that is
    ``2i - 0.5 clip(i, -4, 4) - clip(i, -6, 6)``. Dyadic, so exact on every runtime (a power need not be).
    """
    book = CODE_BOOKS[weight_format].decode(np.arange(_LARGEST_CODE + 1, dtype=np.int8)).astype(np.float32)
    slopes = np.diff(book)
    value = _times(emit, index, float(slopes[-1]), "slope")
    for at in range(1, _LARGEST_CODE):
        change = float(slopes[at] - slopes[at - 1])
        if change:
            low = emit.constant(f"minus_{at}", np.array(-at, np.float32))
            high = emit.constant(f"plus_{at}", np.array(at, np.float32))
            clipped = emit.op("Clip", [index, low, high], f"clip{at}", ir.DataType.FLOAT)
            bend = _times(emit, clipped, change, f"bend{at}")
            value = emit.op("Sub", [value, bend], f"bent{at}", ir.DataType.FLOAT)
    return value


def _times(emit: Emitter, value: ir.Value, factor: float, name: str) -> ir.Value:
    if factor == 1.0:
        return value
    return emit.op(
        "Mul", [value, emit.constant(f"{name}_factor", np.array(factor, np.float32))], name, ir.DataType.FLOAT
    )


def _emit_scaled(emit: Emitter, variant: Variant, decoded: ir.Value, group_scales: ir.Value) -> ir.Value:
    """Multiply [N, Kp] by the group scales [N, Kp/g]; Reshape with 0 and -1 serves every shape."""
    last_axis = emit.constant("last_axis", np.array([-1]))
    if variant.constrained:
        one = emit.constant("one", np.array(1, np.float32))
        group_scales = emit.op("DequantizeLinear", [group_scales, one], "scales", ir.DataType.FLOAT)
    by_group = emit.op("Unsqueeze", [group_scales, last_axis], "scales_3d", ir.DataType.FLOAT)
    groups = [1, -1] if variant.group_size == WHOLE_ROW else [-1, variant.group_size]
    to_groups = emit.constant("to_groups", np.array([0, *groups]))
    grouped = emit.op("Reshape", [decoded, to_groups], "w_groups", ir.DataType.FLOAT)
    product = emit.op("Mul", [grouped, by_group], "w_scaled", ir.DataType.FLOAT)
    to_rows = emit.constant("to_rows", np.array([0, -1]))
    return emit.op("Reshape", [product, to_rows], "w_rows", ir.DataType.FLOAT)
