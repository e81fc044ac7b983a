"""Damaged and hostile model files: each is one clear line, quickly, before any data is touched."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from zqfp_compile.errors import ModelError
from zqfp_compile.model_io import load_model

FLOAT = TensorProto.FLOAT
SHAPE = [4, 8]
WEIGHT = np.arange(32, dtype=np.float32).reshape(SHAPE)


def _node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes)


def _proto(nodes: list[onnx.NodeProto], initializers: tuple = (), **kwargs: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        list(initializers),
    )
    kwargs.setdefault("opset_imports", [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)])
    return helper.make_model(graph, ir_version=10, **kwargs)


def _linear() -> onnx.ModelProto:
    weight = helper.make_tensor("w", FLOAT, SHAPE, WEIGHT.tobytes(), raw=True)
    return _proto([_node("MatMul", ["x", "w"], "y")], (weight,))


def _external(location: str = "w.data", **entries: object) -> onnx.ModelProto:
    """The linear with its weight in ``location``; ``entries`` overrides offset, length and dims."""
    model = _linear()
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


def _function(name: str, calls: list[str]) -> onnx.FunctionProto:
    nodes, previous = [], "a"
    for index, callee in enumerate(calls):
        domain = "" if callee == "Relu" else "f"
        nodes.append(helper.make_node(callee, [previous], [f"t{index}"], domain=domain))
        previous = f"t{index}"
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], [previous], nodes, imports)


def _calling(callee: str, functions: list[onnx.FunctionProto]) -> onnx.ModelProto:
    call = helper.make_node(callee, ["x"], ["y"], domain="f", name="call")
    return _proto([call], functions=functions)


def _if(branch_nodes: list[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    branch = helper.make_graph(
        branch_nodes, "branch", [], [helper.make_tensor_value_info(output, FLOAT, None)]
    )
    condition = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [1])
    )
    return [condition, _node("If", ["c"], "y", then_branch=branch, else_branch=branch)]


def _write(folder: Path, model: onnx.ModelProto, data: bytes | None = WEIGHT.tobytes()) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    if data is not None:
        (folder / "w.data").write_bytes(data)
    return path


def _refused(path: Path, *wanted: str) -> str:
    """Load ``path`` and check the refusal: one line, the file, each of ``wanted``, a remedy, quick."""
    before = sorted(path.parent.rglob("*")) if path.parent.exists() else []
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert time.process_time() - start < 1.0
    assert caught.value.exit_code == 3
    assert "\n" not in message and message.startswith(f"{path}: ") and len(message) < 1000
    assert ";" in message or message.endswith("?"), f"says no remedy: {message}"
    for text in wanted:
        assert text in message, message
    after = sorted(path.parent.rglob("*")) if path.parent.exists() else []
    assert before == after
    return message


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is\nnot a model\n", "is a text file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "torch": (b"PK\x03\x04" + bytes(64), "PyTorch checkpoint"),
    "gguf": (b"GGUF" + bytes(64), "is a GGUF file"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32","shape":[1]}}', "is a safetensors file"),
    "ort": (b"\x18\0\0\0ORTM" + bytes(64), ".ort"),
    "noise": (bytes(range(255, 0, -1)) * 4, "is not a readable ONNX model"),
    "other-proto": (b"\x08\x0a", "holds no graph"),
    "half": (_linear().SerializeToString()[:100], "is not a readable ONNX model"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_model(tmp_path: Path, kind: str) -> None:
    data, wanted = FILES[kind]
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    _refused(path, wanted)


def test_every_cut_of_a_model_is_refused(tmp_path: Path) -> None:
    whole = _linear().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole)
    load_model(path)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            load_model(path)
        except ModelError:
            continue
        # The last field is an opset import of another domain: a cut just before it leaves a sound model.
        kept = onnx.ModelProto.FromString(whole[:size])
        assert kept.graph == _linear().graph and kept.opset_import[0].version == 18


def test_missing_file_suggests_a_name(tmp_path: Path) -> None:
    _write(tmp_path, _linear())
    _refused(tmp_path / "modle.onnx", "no such file", str(tmp_path / "model.onnx"))
    _refused(tmp_path / "nowhere" / "model.onnx", "no such file", "does not exist")


def test_folder_names_the_model_inside(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    path = _write(folder, _linear())
    _refused(folder, "is a folder", str(path))


def test_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    _refused(tmp_path / "model.onnx", "not a regular file")


def test_proto_over_two_gib(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)  # sparse
    _refused(path, "2.0 GiB", "save_as_external_data")


EXTERNAL: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "length": (_external(length=124), ("124 bytes", "need 128")),
    "offset past the end": (_external(offset=4), ("ends at byte 132", "has only 128", "truncated")),
    "no length, past the end": (_external(offset=64, length=None), ("ends at byte 192",)),
    "huge offset": (_external(offset="9" * 18), ("ends at byte", "truncated")),
    "negative offset": (_external(offset=-4), ("offset '-4' is not a number",)),
    "endless digits": (_external(offset="9" * 1000), ("is not a number",)),
    "absolute": (_external("/etc/passwd"), ("'/etc/passwd'", "inside the model's folder")),
    "parent": (_external("../w.data"), ("'../w.data'", "inside the model's folder")),
    "parent in the middle": (_external("a/../../w.data"), ("inside the model's folder",)),
    "no location": (_external(""), ("location ''",)),
    "nul": (_external("w\0.data"), ("inside the model's folder",)),
    "missing": (_external("other.data"), ("other.data", "cannot be opened", "copy it")),
    "unknown entry": (_external(ofset=4), ("unknown external data entry 'ofset'",)),
    "long name": (_external("n" * 100_000), ("cannot be opened",)),
    "folder": (_external("."), ("is not a regular file",)),
    "negative dim": (_external(dims=[-4, -8]), ("[-4, -8]", "negative dimension")),
    "overflow": (_external(dims=[1 << 33, 1 << 33]), ("is larger than",)),
    "overflow with zero": (_external(dims=[1 << 62, 1 << 62, 0], length=0), ("is larger than",)),
    "rank": (_external(dims=[1] * 1000), ("is larger than",)),
}


@pytest.mark.parametrize("kind", EXTERNAL)
def test_external_data(tmp_path: Path, kind: str) -> None:
    model, wanted = EXTERNAL[kind]
    (tmp_path / "secret.data").write_bytes(WEIGHT.tobytes())
    message = _refused(_write(tmp_path, model), "tensor 'w' in the graph", *wanted)
    assert str(tmp_path.parent / "w.data") not in message


def test_truncated_external_data(tmp_path: Path) -> None:
    path = _write(tmp_path, _external(), data=WEIGHT.tobytes()[:-1])
    _refused(path, "tensor 'w'", "has only 127", "copy it again")


def test_external_data_behind_links(tmp_path: Path) -> None:
    """File link out and in, folder link, hard link: all could put another file's bytes into the artifact."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "w.data").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    path = _write(folder, _external())
    load_model(path)

    (folder / "w.data").rename(folder / "real.data")
    for target in (outside / "w.data", folder / "real.data"):
        (folder / "w.data").symlink_to(target)
        _refused(path, "tensor 'w'", "symbolic link", "cp -rL")
        (folder / "w.data").unlink()

    os.link(folder / "real.data", folder / "w.data")
    _refused(path, "2 hard links", "real copy")
    (folder / "w.data").unlink()

    (folder / "sub").symlink_to(outside)
    _refused(_write(folder, _external("sub/w.data"), data=None), "symbolic link")


def test_external_data_in_a_pipe_is_not_opened(tmp_path: Path) -> None:
    path = _write(tmp_path, _external(), data=None)
    os.mkfifo(tmp_path / "w.data")
    _refused(path, "not a regular file")


def test_model_in_a_linked_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    _write(tmp_path / "real", _external())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = load_model(tmp_path / "link" / "model.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)


def _inline(change: Callable[[onnx.TensorProto], object]) -> onnx.ModelProto:
    model = _linear()
    change(model.graph.initializer[0])
    return model


def _typed(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 31)


INLINE: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "short": (_inline(lambda t: setattr(t, "raw_data", b"1234")), ("has 4 bytes", "FLOAT need 128")),
    "no data": (_inline(lambda t: t.ClearField("raw_data")), ("has 0 values of float_data", "need 32")),
    "short typed": (_inline(_typed), ("has 31 values of float_data", "need 32")),
    "huge": (_inline(lambda t: t.dims.append(1 << 50)), ("is larger than",)),
    "negative": (_inline(lambda t: t.dims.append(-1)), ("negative dimension",)),
    "type": (_inline(lambda t: setattr(t, "data_type", 99)), ("element type 99 is unknown",)),
}


@pytest.mark.parametrize("kind", INLINE)
def test_inline_data(tmp_path: Path, kind: str) -> None:
    model, wanted = INLINE[kind]
    _refused(_write(tmp_path, model, data=None), "tensor 'w' in the graph", *wanted)


def test_total_size_budget(tmp_path: Path) -> None:
    """Many tensors over one sparse file: each is legal, the sum is not."""
    model = _external(dims=[1 << 36], length=1 << 38)
    for index in range(40):
        copy = model.graph.initializer.add()
        copy.CopyFrom(model.graph.initializer[0])
        copy.name = f"w{index}"
    path = _write(tmp_path, model, data=None)
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(1 << 38)
    _refused(path, "brings the weights to", "TiB")


def _graphs() -> dict[str, tuple[onnx.ModelProto, tuple[str, ...]]]:
    relu = _node("Relu", ["x"], "y")
    weight = _linear().graph.initializer[0]
    captured = _if([_node("Relu", ["later"], "b")], "b")
    deep = [_node("Relu", ["x"], "y")]
    for _ in range(20):
        deep = _if(deep, "y")
        deep[1].attribute.pop()
    bad_type = _proto([relu])
    bad_type.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    no_output = _proto([relu])
    no_output.graph.ClearField("output")
    hollow = _if([_node("Relu", ["x"], "b")], "b")
    hollow[0].attribute[0].ClearField("t")
    not_tensor = _if([_node("Relu", ["x"], "b")], "b")
    not_tensor[0].attribute[0].type = onnx.AttributeProto.INT
    ir = _proto([relu])
    ir.ir_version = 99
    no_opset = _proto([relu])
    no_opset.ClearField("opset_import")
    sparse = _proto([relu])
    sparse.graph.sparse_initializer.add()
    same = _function("F", ["Relu"])
    deep_calls = [_function(f"F{i}", [f"F{i + 1}"]) for i in range(150)] + [_function("F150", ["Relu"])]
    doubling = [_function(f"F{i}", [f"F{i + 1}"] * 2) for i in range(40)] + [_function("F40", ["Relu"])]
    return {
        "no nodes": (_proto([]), ("no nodes",)),
        "no outputs": (no_output, ("no outputs",)),
        "undefined input": (_proto([_node("Add", ["x", "ghost"], "y")]), ("'node_y' (Add)", "'ghost'")),
        "undefined output": (_proto([_node("Relu", ["x"], "z")]), ("output 'y' of the graph",)),
        "undefined in subgraph": (_proto(_if([_node("Relu", ["ghost"], "b")], "b")), ("'ghost'", "subgraph")),
        "outer value as subgraph output": (_proto(_if([], "x")), ("output 'x' of a subgraph",)),
        "duplicate initializer": (_proto([relu], (weight, weight)), ("initializer 'w'", "defined twice")),
        "nameless initializer": (_inline(lambda t: t.ClearField("name")), ("has no name",)),
        "duplicate output": (_proto([relu, relu]), ("node 'node_y' (Relu)", "defines 'y'")),
        "output over initializer": (_proto([relu, _node("Relu", ["x"], "w")], (weight,)), ("defines 'w'",)),
        "self loop": (_proto([_node("Add", ["x", "y"], "y")]), ("cycle: 'node_y' (Add) -> 'node_y' (Add)",)),
        "cycle": (
            _proto([_node("Add", ["x", "b"], "a"), _node("Relu", ["a"], "b"), _node("Relu", ["b"], "y")]),
            ("cycle", "'node_a' (Add) -> 'node_b' (Relu)"),
        ),
        "cycle through a subgraph": (
            _proto([*captured, _node("Relu", ["y"], "later")]),
            ("cycle", "'node_y' (If)", "'node_later' (Relu)"),
        ),
        "nested": (_proto(deep), ("levels deep",)),
        "negative value dimension": (bad_type, ("value 'x'", "dim_param")),
        "attribute without value": (_proto(hollow), ("attribute 'value'", "'c' (Constant)")),
        "constant of another type": (_proto(not_tensor), ("attribute 'value'",)),
        "sparse": (sparse, ("sparse",)),
        "ir version": (ir, ("IR version 99",)),
        "no opset": (no_opset, ("no ONNX opset",)),
        "old opset": (
            _proto([relu], opset_imports=[helper.make_opsetid("", 9)]),
            ("opset 9", "opset_version"),
        ),
        "new opset": (_proto([relu], opset_imports=[helper.make_opsetid("", 99)]), ("opset 99",)),
        "recursion": (_calling("F", [_function("F", ["Relu", "F"])]), ("'f::F' calls itself",)),
        "mutual recursion": (
            _calling("F", [_function("F", ["G"]), _function("G", ["H"]), _function("H", ["G"])]),
            ("'f::G' -> 'f::H' -> 'f::G'",),
        ),
        "recursion in a subgraph": (
            _calling(
                "F",
                [
                    helper.make_function(
                        "f",
                        "F",
                        ["x"],
                        ["y"],
                        _if([helper.make_node("F", ["x"], ["b"], domain="f")], "b"),
                        [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)],
                    )
                ],
            ),
            ("'f::F' calls itself",),
        ),
        "exploding functions": (_calling("F0", doubling), ("'f::F0'", "more than 5000000 nodes")),
        "endless call chain": (_calling("F0", deep_calls), ("more than 100 levels",)),
        "duplicate function": (_calling("F", [same, same]), ("'f::F' is defined twice",)),
        "cycle in a function": (
            _calling("F", [_function("F", ["Relu"])]),
            ("function 'f::F' has a cycle",),
        ),
    }


GRAPHS = _graphs()
_loop = GRAPHS["cycle in a function"][0].functions[0].node[0]
_loop.input[0] = "t0"


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs(tmp_path: Path, kind: str) -> None:
    model, wanted = GRAPHS[kind]
    _refused(_write(tmp_path, model, data=None), *wanted)


def test_huge_cycle_is_found_quickly(tmp_path: Path) -> None:
    """5,000 nodes in a ring, listed backwards: linear time, and a message of bounded length."""
    count = 5_000
    nodes = [_node("Relu", [f"v{(i + 1) % count}"], f"v{i}") for i in range(count)]
    message = _refused(_write(tmp_path, _proto([*nodes, _node("Relu", ["v0"], "y")])), "has a cycle")
    assert "..." in message


def test_hostile_names_stay_on_one_line(tmp_path: Path) -> None:
    name = "a\nError: all is well\x1b[31m" + "b" * 10_000
    message = _refused(_write(tmp_path, _proto([_node("Relu", [name], "y")])), "reads 'a\\nError")
    assert not re.search(r"[\x00-\x1f]", message)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Flipped bytes: either the model loads or it is a ModelError, never another exception."""
    generator = np.random.default_rng(0)
    whole = np.frombuffer(_calling("F", [_function("F", ["Relu"])]).SerializeToString(), np.uint8)
    other = np.frombuffer(_linear().SerializeToString(), np.uint8)
    path = tmp_path / "model.onnx"
    refused = 0
    for source in [whole, other] * 300:
        damaged = source.copy()
        for _ in range(generator.integers(1, 4)):
            damaged[generator.integers(len(damaged))] = generator.integers(256)
        path.write_bytes(damaged.tobytes())
        try:
            load_model(path)
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
