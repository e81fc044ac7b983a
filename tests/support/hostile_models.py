"""Hostile model files: no model, tensors that lie, data outside the folder, graphs that cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from hostile_case import HostileCase
from hostile_protos import (
    WEIGHT,
    branching,
    calling,
    changed,
    external,
    function,
    linear,
    node,
    proto,
    write_model,
)
from onnx import TensorProto, helper

MODEL = "model.onnx"


def _file(wrong: str, content: bytes, *says: str) -> HostileCase:
    return HostileCase("file", wrong, lambda place: (place / MODEL).write_bytes(content), says)


def _model(group: str, wrong: str, model: onnx.ModelProto, *says: str) -> HostileCase:
    return HostileCase(group, wrong, lambda place: write_model(place, model, None), says)


def _weight(wrong: str, change: Callable[[onnx.TensorProto], object], *says: str) -> HostileCase:
    """The weight of the linear after ``change``."""
    model = changed(lambda it: change(it.graph.initializer[0]))
    return _model("tensor", wrong, model, "tensor 'w' in the graph", *says)


def _external(wrong: str, model: onnx.ModelProto, *says: str) -> HostileCase:
    """The data file is there and right; a secret lies in the folder above the model's."""
    return HostileCase(
        "external data", wrong, lambda place: write_model(place, model), ("tensor 'w' in the graph", *says)
    )


def _special(group: str, wrong: str, make: Callable[[Path], object], *says: str) -> HostileCase:
    return HostileCase(group, wrong, make, says)


def _sparse_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


NO_MODEL = (
    _file("empty", b"", "is empty"),
    _file("a text", b"hello, this is\nnot a model\n", "is a text file"),
    _file("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    _file("a PyTorch checkpoint", b"PK\x03\x04" + bytes(64), "PyTorch checkpoint"),
    _file("a pickle", b"\x80\x02" + bytes(64), "is a Python pickle"),
    _file("gzip", b"\x1f\x8b" + bytes(64), "is gzip-compressed"),
    _file("GGUF", b"GGUF" + bytes(64), "is a GGUF file"),
    _file(
        "safetensors", b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32","shape":[1]}}', "is a safetensors file"
    ),
    _file("ONNX Runtime's format", b"\x18\0\0\0ORTM" + bytes(64), ".ort"),
    _file("noise", bytes(range(255, 0, -1)) * 4, "is not a readable ONNX model"),
    _file("zeros", bytes(1 << 20), "is not a readable ONNX model"),
    _file("another protobuf", b"\x08\x0a", "holds no graph"),
    _file("half a model", linear().SerializeToString()[:100], "is not a readable ONNX model"),
    _file("a length of 2^63", b"\x08\x0a\x3a" + b"\xff" * 8 + b"\x7f", "is not a readable ONNX model"),
    _file("groups without end", b"\x08\x0a" + b"\x3b" * 100_000, "is not a readable ONNX model"),
    _special("file", "a folder", lambda place: (place / MODEL).mkdir(), "is a folder", "give the .onnx file"),
    _special("file", "a pipe", lambda place: os.mkfifo(place / MODEL), "not a regular file"),
    _special("file", "a device", lambda place: (place / MODEL).symlink_to("/dev/zero"), "not a regular file"),
    _special("file", "a link to itself", lambda place: (place / MODEL).symlink_to(MODEL), "cannot be read"),
    _special("file", "not there", lambda place: None, "no such file"),
    _special(
        "file",
        "over 2 GiB",
        lambda place: _sparse_file(place / MODEL, 1 << 31),
        "2.0 GiB",
        "save_as_external_data",
    ),
)


def _behind(target: str, *, folder: bool = False) -> Callable[[Path], None]:
    """External data that is a link to ``target``, or in a folder that is one."""

    def make(place: Path) -> None:
        (place / "other").mkdir()
        (place / "other" / "w.data").write_bytes(WEIGHT.tobytes())
        write_model(place, external("sub/w.data" if folder else "w.data"), None)
        (place / ("sub" if folder else "w.data")).symlink_to(target)

    return make


def _hard_linked(place: Path) -> None:
    write_model(place, external())
    os.link(place / "w.data", place / "private.txt")


def _in_pipe(place: Path) -> None:
    write_model(place, external(), None)
    os.mkfifo(place / "w.data")


def _over_budget(place: Path) -> None:
    """Many tensors over one sparse file: each is legal, the sum is not."""
    model = external(dims=[1 << 36], length=1 << 38)
    for index in range(40):
        copy = model.graph.initializer.add()
        copy.CopyFrom(model.graph.initializer[0])
        copy.name = f"w{index}"
    write_model(place, model, None)
    _sparse_file(place / "w.data", 1 << 38)


def _overlapping() -> onnx.ModelProto:
    """A second tensor that starts in the middle of the first."""
    model = external()
    second = model.graph.initializer.add()
    second.CopyFrom(model.graph.initializer[0])
    second.name = "v"
    for entry in second.external_data:
        entry.value = {"offset": "64"}.get(entry.key, entry.value)
    model.graph.node.add().CopyFrom(node("MatMul", ["x", "v"], "z"))
    return model


def _repeated() -> onnx.ModelProto:
    model = external()
    model.graph.initializer[0].external_data.add(key="offset", value="64")
    return model


OUTSIDE = "inside the model's folder"

EXTERNAL = (
    _external("shorter than its shape", external(length=124), "124 bytes", "need 128"),
    _external("past the end", external(offset=4), "ends at byte 132", "has only 128", "truncated"),
    _external("past the end without length", external(offset=64, length=None), "ends at byte 192"),
    _external("at a huge offset", external(offset="9" * 18), "ends at byte", "truncated"),
    _external("at a negative offset", external(offset=-4), "offset '-4' is not a number"),
    _external("of a negative length", external(length=-128), "length '-128' is not a number"),
    _external("at an offset of 1000 digits", external(offset="9" * 1000), "is not a number"),
    _external("at a hexadecimal offset", external(offset="0x0"), "is not a number"),
    _external("at an absolute path", external("/etc/passwd"), "'/etc/passwd'", OUTSIDE),
    _external("in the parent folder", external("../w.data"), "'../w.data'", OUTSIDE),
    _external("in the parent, in the middle", external("a/../../w.data"), OUTSIDE),
    _external("without a location", external(""), "location ''"),
    _external("with a NUL in its location", external("w\0.data"), OUTSIDE),
    _external("with a line break in its location", external("w\nerror: x"), r"'w\nerror: x'"),
    _external("not there", external("other.data"), "other.data", "cannot be opened", "copy it"),
    _external("with an unknown entry", external(ofset=4), "unknown external data entry 'ofset'"),
    _external("with an entry twice", _repeated(), "repeated external data entry"),
    _external("of a name of 100000 characters", external("n" * 100_000), "cannot be opened"),
    _external("in a folder", external("."), "is not a regular file"),
    _external("of negative dimensions", external(dims=[-4, -8]), "[-4, -8]", "negative dimension"),
    _external("of overflowing dimensions", external(dims=[1 << 33, 1 << 33]), "is larger than"),
    _external("of huge dimensions and 0", external(dims=[1 << 62, 1 << 62, 0], length=0), "is larger than"),
    _external("of rank 1000", external(dims=[1] * 1000), "is larger than"),
    _special(
        "external data",
        "overlapping",
        lambda place: write_model(place, _overlapping(), WEIGHT.tobytes() * 2),
        "tensor 'v' in the graph",
        "bytes 64 to 192",
        "overlap another",
    ),
    _special(
        "external data",
        "cut off",
        lambda place: write_model(place, external(), WEIGHT.tobytes()[:-1]),
        "tensor 'w'",
        "has only 127",
        "copy it again",
    ),
    _special("external data", "a link out", _behind("/etc/passwd"), "tensor 'w'", "symbolic link", "cp -rL"),
    _special("external data", "a link within", _behind("other/w.data"), "symbolic link", "cp -rL"),
    _special("external data", "a dangling link", _behind("nowhere"), "symbolic link"),
    _special("external data", "a link to a device", _behind("/dev/zero"), "symbolic link"),
    _special("external data", "behind a linked folder", _behind("other", folder=True), "symbolic link"),
    _special("external data", "hard-linked", _hard_linked, "2 hard links", "real copy"),
    _special("external data", "a pipe", _in_pipe, "not a regular file"),
    _special("external data", "of 10 TiB", _over_budget, "brings the weights to", "TiB"),
)


def _retyped(data_type: int) -> Callable[[onnx.TensorProto], object]:
    return lambda tensor: setattr(tensor, "data_type", data_type)


def _typed(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 31)


def _as_text(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_type = TensorProto.STRING
    tensor.string_data.extend([b"\xff"] * 32)


TENSORS = (
    _weight("bytes missing", lambda t: setattr(t, "raw_data", b"1234"), "has 4 bytes", "FLOAT need 128"),
    _weight("bytes too many", lambda t: setattr(t, "raw_data", bytes(129)), "has 129 bytes", "need 128"),
    _weight("without data", lambda t: t.ClearField("raw_data"), "has 0 values of float_data", "need 32"),
    _weight("numbers missing", _typed, "has 31 values of float_data", "need 32"),
    _weight("of huge dimensions", lambda t: t.dims.append(1 << 50), "is larger than"),
    _weight("of a negative dimension", lambda t: t.dims.append(-1), "negative dimension"),
    _weight("of an unknown type", _retyped(99), "element type 99 is unknown"),
    _weight("of no type", _retyped(0), "element type 0 is unknown"),
    _weight("doubles that are floats", _retyped(TensorProto.DOUBLE), "DOUBLE need 256"),
    _weight("of text", _as_text, "holds text"),
    _model(
        "tensor",
        "without a name",
        changed(lambda model: model.graph.initializer[0].ClearField("name")),
        "has no name",
    ),
)


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
    return model.SerializeToString().replace(b"node_y", b"node_\xe9")


_WEIGHT = linear().graph.initializer[0]
_RELU = node("Relu", ["x"], "y")

GRAPHS = (
    _model("graph", "without nodes", proto([]), "no nodes"),
    _model("graph", "without outputs", _relu(lambda it: it.graph.ClearField("output")), "no outputs"),
    _model("graph", "with an output twice", _relu(_duplicate_output), "output 'y' of the graph", "twice"),
    _model(
        "graph",
        "with an undefined input",
        proto([node("Add", ["x", "ghost"], "y")]),
        "'node_y' (Add)",
        "'ghost'",
    ),
    _model("graph", "with an undefined output", proto([node("Relu", ["x"], "z")]), "output 'y' of the graph"),
    _model(
        "graph",
        "with an undefined input in a subgraph",
        proto(branching([node("Relu", ["ghost"], "b")], "b")),
        "'ghost'",
        "subgraph",
    ),
    _model(
        "graph",
        "with an outer value as subgraph output",
        proto(branching([], "x")),
        "output 'x' of a subgraph",
    ),
    _model(
        "graph", "with an initializer twice", proto([_RELU], (_WEIGHT, _WEIGHT)), "initializer 'w'", "twice"
    ),
    _model("graph", "with a value twice", proto([_RELU, _RELU]), "node 'node_y' (Relu)", "defines 'y'"),
    _model(
        "graph",
        "with an output over an initializer",
        proto([_RELU, node("Relu", ["x"], "w")], (_WEIGHT,)),
        "defines 'w'",
    ),
    _model(
        "graph",
        "with a node that reads itself",
        proto([node("Add", ["x", "y"], "y")]),
        "cycle: 'node_y' (Add) -> 'node_y' (Add)",
    ),
    _model(
        "graph",
        "with a cycle",
        proto([node("Add", ["x", "b"], "a"), node("Relu", ["a"], "b"), node("Relu", ["b"], "y")]),
        "cycle",
        "'node_a' (Add) -> 'node_b' (Relu)",
    ),
    _model("graph", "with a cycle of 5000 nodes", _ring(5000), "has a cycle", "..."),
    _model(
        "graph",
        "with a cycle through a subgraph",
        _captured(),
        "cycle",
        "'node_y' (If)",
        "'node_later' (Relu)",
    ),
    _model("graph", "nested 20 levels", _nested(20), "levels deep"),
    _file("a subgraph nested 1000 levels", _nested_bytes(1000), "nested too deep"),
    _model("graph", "with a negative input dimension", _relu(_negative_input), "value 'x'", "dim_param"),
    _model(
        "graph",
        "with an attribute without value",
        _constant(lambda it: it.ClearField("t")),
        "attribute 'value'",
        "'c' (Constant)",
    ),
    _model(
        "graph",
        "with a constant of another type",
        _constant(lambda it: setattr(it, "type", onnx.AttributeProto.INT)),
        "attribute 'value'",
    ),
    _model(
        "graph",
        "with an attribute of a call",
        proto(_by_reference()),
        "'node_y' (If)",
        "refers to a function call's",
    ),
    _model(
        "graph",
        "with a constant without output",
        proto(_unnamed_constant()),
        "(Constant)",
        "no single output",
    ),
    _model("graph", "sparse", _relu(lambda it: it.graph.sparse_initializer.add()), "sparse"),
    _model("graph", "of IR version 99", _relu(lambda it: setattr(it, "ir_version", 99)), "IR version 99"),
    _model("graph", "of IR version 3", _relu(lambda it: setattr(it, "ir_version", 3)), "IR version 3"),
    _model("graph", "without an opset", _relu(lambda it: it.ClearField("opset_import")), "no ONNX opset"),
    _model("graph", "of opset 9", _opset(("", 9)), "opset 9", "opset_version"),
    _model("graph", "of opset 99", _opset(("", 99)), "opset 99"),
    _model("graph", "of opset -1", _opset(("", -1)), "opset -1"),
    _model(
        "graph",
        "with an operator of a domain that is not imported",
        proto([helper.make_node("Relu", ["x"], ["y"], domain="acme")]),
        "domain 'acme'",
        "imports no opset",
    ),
    _model("graph", "of two opsets", _opset(("", 18), ("ai.onnx", 17)), "two opsets of ONNX, 18 and 17"),
    _file("a name that is no UTF-8", _latin1(_relu(lambda it: None)), "is not UTF-8 text"),
    _model(
        "graph",
        "with a name that starts a line",
        proto([node("Relu", ["a\nError: all is well\x1b[31m" + "b" * 10_000], "y")]),
        "reads 'a\\nError",
    ),
    _model(
        "graph",
        "with an operator that starts a line",
        proto([helper.make_node("Re\nlu", ["x", "ghost"], ["y"])]),
        r"Re\nlu",
    ),
    _model("graph", "without a linear layer", proto([_RELU]), "no linear layers", "1 Relu"),
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
    _model("function", "recursive", calling("F", [function("F", ["Relu", "F"])]), "'f::F' calls itself"),
    _model("function", "mutually recursive", calling("F", _mutual()), "'f::G' -> 'f::H' -> 'f::G'"),
    _model("function", "recursive in a subgraph", calling("F", [_hidden_recursion()]), "'f::F' calls itself"),
    _model("function", "of 2^40 nodes", calling("F0", _doubling(40)), "'f::F0'", "more than 5000000 nodes"),
    _model("function", "150 calls deep", calling("F0", _chain(150)), "more than 100 levels"),
    _model(
        "function", "defined twice", calling("F", [function("F", ["Relu"])] * 2), "'f::F' is defined twice"
    ),
    _model(
        "function",
        "with a subgraph of its call",
        calling("F", [_function_of(_by_reference())]),
        "in function 'f::F' refers to",
    ),
    _model("function", "cyclic", calling("F", [_function_cycle()]), "function 'f::F' has a cycle"),
)

# Refused by load_model, which a core test checks without ONNX Runtime; all but "without a linear layer".
AT_LOAD = (*NO_MODEL, *EXTERNAL, *TENSORS, *GRAPHS[:-1], *FUNCTIONS)


def _lm(wrong: str, change: Callable[[onnx.ModelProto], object], *says: str, code: int = 3) -> HostileCase:
    """The small language model after ``change``: passes the checks of the file, not the compile."""
    from small_lm import small_lm

    def make(place: Path) -> None:
        (place / "m" / MODEL).write_bytes(changed(change, small_lm).SerializeToString())

    return on_model("model", wrong, make, *says, code=code, flags=EVALUATE)


def on_model(
    group: str,
    wrong: str,
    make: Callable[[Path], object],
    *says: str,
    code: int = 3,
    flags: tuple[str, ...] = (),
) -> HostileCase:
    """A compile of the small language model after ``make``."""
    from hostile_case import COMPILE, QUICK, TEXT

    command = (COMPILE, "m/model.onnx", *QUICK, *TEXT, *flags, "-o", "out")
    return HostileCase(group, wrong, make, says, code, command, "model")


def _poison(value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[1]
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[1, 2] = value
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    return change


def _reshape(
    index: int, shape: tuple[int, ...], dtype: type = np.float32
) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[index]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, dtype), tensor.name))

    return change


def _operator(op_type: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    """The second linear is another operator."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[2].op_type, model.graph.node[2].domain = op_type, domain
        model.opset_import.append(helper.make_opsetid(domain, 1) if domain else model.opset_import[0])

    return change


def _expanded(shape: list[int]) -> Callable[[onnx.ModelProto], None]:
    """The embedding grows to ``shape`` before the first linear reads it."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.array(shape), "s"))
        model.graph.node[1].input[0] = "g"
        model.graph.node.add().CopyFrom(node("Expand", ["e", "s"], "g"))

    return change


def _quantised(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "zqfp"
    model.opset_import.append(helper.make_opsetid("zqfp", 1))
    model.graph.node[1].op_type = "W4A8Linear"


NO_LINEAR = "the options leave no linear layer to rewrite"
# An operator that only the evaluation runs.
EVALUATE = ("--evaluate", "--eval-text", "m/text.txt", "--eval-length", "64")

COMPILED = (
    _lm("with NaN", _poison(np.nan), "'model.layers.0.proj'", "NaN", "--exclude"),
    _lm("with infinity", _poison(np.inf), "'model.layers.0.proj'", "infinite", "--exclude"),
    _lm("with a linear of no output", _reshape(1, (64, 0)), NO_LINEAR, code=2),
    _lm("with a linear of no input", _reshape(1, (0, 64)), NO_LINEAR, code=2),
    _lm(
        "with a linear of another width",
        _reshape(1, (32, 64)),
        "layers.0.proj takes 32 features",
        "'e' has 64",
    ),
    _lm("with weights of rank 0", _reshape(1, ()), NO_LINEAR, code=2),
    _lm("with bools for weights", _reshape(1, (64, 64), np.bool_), NO_LINEAR, code=2),
    _lm("with complex weights", _reshape(1, (64, 64), np.complex64), NO_LINEAR, code=2),
    _lm("with an unknown operator", _operator("Frobnicate"), "Frobnicate"),
    _lm("with an unknown operator of a known domain", _operator("Frobnicate", "com.microsoft"), "Frobnicate"),
    _lm("with an operator of too few inputs", lambda it: it.graph.node[1].input.pop(), "has 1 inputs"),
    _lm("with 10^18 values from a shape", _expanded([10**9, 10**9, 1, 64]), "ONNX Runtime"),
    _lm(
        "with 10^12 values from a shape", _expanded([10**8, 1, 64]), "memory ran out in ONNX Runtime", code=6
    ),
    _lm("compiled already", _quantised, "was compiled by zqfp-compile already"),
)

MODELS = (*AT_LOAD, GRAPHS[-1], *COMPILED)
