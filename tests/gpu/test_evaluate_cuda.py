"""Perplexity in ONNX Runtime's CUDA provider against its CPU provider."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zqfp_compile.evaluate import evaluate
from zqfp_compile.pipeline import compile_model
from zqfp_compile.recipe import Recipe

ort = pytest.importorskip("onnxruntime")

if "CUDAExecutionProvider" not in ort.get_available_providers():
    pytest.skip("needs onnxruntime-gpu", allow_module_level=True)

TOKENS = np.random.default_rng(0).integers(0, 320, 100)


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_cuda_agrees_with_the_cpu(scale: str, tiny_model, tmp_path: Path) -> None:
    recipe = Recipe(target="onnxruntime", evaluate=False, activation_scale=scale, lorc_format="fp8")
    engine = compile_model(tiny_model("llama"), recipe, output=tmp_path / "out").engine
    for model in (tiny_model("llama"), engine):
        here = evaluate(model, None, TOKENS, length=32)
        there = evaluate(model, None, TOKENS, length=32, device="cuda")
        # float32 products on both sides, other orders of sums: that may move an FP8 code to its neighbour.
        assert there.perplexity_original == pytest.approx(here.perplexity_original, rel=1e-3)
