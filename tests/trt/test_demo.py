"""What the README's demo promises, on the real SmolLM2-135M, with less text to evaluate."""

import json
import subprocess

import onnx
import pytest
from cli_runs import PROGRAM

pytest.importorskip("tensorrt_rtx", reason="the demo builds a TensorRT-RTX engine")


@pytest.mark.slow
def test_smollm2_compiles_as_the_readme_says(smollm2, tmp_path):
    """As a process of its own: the peak of memory would be that of all tests."""
    folder = tmp_path / "smollm2.zqfp"
    options = ["--target", "tensorrt-rtx", "--eval-tokens", "2048"]
    subprocess.run([*PROGRAM, smollm2, "--output", folder, *options], check=True)
    report = json.loads((folder / "report.json").read_text())

    rewritten = [layer for layer in report["layers"] if layer["rewritten"]]
    assert len(rewritten) == 210
    assert [layer["reason"] for layer in report["layers"] if not layer["rewritten"]] == [
        "lm_head; use --quantize-lm-head"
    ]
    assert report["certificate"] == {"layers_checked": 210, "mismatches": 0, "problems": [], "ok": True}
    assert report["bits_per_weight"] <= 4.3
    assert report["bits_per_weight_with_lorc"] <= 5.1
    assert report["size"]["ratio"] <= 0.465

    engine = report["engine"]
    assert engine["lint"] == {"ok": True, "problems": []}
    assert [profile["name"] for profile in engine["profiles"]] == ["prefill", "decode"]
    assert engine["fp8_linears"] == 210
    assert all(profile["fp8_linears"] == 210 for profile in engine["profiles"])

    # RTN with energy-weighted LoRC loses 11% on 20,000 tokens; 2,048 tokens scatter by a few percent.
    assert 0 < report["perplexity"]["increase_percent"] < 18
    assert report["peak_rss_bytes"] < 4e9

    # Embedding and lm_head are tied: one tensor of 49152 x 576, no second copy under another name.
    graph = onnx.load(folder / "model.zqfp.onnx", load_external_data=False).graph
    assert sum(list(tensor.dims) in ([49152, 576], [576, 49152]) for tensor in graph.initializer) == 1
