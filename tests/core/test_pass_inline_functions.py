from __future__ import annotations

import onnx_ir as ir
import pytest
from rewrite_models import Case, artifact, float_model, make_plan, unreadable

from passes.inline_functions import InlineFunctions
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from passes.remove_unused import RemoveUnused
from zqfp_compile.pass_base import PassError

NESTED = """
<ir_version: 10, opset_import: ["" : 21, "f" : 1]>
main (float[2] x) => (float[2] y, float[2] z)
{
    [first] y = f.outer <slope: float = 0.5> (x)
    [second] z = f.outer <slope: float = 0.25> (y)
}
<domain: "f", opset_import: ["" : 21, "f" : 1]>
outer <slope> (p) => (q)
{
    [inner] m = f.inner <alpha: float = @slope> (p)
    [neg] q = Neg (m)
}
<domain: "f", opset_import: ["" : 21]>
inner <alpha> (p) => (q) { [act] q = LeakyRelu <alpha: float = @alpha> (p) }
"""


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("inline_functions_lorc", Case(dtype=ir.DataType.FLOAT16, lorc=True)),
        ("inline_functions_lorc_fp8", Case(dtype=ir.DataType.FLOAT16, lorc=True, lorc_fp8=True)),
        ("inline_functions_token", Case(per_token=True, k=72)),
    ],
)
def test_golden(name, case, run_pass, golden):
    model, _ = artifact(case)
    assert run_pass(InlineFunctions(), model).modified
    golden(name, model)


def test_names_are_unique_and_the_main_product_is_named_after_the_layer(run_pass):
    model, _ = artifact(Case(lorc=True))
    run_pass(InlineFunctions(), model)
    names = [node.name for node in model.graph]
    values = [value.name for node in model.graph for value in node.outputs]
    assert len(names) == len(set(names)) and len(values) == len(set(values))
    nodes = {node.name: node for node in model.graph}
    for layer in ("attn.q", "attn.v"):
        assert nodes[f"{layer}/MatMul"].op_type == "MatMul"
        assert f"{layer}/w_hat" in values
    assert not model.functions


def test_without_bias_lorc_and_cast_the_product_still_has_its_name(run_pass):
    """The MatMul then is the last node of the body and writes the layer's output."""
    model, _ = artifact(Case())
    run_pass(InlineFunctions(), model)
    product = next(node for node in model.graph if node.name == "attn.q/MatMul")
    assert product.outputs[0].name == "q" and product.outputs[0].is_graph_output()


def test_one_dequantised_activation_and_shared_constants(run_pass):
    model, _ = artifact(Case())
    run_pass(InlineFunctions(), model)
    x8 = next(node.outputs[0] for node in model.graph if node.op_type == "QuantizeLinear")
    assert [use.node.op_type for use in x8.uses()] == ["DequantizeLinear"]
    constants = [node.attributes["value"].as_tensor() for node in model.graph if node.op_type == "Constant"]
    contents = {(tensor.dtype, tuple(tensor.shape), tensor.tobytes()) for tensor in constants}
    assert len(contents) == len(constants)


def test_a_shared_weight_is_decoded_once(run_pass):
    case = Case()
    model, plan = float_model(case), make_plan(case)
    plan = plan.replace(tensors=dict.fromkeys(plan.tensors, plan.tensors["attn.q"]))
    for pass_ in (QuantizeActivations(plan), QuantizeWeights(plan), RemoveUnused()):
        pass_.call(model)
    run_pass(InlineFunctions(), model)
    assert sum(str(node.name).endswith("/w_hat") for node in model.graph) == 1
    assert sum(node.op_type == "MatMul" for node in model.graph) == 2


def test_nested_functions_and_attribute_references(run_pass):
    model = ir.from_onnx_text(NESTED)
    run_pass(InlineFunctions(), model)
    assert [node.op_type for node in model.graph] == ["LeakyRelu", "Neg", "LeakyRelu", "Neg"]
    slopes = [node.attributes["alpha"].as_float() for node in model.graph if node.op_type == "LeakyRelu"]
    assert slopes == [0.5, 0.25]
    assert [node.name for node in model.graph][1::2] == ["first/neg", "second/neg"]
    assert not any(node.metadata_props for node in model.graph)


def test_ours_are_kept_for_a_lowering(run_pass):
    model, _ = artifact(Case())
    assert not run_pass(InlineFunctions(keep_ours=True), model).modified
    gate = ir.from_onnx_text(NESTED)
    model.functions.update(gate.functions)
    model.opset_imports["f"] = 1
    call = ir.node("inner", [model.graph.inputs[0]], {"alpha": 0.5}, domain="f", name="gate")
    call.outputs[0].name = "gated"
    model.graph.append(call)
    assert run_pass(InlineFunctions(keep_ours=True), model, check=False).modified
    assert [node.op_type for node in model.graph][-1] == "LeakyRelu"
    assert {key[0] for key in model.functions} == {"zqfp"}
    assert sum(node.op_type == "W4A8Linear" for node in model.graph) == 2


def test_nothing_to_do_without_functions(run_pass):
    assert not run_pass(InlineFunctions(), float_model(Case())).modified


def test_a_recursive_function_is_an_error():
    model = ir.from_onnx_text(NESTED.replace("LeakyRelu <alpha: float = @alpha>", "f.outer"))
    with pytest.raises(PassError, match="functions cannot be inlined") as caught:
        InlineFunctions().call(model)
    assert "\n" not in str(caught.value)


def test_no_tensor_is_read():
    model, plan = artifact(Case(lorc=True))
    unreadable(model, plan)
    assert InlineFunctions().call(model).modified
