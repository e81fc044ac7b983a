from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import BETA, Case, float_model, make_plan, mixed_plan, unreadable

from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from zqfp_compile import specs
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import QuantPlan, SitePrecision


def _with_activations(case: Case) -> tuple[ir.Model, QuantPlan]:
    model, plan = float_model(case), make_plan(case)
    QuantizeActivations(plan).call(model)
    return model, plan


def _linears(model: ir.Model) -> dict[str | None, ir.Node]:
    return {node.name: node for node in model.graph if node.op_type == "W4A8Linear"}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("quantize_weights_tensor", Case(dtype=ir.DataType.FLOAT16)),
        ("quantize_weights_token_padded", Case(per_token=True, k=72)),
        ("quantize_weights_e3m0", Case(weight_format="e3m0", constraint="m2")),
        ("quantize_weights_unrounded", Case(constraint="none", activation="none", dtype=ir.DataType.FLOAT16)),
        ("quantize_weights_fp8", Case(weight_format="fp8", activation="e5m2")),
    ],
)
def test_golden(name, case, run_pass, golden):
    model, plan = _with_activations(case)
    assert run_pass(QuantizeWeights(plan), model).modified
    golden(name, model)


def test_the_node_keeps_what_the_old_one_had_and_says_what_a_kernel_needs(run_pass):
    model, plan = _with_activations(Case(dtype=ir.DataType.FLOAT16))
    outputs = [(value.name, value.dtype, str(value.shape)) for value in model.graph.outputs]
    run_pass(QuantizeWeights(plan), model)
    assert [(value.name, value.dtype, str(value.shape)) for value in model.graph.outputs] == outputs
    node = _linears(model)["attn.q"]
    assert node.domain == "zqfp" and len(node.inputs) == 11
    assert node.metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'attn.q']"
    assert {name: attr.value for name, attr in node.attributes.items()} == {
        "weight_format": "e2m1",
        "group_size": 16,
        "activation": "fp8_tensor",
    }
    assert node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN
    assert [i for i, value in enumerate(node.inputs) if value is None] == [5, 6, 7, 8, 9, 10]


def test_variants_that_are_equal_share_a_function(run_pass):
    model, plan = _with_activations(Case())
    run_pass(QuantizeWeights(plan), model)
    overloads = {overload for _, _, overload in model.functions}
    assert overloads == {"e2m1_g16_fp8_tensor_float", "e2m1_g16_fp8_tensor_float_bias"}
    assert all(node.op_identifier() in model.functions for node in _linears(model).values())


def test_gemm_beta_goes_into_the_bias(run_pass):
    model, plan = _with_activations(Case())
    c = model.graph.initializers["c"].const_value.numpy()
    run_pass(QuantizeWeights(plan), model)
    bias = _linears(model)["attn.v"].inputs[5].const_value
    assert np.array_equal(bias.numpy(), BETA * c[0]) and tuple(bias.shape) == (48,)


def test_a_plain_bias_is_used_as_it_is(run_pass):
    model, plan = _with_activations(Case())
    c = model.graph.initializers["c"]
    c.const_value = ir.tensor(np.ones(48, np.float32))
    c.shape = ir.Shape([48])
    linears = (plan.linears[0], dataclasses.replace(plan.linears[1], bias_scale=1.0))
    run_pass(QuantizeWeights(plan.replace(linears=linears)), model)
    assert _linears(model)["attn.v"].inputs[5] is c


def test_each_layer_has_its_own_format(run_pass):
    plan = mixed_plan(Case(k=72), v=SitePrecision("fp8", 0))
    model = float_model(Case(k=72))
    QuantizeActivations(plan).call(model)
    run_pass(QuantizeWeights(plan), model)
    nodes = _linears(model)
    assert nodes["attn.q"].overload == "e2m1_g16_fp8_tensor_float_k72"
    assert nodes["attn.v"].overload == "fp8_fp8_tensor_float_bias"
    assert nodes["attn.q"].inputs[0] is nodes["attn.v"].inputs[0]
    specs.check(model, "quantized")


def test_a_layer_of_format_none_keeps_its_weight_and_its_activation(run_pass):
    plan = mixed_plan(Case(), q=SitePrecision("none", 0))
    model = float_model(Case())
    QuantizeActivations(plan).call(model)
    run_pass(QuantizeWeights(plan), model)
    q = next(node for node in model.graph if node.name == "node_q")
    assert q.op_type == "MatMul" and [value.name for value in q.inputs] == ["x", "wq"]
    assert list(_linears(model)) == ["attn.v"]


def test_one_layer_can_be_quantised_where_the_others_are_not(run_pass):
    plan = make_plan(Case())
    plan = plan.replace(weight_format="none", precisions={"attn.v": SitePrecision("e2m1", 0)})
    model = float_model(Case())
    QuantizeActivations(plan).call(model)
    run_pass(QuantizeWeights(plan), model)
    assert list(_linears(model)) == ["attn.v"]
    q = next(node for node in model.graph if node.name == "node_q")
    assert q.inputs[0].producer().op_type == "DequantizeLinear"


def test_layers_with_the_same_tensors_share_initializers(run_pass):
    model, plan = _with_activations(Case())
    shared = plan.tensors["attn.q"]
    run_pass(QuantizeWeights(plan.replace(tensors={"attn.q": shared, "attn.v": shared})), model)
    nodes = _linears(model)
    for index in (2, 3, 4):
        assert nodes["attn.q"].inputs[index] is nodes["attn.v"].inputs[index]


def test_equal_initializer_names_of_the_model_survive(run_pass):
    model, plan = _with_activations(Case())
    model.graph.initializers["c"].name = "attn.q.codes"
    linears = (plan.linears[0], dataclasses.replace(plan.linears[1], bias="attn.q.codes"))
    run_pass(QuantizeWeights(plan.replace(linears=linears)), model)
    assert _linears(model)["attn.q"].inputs[2].name == "attn.q.codes_2"


def test_another_node_with_the_layer_s_name_is_renamed(run_pass):
    model, plan = _with_activations(Case())
    model.graph[0].name = "attn.q"
    run_pass(QuantizeWeights(plan), model)
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names)) and _linears(model)["attn.q"].outputs[0].name == "q"


def test_weights_none_keeps_the_standard_model(run_pass):
    model, plan = _with_activations(Case())
    assert not run_pass(QuantizeWeights(plan.replace(weight_format="none")), model).modified


def test_errors_name_the_layer_and_the_remedy():
    case = Case()
    with pytest.raises(
        PassError, match=r"layer 'attn.q': its input is not quantised; run quantize-activations"
    ):
        QuantizeWeights(make_plan(case)).call(float_model(case))
    model, plan = _with_activations(case)
    with pytest.raises(PassError, match=r"layer 'attn.q': the plan has no quantised tensors"):
        QuantizeWeights(plan.replace(tensors={})).call(model)
    model, plan = _with_activations(case)
    linears = (plan.linears[0], dataclasses.replace(plan.linears[1], bias="nowhere"))
    with pytest.raises(PassError, match=r"layer 'attn.v': its bias 'nowhere' is no initializer"):
        QuantizeWeights(plan.replace(linears=linears)).call(model)


def test_no_tensor_is_read():
    model, plan = _with_activations(Case(lorc=True))
    assert QuantizeWeights(unreadable(model, plan)).call(model).modified
