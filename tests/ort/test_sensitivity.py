"""Sensitivities measured on tiny models, against models whose weights really hold the errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.causal_lm import CausalLm, graph_inputs
from zqfp_compile.calibrate.samples import load_samples
from zqfp_compile.calibrate.statistics import activation_scales, collect
from zqfp_compile.errors import UsageError
from zqfp_compile.model_io import load_model
from zqfp_compile.pipeline import compile_model
from zqfp_compile.plan import QuantPlan, SitePrecision
from zqfp_compile.precision.auto import Chooser, sensitivities
from zqfp_compile.precision.goal import Goal
from zqfp_compile.precision.probe import Probe
from zqfp_compile.precision.sensitivity import (
    GPTQ_RANK,
    LayerErrors,
    Statistics,
    candidates,
    group_layers,
    measure,
    stored_bits,
)
from zqfp_compile.progress import SilentReporter
from zqfp_compile.quantize.rtn import quantize_weight
from zqfp_compile.quantize_model import quantize_model
from zqfp_compile.recipe import Recipe
from zqfp_compile.registry import create_pass
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import read_weight

pytest.importorskip("onnxruntime")


class Case:
    """A prepared model with its plan, windows and statistics."""

    def __init__(self, path: Path, **changes: object) -> None:
        self.model = load_model(path)
        for name in ("strip-metadata", "raise-opset"):
            create_pass(name).call(self.model)
        plan = create_pass("select-linears", quantize_lm_head=True).call(self.model).plan
        assert plan is not None
        self.lm = CausalLm.from_model(self.model)
        self.feeds = load_samples(
            None,
            tokenizer_path=path.parent / "tokenizer.json",
            interface=self.lm,
            inputs=graph_inputs(self.model),
            samples=2,
            length=24,
            seed=0,
        ).feeds
        found = collect(self.model, [site.activation for site in plan.linears], self.feeds)
        scales, _ = activation_scales(found.ranges, "e4m3")
        self.plan: QuantPlan = plan.replace(activation_scales=scales, **changes)
        self.statistics = Statistics(found.energies, found.rows, scales)

    def weight(self, source) -> np.ndarray:
        return read_weight(self.model, source)

    def probe(self) -> Probe:
        return Probe(self.model, self.plan.linears, self.feeds, logits=self.lm.logits)

    def sensitivities(self, folder: Path) -> tuple[LayerErrors, ...]:
        self.measured = False

        def statistics() -> Statistics:
            self.measured = True
            return self.statistics

        return sensitivities(
            self.model, self.plan, self.feeds, statistics, max_rank=16, seed=0, folder=folder
        )


def logits(model: ir.Model, case: Case) -> list[np.ndarray]:
    session = create_session(ir.to_proto(model).SerializeToString())
    return [session.run([case.lm.logits], feed)[0].astype(np.float64) for feed in case.feeds]


def embedded(case: Case) -> ir.Model:
    """A copy with its weights in memory, so that they can be changed."""
    model = case.model.clone()
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def divergence(exact: list[np.ndarray], other: list[np.ndarray]) -> float:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        return (
            x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        )

    values = []
    for a, b in zip(exact, other, strict=True):
        p, q = log_softmax(a), log_softmax(b)
        values.append((np.exp(p) * (p - q)).sum(-1).ravel())
    return float(np.concatenate(values).mean())


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("opt", "float32"), ("qwen2", "float16")]
)
def test_probe_equals_a_model_with_these_weights(family: str, dtype: str, tiny_model) -> None:
    case = Case(tiny_model(family, dtype=dtype))
    untouched = ir.to_proto(case.model).SerializeToString(deterministic=True)
    probe = case.probe()
    assert probe.divergence({}) == 0.0
    random = np.random.default_rng(0)
    sites = [case.plan.linears[index] for index in (0, len(case.plan.linears) // 2)]
    errors, changed = {}, embedded(case)
    for site in sites:
        weight = case.weight(site.weight)
        error = (random.standard_normal(weight.shape) * weight.std() * 0.3).astype(np.float16)
        errors[site.name] = error.astype(np.float32)
        value = changed.graph.initializers[site.weight.initializer]
        stored = value.const_value.numpy()
        moved = stored + (error.T if site.weight.transposed else error).astype(stored.dtype)
        value.const_value = ir.tensor(moved, name=value.name)
    expected = divergence(logits(embedded(case), case), logits(changed, case))
    assert expected > 1e-6
    # float16: W + E is rounded in one model and not in the other.
    assert probe.divergence(errors) == pytest.approx(expected, rel=1e-3 if dtype == "float32" else 0.1)
    assert probe.divergence({}) == 0.0
    assert ir.to_proto(case.model).SerializeToString(deterministic=True) == untouched


def test_measured_errors_are_those_of_the_weights(tiny_model) -> None:
    case = Case(tiny_model("llama"), lorc_format="float")
    found = measure(case.plan, case.weight, case.probe(), case.statistics, max_rank=16, max_runs=1000)
    assert [item.layers for item in found] == [(site.name,) for site in case.plan.linears]
    for item, site in zip(found, case.plan.linears, strict=True):
        weight = case.weight(site.weight)
        energy = case.statistics.energies[site.activation]
        for name, expected in (("e2m1", item.weight[0]), ("fp8", item.fp8)):
            error = quantize_weight(torch.from_numpy(weight), weight_format=name).dequantize() - weight
            wanted = (error.astype(np.float64) ** 2 @ energy).sum() / (
                weight.astype(np.float64) ** 2 @ energy
            ).sum()
            assert expected == pytest.approx(wanted, rel=1e-4)
        assert item.fp8 < 0.1 * item.weight[0]
        falling = [item.weight[rank] for rank in sorted(item.weight)]
        assert len(falling) > 3 and falling == sorted(falling, reverse=True) and falling[-1] < falling[0]
        assert 0 < item.activation < 0.01  # E4M3: 2^-4 at most relative, a third of its square on average


def test_gptq_leaves_what_low_rank_compensation_would(tiny_model) -> None:
    """The error after ``GPTQ_RANK`` ranks takes the place of the one before any, in the probe as well."""
    case = Case(tiny_model("llama"), lorc_format="float")
    rtn = measure(case.plan, case.weight, case.probe(), case.statistics, max_rank=32, max_runs=1000)
    gptq = measure(
        case.plan, case.weight, case.probe(), case.statistics, max_rank=16, max_runs=1000, gptq=True
    )
    for before, after in zip(rtn, gptq, strict=True):
        assert after.fp8 == before.fp8 and after.activation == before.activation
        assert after.weight[0] == pytest.approx(before.weight[GPTQ_RANK], rel=0.05)
        assert after.weight[16] == pytest.approx(before.weight[32], rel=0.05)
        assert after.divergence < before.divergence


def test_one_layer_costs_what_it_costs_alone_and_groups_share(tiny_model) -> None:
    case = Case(tiny_model("llama"))
    probe = case.probe()
    alone = measure(case.plan, case.weight, probe, case.statistics, max_rank=0, max_runs=1000)
    site = case.plan.linears[1]
    weight = torch.from_numpy(case.weight(site.weight))
    error = quantize_weight(weight).dequantize() - weight.numpy()
    assert alone[1].divergence == pytest.approx(probe.divergence({site.name: error}), rel=1e-5)
    together = measure(case.plan, case.weight, probe, case.statistics, max_rank=0, max_runs=1)
    everything = {
        item.name: quantize_weight(torch.from_numpy(case.weight(item.weight))).dequantize()
        - case.weight(item.weight)
        for item in case.plan.linears
    }
    assert sum(item.divergence for item in together) == pytest.approx(probe.divergence(everything), rel=1e-5)


def test_groups_are_few_and_of_a_kind() -> None:
    names = [
        f"model.layers.{i}.{kind}" for i in range(30) for kind in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    names.append("lm_head")
    groups = group_layers(names, 48)
    assert len(groups) <= 48
    assert sorted(index for group in groups for index in group) == list(range(len(names)))
    for group in groups:
        assert len({names[index].split(".")[-1] for index in group}) == 1
    down = [[names[i] for i in group] for group in groups if names[group[0]].endswith("down")]
    assert down[0] == ["model.layers.0.down"] and down[-1] == ["model.layers.29.down"]
    assert len(group_layers(names, 1000)) == len(names)
    assert len(group_layers(names, 3)) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"lorc_format": "float"},
        {"lorc_format": "fp8"},
        {"group_size": 32, "scale_constraint": "m2"},
        {"scale_constraint": "none"},
        {"group_size": 0},
    ],
)
def test_stored_bits_are_the_bytes_that_are_written(changes: dict, tiny_model, tmp_path: Path) -> None:
    case = Case(tiny_model("llama", dtype="float16"), **changes)
    ways = [SitePrecision("e2m1", 0), SitePrecision("e2m1", 8), SitePrecision("fp8", 0)]
    precisions = {site.name: ways[index % len(ways)] for index, site in enumerate(case.plan.linears)}
    plan = case.plan.replace(precisions=precisions)
    with TensorStore(tmp_path) as store:
        done = quantize_model(
            case.model, plan, store, energies={}, seed=0, progress=lambda done, total, detail: None
        )
        for site in plan.linears:
            way, tensors = plan.precision(site), done.tensors[site.name]
            stored = [getattr(tensors, name) for name in tensors.__dataclass_fields__]
            written = sum(8 * item.nbytes for item in stored if item is not None)
            assert stored_bits(plan, site, way.weight_format, way.lorc_rank) == written, (site.name, way)


def test_measurements_are_kept(tiny_model, tmp_path: Path) -> None:
    case = Case(tiny_model("llama"))
    first = case.sensitivities(tmp_path)
    (file,) = tmp_path.iterdir()
    assert case.measured and case.sensitivities(tmp_path) == first
    assert not case.measured  # nor was the calibration text run for it
    rows = json.loads(file.read_text())
    rows[0]["divergence"] = 42.0
    file.write_text(json.dumps(rows))
    assert case.sensitivities(tmp_path)[0].divergence == 42.0  # it was read
    file.write_text("{")
    assert case.sensitivities(tmp_path) == first  # unusable: measured again
    assert case.sensitivities(tmp_path / "no" / "such") == first
    case.plan = case.plan.replace(group_size=32)
    assert case.sensitivities(tmp_path) != first and len(list(tmp_path.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_error(tiny_model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Case(tiny_model("llama")).sensitivities(tmp_path / "file")


def test_candidates_rank_as_they_must(tiny_model) -> None:
    case = Case(tiny_model("llama"))
    errors = LayerErrors(("x",), {0: 0.01, 8: 0.006}, 0.0005, 0.0002, 0.1)
    found = {(c.weight_format, c.lorc_rank): c for c in candidates(case.plan, case.plan.linears[0], errors)}
    assert found["e2m1", 0].cost == pytest.approx(0.1 * 1.02)
    assert found["e2m1", 8].cost == pytest.approx(0.1 * 0.62)
    assert found["fp8", 0].cost == pytest.approx(0.1 * 0.07)
    assert found["none", 0].cost == 0.0
    only_ranks = candidates(case.plan, case.plan.linears[0], errors, floats=False)
    assert {c.weight_format for c in only_ranks} == {"e2m1"}


def test_too_few_bits_are_refused_with_the_least_possible(tiny_model) -> None:
    case = Case(tiny_model("llama"))
    layers = tuple(LayerErrors((s.name,), {0: 0.01}, 0.001, 0.0, 0.1) for s in case.plan.linears)
    with pytest.raises(UsageError, match=r"bits=4 is below the \d\.\d\d bits"):
        Chooser(case.plan, layers, Goal("bits", 4.0)).choose()


class Lines(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize("options", [{"auto": "bits=8"}, {"lorc_budget": 0.5}, {"auto": "perplexity=+1%"}])
def test_compile(options: dict, algorithm: str, tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = Recipe(
        **options,
        algorithm=algorithm,
        target="none",
        lorc_format="fp8",
        calibration_samples=4,
        calibration_length=32,
        eval_tokens=128,
        eval_length=64,
    )
    reporter = Lines()
    result = compile_model(tiny_model("llama"), recipe, output=tmp_path / "out", reporter=reporter)
    assert (tmp_path / "cache" / "zqfp-compile").is_dir()
    assert any(line.startswith("auto: bits ") for line in reporter.lines)
    report = result.report
    assert report.certificate is not None and report.certificate.mismatches == 0
    if "auto" in options and options["auto"].startswith("bits"):
        assert report.bits_per_weight_with_lorc is not None
        assert 7.8 < report.bits_per_weight_with_lorc <= 8.0
    if "perplexity" in str(options):
        assert any(line.startswith("perplexity on held-out") for line in reporter.lines)
    if "lorc_budget" in options:
        ranks = {layer.lorc_rank for layer in report.layers if layer.rewritten}
        assert len(ranks) > 1
