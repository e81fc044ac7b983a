"""Hostile model files at the loader: each is one clear line, quickly, before any data is touched.

The files are those of ``hostile_cases``; ``tests/ort/test_hostile_files.py`` runs them through the commands.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hostile_case import HostileCase
from hostile_cases import AT_LOAD
from hostile_protos import WEIGHT, branching, calling, external, function, linear, node, write_model

from zqfp_compile.errors import ModelError
from zqfp_compile.model_io import load_model


def _refused(path: Path, *wanted: str) -> str:
    """Load ``path`` and check the refusal: one line, the file, each of ``wanted``, a remedy, quick."""
    before = sorted(path.parent.rglob("*")) if path.parent.exists() else []
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert time.process_time() - start < 1.0
    assert caught.value.exit_code == 3
    assert not re.search(r"[\x00-\x1f]", message)
    assert message.startswith(f"{path}: ") and len(message) < 1000
    assert ";" in message or message.endswith("?"), f"says no remedy: {message}"
    for text in wanted:
        assert text in message, message
    after = sorted(path.parent.rglob("*")) if path.parent.exists() else []
    assert before == after
    return message


@pytest.mark.parametrize("case", AT_LOAD, ids=lambda case: case.name)
def test_it_is_refused(tmp_path: Path, case: HostileCase) -> None:
    case.make(tmp_path)
    _refused(tmp_path / "model.onnx", *case.says)


def test_every_cut_of_a_model_is_refused(tmp_path: Path) -> None:
    whole = linear().SerializeToString()
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
        assert kept.graph == linear().graph and kept.opset_import[0].version == 18


def test_missing_file_suggests_a_name(tmp_path: Path) -> None:
    write_model(tmp_path, linear())
    _refused(tmp_path / "modle.onnx", "no such file", str(tmp_path / "model.onnx"))
    _refused(tmp_path / "nowhere" / "model.onnx", "no such file", "does not exist")


def test_folder_names_the_model_inside(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    path = write_model(folder, linear())
    _refused(folder, "is a folder", str(path))


def test_model_in_a_linked_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_model(tmp_path / "real", external())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model = load_model(tmp_path / "link" / "model.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)


def test_equal_tensors_may_share_their_bytes(tmp_path: Path) -> None:
    """Exporters store equal weights once; an empty tensor lies anywhere."""
    model = external()
    for name, length, dims in (("v", "128", [4, 8]), ("empty", "0", [0, 8])):
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(model.graph.initializer[0])
        tensor.name = name
        tensor.ClearField("dims")
        tensor.dims.extend(dims)
        for entry in tensor.external_data:
            entry.value = length if entry.key == "length" else entry.value
    weights = load_model(write_model(tmp_path, model)).graph.initializers
    np.testing.assert_array_equal(weights["v"].const_value.numpy(), WEIGHT)


def _constant(tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    return [node("Constant", [], "y", value=tensor)]


def _in_a_branch(tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    nodes = branching([node("MatMul", ["a", "w"], "b")], "b")
    for branch in nodes[-1].attribute:
        branch.g.initializer.append(tensor)
    return nodes


@pytest.mark.parametrize("body", [_constant, _in_a_branch])
def test_a_function_holds_no_external_data(
    tmp_path: Path, body: Callable[[onnx.TensorProto], list[onnx.NodeProto]]
) -> None:
    """ONNX Runtime looks for it in the current folder once the function is inlined."""
    imports = [onnx.helper.make_opsetid("", 18)]
    nodes = body(external().graph.initializer[0])
    made = onnx.helper.make_function("f", "F", ["a"], ["y"], nodes, imports)
    _refused(write_model(tmp_path, calling("F", [made])), "cannot be external data")


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Flipped bytes: either the model loads or it is a ModelError, never another exception."""
    generator = np.random.default_rng(0)
    whole = np.frombuffer(calling("F", [function("F", ["Relu"])]).SerializeToString(), np.uint8)
    other = np.frombuffer(linear().SerializeToString(), np.uint8)
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
