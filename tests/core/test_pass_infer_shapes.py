from __future__ import annotations

import onnx_ir as ir
from rewrite_models import Case, artifact

from passes.infer_shapes import InferShapes

CASE = Case(dtype=ir.DataType.FLOAT16)


def described(model: ir.Model) -> dict[str, tuple[str, str]]:
    values = (value for node in model.graph for value in node.outputs)
    return {str(value.name): (str(value.dtype), str(value.shape)) for value in values}


def test_values_get_what_inference_knows(run_pass):
    """Through the functions of W4A8Linear as well."""
    model, _ = artifact(CASE)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    assert "None" in {part for pair in described(model).values() for part in pair}
    assert run_pass(InferShapes(), model).modified
    found = described(model)
    assert all("None" not in pair for pair in found.values())
    for node in model.graph:
        if node.op_type == "W4A8Linear":
            assert node.outputs[0].dtype == CASE.dtype and node.outputs[0].shape[-1] == CASE.n


def test_what_is_known_is_left_alone(run_pass):
    model, _ = artifact(CASE)
    InferShapes().call(model)
    assert not run_pass(InferShapes(), model).modified
