"""Engines with LoRC factors in FP8: they build, and the main products stay FP8 GEMMs."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from rewrite_models import Case, artifact, mixed_plan

from passes.inline_functions import InlineFunctions
from passes.lower_weights_fp8 import LowerWeightsFp8
from passes.remove_unused import RemoveUnused
from zqfp_compile import specs
from zqfp_compile.backends.plan_lint import parse_layers
from zqfp_compile.backends.profiles import Profile
from zqfp_compile.backends.tensorrt import EngineResult, build_engine
from zqfp_compile.plan import QuantPlan, SitePrecision

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")

CASE = Case(dtype=ir.DataType.FLOAT16, lorc=True, lorc_fp8=True, k=128, n=192, group_size=64, rank=16)
K = CASE.k
PROFILES = (
    Profile("prefill", {"x": ((1, K), (512, K), (2048, K))}),
    Profile("decode", {"x": ((1, K), (1, K), (8, K))}),
)


def _build(model: ir.Model, folder: Path, linears: list[str]) -> EngineResult:
    RemoveUnused().call(model)
    specs.check(model, "engine")
    ir.save(model, folder / "m.onnx")
    return build_engine(
        folder / "m.onnx", folder / "m.engine", target="tensorrt-rtx", profiles=PROFILES, linears=linears
    )


def _constants(result: EngineResult, name: str) -> set[str]:
    """Element types of the constants whose name has ``name`` in it, in both profiles."""
    profiles = parse_layers(Path(result.log_path).read_text(), len(PROFILES))
    constants = [tensor for layers in profiles for layer in layers for tensor in layer.constants]
    return {tensor.dtype for tensor in constants if name in tensor.name}


def _lower(model: ir.Model, plan: QuantPlan, lowering: str) -> None:
    (LowerWeightsFp8(plan) if lowering == "fp8" else InlineFunctions()).call(model)


@pytest.mark.parametrize("lowering", ["fp8", "int4"])
def test_fp8_factors_build_and_the_main_product_stays_fp8(lowering: str, tmp_path: Path) -> None:
    model, plan = artifact(CASE)
    _lower(model, plan, lowering)
    result = _build(model, tmp_path, ["attn.q/MatMul", "attn.v/MatMul"])
    assert result.lint.ok and result.lint.problems == ()
    assert result.lint.fp8_linears == 2 and result.lint.fp8_gemms == 1  # q and v are merged
    # The fp8 lowering decodes the factors at compile time; int4 keeps their 8 bits in the engine.
    assert _constants(result, "lorc_u") == ({"Half"} if lowering == "fp8" else {"FP8"})


@pytest.mark.parametrize("lowering", ["fp8", "int4"])
def test_layers_of_different_formats_and_ranks_build(lowering: str, tmp_path: Path) -> None:
    plan = mixed_plan(CASE, q=SitePrecision("fp8", 0), v=SitePrecision("e2m1", 8))
    model, _ = artifact(CASE, plan)
    _lower(model, plan, lowering)
    result = _build(model, tmp_path, ["attn.q/MatMul", "attn.v/MatMul"])
    assert result.lint.ok and result.lint.fp8_linears == 2
