"""The quantize step: every layer gets the format and the rank the plan gives it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import Case, float_model, make_plan

from zqfp_compile.plan import QuantPlan, SitePrecision
from zqfp_compile.quantize_model import quantize_model
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import read_weight


def _plan(case: Case, **changes: object) -> QuantPlan:
    return make_plan(case).replace(tensors={}, **changes)


def _run(case: Case, plan: QuantPlan, store: TensorStore) -> QuantPlan:
    return quantize_model(
        float_model(case), plan, store, energies={}, seed=0, progress=lambda done, total, name: None
    )


@pytest.mark.parametrize("lorc_format", ["float", "fp8"])
def test_each_layer_gets_its_format_and_rank(tmp_path: Path, lorc_format: str) -> None:
    case = Case(dtype=ir.DataType.FLOAT16, k=72)
    precisions = {"attn.q": SitePrecision("fp8", 0), "attn.v": SitePrecision("int4", 3)}
    plan = _plan(case, precisions=precisions, lorc_format=lorc_format, lorc_rank=9)
    with TensorStore(tmp_path) as store:
        plan = _run(case, plan, store)
        q, v = plan.tensors["attn.q"], plan.tensors["attn.v"]
        assert (q.codes.dtype, tuple(q.codes.shape)) == (ir.DataType.FLOAT8E4M3FN, (48, 72))
        assert (v.codes.dtype, tuple(v.codes.shape)) == (ir.DataType.INT4, (48, 80))
        assert q.lorc_v is None and q.group_scales is None
        factor_type = ir.DataType.FLOAT8E4M3FN if lorc_format == "fp8" else ir.DataType.FLOAT16
        assert v.lorc_v.dtype == v.lorc_u.dtype == factor_type
        assert (tuple(v.lorc_v.shape), tuple(v.lorc_u.shape)) == ((72, 3), (3, 48))
        scales = [None if item is None else tuple(item.shape) for item in (v.lorc_v_scale, v.lorc_u_scale)]
        assert scales == ([(3,), (3,)] if lorc_format == "fp8" else [None, None])
        assert [plan.quantized_weight(site).weight_format for site in plan.linears] == ["fp8", "int4"]


def test_the_compensation_helps_and_fp8_factors_lose_little(tmp_path: Path) -> None:
    case = Case(dtype=ir.DataType.FLOAT16)
    left = {}
    for lorc_format in ("float", "fp8"):
        folder = tmp_path / lorc_format
        folder.mkdir()
        with TensorStore(folder) as store:
            plan = _run(case, _plan(case, lorc_rank=24, lorc_format=lorc_format), store)
            site = plan.linears[0]
            error = read_weight(float_model(case), site.weight) - plan.quantized_weight(site).dequantize()
            v, u = plan.low_rank(site)
            left[lorc_format] = np.linalg.norm(error.T - v @ u) / np.linalg.norm(error)
    # Half the rank takes most of a white error's energy; E4M3's 3% per factor value hardly shows beside it.
    assert left["float"] < 0.45
    assert left["float"] <= left["fp8"] < 1.05 * left["float"]


def test_a_layer_left_in_float_has_no_tensors(tmp_path: Path) -> None:
    with TensorStore(tmp_path) as store:
        plan = _run(Case(), _plan(Case(), precisions={"attn.q": SitePrecision("none", 0)}), store)
        assert list(plan.tensors) == ["attn.v"]
        assert [site.name for site in plan.rewritten] == ["attn.v"] and plan.quantizes_weights


def test_a_shared_weight_shares_tensors_only_at_the_same_precision(tmp_path: Path) -> None:
    plan = _plan(Case())
    shared = [dataclasses.replace(site, weight=plan.linears[0].weight) for site in plan.linears]
    plan = plan.replace(linears=(*shared, dataclasses.replace(shared[0], name="attn.k")))
    plan = plan.replace(precisions={"attn.v": SitePrecision("fp8", 0)})
    with TensorStore(tmp_path) as store:
        plan = _run(Case(), plan, store)
        assert plan.tensors["attn.q"] is plan.tensors["attn.k"]
        assert plan.tensors["attn.v"].codes.dtype == ir.DataType.FLOAT8E4M3FN


def test_a_weight_shared_by_layers_of_two_types_has_factors_of_each(tmp_path: Path) -> None:
    """A float16 weight, multiplied as it is by one layer and cast to float by another."""
    plan = _plan(Case(), lorc_rank=4)
    q, v = plan.linears
    shared = dataclasses.replace(v, weight=q.weight, dtype=ir.DataType.FLOAT16)
    with TensorStore(tmp_path) as store:
        plan = _run(Case(), plan.replace(linears=(q, shared)), store)
        types = [plan.tensors[layer].lorc_v.dtype for layer in ("attn.q", "attn.v")]
    assert types == [ir.DataType.FLOAT, ir.DataType.FLOAT16]
