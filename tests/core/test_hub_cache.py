"""Links of a Hugging Face cache are followed into the blobs of the same repository, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hostile_protos import WEIGHT, external, write_model
from hub_layout import snapshot_of

from zqfp_compile import hub_cache
from zqfp_compile.companions import companion_folder, find_companions
from zqfp_compile.errors import ModelError
from zqfp_compile.hub_cache import snapshot
from zqfp_compile.model_io import data_folder, load_model
from zqfp_compile.runtime.folder import ModelFolder

DATA = "onnx/w.data"


@pytest.fixture
def revision(tmp_path: Path) -> Path:
    (tmp_path / "files" / "onnx").mkdir(parents=True)
    write_model(tmp_path / "files" / "onnx", external())
    (tmp_path / "files" / "config.json").write_text("{}")
    return snapshot_of(tmp_path / "files", tmp_path / "cache")


def test_weights_are_read_from_the_blob(revision: Path) -> None:
    model = load_model(revision / "onnx" / "model.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)
    assert data_folder(model) == revision.parents[1] / "blobs"


def test_the_snapshot_is_looked_for_once_per_model(revision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per tensor: by the checks, and by what reads the weights."""
    path = revision / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for name in ("u", "v"):
        model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
        model.graph.initializer[-1].name = name
    path.write_bytes(model.SerializeToString())
    asked = []
    monkeypatch.setattr(hub_cache, "snapshot", lambda folder: asked.append(folder) or snapshot(folder))
    weights = load_model(path).graph.initializers
    assert all(np.array_equal(value.const_value.numpy(), WEIGHT) for value in weights.values())
    assert len(weights) == 3 and len(asked) == 2


def test_the_cache_may_be_behind_a_link(revision: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    moved = tmp_path / "link" / revision.relative_to(tmp_path / "cache")
    model = load_model(moved / "onnx" / "model.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)


@pytest.mark.parametrize("elements", [32, 2048])
def test_a_constant_node_may_be_in_a_blob(elements: int, tmp_path: Path) -> None:
    """Large ones become initializers, small ones are read."""
    tensor = onnx.numpy_helper.from_array(np.arange(elements, dtype=np.float32), "c")
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    copy = onnx.helper.make_node("Identity", ["c"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [elements])
    graph = onnx.helper.make_graph([node, copy], "g", [], [output])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "model.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="data", size_threshold=0, convert_attribute=True
    )
    loaded = load_model(snapshot_of(tmp_path / "files", tmp_path / "cache") / "model.onnx")
    found = [value.const_value for value in loaded.graph.initializers.values()]
    found += [node.attributes["value"].as_tensor() for node in loaded.graph if node.op_type == "Constant"]
    np.testing.assert_array_equal(found[0].numpy(), np.arange(elements, dtype=np.float32))


def _relink(revision: Path, target: Path) -> None:
    (revision / DATA).unlink()
    (revision / DATA).symlink_to(target)


def _secret(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(WEIGHT.tobytes())
    return place


def _to_another_repository(revision: Path) -> None:
    _relink(revision, _secret(revision.parents[2] / "models--other--private" / "blobs" / "5"))


def _to_a_file_outside(revision: Path) -> None:
    _relink(revision, _secret(revision.parents[3] / "secret"))


def _to_a_file_of_the_repository(revision: Path) -> None:
    _relink(revision, _secret(revision.parents[1] / "refs" / "main"))


def _below_the_blobs(revision: Path) -> None:
    _relink(revision, _secret(revision.parents[1] / "blobs" / "more" / "5"))


def _blobs_behind_a_link(revision: Path) -> None:
    blobs = revision.parents[1] / "blobs"
    blobs.rename(revision.parents[3] / "elsewhere")
    blobs.symlink_to(revision.parents[3] / "elsewhere")


def _blob_behind_a_link(revision: Path) -> None:
    blob = Path(os.path.realpath(revision / DATA))
    blob.unlink()
    blob.symlink_to(_secret(revision.parents[3] / "secret"))


def _folder_behind_a_link(revision: Path) -> None:
    """The model is in one snapshot, its folder of data links into another repository's."""
    other = revision.parents[2] / "models--other--private" / "snapshots" / ("6" * 40)
    blob = _secret(other.parents[1] / "blobs" / "5")
    other.mkdir(parents=True)
    (other / "w.data").symlink_to(blob)
    (revision / "onnx" / "more").symlink_to(other)
    model = onnx.load(revision / "onnx" / "model.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "more/w.data"
    (revision / "onnx" / "model.onnx").unlink()
    (revision / "onnx" / "model.onnx").write_bytes(model.SerializeToString())


def _another_name(revision: Path) -> None:
    """The same links in a folder that is no cache's."""
    revision.parents[1].rename(revision.parents[2] / "name")


@pytest.mark.parametrize(
    "change",
    [
        _to_another_repository,
        _to_a_file_outside,
        _to_a_file_of_the_repository,
        _below_the_blobs,
        _blobs_behind_a_link,
        _blob_behind_a_link,
        _folder_behind_a_link,
        _another_name,
    ],
)
def test_every_other_link_is_refused(change: Callable[[Path], None], revision: Path, tmp_path: Path) -> None:
    change(revision)
    (path,) = (tmp_path / "cache").glob("*name/snapshots/*/onnx/model.onnx")
    with pytest.raises(ModelError, match="is behind a symbolic link"):
        load_model(path)


def test_a_hard_linked_blob_is_refused(revision: Path) -> None:
    blob = Path(os.path.realpath(revision / DATA))
    os.link(blob, blob.with_name("5"))
    with pytest.raises(ModelError, match="2 hard links"):
        load_model(revision / "onnx" / "model.onnx")


def test_a_blob_that_was_not_downloaded(revision: Path) -> None:
    Path(os.path.realpath(revision / DATA)).unlink()
    with pytest.raises(ModelError, match=r"not in the Hugging Face cache .*; download the model again"):
        load_model(revision / "onnx" / "model.onnx")


def test_companions_are_in_the_snapshot_or_beside_the_model(revision: Path) -> None:
    model = revision / "onnx" / "model.onnx"
    assert find_companions(companion_folder(model)) == (Path(os.path.realpath(revision)) / "config.json",)
    (revision / "onnx" / "config.json").write_text("{}")
    assert find_companions(companion_folder(model)) == (revision / "onnx" / "config.json",)


def test_a_model_in_a_snapshot_generates_with_its_companions(revision: Path) -> None:
    folder = ModelFolder.of(revision / "onnx" / "model.onnx")
    assert folder.read_json("config.json") == {} and folder.companion("config.json") is not None
    assert folder.companion("tokenizer.json") is None


def test_a_companion_that_leaves_the_cache_is_refused(revision: Path, tmp_path: Path) -> None:
    (revision / "tokenizer.json").symlink_to(_secret(tmp_path / "secret"))
    with pytest.raises(ModelError, match=r"tokenizer\.json: is a symbolic link out of"):
        find_companions(companion_folder(revision / "onnx" / "model.onnx"))
