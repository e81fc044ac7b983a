"""Engines with an FP8 KV cache and FP8 attention, built by the real TensorRT-RTX without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compiled_models import LINEARS, quick

from zqfp_compile import compile_model
from zqfp_compile.backends.plan_lint import parse_layers

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")


@pytest.mark.parametrize(
    ("family", "exporter", "dtype", "attention"),
    [
        ("llama", "torch", "float16", "none"),
        ("llama", "torch", "float16", "fp8"),
        ("qwen2", "optimum", "float16", "fp8"),
        ("gpt2", "torch", "float32", "none"),
    ],
)
def test_the_network_takes_and_gives_fp8(
    family: str, exporter: str, dtype: str, attention: str, tiny_model, tmp_path: Path
) -> None:
    recipe = quick(
        target="tensorrt-rtx",
        compute_capability="89",
        evaluate=False,
        kv_cache_dtype="fp8",
        attention=attention,
    )
    result = compile_model(tiny_model(family, exporter, dtype), recipe, output=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["engine"]["lint"] == {"ok": True, "problems": []}
    assert report["engine"]["fp8_linears"] == LINEARS[family]
    assert len(report["attention"]) == (2 if attention == "fp8" else 0)
    log = (result.folder / "tensorrt-rtx.engine.log").read_text(errors="replace")
    for layers in parse_layers(log, 2):
        types: dict[str, set[str]] = {}
        for layer in layers:
            for tensor in (*layer.inputs, *layer.outputs):
                types.setdefault(tensor.name.removesuffix(" [profile 1]"), set()).add(tensor.dtype)
        for cache in report["kv_cache"]:
            assert types[cache["past"]] == types[cache["present"]] == {"FP8"}
