"""One zqfp::QuantizeSiluMul, QuantizeRmsNorm, ... as a model, its inputs, and what it computes in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rewrite_models import NUMPY

from zqfp_compile.backends.ort import create_session
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.kernels.reference import rms_norm, silu_mul

EPSILON = 0.25  # of a size that shows
STATIC_SCALE = 0.011
F32, E4M3 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
UNIT = {F32: 2e-6, ir.DataType.FLOAT16: 2**-10, ir.DataType.BFLOAT16: 2**-7}
MOST_CODES_OFF = 0.005


@dataclass(frozen=True)
class Fused:
    """One variant of the operators.

    Attributes:
        norm: Whether it is the norm; else SiLU times up.
        plain: Whether it is neither: QuantizeActivation or QuantizeTokens.
        skip: Whether the norm's x is a sum.
        tokens: Whether each token has a scale of its own.
        dtype: Type of everything but x8 and a.
        rank: Columns of V; 0 without.
        k: The last dimension.
    """

    norm: bool = False
    plain: bool = False
    skip: bool = False
    tokens: bool = False
    dtype: ir.DataType = F32
    rank: int = 0
    k: int = 208

    def __str__(self) -> str:
        kind = "norm" + "+skip" * self.skip if self.norm else "plain" if self.plain else "silu"
        scale = "token" if self.tokens else "tensor"
        return f"{kind}-{scale}-{self.dtype.name.lower()}-r{self.rank}-k{self.k}"


FUSED: tuple[dict[str, bool], ...] = ({}, {"norm": True}, {"norm": True, "skip": True})


def variants(kinds: Sequence[dict[str, bool]] = FUSED, **fixed: Any) -> list[Fused]:
    """Every operator with both scales, with and without LoRC."""
    scales = ({"tokens": False}, {"tokens": True})
    return [
        Fused(**{**kind, **scale, "rank": rank, **fixed})
        for kind in kinds
        for scale in scales
        for rank in (0, 16)
    ]


def inputs(case: Fused, *shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs by name, in the operator's order: activations of ``shape`` + [k]."""
    rng = np.random.default_rng(seed)

    def random(*dims: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(dims) * scale).astype(NUMPY[case.dtype])

    feeds = {"x": random(*shape, case.k, scale=3)}
    if case.norm:
        feeds["gamma"] = random(case.k)
    elif not case.plain:
        feeds["up"] = random(*shape, case.k)
    if case.skip:
        feeds["skip"] = random(*shape, case.k, scale=20)
    if not case.tokens:
        feeds["a"] = np.array(STATIC_SCALE, np.float32)
    if case.rank:
        feeds["v"] = random(case.k, case.rank, scale=0.1)
    return feeds


def model(case: Fused) -> ir.Model:
    """One node whose inputs are those of :func:`inputs`, and whose outputs are x8, a, xv and sum."""
    activation = ir.Shape(["batch", case.k])
    shapes = {
        **dict.fromkeys(("x", "up", "skip"), activation),
        "gamma": ir.Shape([case.k]),
        "a": ir.Shape([]),
        "v": ir.Shape([case.k, case.rank]),
    }
    values = [_value(name, F32 if name == "a" else case.dtype, shapes[name]) for name in inputs(case, 0)]
    outputs = [_value("x8", E4M3, activation)]
    outputs += [_value("a.out", F32, ir.Shape(["batch", 1]))] * case.tokens
    outputs += [_value("xv", case.dtype, ir.Shape(["batch", case.rank]))] * (case.rank > 0)
    outputs += [_value("sum", case.dtype, activation)] * case.skip
    attributes = [ir.AttrInt64("lorc_rank", case.rank)]
    if not case.plain:
        attributes.append(ir.AttrInt64("tokens", int(case.tokens)))
    if case.norm:
        attributes += [ir.AttrInt64("skip", int(case.skip)), ir.AttrFloat32("epsilon", EPSILON)]
    op_type = "QuantizeRmsNorm" if case.norm else "QuantizeSiluMul"
    if case.plain:
        op_type = "QuantizeTokens" if case.tokens else "QuantizeActivation"
    node = ir.Node("zqfp", op_type, values, attributes, outputs=outputs, name="node")
    graph = ir.Graph(values, outputs, nodes=[node], opset_imports={"": 21, "zqfp": 1}, name="g")
    return ir.Model(graph, ir_version=10)


def with_constants(case: Fused) -> ir.Model:
    """The model with all but its activations stored."""
    made, feeds = model(case), inputs(case, 0)
    for value in [value for value in made.graph.inputs if value.name in ("gamma", "a", "v")]:
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(feeds[str(value.name)])
        made.graph.register_initializer(value)
    return made


def _value(name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)


def session_of(graph: ir.Model, library: Path, **options: Any) -> Any:
    """A session of ONNX Runtime with our custom ops."""
    return create_session(ir.to_proto(graph).SerializeToString(), custom_ops=library, **options)


def run(session: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name: x8's codes as uint8, the others as float64."""
    binding = session.io_binding()
    for name, x in feeds.items():
        binding.bind_ortvalue_input(name, ort_value(x))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    outputs = {}
    for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        dtype = ir.DataType(value.element_type())
        array = np.frombuffer(raw, NUMPY.get(dtype, np.dtype(np.uint8))).reshape(value.shape())
        outputs[output.name] = array if dtype == E4M3 else array.astype(np.float64)
    return outputs


def check(case: Fused, got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Both compute in float32 and round once, so they have almost the same h.

    It is at most a unit in the last place of its type apart, and seldom. What follows from that: sums of h
    within a unit of the largest, and FP8 codes one step apart where h lay at a boundary. FLOAT16 has 128
    numbers to each step of E4M3, BFLOAT16 16: 1 in 200 codes at most.
    """
    same(got, wanted, UNIT[case.dtype], MOST_CODES_OFF)
    assert np.array_equal(got.get("sum", 0), wanted.get("sum", 0))


def same(
    got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], unit: float, most_codes_off: float
) -> None:
    """At most that share of codes is a step off, and numbers are within ``unit`` of the largest."""
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in wanted.items()}
    steps = code_steps(got["x8"], wanted["x8"])
    assert steps.max() <= 1 and (steps > 0).mean() <= most_codes_off
    for name in set(wanted) - {"x8"}:
        assert np.abs(got[name] - wanted[name]).max() <= unit * np.abs(wanted[name]).max(), name


def ort_value(x: np.ndarray) -> Any:
    """``x`` for ONNX Runtime, whose Python API does not know numpy's bfloat16."""
    import onnxruntime as ort

    if x.dtype == NUMPY[ir.DataType.BFLOAT16]:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), int(ir.DataType.BFLOAT16))
    return ort.OrtValue.ortvalue_from_numpy(x)


def reference(case: Fused, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What zqfp.h says, in float64 but for the roundings to the type and those of the quantiser."""
    outputs: dict[str, np.ndarray] = {}
    if case.norm:
        s, exact = rms_norm(feeds["x"], feeds.get("skip"), feeds["gamma"], EPSILON)
        outputs |= {"sum": s.astype(np.float64)} if case.skip else {}
    else:
        exact = silu_mul(feeds["x"], feeds["up"])
    h32 = exact.astype(np.float32).astype(NUMPY[case.dtype]).astype(np.float32)
    a = feeds.get("a")
    if a is None:
        a = np.maximum(np.abs(h32).max(-1, keepdims=True), np.float32(1e-30)) / np.float32(448)
        outputs["a.out"] = a.astype(np.float64)
    outputs["x8"] = E4M3FN.encode(h32 / a).view(np.uint8)
    if case.rank:
        outputs["xv"] = h32.astype(np.float64) @ feeds["v"].astype(np.float64)
    return outputs


def code_steps(codes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """By how many E4M3 numbers the codes differ; -0 is 0."""

    def position(array: np.ndarray) -> np.ndarray:
        magnitude = (array & 0x7F).astype(np.int64)
        return np.where(array & 0x80, -magnitude, magnitude)

    steps: np.ndarray = np.abs(position(codes) - position(wanted))
    return steps
