"""Graphs of ONNX GraphSurgeon: nothing that matters is lost on the way there and back, and they compile."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from zqfp_compile import from_graphsurgeon, load_model, save_model, to_graphsurgeon
from zqfp_compile.backends.ort import create_session
from zqfp_compile.errors import MissingDependencyError, ModelError

gs = pytest.importorskip("onnx_graphsurgeon")
pytest.importorskip("onnxruntime")

SCOPES = "pkg.torch.onnx.name_scopes"
W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)

# A subgraph that reads outer values, two overloads of a function, an attribute that refers to another.
MODEL = """
<ir_version: 10, opset_import: ["" : 21, "f" : 1], producer_name: "me">
main (float[n, 8] x, bool c) => (float[n, 8] y, float[n, m] z)
{
  [linear] m = MatMul (x, w)
  [bias] a = Add (m, b)
  l = f.Scale:twice (a)
  [if] y = If (c) <
    then_branch = yes () => (float[n, 8] t) { t = Add (l, b) },
    else_branch = no () => (float[n, 8] e) { d = f.Scale <alpha: float = 3.0> (own)  e = Mul (l, d) }
  >
  s, z = Split <axis = 1, num_outputs = 2> (y)
}
<domain: "f", opset_import: ["" : 21]>
Scale <alpha> (i) => (o) { k = Constant <value_float: float = @alpha> ()  o = Mul (i, k) }
<domain: "f", overload: "twice", opset_import: ["" : 21]>
Scale (i) => (o) { o = Add (i, i) }
"""


def _model() -> ir.Model:
    proto = onnx.parser.parse_model(MODEL)
    for name, array in (("w", W), ("b", W[0]), ("own", W[1])):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto.graph.node[0].metadata_props.add(key=SCOPES, value="['', 'model.q_proj', 'MatMul']")
    proto.metadata_props.add(key="author", value="me")
    return ir.from_proto(proto)


def _run(model: ir.Model | onnx.ModelProto, **feed: np.ndarray) -> list[np.ndarray]:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    return create_session(proto.SerializeToString()).run(None, feed)


def _both_branches(model: ir.Model | onnx.ModelProto) -> list[np.ndarray]:
    return [y for c in (True, False) for y in _run(model, x=X, c=np.array(c))]


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _one_constant(array: np.ndarray | ir.TensorProtocol) -> ir.Model:
    """y = Identity(w)"""
    tensor = ir.tensor(array, name="w")
    w = ir.val("w", const_value=tensor)
    node = ir.node("Identity", [w])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
    graph = ir.Graph([], [y], nodes=[node], initializers=[w], opset_imports={"": 23}, name="one")
    return ir.Model(graph, ir_version=11)


def _data(model: ir.Model) -> tuple[ir.DataType, tuple[int, ...], bytes]:
    tensor = model.graph.initializers["w"].const_value
    return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()


def test_there_and_back() -> None:
    model = _model()
    before = _bytes(model)
    graph = to_graphsurgeon(model)
    assert isinstance(graph, gs.Graph)
    back = from_graphsurgeon(graph)
    assert _bytes(model) == before, "the model is left as it was"

    assert [node.name for node in back.graph] == [node.name for node in model.graph]
    assert [node.op_type for node in back.graph] == ["MatMul", "Add", "Scale", "If", "Split"]
    assert back.graph[0].metadata_props == model.graph[0].metadata_props
    assert back.metadata_props == {"author": "me"}
    assert (back.ir_version, back.producer_name) == (10, "me")
    assert back.graph.opset_imports == model.graph.opset_imports
    for values in ("inputs", "outputs"):
        for old, new in zip(getattr(model.graph, values), getattr(back.graph, values), strict=True):
            assert (old.name, old.shape, old.type) == (new.name, new.shape, new.type)
    assert set(back.functions) == {("f", "Scale", ""), ("f", "Scale", "twice")}
    assert back.functions["f", "Scale", ""][0].attributes["value_float"].ref_attr_name == "alpha"
    branches = back.graph[3].attributes
    then_branch, else_branch = (branches[f"{name}_branch"].as_graph() for name in ("then", "else"))
    assert not then_branch.initializers and then_branch[0].inputs[1] is back.graph.initializers["b"]
    # What only a subgraph reads has no other place in a gs.Graph.
    assert list(back.graph.initializers) == ["w", "b"] and list(else_branch.initializers) == ["own"]
    for old, new in zip(_both_branches(model), _both_branches(back), strict=True):
        np.testing.assert_array_equal(new, old)


def test_graphsurgeon_itself_exports_what_it_gets() -> None:
    """Functions have names of their own there: graphsurgeon knows no overloads."""
    graph = to_graphsurgeon(_model())
    assert [function.name for function in graph.functions] == ["Scale", "Scale_twice"]
    for old, new in zip(_both_branches(_model()), _both_branches(gs.export_onnx(graph)), strict=True):
        np.testing.assert_array_equal(new, old)


def test_an_edited_graph() -> None:
    """A node in between, a value replaced, dead nodes cleaned up; the rest is as it was."""
    graph = to_graphsurgeon(_model())
    linear = graph.nodes[0]
    linear.inputs[1].values = linear.inputs[1].values * 2
    (a,) = linear.outputs
    negated = gs.Variable("negated", dtype=np.float32, shape=["n", 8])
    graph.nodes[1].inputs[0] = negated  # the bias
    graph.nodes.append(gs.Node("Neg", "neg", inputs=[a], outputs=[negated]))
    graph.nodes.append(gs.Node("Relu", "dead", inputs=[a], outputs=[gs.Variable("unused")]))
    # Sorting functions of a graph with subgraphs never ends in graphsurgeon 0.6.1.
    model = from_graphsurgeon(graph.cleanup().toposort(mode="nodes"))
    assert [node.name for node in model.graph] == ["linear", "neg", "bias", "", "if", ""]
    assert model.graph[0].metadata_props == {SCOPES: "['', 'model.q_proj', 'MatMul']"}
    y = _run(model, x=X, c=np.array(True))[0]
    np.testing.assert_allclose(y, 2 * (W[0] - 2 * (X @ W)) + W[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("name", ["FLOAT4E2M1", "INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2", "BFLOAT16"])
def test_types_numpy_does_not_know(name: str, read: bool) -> None:
    """Also when somebody read the values; an odd count, so that half a byte is padding."""
    dtype = ir.DataType[name]
    array = np.array([[1, 2, 3], [4, 0, 6], [6, 4, 1]]).astype(dtype.numpy())
    model = _one_constant(ir.Tensor(array, dtype=dtype, name="w"))
    graph = to_graphsurgeon(model)
    constant = graph.tensors()["w"]
    assert constant.dtype == array.dtype and constant.shape == [3, 3]
    if read:
        assert np.array_equal(constant.values.astype(np.float32), array.astype(np.float32))
    assert _data(from_graphsurgeon(graph)) == _data(model)


def test_a_constant_that_is_exported_in_another_type() -> None:
    graph = to_graphsurgeon(_one_constant(W))
    (node,) = graph.nodes
    node.inputs[0] = gs.Constant("w", W, export_dtype=onnx.TensorProto.BFLOAT16)
    dtype, _, data = _data(from_graphsurgeon(graph))
    assert dtype == ir.DataType.BFLOAT16 and data == W.astype(ml_dtypes.bfloat16).tobytes()


def test_text() -> None:
    model = _one_constant(ir.tensor(["a", "bc"], name="w"))
    back = from_graphsurgeon(to_graphsurgeon(model))
    assert back.graph.initializers["w"].const_value.string_data() == [b"a", b"bc"]


def test_unread_weights_stay_in_their_file(tmp_path: Path) -> None:
    proto = ir.to_proto(_model())
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load_model(tmp_path / "m.onnx")
    graph = to_graphsurgeon(model)
    back = from_graphsurgeon(graph)
    for name in ("w", "b"):  # b is read in a subgraph as well
        tensor = back.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor) and tensor.raw is None
    np.testing.assert_array_equal(graph.tensors()["w"].values, W)
    assert not isinstance(from_graphsurgeon(graph).graph.initializers["w"].const_value, ir.ExternalTensor)
    assert graph.tensors()["b"].values.tolist() == W[0].tolist()


def test_external_data_that_graphsurgeon_did_not_load(tmp_path: Path) -> None:
    proto = ir.to_proto(_model())
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    graph = gs.import_onnx(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    back = from_graphsurgeon(graph, tmp_path)
    save_model(back, tmp_path / "copy.onnx")
    np.testing.assert_array_equal(load_model(tmp_path / "copy.onnx").graph.initializers["w"].const_value, W)
    with pytest.raises(ModelError, match=r"external data file 'm\.data' cannot be opened"):
        from_graphsurgeon(graph, tmp_path / "elsewhere")


def test_a_graph_made_by_hand() -> None:
    """No IR version, and a constant in an attribute whose type graphsurgeon cannot write."""
    x = gs.Variable("x", np.float32, ["n", 8])
    k, y = gs.Variable("k"), gs.Variable("y", np.float32, ["n", 8])
    value = gs.Constant("value", np.array([1, 2, 3, 4, 5, 6, 7, -8]).astype(ml_dtypes.int4))
    wide = gs.Variable("wide")
    graph = gs.Graph(
        [
            gs.Node("Constant", "k", {"value": value}, outputs=[k]),
            gs.Node("Cast", "cast", {"to": onnx.TensorProto.FLOAT}, [k], [wide]),
            gs.Node("Mul", "mul", inputs=[x, wide], outputs=[y]),
        ],
        [x],
        [y],
        opset=21,
    )
    model = from_graphsurgeon(graph)
    assert model.ir_version == 10
    np.testing.assert_array_equal(_run(model, x=X)[0], X * np.array([1, 2, 3, 4, 5, 6, 7, -8], np.float32))


def test_what_graphsurgeon_would_drop_is_refused() -> None:
    model = _one_constant(W)
    kind = ir.AttrTypeProto("type", ir.TypeAndShape(ir.TensorType(ir.DataType.FLOAT), None))
    model.graph[0].attributes["type"] = kind
    with pytest.raises(ModelError, match=r"attribute 'type' is of type TYPE_PROTO, which graphsurgeon drops"):
        to_graphsurgeon(model)


def test_without_graphsurgeon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'zqfp-compile\[graphsurgeon\]'"):
        to_graphsurgeon(_one_constant(W))
