"""compile_model on models that are objects: the same compile as of their file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled_models import quick, run_artifact

from zqfp_compile import (
    compile_model,
    create_pass,
    from_graphsurgeon,
    load_model,
    save_model,
    to_graphsurgeon,
)
from zqfp_compile.errors import ModelError, UsageError

gs = pytest.importorskip("onnx_graphsurgeon")
pytest.importorskip("onnxruntime")


def _artifact(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Nodes in order, and tensors by name: graphsurgeon orders initializers by their first use."""
    graph = onnx.load(folder / "model.zqfp.onnx").graph
    tensors = sorted(graph.initializer, key=lambda tensor: tensor.name)
    return [node.SerializeToString() for node in graph.node], [
        tensor.SerializeToString() for tensor in tensors
    ]


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("onnx.ModelProto", onnx.load),
        ("onnx_ir.Model", load_model),
        ("gs.Graph", lambda path: to_graphsurgeon(load_model(path))),
    ],
)
def test_the_artifact_is_that_of_the_file(
    kind: str, read: Callable[[Path], Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_model("llama")
    recipe = quick(calibration=None, eval_text=None)  # the built-in text needs the tokenizer
    wanted = compile_model(path, recipe, output=tmp_path / "file")
    result = compile_model(read(path), recipe, output=tmp_path / "object", folder=path.parent)
    assert _artifact(result.folder) == _artifact(wanted.folder)
    assert result.report.model.endswith(f"({kind})") and wanted.report.model == str(path)
    assert result.report.perplexity == wanted.report.perplexity
    assert {file.name for file in result.folder.iterdir()} == {file.name for file in wanted.folder.iterdir()}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "object"]


def test_a_graph_that_graphsurgeon_imported(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Layers go by node names then; what is computed is the same. The result is a graph again."""
    path = tiny_model("qwen2")
    graph = gs.import_onnx(onnx.load(path))
    constants = {name: values for name, values in graph.tensors().items() if isinstance(values, gs.Constant)}
    result = compile_model(graph, quick(evaluate=False), output=tmp_path / "out", folder=path.parent)
    wanted = compile_model(path, quick(evaluate=False), output=tmp_path / "wanted")
    assert [layer.sqnr_db for layer in result.report.layers] == [
        layer.sqnr_db for layer in wanted.report.layers
    ]
    assert all(graph.tensors()[name] is constant for name, constant in constants.items())

    compiled = result.graph()
    linears = [node for node in compiled.nodes if node.domain == "zqfp"]
    assert len(linears) == 14 and isinstance(linears[0].inputs[2], gs.Constant)
    codes = linears[0].inputs[2].values  # INT4, which graphsurgeon could not write any more
    assert codes.min() >= -7 and codes.max() <= 7
    save_model(from_graphsurgeon(compiled), tmp_path / "again.onnx")
    for old, new in zip(
        run_artifact(result.artifact)[0].values(),
        run_artifact(tmp_path / "again.onnx")[0].values(),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)


def test_passes_one_by_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """From a script of one's own, on an ``ir.Model`` and around graphsurgeon."""
    model = load_model(tiny_model("llama"))
    for name in ("strip-metadata", "raise-opset"):
        model = create_pass(name).call(model).model
    selected = create_pass("select-linears").call(model)
    assert selected.plan is not None and len(selected.plan.linears) == 14
    graph = to_graphsurgeon(model)
    graph.nodes[0].name = "renamed"
    again = create_pass("select-linears").call(from_graphsurgeon(graph))
    assert again.plan is not None and again.plan.linears == selected.plan.linears


def test_what_is_wrong_is_said(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = load_model(tiny_model("opt"))
    with pytest.raises(UsageError, match=r"\(onnx_ir\.Model\): is not a file, .* give output="):
        compile_model(model, quick())
    with pytest.raises(UsageError, match=r"a dict is no model; give a path"):
        compile_model({}, quick(), output=tmp_path / "out")
    damaged = onnx.load(tiny_model("opt"))
    damaged.graph.initializer[0].raw_data = b"\0"
    with pytest.raises(
        ModelError, match=r"^main_graph \(onnx\.ModelProto\): tensor .* has 1 bytes, its shape"
    ):
        compile_model(damaged, quick(), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_artifact_is_recognised_as_an_object_too(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = compile_model(tiny_model("gpt2"), quick(evaluate=False), output=tmp_path / "out")
    with pytest.raises(ModelError, match=r"^main_graph \(gs\.Graph\): was compiled by zqfp"):
        compile_model(result.graph(), quick(), output=tmp_path / "twice", folder=tiny_model("gpt2").parent)
