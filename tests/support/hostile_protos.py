"""Parts that hostile model files are made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hostile_case import HostileCase
from onnx import TensorProto, helper

FLOAT = TensorProto.FLOAT
SHAPE = [4, 8]
WEIGHT = np.arange(32, dtype=np.float32).reshape(SHAPE)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes)


def proto(
    nodes: list[onnx.NodeProto], initializers: tuple[onnx.TensorProto, ...] = (), **kwargs: Any
) -> onnx.ModelProto:
    """``x`` [2, 4] -> ``y``."""
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        list(initializers),
    )
    kwargs.setdefault("opset_imports", [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)])
    return helper.make_model(graph, ir_version=10, **kwargs)


def linear() -> onnx.ModelProto:
    weight = helper.make_tensor("w", FLOAT, SHAPE, WEIGHT.tobytes(), raw=True)
    return proto([node("MatMul", ["x", "w"], "y")], (weight,))


def changed(
    change: Callable[[onnx.ModelProto], object], make: Callable[[], onnx.ModelProto] = linear
) -> onnx.ModelProto:
    """A model after ``change``."""
    model = make()
    change(model)
    return model


def external(location: str = "w.data", **entries: Any) -> onnx.ModelProto:
    """The linear with its weight in ``location``; ``entries`` overrides offset, length and dims."""
    model = linear()
    weight = model.graph.initializer[0]
    if "dims" in entries:
        weight.ClearField("dims")
        weight.dims.extend(entries.pop("dims"))
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": 128, **entries}.items():
        if value is not None:
            weight.external_data.add(key=key, value=str(value))
    return model


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    """``f::name``, a chain of calls; all but ``Relu`` are functions of ``f``."""
    nodes, previous = [], "a"
    for index, callee in enumerate(calls):
        domain = "" if callee == "Relu" else "f"
        nodes.append(helper.make_node(callee, [previous], [f"t{index}"], domain=domain))
        previous = f"t{index}"
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], [previous], nodes, imports)


def calling(callee: str, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    call = helper.make_node(callee, ["x"], ["y"], domain="f", name="call")
    return proto([call], functions=functions)


def branching(branch_nodes: list[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """An ``If`` that makes ``y`` of ``output``, the same in both branches, and its condition."""
    branch = helper.make_graph(
        branch_nodes, "branch", [], [helper.make_tensor_value_info(output, FLOAT, None)]
    )
    condition = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [1])
    )
    return [condition, node("If", ["c"], "y", then_branch=branch, else_branch=branch)]


def write_model(folder: Path, model: onnx.ModelProto, data: bytes | None = WEIGHT.tobytes()) -> Path:
    """Write ``model.onnx`` and, unless ``None``, ``w.data``."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    if data is not None:
        (folder / "w.data").write_bytes(data)
    return path


def model_file(group: str, wrong: str, model: onnx.ModelProto, *says: str) -> HostileCase:
    """A model without a data file."""
    return HostileCase(group, wrong, lambda place: write_model(place, model, None), says)
