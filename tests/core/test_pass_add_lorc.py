from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
from rewrite_models import Case, float_model, make_plan, unreadable

from passes.add_lorc import AddLoRC
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from zqfp_compile import specs
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import QuantPlan


def _quantized(case: Case) -> tuple[ir.Model, QuantPlan]:
    model, plan = float_model(case), make_plan(case)
    QuantizeActivations(plan).call(model)
    QuantizeWeights(plan).call(model)
    return model, plan


@pytest.mark.parametrize(("name", "fp8"), [("add_lorc", False), ("add_lorc_fp8", True)])
def test_golden(run_pass, golden, name, fp8):
    model, plan = _quantized(Case(dtype=ir.DataType.FLOAT16, lorc=True, lorc_fp8=fp8))
    assert run_pass(AddLoRC(plan), model).modified
    golden(name, model)


def test_fp8_factors_come_with_their_scales(run_pass):
    model, plan = _quantized(Case(dtype=ir.DataType.FLOAT16, lorc=True, lorc_fp8=True))
    run_pass(AddLoRC(plan), model)
    specs.check(model, "quantized")
    for node in (node for node in model.graph if node.op_type == "W4A8Linear"):
        v, u, v_scale, u_scale = node.inputs[7:]
        assert {v.dtype, u.dtype} == {ir.DataType.FLOAT8E4M3FN}
        assert {v_scale.dtype, u_scale.dtype} == {ir.DataType.FLOAT}
        assert tuple(v_scale.shape) == tuple(u_scale.shape) == (4,)
        assert node.overload.endswith("_lorc8")


def test_x_is_the_activation_before_the_cast_and_factors_have_its_type(run_pass):
    model, plan = _quantized(Case(dtype=ir.DataType.FLOAT16, lorc=True))
    run_pass(AddLoRC(plan), model)
    for node in (node for node in model.graph if node.op_type == "W4A8Linear"):
        x, v, u = node.inputs[6:9]
        assert list(node.inputs[9:]) == [None, None]
        assert x is model.graph.inputs[0]
        assert {x.dtype, v.dtype, u.dtype} == {ir.DataType.FLOAT16}
        assert "_lorc" in node.overload and node.op_identifier() in model.functions


def test_layers_without_factors_are_left_alone(run_pass):
    model, plan = _quantized(Case(lorc=True))
    bare = dataclasses.replace(plan.tensors["attn.q"], lorc_v=None, lorc_u=None)
    run_pass(AddLoRC(plan.replace(tensors={**plan.tensors, "attn.q": bare})), model)
    lorc = {node.name: "_lorc" in node.overload for node in model.graph if node.op_type == "W4A8Linear"}
    assert lorc == {"attn.q": False, "attn.v": True}
    model, plan = _quantized(Case())
    assert not run_pass(AddLoRC(plan), model).modified


def test_errors_name_the_layer():
    model, plan = _quantized(Case(lorc=True))
    moved = dataclasses.replace(plan.linears[0], activation="gone")
    with pytest.raises(PassError, match=r"layer 'attn.q': its input 'gone' is not in the graph"):
        AddLoRC(plan.replace(linears=(moved, plan.linears[1]))).call(model)
    with pytest.raises(PassError, match=r"node 'attn.q': the plan does not know this W4A8Linear"):
        AddLoRC(plan.replace(linears=())).call(model)


@pytest.mark.parametrize("fp8", [False, True])
def test_no_tensor_is_read(fp8):
    model, plan = _quantized(Case(lorc=True, lorc_fp8=fp8))
    assert AddLoRC(unreadable(model, plan)).call(model).modified
