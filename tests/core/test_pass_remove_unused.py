from __future__ import annotations

import onnx_ir as ir
from rewrite_models import Case, float_model, make_plan, unreadable

from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from passes.remove_unused import RemoveUnused

TEXT = """
<ir_version: 10, opset_import: ["" : 21, "other" : 1, "f" : 1]>
main (float[2] x, bool c, float[1] default) => (float[2] y, float[2] w)
<float[1] default = {3.0}, float[2] w = {1.0, 2.0}, float[2] dead = {1.0, 2.0}, float[2] inner = {1.0, 2.0}>
{
    a = Add (x, dead)
    b = Relu (a)
    n = Neg (x)
    y = If (c) <then_branch = yes () => (float[2] t) {
            t = Add (n, inner)
            u = Abs (t)
        }, else_branch = no () => (float[2] e) { e = Identity (x) }>
}
<domain: "f", opset_import: ["" : 21, "other" : 1]>
unused (p) => (q) { q = Relu (p) }
"""


def test_golden(run_pass, golden):
    case = Case(dtype=ir.DataType.FLOAT16)
    model, plan = float_model(case), make_plan(case)
    QuantizeActivations(plan).call(model)
    QuantizeWeights(plan).call(model)
    assert run_pass(RemoveUnused(), model).modified
    golden("remove_unused", model)


def test_keeps_what_outputs_and_subgraphs_use(run_pass):
    """Dead chains, also in branches, go; inputs with defaults and initializers that are outputs stay."""
    model = ir.from_onnx_text(TEXT)
    assert run_pass(RemoveUnused(), model).modified
    assert [node.op_type for node in model.graph] == ["Neg", "If"]
    branch = model.graph[1].attributes["then_branch"].as_graph()
    assert [node.op_type for node in branch] == ["Add"]
    assert set(model.graph.initializers) == {"default", "w", "inner"}
    assert [value.name for value in model.graph.inputs] == ["x", "c", "default"]
    assert not model.functions and dict(model.graph.opset_imports) == {"": 21}


def test_no_tensor_is_read_and_empty_inputs_stay():
    case = Case()
    model, plan = float_model(case), make_plan(case)
    QuantizeActivations(plan).call(model)
    QuantizeWeights(plan).call(model)
    unreadable(model, plan)
    assert RemoveUnused().call(model).modified
    assert all(len(node.inputs) == 11 for node in model.graph if node.op_type == "W4A8Linear")
    assert not {"wq", "wv", "c"} & set(model.graph.initializers)
