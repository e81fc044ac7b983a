"""Engines with the token embedding in FP8: one fused kernel reads rows of 8-bit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from compiled_models import LINEARS, quick

from zqfp_compile import compile_model
from zqfp_compile.backends.plan_lint import Layer, Tensor, parse_layers

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")


def _tables(layers: Sequence[Layer]) -> list[tuple[Layer, Tensor]]:
    """The layers with a constant of the table's shape, and that constant."""
    shapes = ((320, 72), (72, 320))
    return [(layer, tensor) for layer in layers for tensor in layer.constants if tensor.dims in shapes]


@pytest.mark.parametrize("lowering", ["fp8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_engine_gathers_from_codes(family: str, lowering: str, tiny_model, tmp_path: Path) -> None:
    tied = family == "qwen2"
    recipe = quick(
        target="tensorrt-rtx",
        compute_capability="89",
        evaluate=False,
        quantize_embedding=True,
        quantize_lm_head=tied,
        weight_lowering=lowering,
    )
    result = compile_model(tiny_model(family, dtype="float16"), recipe, output=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["engine"]["lint"] == {"ok": True, "problems": []}
    assert report["engine"]["fp8_linears"] == LINEARS[family] + tied
    assert [table["shared_with"] for table in report["embeddings"]] == [["lm_head"] if tied else []]
    log = (result.folder / "tensorrt-rtx.engine.log").read_text(errors="replace")
    for layers in parse_layers(log, 2):
        tables = _tables(layers)
        gathers = [(layer, table) for layer, table in tables if "node_embedding" in layer.nodes]
        assert [(layer.type, table.dtype) for layer, table in gathers] == [("kgen", "FP8")]
        if tied:  # lm_head's FP8 GEMM has its own layout of the codes
            others = [(layer.is_fp8_gemm, table) for layer, table in tables if (layer, table) not in gathers]
            assert [(fp8, table.dtype) for fp8, table in others] == [(True, "FP8")]
