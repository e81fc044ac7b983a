"""tools/bench_decode.py on the CPU with a tiny shape: every contender runs, and its rows say what they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

pytest.importorskip("onnxruntime")

SHAPE = "--layers 2 --hidden 128 --intermediate 192 --heads 2 --kv-heads 1 --vocab 200"
STEPS = "--batches 1 3 --prefill 8 --context 16 --repeats 1"


def test_only_ours_have_gated_layers_and_fused_and_joined_quantizers(
    repo_root: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(repo_root / "tools")
    from decode_model import Float16Linears, Shape, W4A8Linears, write_model

    shape = Shape(layers=2, hidden=128, intermediate=192, heads=2, kv_heads=1, vocab=200)
    wanted = {
        "zqfp_lorc16": [8, 0, 0, 0, 2],
        "zqfp_two_launches": [0, 4, 0, 4, 2],
        "zqfp_ungated": [8, 0, 0, 0, 0],
        "zqfp_two_launches_ungated": [0, 4, 2, 2, 0],
        "fp16": [0, 0, 0, 0, 0],
    }
    contenders = [W4A8Linears(16), Float16Linears(), W4A8Linears(two_launches=True)]
    contenders += [W4A8Linears(ungated=True), W4A8Linears(two_launches=True, ungated=True)]
    for linears in contenders:
        path, _ = write_model(tmp_path, shape, linears, 64)
        nodes = onnx.load(path, load_external_data=False).graph.node
        kinds, attributes = (
            [node.op_type for node in nodes],
            [a.name for node in nodes for a in node.attribute],
        )
        ours = ("QuantizedW4A8Linear", "QuantizeRmsNorm", "QuantizeSiluMul", "QuantizeActivation")
        assert [*(kinds.count(kind) for kind in ours), attributes.count("gated")] == wanted[linears.name]


def test_every_contender_has_a_row_per_step(make, repo_root: Path, tmp_path: Path) -> None:
    make("onnxruntime-ops")
    published = tmp_path / "decode.json"
    command = [sys.executable, "tools/bench_decode.py", "--device", "cpu", *SHAPE.split(), *STEPS.split()]
    command += ["--publish", str(published), "--work", str(tmp_path / "work")]
    for _ in range(2):  # the second run's rows replace the first's
        subprocess.run(command, cwd=repo_root, check=True, timeout=120, capture_output=True)
    rows = json.loads(published.read_text())
    names = {row["contender"] for row in rows}
    assert names == {"fp16", "ort_int4", "zqfp", "zqfp_lorc16", "zqfp_lorc16_token"}
    steps = {("decode", 1, 17), ("decode", 3, 17), ("prefill", 1, 8)}
    for name in names:
        mine = [row for row in rows if row["contender"] == name]
        assert sorted((row["phase"], row["batch"], row["context"]) for row in mine) == sorted(steps)
        assert all(row["tokens_per_s"] > 0 and not row["cuda_graph"] for row in mine)
    bits = {row["contender"]: row["bits_per_weight"] for row in rows}
    assert (bits["fp16"], bits["ort_int4"]) == (16, 4.5)
    assert list((tmp_path / "work").iterdir()) == []


def test_an_interrupted_run_leaves_no_model(repo_root: Path, tmp_path: Path, monkeypatch) -> None:
    """A model of 7B has 14 GB."""
    monkeypatch.syspath_prepend(repo_root / "tools")
    import bench_decode

    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_decode.Runner, "milliseconds", interrupted)
    options = [*SHAPE.split(), *STEPS.split(), "--contenders", "fp16", "ort_int4", "--turns", "2"]
    monkeypatch.setattr("sys.argv", ["bench_decode.py", "--device", "cpu", *options, "--work", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        bench_decode.main()
    assert list(tmp_path.iterdir()) == []


def test_contenders_take_turns(repo_root: Path, tmp_path: Path) -> None:
    """One after the other; a row has the median of its turns, and their models are gone afterwards."""
    published, work = tmp_path / "decode.json", tmp_path / "work"
    command = [sys.executable, "tools/bench_decode.py", "--device", "cpu", *SHAPE.split(), *STEPS.split()]
    command += ["--contenders", "fp16", "ort_int4", "--turns", "3"]
    command += ["--publish", str(published), "--work", str(work)]
    done = subprocess.run(
        command, cwd=repo_root, check=True, timeout=120, capture_output=True, encoding="utf-8"
    )
    order = [line.split()[0] for line in done.stdout.splitlines() if "prefill  batch  1" in line]
    assert order == ["fp16", "ort_int4"] * 3
    for row in json.loads(published.read_text()):
        assert len(row["ms_by_turn"]) == 3
        assert row["ms"] == sorted(row["ms_by_turn"])[1]
    assert list(work.iterdir()) == []
