"""The CPU kernels of the custom-op library, through ONNX Runtime, against the fp8 lowering and float64.

Per linear, on identical input. Both sides sum the same products in float32 in another order: they differ by
rounding only, 1e-6 of the largest output for FLOAT. For FLOAT16 the fp8 lowering rounds the product, the
branch and the sum to half each, ours once: two units in the last place of the largest output, 2^-9.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from gated_layers import gated
from rewrite_models import NUMPY, Case, artifact, float_model, quantized_activation, reference

from passes._plugin_ops import Product
from passes.lower_weights_fp8 import LowerWeightsFp8
from passes.lower_weights_plugin import LowerWeightsPlugin
from passes.remove_unused import RemoveUnused
from zqfp_compile.backends.ort import create_session
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.kernels.reference import silu_mul

ort = pytest.importorskip("onnxruntime")

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TOLERANCE = {F32: 1e-6, F16: 2**-9}
# SmolLM2's linears, and shapes that fill no block of the kernel's order.
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (8, 16), (72, 80), (200, 208)]


@pytest.fixture(scope="module")
def library(make) -> Path:
    return make("onnxruntime-ops") / "libzqfp_onnxruntime.so"


def hosted_case(n: int, k: int, number: int, **changes: Any) -> Case:
    """A case of the given shape whose other options vary with ``number``."""
    lorc = ({}, {"lorc": True, "rank": 16}, {"lorc": True, "lorc_fp8": True, "rank": 12})[number % 3]
    options = {
        "group_size": (32, 64, 128)[number % 3],
        "constraint": ("e4m3", "m2", "m1")[number // 2 % 3],
        "per_token": bool(number % 2),
        "seed": number,
        **lorc,
    }
    return Case(n=n, k=k, **{**options, **changes})


def lower(case: Case) -> tuple[ir.Model, ir.Model, Any]:
    """The model with our ops, the fp8 lowering, and the plan."""
    model, plan = artifact(case)
    ours, standard = model.clone(), model
    result = LowerWeightsPlugin(plan).call(ours)
    assert result.declined == ()
    LowerWeightsFp8(plan).call(standard)
    for lowered in (ours, standard):
        RemoveUnused().call(lowered)
    return ours, standard, plan


def open_session(model: ir.Model, library: Path | None = None, **options: Any) -> Any:
    return create_session(ir.to_proto(model).SerializeToString(), custom_ops=library, **options)


def inputs(case: Case, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(case.seed + 9)
    return (rng.standard_normal((*shape, case.k)) * rng.uniform(0.1, 2)).astype(NUMPY[case.dtype])


def error(values: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(values.astype(np.float64) - exact.astype(np.float64)).max() / np.abs(exact).max())


CASES = [
    hosted_case(n, k, number, dtype=dtype) for dtype in (F32, F16) for number, (n, k) in enumerate(SHAPES)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-n{case.n}-g{case.group_size}")
def test_every_linear_equals_the_fp8_lowering(case, library):
    ours, standard, plan = lower(case)
    x = inputs(case, 7)
    got, wanted = open_session(ours, library).run(None, {"x": x}), open_session(standard).run(None, {"x": x})
    for layer, y, y8 in zip(("attn.q", "attn.v"), got, wanted, strict=True):
        assert y.dtype == NUMPY[case.dtype] and y.shape == (7, case.n)
        assert error(y, y8) < TOLERANCE[case.dtype]
        exact = reference(case, plan, float_model(case), layer, x)
        assert error(y, exact) < max(TOLERANCE[case.dtype], error(y8, exact))


@pytest.mark.parametrize("per_token", [False, True])
def test_bfloat16(per_token, library):
    """ONNX Runtime's CPU provider has no bfloat16 nodes, but ours are all this graph has."""
    case = hosted_case(72, 80, 0, dtype=BF16, per_token=per_token)
    ours, _, plan = lower(case)
    x = inputs(case, 3)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), int(BF16))
    session = open_session(ours, library)
    results = session.run_with_ort_values(None, {"x": value})
    for layer, y in zip(("attn.q", "attn.v"), results, strict=True):
        assert y.element_type() == int(BF16)
        exact = reference(case, plan, float_model(case), layer, x)
        got = np.frombuffer(bytes_of(y), np.uint16).view(NUMPY[BF16]).reshape(3, case.n)
        assert error(got, exact) < 2**-8


def bytes_of(value: Any) -> bytes:
    """The content of a tensor whose type numpy does not have."""
    import ctypes

    return ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("n", "v_n"), [(192, 72), (64, 576), (72, 128)])
def test_one_product_of_several_layers_gives_the_bits_of_each(n, v_n, number, dtype, library, monkeypatch):
    case = hosted_case(n, 208, number, v_n=v_n, dtype=dtype)
    merged, _, _ = lower(case)
    alone = "passes.lower_weights_plugin.products"
    monkeypatch.setattr(alone, lambda linears: [Product([item]) for item in linears])
    apart, _, _ = lower(case)
    assert [sum(node.op_type == "PackedW4A8Linear" for node in model.graph) for model in (merged, apart)] == [
        1,
        2,
    ]
    for rows in (1, 7, 33, 0):
        x = inputs(case, rows)
        got, wanted = (open_session(model, library).run(None, {"x": x}) for model in (merged, apart))
        for y, exact, width in zip(got, wanted, (n, v_n), strict=True):
            assert y.shape == (rows, width) and y.tobytes() == exact.tobytes()


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("number", range(3))
def test_a_gated_layer_gives_the_silu_product_of_gate_and_up(number, dtype, library):
    """Of those that are apart, as they are outputs, in float64: h is computed in float32 and rounded once.

    Half a unit in the last place and the roundings of float32 before it, with FLOAT those alone: 2^-22.
    """
    case = hosted_case(72, 208, number, dtype=dtype)
    x, results = inputs(case, 33), []
    for outputs in (("h",), ("gate", "up")):
        model, plan = gated(case, outputs=outputs)
        LowerWeightsPlugin(plan).call(model)
        RemoveUnused().call(model)
        assert sum(node.op_type == "PackedW4A8Linear" for node in model.graph) == len(outputs)
        results += [y.astype(np.float64) for y in open_session(model, library).run(None, {"x": x})]
    h, gate, up = results
    exact = silu_mul(gate, up)
    assert h.shape == (33, 72) and np.abs(exact).max() > 1
    unit, smallest = {F32: (2**-22, 1e-37), F16: (1.001 * 2**-11, 2**-25)}[dtype]
    assert (np.abs(h - exact) <= unit * np.abs(exact) + smallest).all()


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("per_token", [False, True])
def test_activations_are_quantised_bit_for_bit_as_by_the_standard_nodes(dtype, per_token, library):
    """Every float16 number, and per token rows of zeros, of tiny and of huge numbers."""
    case = hosted_case(8, 64, 0, dtype=dtype, per_token=per_token)
    ours, _, _ = lower(case)
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)].astype(NUMPY[dtype])
    x = np.resize(x, (len(x) // 64 + 1, 64))
    x[:4] = np.array([0, 1e-7, 3, 65504], NUMPY[dtype])[:, None] * np.linspace(-1, 1, 64)
    expose(ours, "x.x8")
    got = open_session(ours, library).run_with_ort_values(["x.x8"], {"x": ort_value(x)})[0]
    x8, _ = quantized_activation(case, x)
    wanted = E4M3FN.encode(x8).view(np.uint8)
    codes = np.frombuffer(bytes_of(got), np.uint8).reshape(x.shape)
    assert np.array_equal(np.where(codes == 0x80, 0, codes), np.where(wanted == 0x80, 0, wanted))


def ort_value(x: np.ndarray) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(x)


def expose(model: ir.Model, name: str) -> None:
    model.graph.outputs.append(next(o for node in model.graph for o in node.outputs if o.name == name))


@pytest.mark.parametrize("number", [0, 1])
def test_rank_and_size_of_the_batch(number, library):
    """Activations of one, two and three dimensions; empty ones; more rows than fit in a tile."""
    case = hosted_case(72, 80, number, lorc=True, rank=16)
    plan_model, _, _ = lower(case)
    by_row = open_session(plan_model, library)
    x = inputs(case, 61)
    whole = by_row.run(None, {"x": x})
    for row in (0, 60):
        for part, full in zip(by_row.run(None, {"x": x[row : row + 1]}), whole, strict=True):
            assert np.array_equal(part[0], full[row])
    assert [y.shape for y in by_row.run(None, {"x": x[:0]})] == [(0, 72)] * 2
    for shape in ((61, 1), (1, 61), ()):
        model = plan_model.clone()
        model.graph.inputs[0].shape = ir.Shape([*shape, case.k])
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
        rows = x.reshape(*shape, case.k) if shape else x[0]
        for part, full in zip(open_session(model, library).run(None, {"x": rows}), whole, strict=True):
            assert part.shape == (*shape, 72)
            assert np.array_equal(part.reshape(-1, 72), full[: part.size // 72])


@pytest.mark.parametrize("level", [True, False])
def test_threads_and_optimisation_levels_change_no_bit(level, library):
    case = hosted_case(200, 208, 1, lorc=True, rank=16, dtype=F16)
    ours, _, _ = lower(case)
    x = inputs(case, 33)
    first = open_session(ours, library, threads=1).run(None, {"x": x})
    other = open_session(ours, library, threads=3, optimize=level).run(None, {"x": x})
    assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_artifact_still_runs_in_a_session_with_the_library(library):
    """The ops have names of their own: a custom op would beat the function, and not know its codes."""
    case = hosted_case(72, 80, 1)
    model, _ = artifact(case)
    x = inputs(case, 5)
    with_library = open_session(model, library).run(None, {"x": x})
    assert all(
        np.array_equal(a, b)
        for a, b in zip(with_library, open_session(model).run(None, {"x": x}), strict=True)
    )


def damaged(case: Case, change: Any) -> ir.Model:
    model, _, _ = lower(case)
    for value in (o for node in model.graph for o in node.outputs):
        value.shape = None
    model.graph.outputs[0].shape = None
    change({str(node.name): node for node in model.graph}, model.graph.initializers)
    return model


def set_attribute(node: ir.Node, name: str, value: int) -> None:
    node.attributes[name] = ir.AttrInt64(name, value)


def set_outputs(node: ir.Node, *sizes: int) -> None:
    node.attributes["output_n"] = ir.AttrInt64s("output_n", sizes)


BAD = [
    ("n", lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "n", 128), "codes have 8192 elements"),
    ("n-small", lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "n", 64), "row_scales has shape"),
    ("k", lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "k", 48), "x8 has shape"),
    ("negative", lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "n", -8), "must be positive"),
    ("group", lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "group_size", 16), "32, 64 or 128"),
    (
        "dtype",
        lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "dtype", 7),
        "does not match expected type",
    ),
    ("bias", lambda nodes, _: set_attribute(nodes["attn.v/MatMul"], "bias", 0), "has 8 inputs"),
    ("rank", lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "lorc_rank", 8), "xv has shape"),
    ("token", lambda nodes, _: set_attribute(nodes["attn.q/MatMul"], "per_token", 1), "a has shape"),
    (
        "quantizer",
        lambda nodes, _: set_attribute(nodes["x.quantize"], "lorc_rank", 0),
        "QuantizeActivation has 3",
    ),
    ("v", lambda nodes, _: set_attribute(nodes["x.quantize"], "lorc_rank", 24), "Mismatch between the sum"),
    ("outputs", lambda nodes, _: set_outputs(nodes["attn.q/MatMul"], 32, 24), "does not divide n = 56"),
    ("missing", lambda nodes, _: set_outputs(nodes["attn.q/MatMul"], 56, 0), "does not divide n = 56"),
    ("many", lambda nodes, _: set_outputs(nodes["attn.q/MatMul"], *[64] * 5), "at most 4 parts"),
]


@pytest.mark.parametrize(("change", "says"), [item[1:] for item in BAD], ids=[item[0] for item in BAD])
def test_wrong_nodes_are_errors_of_onnx_runtime(change, says, library):
    """Raised when the session opens or runs, whichever can know."""
    case = hosted_case(56, 64, 0, lorc=True, rank=16)
    model = damaged(case, change)
    with pytest.raises(Exception, match=says) as caught:
        open_session(model, library).run(None, {"x": inputs(case, 3)})
    assert type(caught.value).__module__.startswith("onnxruntime")


def test_codes_that_are_computed_are_refused(library):
    case = hosted_case(56, 64, 0)
    ours, _, _ = lower(case)
    model = ours.clone()
    stored = model.graph.initializers.pop("attn.q/packed_codes")
    stored.const_value = None
    model.graph.inputs.append(stored)
    with pytest.raises(Exception, match="codes is not an initializer"):
        open_session(model, library)


def test_without_the_library_the_model_is_refused_by_name():
    ours, _, _ = lower(hosted_case(56, 64, 0))
    with pytest.raises(Exception, match="zqfp"):
        open_session(ours)


def test_cases_cover_what_the_kernel_takes():
    seen = {(case.group_size, case.per_token, case.branch) for case in CASES}
    assert {item[0] for item in seen} == {32, 64, 128} and {item[2] for item in seen} == {
        "plain",
        "lorc",
        "lorc8",
    }
    assert {case.constraint for case in CASES} == {"m1", "m2", "e4m3"}
    assert dataclasses.replace(CASES[0], dtype=F16) in CASES
