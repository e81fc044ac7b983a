"""The certificate passes what the rewrite makes and catches each way to break it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import NUMPY, Case, artifact, float_model, make_plan, mixed_plan

from passes.quantize_activations import QuantizeActivations
from passes.remove_unused import RemoveUnused
from zqfp_compile.certificate import Certificate, certify
from zqfp_compile.errors import AccuracyError
from zqfp_compile.model_io import load_model, save_model
from zqfp_compile.plan import QuantPlan, SitePrecision, WeightSource
from zqfp_compile.report.metrics import sqnr_db
from zqfp_compile.weights import read_bias, read_weight
from zqfp_compile.work_folder import WorkFolder

pytest.importorskip("onnxruntime")

CASES = [
    Case(),
    Case(lorc=True, k=72),
    Case(dtype=ir.DataType.FLOAT16, lorc=True),
    Case(dtype=ir.DataType.BFLOAT16, lorc=True),
    Case(per_token=True, constraint="m2"),
    Case(activation="int8", weight_format="int4", constraint="m1"),
    Case(activation="int8", per_token=True),
    Case(activation="e5m2", weight_format="e3m0"),
    Case(activation="none", dtype=ir.DataType.FLOAT16),
    Case(weight_format="fp8", lorc=True),
    Case(constraint="none"),
    Case(lorc=True, lorc_fp8=True, k=72),
    Case(lorc=True, lorc_fp8=True, dtype=ir.DataType.FLOAT16),
    Case(lorc=True, lorc_fp8=True, dtype=ir.DataType.BFLOAT16, per_token=True),
]


def rows(case: Case) -> np.ndarray:
    x = np.random.default_rng(5).standard_normal((12, case.k)).astype(np.float32)
    return x.astype(NUMPY[case.dtype]).astype(np.float32)


def check(
    case: Case,
    model: ir.Model,
    plan: QuantPlan,
    original: ir.Model | None = None,
    work: WorkFolder | None = None,
) -> Certificate:
    original = original or float_model(case)
    return certify(
        model,
        plan,
        {"x": rows(case)},
        lambda site: read_weight(original, site.weight),
        original_bias=lambda site: read_bias(original, site),
        work=work,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_variant_is_certified(case: Case) -> None:
    certificate = check(case, *artifact(case))
    assert (certificate.layers_checked, certificate.mismatches) == (2, 0)
    assert [(layer.name, layer.k, layer.n) for layer in certificate.layers] == [
        ("attn.q", case.k, case.n),
        ("attn.v", case.k, case.n),
    ]
    assert all(layer.weight_bit_equal for layer in certificate.layers)


def test_layers_of_different_formats_and_ranks() -> None:
    case = Case(dtype=ir.DataType.FLOAT16, lorc_fp8=True)
    plan = mixed_plan(case, q=SitePrecision("fp8", 2), v=SitePrecision("e2m1", 0))
    certificate = check(case, *artifact(case, plan))
    assert (certificate.layers_checked, certificate.mismatches) == (2, 0)


def test_a_layer_left_in_float_is_not_compared() -> None:
    plan = mixed_plan(Case(), q=SitePrecision("none", 0))
    certificate = check(Case(), *artifact(Case(), plan))
    assert [layer.name for layer in certificate.layers] == ["attn.v"] and certificate.mismatches == 0


def test_one_quantised_weight_among_quantised_activations() -> None:
    plan = mixed_plan(Case(), v=SitePrecision("e2m1", 0)).replace(weight_format="none")
    plan = plan.replace(tensors={"attn.v": plan.tensors["attn.v"]})
    certificate = check(Case(), *artifact(Case(), plan))
    assert (certificate.layers_checked, certificate.mismatches) == (2, 0)


def test_a_scaled_bfloat16_bias() -> None:
    """The artifact holds beta * C rounded to bfloat16, which is no mismatch although y is float32 here."""
    case = Case(dtype=ir.DataType.BFLOAT16)
    plan = make_plan(case)
    linears = tuple(dataclasses.replace(site, bias_scale=0.3) for site in plan.linears)
    model, plan = artifact(case, plan.replace(linears=linears))
    assert check(case, model, plan).mismatches == 0


def test_a_scaled_bfloat16_bias_of_a_layer_whose_weight_stays() -> None:
    """There the graph still computes beta * C, here in float32: nothing is rounded before the sum."""
    case = Case(dtype=ir.DataType.BFLOAT16)
    plan = make_plan(case).replace(weight_format="none", tensors={})
    plan = plan.replace(linears=tuple(dataclasses.replace(site, bias_scale=0.3) for site in plan.linears))
    models = [float_model(case), float_model(case)]
    for model in models:
        model.graph[1].attributes["beta"] = ir.AttrFloat32("beta", 0.3)
    model, original = models
    QuantizeActivations(plan).call(model)
    certificate = check(case, model, plan, original)
    assert (certificate.layers_checked, certificate.mismatches) == (2, 0)


def test_a_float_weight_that_the_graph_casts_to_bfloat16() -> None:
    case = Case(dtype=ir.DataType.BFLOAT16)
    plan = make_plan(case).replace(weight_format="none", tensors={})
    source = WeightSource("wide", True, casts=(ir.DataType.BFLOAT16,))
    plan = plan.replace(linears=(dataclasses.replace(plan.linears[0], weight=source),))
    models = []
    for _ in range(2):
        model = float_model(case)
        wide = ir.val("wide", const_value=ir.tensor(np.full((case.k, case.n), 0.3, np.float32)))
        model.graph.register_initializer(wide)
        cast = ir.node("Cast", [wide], {"to": ir.DataType.BFLOAT16}, name="narrow")
        cast.outputs[0].dtype = ir.DataType.BFLOAT16
        model.graph.insert_before(model.graph[0], cast)
        model.graph[1].replace_input_with(1, cast.outputs[0])
        models.append(model)
    model, original = models
    QuantizeActivations(plan).call(model)
    certificate = check(case, model, plan, original)
    assert (certificate.layers_checked, certificate.mismatches) == (1, 0)


@pytest.mark.parametrize("factor", [1, 1.5])
@pytest.mark.parametrize("size", [1e-8, 3e4])
def test_outputs_that_float16_cannot_hold(size: float, factor: float) -> None:
    """Few bits among the subnormal numbers, inf above 65504: no mismatch; another weight still is one."""
    case = Case(dtype=ir.DataType.FLOAT16)
    model, plan = artifact(case)
    tensors = {}
    for layer, stored in plan.tensors.items():
        rows = stored.row_scales.numpy() * np.float32(size)
        _initializer(model, layer, 4).const_value = ir.tensor(rows * np.float32(factor))
        tensors[layer] = dataclasses.replace(stored, row_scales=ir.tensor(rows))
    layer = check(case, model, plan.replace(tensors=tensors)).layers[0]
    assert (layer.max_rel_error <= layer.tolerance) == layer.ok == (factor == 1)
    assert (layer.sqnr_db == -np.inf) == (size > 1)


@pytest.mark.parametrize("position", [7, 8, 9, 10], ids=["v", "u", "v-scale", "u-scale"])
def test_damaged_fp8_factors_are_a_mismatch(position: int) -> None:
    case = Case(lorc=True, lorc_fp8=True)
    model, plan = artifact(case)
    value = _initializer(model, "attn.q", position)
    array = value.const_value.numpy().copy()
    array.reshape(-1)[0] = array.reshape(-1)[0].astype(np.float32) * 0.5 + 1
    value.const_value = ir.tensor(array)
    layer = check(case, model, plan).layers[0]
    assert layer.weight_bit_equal and not layer.ok


def test_activations_only() -> None:
    case = Case(dtype=ir.DataType.FLOAT16)
    model, plan = float_model(case), make_plan(case).replace(weight_format="none", tensors={})
    for pass_ in (QuantizeActivations(plan), RemoveUnused()):
        pass_.call(model)
    certificate = check(case, model, plan)
    assert (certificate.layers_checked, certificate.mismatches) == (2, 0)
    # E4M3 has 3 mantissa bits: about 31 dB on normal numbers. Unrounded, float16 would give 60 dB.
    assert all(28 < layer.sqnr_db < 35 for layer in certificate.layers)


def test_sqnr_is_against_the_original_layer() -> None:
    case = Case(weight_format="fp8", activation="none")
    model, plan = artifact(case)
    weight = read_weight(float_model(case), plan.linears[0].weight)
    tensors = plan.tensors["attn.q"]
    w_hat = tensors.codes.numpy().astype(np.float32) * tensors.row_scales.numpy()[:, None]
    expected = sqnr_db(rows(case) @ weight.T, rows(case) @ w_hat.T)
    assert check(case, model, plan).layers[0].sqnr_db == pytest.approx(expected, abs=1e-3)


def _initializer(model: ir.Model, layer: str, position: int) -> ir.Value:
    node = next(node for node in model.graph if node.name == layer)
    value = node.inputs[position]
    assert value is not None and value.const_value is not None
    return value


def _flip_code(model: ir.Model) -> None:
    value = _initializer(model, "attn.q", 2)
    codes = value.const_value.numpy().astype(np.int8)
    codes[3, 5] = 1 if codes[3, 5] != 1 else 2
    value.const_value = ir.Tensor(codes.astype(ml_dtypes.int4))


def _scale_initializer(position: int) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        value = _initializer(model, "attn.q", position)
        array = value.const_value.numpy()
        value.const_value = ir.tensor((array.astype(np.float32) * 1.01).astype(array.dtype))

    return change


def _drop_lorc(model: ir.Model) -> None:
    u = _initializer(model, "attn.q", 8)
    u.const_value = ir.tensor(np.zeros_like(u.const_value.numpy()))


def _change_code_book(model: ir.Model) -> None:
    """6 becomes 5.5 or so: the slope of the last segment."""
    for function in model.functions.values():
        for node in function:
            value = node.attributes.get("value")
            if node.outputs[0].name == "plus_6" and value is not None:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.float32(5)))
                return
    raise AssertionError("the function has no such constant any more")


@pytest.mark.parametrize(
    ("damage", "weight_equal"),
    [
        (_flip_code, False),
        (_scale_initializer(4), False),
        (_change_code_book, False),
        (_scale_initializer(1), True),
        (_drop_lorc, True),
    ],
    ids=["code", "row-scale", "code-book", "activation-scale", "lorc"],
)
def test_damage_is_a_mismatch(damage: Callable[[ir.Model], None], weight_equal: bool) -> None:
    case = Case(lorc=True)
    model, plan = artifact(case)
    damage(model)
    certificate = check(case, model, plan)
    layer = certificate.layers[0]
    assert certificate.mismatches >= 1 and not layer.ok
    assert layer.weight_bit_equal == weight_equal


def test_lost_bias_is_a_mismatch() -> None:
    case = Case()
    model, plan = artifact(case)
    bias = _initializer(model, "attn.v", 5)
    bias.const_value = ir.tensor(np.zeros(case.n, np.float32))
    assert [layer.ok for layer in check(case, model, plan).layers] == [True, False]


def test_function_without_decoded_weight_is_a_mismatch() -> None:
    case = Case()
    model, plan = artifact(case)
    for function in model.functions.values():
        next(value for node in function for value in node.outputs if value.name == "w_hat").name = "other"
    assert check(case, model, plan).mismatches == 2


def test_a_verdict_holds_for_the_bytes_it_was_made_on(tmp_path: Path) -> None:
    """One that is kept is found again by the weights in the artifact's data file, not by their place."""
    case = Case(lorc=True)
    made, plan = artifact(case)
    path = tmp_path / "model.onnx"
    save_model(made, path)
    with WorkFolder(tmp_path / "work", "key") as work:
        first = check(case, load_model(path), plan, work=work)
        kept = {file.name: file.stat().st_mtime_ns for file in work.path.iterdir()}
        assert check(case, load_model(path), plan, work=work) == first
        assert {file.name: file.stat().st_mtime_ns for file in work.path.iterdir()} == kept
        codes = load_model(path).graph.initializers["attn.q.codes"].const_value
        assert isinstance(codes, ir.ExternalTensor)
        content = bytearray(Path(codes.path).read_bytes())
        content[codes.offset or 0] = 0x22 if content[codes.offset or 0] == 0x11 else 0x11
        Path(codes.path).write_bytes(content)
        changed = check(case, load_model(path), plan, work=work)
    assert [layer.ok for layer in first.layers + changed.layers] == [True, True, False, True]


def test_zero_comparisons_is_a_failure() -> None:
    case = Case()
    model, plan = artifact(case)
    with pytest.raises(AccuracyError, match="no linear was compared"):
        check(case, model, plan.replace(linears=()))


def test_layers_that_cannot_be_compared_fail() -> None:
    case = Case()
    model, plan = artifact(case)
    with pytest.raises(AccuracyError, match="no sample rows"):
        certify(model, plan, {}, lambda site: np.zeros(0), original_bias=lambda site: None)
    moved = [*plan.linears[:1], *plan.linears[1:]]
    moved[1] = type(moved[1])(**{**vars(moved[1]), "output": "elsewhere"})
    with pytest.raises(AccuracyError, match=r"attn\.v.*not in the compiled graph"):
        check(case, model, plan.replace(linears=tuple(moved)))
