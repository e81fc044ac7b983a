"""Bits per weight in the report, counted by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest
from rewrite_models import Case, artifact, float_model, make_plan, mixed_plan

from zqfp_compile.plan import QuantPlan, SitePrecision
from zqfp_compile.recipe import Recipe
from zqfp_compile.report.assemble import Facts, assemble
from zqfp_compile.report.model import Report

K, N, G = 64, 48, 16
E2M1 = 4 + 8 / G + 32 / K
FP8 = 8 + 32 / K


def save(case: Case, plan: QuantPlan, folder: Path) -> None:
    ir.save(artifact(case, plan)[0], folder / "m.onnx")


def report(case: Case, plan: QuantPlan, folder: Path) -> Report:
    if not (folder / "m.onnx").exists():
        save(case, plan, folder)
    facts = Facts(
        name="m",
        source=folder / "m.onnx",
        recipe=Recipe(),
        plan=plan,
        model=float_model(case),
        artifact=folder / "m.onnx",
        samples=None,
        certificate=None,
        evaluation=None,
        eval_description="",
        engine=None,
        warnings=(),
        seconds={},
    )
    return assemble(facts)


def test_formats_ranks_and_fp8_factors_with_their_scales(tmp_path: Path) -> None:
    case = Case(dtype=ir.DataType.FLOAT16, lorc_fp8=True)
    plan = mixed_plan(case, q=SitePrecision("fp8", 0), v=SitePrecision("e2m1", 3))
    made = report(case, plan, tmp_path)
    q, v = made.layers
    lorc = (8 * 3 * (K + N) + 32 * 2 * 3) / (K * N)
    assert (q.weight_format, q.lorc_rank, q.bits, q.bits_with_lorc) == ("fp8", 0, FP8, FP8)
    assert (v.weight_format, v.lorc_rank, v.bits) == ("e2m1", 3, E2M1)
    assert v.bits_with_lorc == pytest.approx(E2M1 + lorc)
    assert made.bits_per_weight == pytest.approx((FP8 + E2M1) / 2)
    assert made.bits_per_weight_with_lorc == pytest.approx((FP8 + E2M1 + lorc) / 2)
    assert made.size.linear_bytes == (FP8 + E2M1) * K * N / 8
    assert made.size.lorc_bytes == round(lorc * K * N / 8)


def test_a_layer_left_in_float_counts_with_its_own_bits(tmp_path: Path) -> None:
    case = Case(dtype=ir.DataType.FLOAT16)
    made = report(case, mixed_plan(case, q=SitePrecision("none", 0)), tmp_path)
    q = made.skipped[0]
    assert (q.name, q.bits, q.reason) == ("attn.q", 16, "kept in float by mixed precision")
    assert [layer.name for layer in made.rewritten] == ["attn.v"]
    assert made.bits_per_weight == pytest.approx((16 + E2M1) / 2)
    assert (made.size.linear_bytes, made.size.lorc_bytes) == (E2M1 * K * N / 8, 0)  # the rewritten ones only


def test_float_factors_take_their_type(tmp_path: Path) -> None:
    case = Case(dtype=ir.DataType.FLOAT16, lorc=True)
    made = report(case, make_plan(case), tmp_path)
    assert made.bits_per_weight_with_lorc == pytest.approx(E2M1 + 16 * 4 * (K + N) / (K * N))


def test_the_output_projection_is_no_decoder_weight(tmp_path: Path) -> None:
    case = Case()
    plan = mixed_plan(case, v=SitePrecision("fp8", 0))
    head = dataclasses.replace(plan.linears[1], is_lm_head=True)
    made = report(case, plan.replace(linears=(plan.linears[0], head)), tmp_path)
    assert made.bits_per_weight == pytest.approx(E2M1)
    assert made.layers[1].bits == pytest.approx(FP8)


def test_a_shared_weight_counts_once(tmp_path: Path) -> None:
    case = Case()
    plan = mixed_plan(case, v=SitePrecision("fp8", 0))
    same = dataclasses.replace(plan.linears[0], name="attn.k")  # its node is not in the graph, only counted
    tensors = {**plan.tensors, "attn.k": plan.tensors["attn.q"]}
    twice = plan.replace(linears=(*plan.linears, same), tensors=tensors)
    save(case, plan, tmp_path)
    shared, alone = report(case, twice, tmp_path), report(case, plan, tmp_path)
    assert shared.bits_per_weight == alone.bits_per_weight
    assert shared.size == alone.size
