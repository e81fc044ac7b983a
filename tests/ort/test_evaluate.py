"""Perplexity against torch, the comparison of two models, and the perplexity tool."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.device import CUDA_PROVIDER
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.evaluate import cut_windows, evaluate
from zqfp_compile.report import metrics

onnxruntime = pytest.importorskip("onnxruntime")

TOKENS = np.random.default_rng(0).integers(0, 320, 100)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_is_torch_perplexity(family: str, tiny_model, models_folder: Path) -> None:
    import torch
    from tiny_models import make_model

    result = evaluate(tiny_model(family), None, TOKENS, length=32)
    model = make_model(family, "float32")
    nll, count = 0.0, 0
    for window in cut_windows(TOKENS, 32):
        ids = torch.from_numpy(window)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        nll += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += window.size - 1
    assert result.tokens_scored == count == 96  # 31 + 31 + 31 + 3
    assert result.nll_original == pytest.approx(nll / count, rel=1e-5)  # float32 logits
    assert result.perplexity_original == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert result.perplexity_compiled is None and result.kl is None


def test_a_model_against_itself(tiny_model) -> None:
    path = tiny_model("llama")
    result = evaluate(path, path, TOKENS, length=50)
    assert result.perplexity_compiled == result.perplexity_original
    assert (result.logits_sqnr_db, result.kl, result.top1_agreement) == (math.inf, 0.0, 1.0)
    assert result.cosine == pytest.approx(1.0, abs=1e-5)  # sums of float32


def test_half_precision_is_close_and_not_equal(tiny_model) -> None:
    result = evaluate(tiny_model("llama"), tiny_model("llama", dtype="float16"), TOKENS, length=50)
    # float16 keeps 11 bits: 66 dB for one rounding, less after two layers; unrelated models would give 0 dB.
    assert result.logits_sqnr_db is not None and 35 < result.logits_sqnr_db < 75
    assert result.kl is not None and 0 < result.kl < 1e-3
    assert result.top1_agreement is not None and result.top1_agreement > 0.9
    assert result.perplexity_compiled == pytest.approx(result.perplexity_original, rel=0.01)
    assert result.perplexity_compiled != result.perplexity_original


def test_comparison_is_the_metrics_definitions(tiny_model) -> None:
    paths = tiny_model("llama"), tiny_model("llama", dtype="float16")
    result = evaluate(*paths, TOKENS, length=100)
    logits = []
    for path in paths:
        session = create_session(path)
        feed = CausalLm.from_session(session).make_feed(TOKENS[None])
        logits.append(session.run(["logits"], feed)[0][0, :-1])
    # evaluate works in float32: one part in a million or so, and KL is a difference of such numbers.
    assert result.logits_sqnr_db == pytest.approx(metrics.sqnr_db(*logits), abs=1e-3)
    assert result.cosine == pytest.approx(metrics.cosine(*logits).mean(), abs=1e-5)
    assert result.kl == pytest.approx(metrics.kl_divergence(*logits).mean(), rel=0.05, abs=1e-7)
    assert result.top1_agreement == metrics.top1_agreement(*logits)
    nll = metrics.negative_log_likelihood(logits[1], TOKENS[1:])
    assert result.nll_compiled == pytest.approx(nll.mean(), rel=1e-5)


def test_bfloat16_runs_as_float32(tiny_model) -> None:
    result = evaluate(tiny_model("llama"), tiny_model("llama", dtype="bfloat16"), TOKENS, length=50)
    # Weights rounded to 8 bits: 48 dB for one rounding.
    assert result.logits_sqnr_db is not None and 20 < result.logits_sqnr_db < 60


def test_windows_cover_the_text_once() -> None:
    tokens = np.arange(23)
    windows = list(cut_windows(tokens, 5))
    np.testing.assert_array_equal(np.concatenate(windows), tokens)
    assert [w.size for w in windows] == [5, 5, 5, 5, 3]
    assert [w.size for w in cut_windows(tokens[:21], 5)] == [5, 5, 5, 5]  # one token alone scores nothing
    assert [w.size for w in cut_windows(tokens, 5, exact=True)] == [5, 5, 5, 5]


def test_nothing_to_score(tiny_model) -> None:
    with pytest.raises(UsageError, match="too few"):
        evaluate(tiny_model("llama"), None, TOKENS[:1], length=50)


def test_nan_logits_are_an_error(tiny_model, tmp_path: Path) -> None:
    model = ir.load(tiny_model("llama"))
    for value in model.graph.initializers.values():
        if value.name.endswith("norm.weight"):
            value.const_value = ir.tensor(np.full(tuple(value.const_value.shape), np.nan, np.float32))
    ir.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ModelError, match=r"nan\.onnx: its logits hold NaN"):
        evaluate(tmp_path / "nan.onnx", None, TOKENS, length=50)


def test_models_of_other_vocabularies(tiny_model, tmp_path: Path) -> None:
    model = ir.load(tiny_model("llama"))
    logits = next(v for v in model.graph.outputs if v.name == "logits")
    cut = [ir.tensor(np.array([n], np.int64)) for n in (0, 300, 2)]
    constants = [ir.node("Constant", [], {"value": tensor}) for tensor in cut]
    node = ir.node("Slice", [logits, *(c.outputs[0] for c in constants)])
    for item in (*constants, node):
        model.graph.append(item)
    logits.name, node.outputs[0].name = "all_logits", "logits"
    node.outputs[0].type, node.outputs[0].shape = logits.type, ir.Shape(["b", "s", 300])
    model.graph.outputs[list(model.graph.outputs).index(logits)] = node.outputs[0]
    ir.save(model, tmp_path / "small.onnx")
    with pytest.raises(UsageError, match="logits differ in shape"):
        evaluate(tiny_model("llama"), tmp_path / "small.onnx", TOKENS, length=50)


@pytest.mark.parametrize("options", [[], ["--scale-constraint", "m2", "--lorc-rank", "0", "--set", "seed=1"]])
def test_perplexity_tool(options: list[str], tiny_model, repo_root: Path, tmp_path: Path) -> None:
    text = tmp_path / "wiki.txt"
    text.write_text("a two @-@ part tale , " * 40)
    command = [sys.executable, str(repo_root / "tools" / "eval_perplexity.py"), str(tiny_model("llama"))]
    command += ["--text", str(text), "--wikitext", "--length", "64", "--limit-tokens", "200", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    human, line = done.stdout.splitlines()
    record = json.loads(line)
    assert record["tokens"] == 196 and math.isfinite(record["perplexity"])
    assert f"{record['perplexity']:.3f}" in human
    wanted = {"scale_constraint": "m2", "lorc_rank": 0, "seed": 1} if options else {}
    assert record["options"] == wanted


def test_perplexity_tool_reports_errors_in_one_line(repo_root: Path, tiny_model) -> None:
    tool = [sys.executable, str(repo_root / "tools" / "eval_perplexity.py")]
    has_cuda = CUDA_PROVIDER in onnxruntime.get_available_providers()
    for arguments, code, says in (
        (["missing.onnx"], 3, "missing.onnx"),
        ([str(tiny_model("llama")), "--set", "nonsense=1"], 2, "nonsense"),
        *([] if has_cuda else [([str(tiny_model("llama")), "--provider", "cuda"], 6, "onnxruntime-gpu")]),
    ):
        done = subprocess.run([*tool, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert says in done.stderr and "Traceback" not in done.stderr
