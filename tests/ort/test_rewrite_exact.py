"""Every variant of W4A8Linear in ONNX Runtime against the equation of DESIGN section 2 in float64."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import (
    NUMPY,
    Case,
    artifact,
    decoded,
    float_model,
    make_plan,
    mixed_plan,
    quantized_activation,
    reference,
)

from passes.inline_functions import InlineFunctions
from passes.lower_weights_fp8 import LowerWeightsFp8
from passes.quantize_activations import QuantizeActivations
from passes.remove_unused import RemoveUnused
from zqfp_compile import specs
from zqfp_compile.plan import SitePrecision

pytest.importorskip("onnxruntime")
LAYERS = ("attn.q", "attn.v")

# Relative to the largest output. FLOAT: accumulation over K = 72 in float32, measured 4e-7. FLOAT16: y, the
# LoRC products and the sum with the bias are each rounded to 11 bits, 2^-11 = 5e-4 at a time.
# BFLOAT16 runs as FLOAT (see _without_bfloat16).
TOLERANCE = {ir.DataType.FLOAT: 2e-6, ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 2e-6}

WEIGHTS = [*itertools.product(("e2m1", "e3m0", "int4"), ("none", "m1", "m2", "e4m3")), ("fp8", "e4m3")]
BRANCHES = [(False, 64), (False, 72), (True, 72)]  # LoRC or not; K = 72 pads the last group of 16
CASES = [
    Case(weights, constraint, activation, per_token, dtype, lorc, k)
    for (weights, constraint), (activation, per_token), dtype, (lorc, k) in itertools.product(
        WEIGHTS, [("e4m3", False), ("e4m3", True), ("none", False)], NUMPY, BRANCHES
    )
]
CASES += [  # one group a row; an odd K leaves an odd number of 4-bit codes in a row
    Case(weights, constraint, k=71, group_size=0, lorc=True)
    for weights, constraint in [("e2m1", "none"), ("e2m1", "e4m3"), ("int4", "m2")]
]
CASES += [
    Case(activation=activation, per_token=per_token, lorc=True)
    for activation, per_token in itertools.product(("e5m2", "int8"), (False, True))
]
CASES += [
    # Not BFLOAT16: as FLOAT the body does not round the decoded factors, the lowered form did.
    Case(weights, dtype=dtype, per_token=per_token, lorc=True, lorc_fp8=True, k=72)
    for weights, dtype, per_token in itertools.product(
        ("e2m1", "fp8"), (ir.DataType.FLOAT, ir.DataType.FLOAT16), (False, True)
    )
]


def _without_bfloat16(model: ir.Model) -> ir.Model:
    """BFLOAT16 -> FLOAT everywhere: ONNX Runtime's CPU provider has no bfloat16 MatMul or Add."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in itertools.chain.from_iterable(graph.all_nodes() for graph in graphs):
        to = node.attributes.get("to")
        if to is not None and to.as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
            if value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32))
    return model


def _run(model: ir.Model, x: np.ndarray, *, optimize: bool = True) -> list[np.ndarray]:
    from zqfp_compile.backends.ort import create_session

    proto = ir.to_proto(_without_bfloat16(model))
    session = create_session(proto.SerializeToString(), optimize=optimize, threads=1)
    if x.dtype not in (np.float32, np.float16):
        x = x.astype(np.float32)
    return session.run(None, {"x": x})


def _inputs(case: Case) -> np.ndarray:
    """Tokens of very different size, one of them all zeros."""
    rng = np.random.default_rng(case.seed + 2)
    x = rng.standard_normal((6, case.k)) * np.array([[1], [0.01], [0], [1], [0.3], [1]])
    return x.astype(np.float32).astype(NUMPY[case.dtype])


def _assert_close(case: Case, got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape and np.isfinite(got).all()
    error = np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert error <= TOLERANCE[case.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_artifact_and_lowered_forms(case):
    """The artifact meets the equation; unoptimised, FP8-lowered and inlined it gives the same."""
    model, plan = artifact(case)
    x = _inputs(case)
    outputs = _run(model, x)
    for y, layer in zip(outputs, LAYERS, strict=True):
        _assert_close(case, y, reference(case, plan, float_model(case), layer, x))
    # Unfolded weights may take another float32 GEMM kernel: the same tolerance, against our own output.
    for y, plain in zip(outputs, _run(artifact(case)[0], x, optimize=False), strict=True):
        _assert_close(case, plain, y.astype(np.float64))
    for lowering in (LowerWeightsFp8(plan), InlineFunctions()):
        lowered, _ = artifact(case)
        lowering.call(lowered)
        RemoveUnused().call(lowered)
        for y, other in zip(outputs, _run(lowered, x), strict=True):
            assert np.array_equal(y, other), f"{lowering.name} is not bit-equal"


@pytest.mark.parametrize(
    "case",
    [
        Case(weights, constraint, k=k, group_size=group_size)
        for weights, constraint in WEIGHTS
        for k, group_size in [(64, 16), (72, 16), (71, 0)]
    ],
    ids=str,
)
@pytest.mark.parametrize("optimize", [False, True])
def test_decoded_weight_is_bit_equal_to_numpy(case, optimize):
    model, plan = artifact(case)
    InlineFunctions().call(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[f"{layer}/w_hat"] for layer in LAYERS)
    for layer in LAYERS:
        values[f"{layer}/w_hat"].shape = ir.Shape([case.n, case.k])
    weights = _run(model, _inputs(case), optimize=optimize)[len(LAYERS) :]
    for layer, w_hat in zip(LAYERS, weights, strict=True):
        assert np.array_equal(w_hat, decoded(plan, layer).dequantize())


MIXED = [
    *itertools.product([SitePrecision("e2m1", 0), SitePrecision("none", 0)], [SitePrecision("fp8", 3)]),
    *itertools.product([SitePrecision("fp8", 0)], [SitePrecision("none", 0), SitePrecision("e2m1", 2)]),
    (SitePrecision("int4", 1), SitePrecision("e3m0", 5)),
]


@pytest.mark.parametrize("lorc_fp8", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("q", "v"), MIXED, ids=str)
def test_layers_of_different_formats_and_ranks(q, v, per_token, lorc_fp8):
    case = Case(dtype=ir.DataType.FLOAT16, per_token=per_token, lorc_fp8=lorc_fp8, k=72)
    plan = mixed_plan(case, q=q, v=v)
    model, _ = artifact(case, plan)
    specs.check(model, "quantized")
    x = _inputs(case)
    outputs = _run(model, x)
    for y, layer in zip(outputs, LAYERS, strict=True):
        if layer in plan.tensors:
            _assert_close(case, y, reference(case, plan, float_model(case), layer, x))
    untouched = _run(float_model(case), x)
    for y, plain, precision in zip(outputs, untouched, (q, v), strict=True):
        assert np.array_equal(y, plain) == (precision.weight_format == "none")
    for lowering in (LowerWeightsFp8(plan), InlineFunctions()):
        lowered, _ = artifact(case, plan)
        lowering.call(lowered)
        RemoveUnused().call(lowered)
        specs.check(lowered, "engine")
        for y, other in zip(outputs, _run(lowered, x), strict=True):
            assert np.array_equal(y, other), f"{lowering.name} is not bit-equal"


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_activations_alone_are_a_standard_model(per_token, dtype):
    """``--weights none`` stops after quantize-activations: float weights on dequantised activations."""
    case = Case(per_token=per_token, dtype=dtype)
    model, plan = float_model(case), make_plan(case)
    QuantizeActivations(plan).call(model)
    x = _inputs(case)
    got = _run(model, x)[0]
    x8, a = quantized_activation(case, x)
    weight = float_model(case).graph.initializers["wq"].const_value.numpy().astype(np.float64)
    _assert_close(case, got, (x8 * a) @ weight)


def test_the_saved_artifact_runs(tmp_path):
    """Overloads, INT4 and FP8 tensors survive external data on disk."""
    from zqfp_compile.backends.ort import create_session
    from zqfp_compile.model_io import save_model

    case = Case(lorc=True, k=72)
    model, _ = artifact(case)
    x = _inputs(case)
    expected = _run(artifact(case)[0], x)
    save_model(model, tmp_path / "model.onnx")
    got = create_session(tmp_path / "model.onnx", threads=1).run(None, {"x": x})
    assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
