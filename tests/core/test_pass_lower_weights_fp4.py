from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from rewrite_models import Case, artifact, decoded, float_model, make_plan, mixed_plan, reference, unreadable

from passes.lower_weights_fp4 import LowerWeightsFp4
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import SitePrecision

LAYERS = ("attn.q", "attn.v")


@pytest.mark.parametrize(
    ("name", "case"),
    [("lower_weights_fp4", Case(lorc=True)), ("lower_weights_fp4_padded", Case(k=72, constraint="none"))],
)
def test_golden(name, case, run_pass, golden):
    model, plan = artifact(case)
    assert run_pass(LowerWeightsFp4(plan), model).modified
    golden(name, model)


@pytest.mark.parametrize("constraint", ["none", "m1", "m2", "e4m3"])
@pytest.mark.parametrize(("k", "group_size"), [(64, 16), (72, 16), (71, 0)])
@pytest.mark.parametrize("per_token", [False, True])
def test_onnx_reference_agrees(constraint, k, group_size, per_token):
    case = Case(constraint=constraint, k=k, per_token=per_token, lorc=True, group_size=group_size)
    model, plan = artifact(case)
    LowerWeightsFp4(plan).call(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    x = np.random.default_rng(3).standard_normal((5, k)).astype(np.float32)
    for y, layer in zip(ReferenceEvaluator(proto).run(None, {"x": x}), LAYERS, strict=True):
        wanted = reference(case, plan, float_model(case), layer, x)
        # float32 accumulation over K = 72 against float64: measured 1e-7.
        assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_fp8_layers_keep_eight_bits():
    case = Case(k=72, lorc_fp8=True)
    plan = mixed_plan(case, q=SitePrecision("fp8", 3), v=SitePrecision("e2m1", 2))
    model, _ = artifact(case, plan)
    LowerWeightsFp4(plan).call(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert model.graph.initializers["attn.q.codes"].dtype == ir.DataType.FLOAT8E4M3FN
    assert model.graph.initializers["attn.v/w4"].dtype == ir.DataType.FLOAT4E2M1
    x = np.random.default_rng(3).standard_normal((5, 72)).astype(np.float32)
    for y, layer in zip(ReferenceEvaluator(proto).run(None, {"x": x}), LAYERS, strict=True):
        wanted = reference(case, plan, float_model(case), layer, x)
        # float32 accumulation over K = 72 against float64: measured 1e-7.
        assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_one_layer_of_another_format_is_an_error():
    plan = mixed_plan(Case(), q=SitePrecision("int4", 0))
    model, _ = artifact(Case(), plan)
    with pytest.raises(PassError, match=r"--emit fp4: .* the weights are e2m1, int4"):
        LowerWeightsFp4(plan).call(model)


def test_the_decoded_weight_is_bit_equal():
    model, plan = artifact(Case(k=72))
    LowerWeightsFp4(plan).call(model)
    w_hat = next(v for node in model.graph for v in node.outputs if v.name == "attn.q/w_hat")
    w_hat.shape = ir.Shape([48, 72])
    model.graph.outputs[:] = [w_hat]
    got = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": np.zeros((1, 72), np.float32)})[0]
    assert np.array_equal(got, decoded(plan, "attn.q").dequantize())


def test_types_and_versions():
    model, plan = artifact(Case(k=72))
    LowerWeightsFp4(plan).call(model)
    weight = model.graph.initializers["attn.q/w4"].const_value
    assert weight.dtype == ir.DataType.FLOAT4E2M1 and tuple(weight.shape) == (48, 80)
    assert weight.nbytes == 48 * 80 // 2 == len(weight.tobytes())
    assert model.graph.opset_imports[""] >= 23 and model.ir_version >= 11 and not model.functions


@pytest.mark.parametrize("weight_format", ["e3m0", "int4", "fp8"])
def test_other_formats_have_no_standard_type(weight_format):
    model, plan = artifact(Case(weight_format=weight_format))
    with pytest.raises(PassError, match=rf"--emit fp4: .* the weights are {weight_format}"):
        LowerWeightsFp4(plan).call(model)


def test_nothing_to_do_without_linears(run_pass):
    assert not run_pass(LowerWeightsFp4(make_plan(Case())), float_model(Case())).modified


def test_no_tensor_is_read():
    model, plan = artifact(Case(lorc=True))
    assert LowerWeightsFp4(unreadable(model, plan)).call(model).modified
