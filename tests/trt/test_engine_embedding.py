"""Engines with the token embedding in FP8: one fused kernel reads rows of 8-bit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from compiled_models import LINEARS, quick

from zqfp_compile import compile_model
from zqfp_compile.backends.plan_lint import Layer, Tensor, parse_layers
from zqfp_compile.backends.profiles import Profile
from zqfp_compile.backends.tensorrt import build_engine
from zqfp_compile.model_io import save_model
from zqfp_compile.quantize_model import quantize_embeddings, quantize_model
from zqfp_compile.registry import create_pass
from zqfp_compile.tensor_store import TensorStore

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
        if tied:  # the FP8 GEMM of lm_head reads the codes through a view of its own
            others = [(layer.is_fp8_gemm, table) for layer, table in tables if (layer, table) not in gathers]
            assert [(fp8, table.dtype) for fp8, table in others] == [(True, "FP8")]


def test_a_tied_table_is_in_the_engine_once(tmp_path: Path) -> None:
    rows, width = 4096, 512
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (int64[B,S] input_ids) => (float16[B,S,{rows}] logits) {{
            h = Gather(table, input_ids)
            t = Transpose<perm=[1, 0]>(table)
            logits = MatMul(h, t)
        }}"""
    )
    array = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float16)
    table = ir.val("table", const_value=ir.tensor(array, name="table"))
    for node in (model.graph[0], model.graph[1]):
        node.replace_input_with(0, table)
    model.graph.register_initializer(table)
    with TensorStore(tmp_path) as store:
        plan = create_pass("select-linears", quantize_lm_head=True).call(model).plan
        assert plan is not None
        plan = (
            create_pass("select-embedding", plan=plan.replace(activation_scales={"h": 0.01})).call(model).plan
        )
        assert plan is not None
        plan = quantize_embeddings(model, plan, store)
        plan = quantize_model(model, plan, store, energies={}, seed=0, progress=lambda *_: None)
        rewrites = ("quantize-activations", "quantize-weights", "quantize-embedding", "lower-weights-fp8")
        for name in rewrites:
            create_pass(name, plan=plan).call(model)
        create_pass("remove-unused").call(model)
        save_model(model, tmp_path / "m.onnx")
    tokens = {"prefill": ((1, 1), (1, 512), (1, 2048)), "decode": ((1, 1), (1, 1), (8, 1))}
    profiles = [Profile(name, {"input_ids": shapes}) for name, shapes in tokens.items()]
    engine, linears = tmp_path / "m.engine", [f"{plan.linears[0].name}/MatMul"]
    result = build_engine(
        tmp_path / "m.onnx", engine, target="tensorrt-rtx", profiles=profiles, linears=linears
    )
    assert result.lint.fp8_linears == 1
    log = Path(result.log_path).read_text(errors="replace")
    stored = [int(size) for size in re.findall(r"Total Weights Memory: (\d+) bytes", log)]
    # Codes, and a float scale per row for the Gather and for the GEMM.
    assert stored and max(stored) < rows * width + 3 * 4 * rows
