"""A small block with two linears of one activation, and plans with random legal tensors for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from passes.add_lorc import AddLoRC
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from passes.remove_unused import RemoveUnused
from zqfp_compile.formats.codebook import CODE_BOOKS
from zqfp_compile.formats.minifloat import MINI_FLOATS
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.formats.scales import legal_scales
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan, SitePrecision, WeightSource

NUMPY = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
STATIC_SCALE = 0.011  # activations of up to 3 use an eighth of E4M3's range, and INT8 saturates now and then
BETA = 0.5


@dataclass(frozen=True)
class Case:
    """One variant of the operator."""

    weight_format: str = "e2m1"
    constraint: str = "e4m3"
    activation: str = "e4m3"
    per_token: bool = False
    dtype: ir.DataType = ir.DataType.FLOAT
    lorc: bool = False
    k: int = 64
    n: int = 48
    group_size: int = 16
    seed: int = 0
    lorc_fp8: bool = False
    rank: int = 4
    v_n: int = 0  # rows of v when they are not n

    def __str__(self) -> str:
        scale = "token" if self.per_token else "tensor"
        parts = [self.weight_format, self.constraint, self.activation, scale, self.dtype.name.lower()]
        return "-".join([*parts, self.branch, f"k{self.k}"])

    @property
    def branch(self) -> str:
        return "plain" if not self.lorc else "lorc8" if self.lorc_fp8 else "lorc"

    def rows(self, key: str) -> int:
        """Rows of the weight of ``q`` or ``v``."""
        return self.v_n if key == "v" and self.v_n else self.n


# What the kernel's hosts are called with on the CPU: its group sizes, padded N and K, LoRC of any rank.
HOST_CASES = [
    Case(group_size=64, dtype=ir.DataType.FLOAT16, n=72, k=80),
    Case(group_size=32, dtype=ir.DataType.FLOAT16, n=96, k=144, per_token=True),
    Case(group_size=128, dtype=ir.DataType.FLOAT16, n=72, k=208, lorc=True, rank=16),
    Case(group_size=64, dtype=ir.DataType.FLOAT16, n=72, k=80, lorc=True, rank=12, per_token=True),
    # Both in one product.
    Case(group_size=64, dtype=ir.DataType.FLOAT16, n=64, v_n=136, k=80),
    Case(group_size=32, dtype=ir.DataType.FLOAT16, n=128, v_n=72, k=80, lorc=True, rank=12, per_token=True),
]


def float_model(case: Case) -> ir.Model:
    """``q = x @ Wq`` (MatMul) and ``v = x @ Wv^T + beta * C`` (Gemm, transB), x [batch, K]."""
    rng = np.random.default_rng(case.seed)
    numpy_type = NUMPY[case.dtype]

    def const(name: str, *shape: int) -> ir.Value:
        array = rng.standard_normal(shape).astype(np.float32).astype(numpy_type)
        tensor = ir.Tensor(array, dtype=case.dtype, name=name)
        return ir.Value(name=name, type=ir.TensorType(case.dtype), shape=ir.Shape(shape), const_value=tensor)

    def value(name: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(case.dtype), shape=ir.Shape(shape))

    x = value("x", "batch", case.k)
    rows = case.rows("v")
    wq, wv, bias = const("wq", case.k, case.n), const("wv", rows, case.k), const("c", 1, rows)
    scopes = {"pkg.torch.onnx.name_scopes": "['', 'attn.q']"}
    q = ir.Node(
        "", "MatMul", [x, wq], name="node_q", outputs=[value("q", "batch", case.n)], metadata_props=scopes
    )
    attrs = [ir.AttrInt64("transB", 1), ir.AttrFloat32("beta", BETA)]
    v = ir.Node("", "Gemm", [x, wv, bias], attrs, name="node_v", outputs=[value("v", "batch", rows)])
    graph = ir.Graph(
        [x],
        [*q.outputs, *v.outputs],
        nodes=[q, v],
        initializers=[wq, wv, bias],
        opset_imports={"": 21},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def make_plan(case: Case) -> QuantPlan:
    """The plan of :func:`float_model`, its tensors random but legal under the constraint."""
    rng = np.random.default_rng(case.seed + 1)
    sources = {"q": WeightSource("wq", True), "v": WeightSource("wv", False)}
    linears = tuple(
        LinearSite(
            name=f"attn.{key}",
            node=f"node_{key}",
            activation="x",
            output=key,
            weight=source,
            bias="c" if key == "v" else None,
            bias_scale=BETA if key == "v" else 1.0,
            k=case.k,
            n=case.rows(key),
            dtype=case.dtype,
        )
        for key, source in sources.items()
    )
    return QuantPlan(
        linears=linears,
        weight_format=case.weight_format,
        activation_format=case.activation,
        per_token=case.per_token,
        group_size=case.group_size,
        scale_constraint=case.constraint,
        activation_scales={} if case.per_token or case.activation == "none" else {"x": static_scale(case)},
        tensors={site.name: layer_tensors(dataclasses.replace(case, n=site.n), rng) for site in linears},
    )


def static_scale(case: Case) -> float:
    return 0.02 if case.activation == "int8" else STATIC_SCALE


def layer_tensors(case: Case, rng: np.random.Generator) -> LinearTensors:
    weight = random_weight(case, rng)
    fp8 = case.weight_format == "fp8"
    scale_type = ir.DataType.FLOAT if case.constraint == "none" else ir.DataType.FLOAT8E4M3FN
    scales = weight.group_scales
    return LinearTensors(
        codes=ir.Tensor(weight.codes if fp8 else weight.codes.astype(ml_dtypes.int4)),
        group_scales=None
        if scales is None
        else ir.Tensor(scales.astype(scale_type.numpy()), dtype=scale_type),
        row_scales=ir.Tensor(weight.row_scales),
        **(random_factors(case, rng) if case.lorc else {}),
    )


def random_factors(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """V and U in the layer's type; in FP8 every code but NaN, times any scale."""
    shapes = {"lorc_v": (case.k, case.rank), "lorc_u": (case.rank, case.n)}
    if not case.lorc_fp8:
        arrays = {key: rng.standard_normal(shape).astype(np.float32) * 0.1 for key, shape in shapes.items()}
        return {key: ir.Tensor(a.astype(NUMPY[case.dtype]), dtype=case.dtype) for key, a in arrays.items()}
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    factors = {
        key: ir.Tensor(rng.choice(finite, shape).view(ml_dtypes.float8_e4m3fn))
        for key, shape in shapes.items()
    }
    scales = {f"{key}_scale": rng.uniform(0.5, 2, case.rank).astype(np.float32) * 1e-3 for key in shapes}
    return {**factors, **{key: ir.Tensor(array) for key, array in scales.items()}}


def random_weight(case: Case, rng: np.random.Generator) -> QuantizedWeight:
    """Every code, legal scale and row scale is possible, far beyond what a real weight needs."""
    n, k = case.n, case.k
    rows = np.exp2(rng.uniform(-9, -5, n)).astype(np.float32)
    if case.constraint == "none":
        rows = np.ones(n, np.float32)
    elif case.constraint == "m1":
        rows = np.exp2(np.round(np.log2(rows)))
    if case.weight_format == "fp8":
        codes = rng.uniform(-448, 448, (n, k)).astype(ml_dtypes.float8_e4m3fn)
        return QuantizedWeight(codes, None, rows, k, "fp8", case.group_size, case.constraint)
    width = case.group_size or k
    groups = -(-k // width)
    codes = rng.integers(-7, 8, (n, groups * width)).astype(np.int8)
    codes[:, k:] = 0
    if case.constraint == "none":
        scales = rng.uniform(0.001, 0.1, (n, groups)).astype(np.float32)
    else:
        scales = rng.choice(legal_scales(case.constraint, CODE_BOOKS[case.weight_format]), (n, groups))
    return QuantizedWeight(codes, scales, rows, k, case.weight_format, case.group_size, case.constraint)


def unreadable(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """Make every tensor of the model and the plan raise when it is read; return the plan."""

    def sealed(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
        def refuse() -> ir.TensorProtocol:
            raise AssertionError("a pass read a tensor")

        return None if tensor is None else ir.LazyTensor(refuse, tensor.dtype, ir.Shape(tensor.shape.numpy()))

    known: dict[int, ir.TensorProtocol | None] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.size > 3:  # scales and shapes may be looked at
            value.const_value = sealed(value.const_value)
    tensors = {}
    for layer, old in plan.tensors.items():
        fields = {spec.name: getattr(old, spec.name) for spec in dataclasses.fields(old)}
        new: dict[str, Any] = {
            name: known.setdefault(id(tensor), sealed(tensor)) for name, tensor in fields.items()
        }
        tensors[layer] = LinearTensors(**new)
    return plan.replace(tensors=tensors)


def decoded(plan: QuantPlan, layer: str) -> QuantizedWeight:
    """The layer's weight, read back from the plan's tensors."""
    return plan.quantized_weight(next(site for site in plan.linears if site.name == layer))


def mixed_plan(case: Case, **precisions: SitePrecision) -> QuantPlan:
    """The plan of :func:`float_model` with formats and ranks per layer, ``q`` and ``v``."""
    rng = np.random.default_rng(case.seed + 3)
    plan = make_plan(dataclasses.replace(case, lorc=False))
    named = {f"attn.{key}": precision for key, precision in precisions.items()}
    tensors = dict(plan.tensors)
    for name, precision in named.items():
        lorc = precision.lorc_rank > 0
        wanted: dict[str, Any] = {
            "weight_format": precision.weight_format,
            "lorc": lorc,
            "rank": precision.lorc_rank,
            "n": case.rows(name.removeprefix("attn.")),
        }
        del tensors[name]
        if precision.weight_format != "none":
            tensors[name] = layer_tensors(dataclasses.replace(case, **wanted), rng)
    return plan.replace(tensors=tensors, precisions=named)


def artifact(case: Case, plan: QuantPlan | None = None) -> tuple[ir.Model, QuantPlan]:
    """The model after the rewrite passes."""
    model, plan = float_model(case), plan or make_plan(case)
    for pass_ in (QuantizeActivations(plan), QuantizeWeights(plan), AddLoRC(plan), RemoveUnused()):
        pass_.call(model)
    return model, plan


def quantized_activation(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x8 and a of DESIGN section 2, in float32 as the graph computes them, returned as float64."""
    if case.activation == "none":
        return x.astype(np.float64), np.float64(1)
    x32 = x.astype(np.float32)
    if case.per_token:
        amax = np.abs(x32).max(axis=-1, keepdims=True)
        a = np.maximum(amax, np.float32(1e-30)) / np.float32(LARGEST[case.activation])
    else:
        a = np.array(static_scale(case), np.float32)
    scaled = x32 / a
    if case.activation == "int8":
        return np.clip(np.rint(scaled), -128, 127).astype(np.float64), a.astype(np.float64)
    return MINI_FLOATS[case.activation].round(scaled).astype(np.float64), a.astype(np.float64)


def factors(case: Case, tensors: LinearTensors) -> tuple[np.ndarray, np.ndarray]:
    """V and U as the graph multiplies by them: FP8 times scale in float32, rounded to the layer's type."""
    assert tensors.lorc_v is not None and tensors.lorc_u is not None
    v, u = (t.numpy().astype(np.float32) for t in (tensors.lorc_v, tensors.lorc_u))
    if case.lorc_fp8:
        assert tensors.lorc_v_scale is not None and tensors.lorc_u_scale is not None
        v = v * tensors.lorc_v_scale.numpy()[None, :]
        u = u * tensors.lorc_u_scale.numpy()[:, None]
    # Tests run BFLOAT16 models as FLOAT.
    dtype = np.dtype(np.float32) if case.dtype == ir.DataType.BFLOAT16 else NUMPY[case.dtype]
    return v.astype(dtype).astype(np.float64), u.astype(dtype).astype(np.float64)


def reference(case: Case, plan: QuantPlan, model: ir.Model, layer: str, x: np.ndarray) -> np.ndarray:
    """y = a R (x8 @ w8^T) + (x @ V) @ U + beta C in float64; ``model`` is the float model with the bias."""
    weight, tensors = decoded(plan, layer), plan.tensors[layer]
    x8, a = quantized_activation(case, x)
    y: np.ndarray = a * (x8 @ weight.fp8_weight().astype(np.float64).T) * weight.row_scales.astype(np.float64)
    if tensors.lorc_v is not None and tensors.lorc_u is not None:
        v, u = factors(case, tensors)
        y = y + (x.astype(np.float64) @ v) @ u
    site = next(site for site in plan.linears if site.name == layer)
    if site.bias is not None:
        bias = model.graph.initializers[site.bias].const_value
        assert bias is not None
        y = y + site.bias_scale * bias.numpy().astype(np.float64).reshape(-1)
    return y
