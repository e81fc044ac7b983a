"""Nodes that an engine builder computes once are found in the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from zqfp_compile.backends.equal_products import equal_products


def test_equal_products_are_grouped(tmp_path: Path) -> None:
    def product(name: str, x: str, weight: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node("Gemm", [x, weight], [f"{name}.y"], name=name, **attributes)

    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Cast", ["same"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["rounded"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["w"], ["t1"], perm=[1, 0]),
        helper.make_node("Transpose", ["w"], ["t2"], perm=[1, 0]),
        helper.make_node("Transpose", ["w"], ["t3"], perm=[0, 1]),
        product("a", "x", "t1"),
        product("b", "same", "t2"),
        product("c", "float", "t2"),
        product("other input", "rounded", "t1"),
        product("other weight", "x", "t3"),
        product("other attribute", "x", "t1", transB=1),
        product("not asked for", "x", "t1"),
        helper.make_node("Split", ["x"], ["s1", "s2"], axis=0, num_outputs=2),
        product("first half", "s1", "w"),
        product("second half", "s2", "w"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 8])]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes[7:]]
    weights = [numpy_helper.from_array(np.ones((8, 8), np.float32), "w")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "m.onnx")
    names = [node.name for node in nodes if node.op_type == "Gemm" and node.name != "not asked for"]
    alone = ["other input", "other weight", "other attribute", "first half", "second half"]
    assert equal_products(tmp_path / "m.onnx", names) == [["a", "b", "c"], *([name] for name in alone)]
