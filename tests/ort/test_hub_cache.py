"""A model that huggingface_hub downloaded compiles under the path that the download returned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from cli_runs import PROGRAM
from hub_layout import snapshot_of
from onnx import TensorProto
from small_lm import small_lm, write_model_folder

pytest.importorskip("onnxruntime")

VALIDATE = [sys.executable, "-m", "zqfp_compile.cli_validate"]


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16], ids=["float32", "bfloat16"])
def test_a_snapshot_compiles_and_runs(dtype: int, tmp_path: Path, models_folder: Path) -> None:
    """The weights and the model are links to blobs, the tokenizer is in the folder above."""
    files = tmp_path / "files"
    write_model_folder(files).unlink()
    text = (files / "text.txt").rename(tmp_path / "text.txt")
    (files / "onnx").mkdir()
    path, external = files / "onnx" / "model.onnx", {"location": "model.onnx_data", "size_threshold": 0}
    onnx.save(small_lm(dtype), path, save_as_external_data=True, **external)
    model = snapshot_of(files, tmp_path / "cache") / "onnx" / "model.onnx"

    out = tmp_path / "out"
    texts = ["--calibration", str(text), "--eval-text", str(text)]
    lines = _run(*PROGRAM, str(model), "--target", "onnxruntime", *texts, "-o", str(out))
    assert "RANDOM" not in lines and "perplexity:" in lines, lines
    report = json.loads((out / "report.json").read_text())
    assert report["certificate"]["mismatches"] == 0 and report["logits"]["sqnr_db"] > 9
    assert not (out / "tokenizer.json").is_symlink() and (out / "config.json").is_file()
    assert "RANDOM" not in _run(*VALIDATE, str(model), str(out), "--text", str(text))
