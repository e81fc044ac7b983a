"""docs/writing_a_pass.md and tools/own_pass.py: the pass they show works, in the scripts they show."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from compiled_models import quick
from documents import snippets

from zqfp_compile import load_model, save_model

pytest.importorskip("onnx_graphsurgeon")
pytest.importorskip("onnxruntime")

RECIPE = quick(evaluate=False)


@pytest.fixture
def with_identity(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with an Identity in front of a linear layer and one that makes an output."""
    source = tiny_model("gpt2")
    shutil.copytree(source.parent, tmp_path / "in")
    model = load_model(source)
    linear = next(node for node in model.graph if node.op_type in ("Gemm", "MatMul"))
    inner = ir.node("Identity", [linear.inputs[0]], name="inner")
    model.graph.insert_before(linear, inner)
    linear.replace_input_with(0, inner.outputs[0])
    last = ir.node("Identity", [model.graph.outputs[0]], name="last")
    last.outputs[0].type, last.outputs[0].shape = model.graph.outputs[0].type, model.graph.outputs[0].shape
    model.graph.append(last)
    model.graph.outputs.append(last.outputs[0])
    path = tmp_path / "in" / "model.onnx"
    save_model(model, path)
    return path


def _names(path: Path) -> set[str]:
    return {node.name for node in onnx.load(path, load_external_data=False).graph.node}


def test_the_tool(with_identity: Path, repo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    command = [sys.executable, "tools/own_pass.py", str(with_identity), "--output", str(tmp_path / "out")]
    command += ["--recipe", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, cwd=repo_root, check=True, timeout=120, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["changed", "last stays: its result is a graph output"]
    assert {"inner", "last"} <= _names(with_identity)
    assert _names(tmp_path / "out" / "model.zqfp.onnx") & {"inner", "last"} == {"last"}


def test_the_document(
    with_identity: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scripts run as they are, one after the other, with a recipe that takes less time."""
    document = repo_root / "docs" / "writing_a_pass.md"
    codes = [code.replace('Recipe(target="none")', "recipe") for code in snippets(document, "python")]
    script, surgeon, _ = codes
    own_pass = runpy.run_path(str(repo_root / "tools" / "own_pass.py"))
    monkeypatch.chdir(with_identity.parent)
    names: dict[str, Any] = {"DropIdentity": own_pass["DropIdentity"], "recipe": RECIPE}
    exec(script, names)
    for made in (Path("prepared.onnx"), names["result"].artifact):
        assert _names(made) & {"inner", "last"} == {"last"}
    exec(surgeon, names)
    assert capsys.readouterr().out.splitlines()[-1].count("W4A8Linear_e2m1_g64_fp8_tensor_float_bias") == 8
    # A gs.Graph and the compile's own names meet again in what is saved.
    assert {node.op_type for node in load_model("compiled.onnx").graph if node.domain == "zqfp"} == {
        "W4A8Linear"
    }
    assert "logits" in _names(Path("compiled.onnx"))
