from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import Case, artifact, decoded, float_model, make_plan, unreadable

from passes.lower_weights_fp8 import LowerWeightsFp8
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from passes.remove_unused import RemoveUnused
from zqfp_compile.pass_base import PassError


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("lower_weights_fp8_lorc", Case(dtype=ir.DataType.FLOAT16, lorc=True)),
        ("lower_weights_fp8_token", Case(per_token=True)),
        ("lower_weights_fp8_unrounded", Case(constraint="none", activation="none")),
    ],
)
def test_golden(name, case, run_pass, golden):
    model, plan = artifact(case)
    assert run_pass(LowerWeightsFp8(plan), model).modified
    RemoveUnused().call(model)
    golden(name, model)


@pytest.mark.parametrize("weight_format", ["e2m1", "e3m0", "int4"])
@pytest.mark.parametrize("constraint", ["m1", "m2", "e4m3"])
@pytest.mark.parametrize("k", [64, 72])
def test_weights_are_exact(weight_format, constraint, k):
    model, plan = artifact(Case(weight_format=weight_format, constraint=constraint, k=k))
    LowerWeightsFp8(plan).call(model)
    for layer in ("attn.q", "attn.v"):
        stored = model.graph.initializers[f"{layer}/w8"].const_value
        assert stored.dtype == ir.DataType.FLOAT8E4M3FN and tuple(stored.shape) == (48, k)
        assert np.array_equal(stored.numpy().astype(np.float32), decoded(plan, layer).fp8_weight())


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_fp8_factors_are_decoded_to_the_type_of_y(dtype, run_pass):
    """Float32 product, then one rounding: bit for bit what the function body computes."""
    case = Case(lorc=True, lorc_fp8=True, dtype=dtype)
    model, plan = artifact(case)
    run_pass(LowerWeightsFp8(plan), model)
    for layer in ("attn.q", "attn.v"):
        tensors = plan.tensors[layer]
        wanted = {
            "lorc_v": tensors.lorc_v.numpy().astype(np.float32) * tensors.lorc_v_scale.numpy(),
            "lorc_u": tensors.lorc_u.numpy().astype(np.float32) * tensors.lorc_u_scale.numpy()[:, None],
        }
        for name, values in wanted.items():
            stored = model.graph.initializers[f"{layer}/{name}"].const_value
            assert stored.dtype == dtype
            assert np.array_equal(stored.numpy(), values.astype(dtype.numpy()))


def test_shared_factors_are_decoded_once(run_pass):
    case = Case(lorc=True, lorc_fp8=True)
    plan = make_plan(case)
    model, plan = artifact(case, plan.replace(tensors=dict.fromkeys(plan.tensors, plan.tensors["attn.q"])))
    run_pass(LowerWeightsFp8(plan), model)
    decoded_factors = [name for name in model.graph.initializers if "/lorc_" in name]
    assert decoded_factors == ["attn.q/lorc_v", "attn.q/lorc_u"]


def test_main_products_are_named_and_share_one_dequantised_activation(run_pass):
    model, plan = artifact(Case(lorc=True, dtype=ir.DataType.FLOAT16))
    run_pass(LowerWeightsFp8(plan), model)
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))
    nodes = {node.name: node for node in model.graph}
    left = {nodes[f"{layer}/MatMul"].inputs[0] for layer in ("attn.q", "attn.v")}
    assert len(left) == 1 and left.pop().producer().op_type == "DequantizeLinear"
    assert all(nodes[f"{layer}/MatMul"].op_type == "MatMul" for layer in ("attn.q", "attn.v"))
    assert nodes["attn.q/MatMul"].metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'attn.q']"


def test_shared_codes_are_decoded_once(run_pass):
    case = Case()
    model, plan = float_model(case), make_plan(case)
    plan = plan.replace(tensors=dict.fromkeys(plan.tensors, plan.tensors["attn.q"]))
    for pass_ in (QuantizeActivations(plan), QuantizeWeights(plan), RemoveUnused()):
        pass_.call(model)
    run_pass(LowerWeightsFp8(plan), model)
    assert [name for name in model.graph.initializers if name.endswith("/w8")] == ["attn.q/w8"]


def test_nothing_to_do_without_linears(run_pass):
    assert not run_pass(LowerWeightsFp8(make_plan(Case())), float_model(Case())).modified


def test_a_plan_of_another_model_is_an_error():
    model, plan = artifact(Case())
    with pytest.raises(PassError, match=r"node 'attn.q': the plan does not know this W4A8Linear"):
        LowerWeightsFp8(plan.replace(linears=())).call(model)


@pytest.mark.parametrize("fp8", [False, True])
def test_no_tensor_is_read(fp8):
    model, plan = artifact(Case(lorc=True, lorc_fp8=fp8))
    assert LowerWeightsFp8(unreadable(model, plan)).call(model).modified


def test_external_tensors_are_released_after_decoding(tmp_path):
    """onnx-ir keeps what it has read of an external tensor: on a large model that would be all of it."""
    model, plan = artifact(Case())
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    packed = model.graph.initializers["attn.q.codes"].const_value
    assert isinstance(packed, ir.ExternalTensor)
    LowerWeightsFp8(plan).call(model)
    model.graph.initializers["attn.q/w8"].const_value.numpy()
    assert packed._array is None  # the only trace a reader leaves
