from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from passes.strip_metadata import NAME_SCOPES, StripMetadata
from zqfp_compile.pass_base import PassResult

MODEL = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[M,4] x, bool c) => (float[M,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> {
  t = MatMul(x, w)
  u = If (c) <then_branch = a () => (float[M,2] p) { p = Identity(t) },
              else_branch = b () => (float[M,2] q) { q = Neg(t) }>
  y = local.F(u)
}
<domain: "local", opset_import: ["" : 21]>
F (a) => (b) { b = Relu(a) }
"""


def exported() -> ir.Model:
    """The model with everything torch.onnx attaches, everywhere it can be attached."""
    model = ir.from_onnx_text(MODEL)
    model.metadata_props["license"] = "apache-2.0"
    model.graph.metadata_props["pkg.torch.export.ExportedProgram.graph_signature"] = "long"
    model.graph.doc_string = "graph doc"
    model.graph.inputs[0].metadata_props["pkg.torch.onnx.original_node_name"] = "x"
    model.graph.initializers["w"].metadata_props["pkg.torch.export.graph_signature.InputSpec.kind"] = "P"
    (function,) = model.functions.values()
    nodes = [*model.graph.all_nodes(), *function.all_nodes()]
    for number, node in enumerate(nodes):
        node.name = f"node_{number}"
        node.doc_string = "File model.py, line 12"
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File model.py, line 12\n" * 20
        node.metadata_props[NAME_SCOPES] = f"['', 'layers.{number}', 'linear']"
        node.outputs[0].metadata_props["shape"] = "long"
    return model


def test_only_name_scopes_survive(
    run_pass: Callable[..., PassResult], golden: Callable[[str, ir.Model], None]
) -> None:
    model = exported()
    assert run_pass(StripMetadata(), model).modified
    text = ir.to_proto(model).SerializeToString()
    assert b"model.py" not in text
    assert b"long" not in text
    golden("strip_metadata", model)


def test_the_authors_model_properties_stay(run_pass: Callable[..., PassResult]) -> None:
    model = exported()
    run_pass(StripMetadata(), model)
    assert model.metadata_props == {"license": "apache-2.0"}


def test_a_clean_model_is_untouched(run_pass: Callable[..., PassResult]) -> None:
    assert not run_pass(StripMetadata(), ir.from_onnx_text(MODEL)).modified
