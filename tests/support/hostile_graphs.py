"""Hostile graphs and functions: what cannot be, does not end, or names things so that a message breaks."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from hostile_case import raw_file
from hostile_protos import branching, calling, changed, function, linear, model_file, node, proto
from onnx import helper


def _nested(levels: int) -> onnx.ModelProto:
    """Ifs in Ifs, without else: both would double the file at each level."""
    nodes = [node("Relu", ["x"], "y")]
    for _ in range(levels):
        nodes = branching(nodes, "y")
        nodes[1].attribute.pop()
    return proto(nodes)


def _nested_bytes(levels: int) -> bytes:
    """Graph in attribute in node in graph; protobuf's own writers refuse to make it."""
    content = b""
    for _ in range(levels):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            content = tag + _varint(len(content)) + content
    return b"\x08\x0a\x3a" + _varint(len(content)) + content  # ModelProto.graph


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _captured() -> onnx.ModelProto:
    """A subgraph reads what a later node makes of the subgraph's result."""
    return proto([*branching([node("Relu", ["later"], "b")], "b"), node("Relu", ["y"], "later")])


def _relu(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    return changed(change, lambda: proto([node("Relu", ["x"], "y")]))


def _opset(*versions: tuple[str, int]) -> onnx.ModelProto:
    imports = [helper.make_opsetid(domain, version) for domain, version in versions]
    return proto([node("Relu", ["x"], "y")], opset_imports=imports)


def _constant(change: Callable[[onnx.AttributeProto], object]) -> onnx.ModelProto:
    nodes = branching([node("Relu", ["x"], "b")], "b")
    change(nodes[0].attribute[0])
    return proto(nodes)


def _by_reference() -> list[onnx.NodeProto]:
    """A branch that is an attribute of the call; found by tools/fuzz_readers.py."""
    nodes = branching([node("Relu", ["x"], "b")], "b")
    nodes[1].attribute[0].ClearField("g")
    nodes[1].attribute[0].ref_attr_name = "branch"
    return nodes


def _unnamed_constant() -> list[onnx.NodeProto]:
    """Found by tools/fuzz_readers.py."""
    made = branching([], "x")[0]
    made.ClearField("output")
    return [made, node("Relu", ["x"], "y")]


def _negative_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


def _duplicate_output(model: onnx.ModelProto) -> None:
    model.graph.output.add().CopyFrom(model.graph.output[0])


def _ring(count: int) -> onnx.ModelProto:
    """A cycle of ``count`` nodes, listed backwards."""
    nodes = [node("Relu", [f"v{(i + 1) % count}"], f"v{i}") for i in range(count)]
    return proto([*nodes, node("Relu", ["v0"], "y")])


def _latin1(model: onnx.ModelProto) -> bytes:
    data: bytes = model.SerializeToString()
    return data.replace(b"node_y", b"node_\xe9")


_WEIGHT = linear().graph.initializer[0]
_RELU = node("Relu", ["x"], "y")

GRAPHS = (
    model_file("graph", "without nodes", proto([]), "no nodes"),
    model_file("graph", "without outputs", _relu(lambda it: it.graph.ClearField("output")), "no outputs"),
    model_file("graph", "with an output twice", _relu(_duplicate_output), "output 'y' of the graph", "twice"),
    model_file(
        "graph",
        "with an undefined input",
        proto([node("Add", ["x", "ghost"], "y")]),
        "'node_y' (Add)",
        "'ghost'",
    ),
    model_file(
        "graph", "with an undefined output", proto([node("Relu", ["x"], "z")]), "output 'y' of the graph"
    ),
    model_file(
        "graph",
        "with an undefined input in a subgraph",
        proto(branching([node("Relu", ["ghost"], "b")], "b")),
        "'ghost'",
        "subgraph",
    ),
    model_file(
        "graph",
        "with an outer value as subgraph output",
        proto(branching([], "x")),
        "output 'x' of a subgraph",
    ),
    model_file(
        "graph", "with an initializer twice", proto([_RELU], (_WEIGHT, _WEIGHT)), "initializer 'w'", "twice"
    ),
    model_file("graph", "with a value twice", proto([_RELU, _RELU]), "node 'node_y' (Relu)", "defines 'y'"),
    model_file(
        "graph",
        "with an output over an initializer",
        proto([_RELU, node("Relu", ["x"], "w")], (_WEIGHT,)),
        "defines 'w'",
    ),
    model_file(
        "graph",
        "with a node that reads itself",
        proto([node("Add", ["x", "y"], "y")]),
        "cycle: 'node_y' (Add) -> 'node_y' (Add)",
    ),
    model_file(
        "graph",
        "with a cycle",
        proto([node("Add", ["x", "b"], "a"), node("Relu", ["a"], "b"), node("Relu", ["b"], "y")]),
        "cycle",
        "'node_a' (Add) -> 'node_b' (Relu)",
    ),
    model_file("graph", "with a cycle of 5000 nodes", _ring(5000), "has a cycle", "..."),
    model_file(
        "graph",
        "with a cycle through a subgraph",
        _captured(),
        "cycle",
        "'node_y' (If)",
        "'node_later' (Relu)",
    ),
    model_file("graph", "nested 20 levels", _nested(20), "levels deep"),
    raw_file("a subgraph nested 1000 levels", _nested_bytes(1000), "nested too deep"),
    model_file("graph", "with a negative input dimension", _relu(_negative_input), "value 'x'", "dim_param"),
    model_file(
        "graph",
        "with an attribute without value",
        _constant(lambda it: it.ClearField("t")),
        "attribute 'value'",
        "'c' (Constant)",
    ),
    model_file(
        "graph",
        "with a constant of another type",
        _constant(lambda it: setattr(it, "type", onnx.AttributeProto.INT)),
        "attribute 'value'",
    ),
    model_file(
        "graph",
        "with an attribute of a call",
        proto(_by_reference()),
        "'node_y' (If)",
        "refers to a function call's",
    ),
    model_file(
        "graph",
        "with a constant without output",
        proto(_unnamed_constant()),
        "(Constant)",
        "no single output",
    ),
    model_file("graph", "sparse", _relu(lambda it: it.graph.sparse_initializer.add()), "sparse"),
    model_file("graph", "of IR version 99", _relu(lambda it: setattr(it, "ir_version", 99)), "IR version 99"),
    model_file("graph", "of IR version 3", _relu(lambda it: setattr(it, "ir_version", 3)), "IR version 3"),
    model_file("graph", "without an opset", _relu(lambda it: it.ClearField("opset_import")), "no ONNX opset"),
    model_file("graph", "of opset 9", _opset(("", 9)), "opset 9", "opset_version"),
    model_file("graph", "of opset 99", _opset(("", 99)), "opset 99"),
    model_file("graph", "of opset -1", _opset(("", -1)), "opset -1"),
    model_file(
        "graph",
        "with an operator of a domain that is not imported",
        proto([helper.make_node("Relu", ["x"], ["y"], domain="acme")]),
        "domain 'acme'",
        "imports no opset",
    ),
    model_file("graph", "of two opsets", _opset(("", 18), ("ai.onnx", 17)), "two opsets of ONNX, 18 and 17"),
    raw_file("a name that is no UTF-8", _latin1(_relu(lambda it: None)), "is not UTF-8 text"),
    model_file(
        "graph",
        "with a name that starts a line",
        proto([node("Relu", ["a\nError: all is well\x1b[31m" + "b" * 10_000], "y")]),
        "reads 'a\\nError",
    ),
    model_file(
        "graph",
        "with an operator that starts a line",
        proto([helper.make_node("Re\nlu", ["x", "ghost"], ["y"])]),
        r"Re\nlu",
    ),
)


def _doubling(count: int) -> list[onnx.FunctionProto]:
    """Each function calls the next one twice."""
    return [*(function(f"F{i}", [f"F{i + 1}"] * 2) for i in range(count)), function(f"F{count}", ["Relu"])]


def _chain(count: int) -> list[onnx.FunctionProto]:
    return [*(function(f"F{i}", [f"F{i + 1}"]) for i in range(count)), function(f"F{count}", ["Relu"])]


def _function_of(nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    """``f::F``: ``x`` -> ``y``."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    return helper.make_function("f", "F", ["x"], ["y"], nodes, imports)


def _hidden_recursion() -> onnx.FunctionProto:
    """A function that calls itself in a subgraph."""
    return _function_of(branching([helper.make_node("F", ["x"], ["b"], domain="f")], "b"))


def _function_cycle() -> onnx.FunctionProto:
    made = function("F", ["Relu"])
    made.node[0].input[0] = "t0"
    return made


def _mutual() -> list[onnx.FunctionProto]:
    return [function("F", ["G"]), function("G", ["H"]), function("H", ["G"])]


FUNCTIONS = (
    model_file("function", "recursive", calling("F", [function("F", ["Relu", "F"])]), "'f::F' calls itself"),
    model_file("function", "mutually recursive", calling("F", _mutual()), "'f::G' -> 'f::H' -> 'f::G'"),
    model_file(
        "function", "recursive in a subgraph", calling("F", [_hidden_recursion()]), "'f::F' calls itself"
    ),
    model_file(
        "function", "of 2^40 nodes", calling("F0", _doubling(40)), "'f::F0'", "more than 5000000 nodes"
    ),
    model_file("function", "150 calls deep", calling("F0", _chain(150)), "more than 100 levels"),
    model_file(
        "function", "defined twice", calling("F", [function("F", ["Relu"])] * 2), "'f::F' is defined twice"
    ),
    model_file(
        "function",
        "with a subgraph of its call",
        calling("F", [_function_of(_by_reference())]),
        "in function 'f::F' refers to",
    ),
    model_file("function", "cyclic", calling("F", [_function_cycle()]), "function 'f::F' has a cycle"),
)

NO_LINEAR_LAYER = model_file("graph", "without a linear layer", proto([_RELU]), "no linear layers", "1 Relu")
