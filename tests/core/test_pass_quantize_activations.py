from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import Case, float_model, make_plan, unreadable

from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from zqfp_compile.pass_base import PassError


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("quantize_activations_tensor", Case(dtype=ir.DataType.FLOAT16)),
        ("quantize_activations_token", Case(dtype=ir.DataType.BFLOAT16, per_token=True)),
        ("quantize_activations_int8", Case(activation="int8")),
    ],
)
def test_golden(name, case, run_pass, golden):
    model = float_model(case)
    assert run_pass(QuantizeActivations(make_plan(case)), model).modified
    golden(name, model)


def test_nodes_of_the_plan_keep_their_names(run_pass):
    """A linear that is called what the pass would call its QuantizeLinear is still found afterwards."""
    model, plan = float_model(Case()), make_plan(Case())
    q, v = plan.linears
    plan = plan.replace(linears=(q, dataclasses.replace(v, node="x.x8")))
    model.graph[1].name = "x.x8"
    run_pass(QuantizeActivations(plan), model)
    run_pass(QuantizeWeights(plan), model, check=False)
    assert _ops(model)[2:] == ["W4A8Linear", "W4A8Linear"]


def test_constants_of_the_model_with_our_names(run_pass):
    """Another content, another size, a value or an input: ours get free names."""
    case = Case(per_token=True)
    model, plan = float_model(case), make_plan(case)
    x = model.graph.inputs[0]
    for name, array in [("zqfp.one", np.array(2, np.float32)), ("zqfp.last_axis", np.array([-1, 0]))]:
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    floor = ir.val("zqfp.smallest_range", const_value=ir.tensor(np.array(1e-30, np.float32)))
    model.graph.register_initializer(floor)
    model.graph.inputs.append(floor)
    relu = ir.Node("", "Relu", [x], name="relu")
    relu.outputs[0].name = "zqfp.largest_e4m3"
    model.graph.append(relu)
    run_pass(QuantizeActivations(plan), model)
    constants = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert constants["zqfp.one_2"].numpy() == 1 and constants["zqfp.last_axis_2"].numpy().tolist() == [-1]
    assert constants["zqfp.largest_e4m3_2"].numpy() == 448
    assert "zqfp.smallest_range_2" in constants


def test_one_pair_serves_all_planned_consumers(run_pass):
    model = float_model(Case())
    run_pass(QuantizeActivations(make_plan(Case())), model)
    assert _ops(model) == ["QuantizeLinear", "DequantizeLinear", "MatMul", "Gemm"]


def test_consumers_outside_the_plan_keep_x(run_pass):
    model, plan = float_model(Case()), make_plan(Case())
    run_pass(QuantizeActivations(plan.replace(linears=plan.linears[:1])), model)
    nodes = {node.name: node for node in model.graph}
    assert nodes["node_v"].inputs[0] is model.graph.inputs[0]
    assert nodes["node_q"].inputs[0] is not model.graph.inputs[0]


def test_activation_in_the_middle_of_the_graph(run_pass):
    """The pair goes behind the producer of x, before its first consumer."""
    case = Case()
    model, plan = float_model(case), make_plan(case)
    x = model.graph.inputs[0]
    relu = ir.Node("", "Relu", [x], name="relu")
    h = relu.outputs[0]
    h.name, h.dtype, h.shape = "h", case.dtype, x.shape.copy()
    model.graph.insert_before(model.graph[0], relu)
    for node in list(model.graph)[1:]:
        node.replace_input_with(0, h)
    linears = tuple(dataclasses.replace(site, activation="h") for site in plan.linears)
    run_pass(QuantizeActivations(plan.replace(linears=linears, activation_scales={"h": 0.5})), model)
    assert _ops(model) == ["Relu", "QuantizeLinear", "DequantizeLinear", "MatMul", "Gemm"]
    scale = model.graph.initializers["h.scale"].const_value
    assert scale is not None and scale.numpy() == np.float32(0.5)


def test_nothing_to_do_without_activation_quantisation(run_pass):
    case = Case(activation="none")
    assert not run_pass(QuantizeActivations(make_plan(case)), float_model(case)).modified


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, float("nan"), float("inf"), 1e-60])
def test_a_missing_or_bad_scale_is_an_error(scale):
    plan = make_plan(Case()).replace(activation_scales={} if scale is None else {"x": scale})
    with pytest.raises(PassError, match=r"activation 'x': no positive calibrated scale"):
        QuantizeActivations(plan).call(float_model(Case()))


def test_a_plan_of_another_model_is_an_error():
    model = float_model(Case())
    model.graph[0].name = "renamed"
    with pytest.raises(PassError, match=r"layer 'attn.q': its node 'node_q' is not in the graph"):
        QuantizeActivations(make_plan(Case())).call(model)


def test_an_old_opset_is_an_error():
    model = float_model(Case())
    model.graph.opset_imports[""] = 20
    with pytest.raises(PassError, match="opset is below 21"):
        QuantizeActivations(make_plan(Case())).call(model)


def test_no_tensor_is_read():
    model = float_model(Case())
    plan = unreadable(model, make_plan(Case()))
    assert QuantizeActivations(plan).call(model).modified
