"""The walk through a model, layer by layer, against ONNX Runtime's own run of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.calibrate.linears import Replacement
from zqfp_compile.calibrate.walk import walk
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.errors import ModelError, UsageError  # noqa: F401
from zqfp_compile.model_io import load_model
from zqfp_compile.plan import LinearSite, QuantPlan, SitePrecision
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.registry import create_pass

pytest.importorskip("onnxruntime")

LENGTHS = (24, 9, 17)  # samples of different lengths
FAMILIES = ("llama", "qwen2", "opt", "gpt2")


def planned(path: Path, **options: Any) -> tuple[ir.Model, QuantPlan]:
    model = load_model(path)
    for name in ("strip-metadata", "raise-opset"):
        create_pass(name).call(model)
    plan = create_pass("select-linears", **options).call(model).plan
    assert plan is not None
    return model, plan


def feeds_for(model: ir.Model) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    interface = CausalLm.from_model(model)
    return [interface.make_feed(random.integers(2, 320, (1, length))) for length in LENGTHS]


def whole_activations(model: ir.Model, names: list[str], feeds: list) -> dict[str, np.ndarray]:
    """Every activation over all runs, [tokens, K], from one session of the whole model."""
    full = model.clone()
    if uses_bfloat16(full):
        widen_bfloat16(full)
    values = {value.name: value for node in full.graph for value in node.outputs}
    full.graph.outputs.clear()
    full.graph.outputs.extend(values[name] for name in names)
    session = create_session(ir.to_proto(full).SerializeToString())
    inputs = {arg.name for arg in session.get_inputs()}
    runs = []
    for feed in feeds:
        plain = {
            name: a.astype(np.float32) if a.dtype.name == "bfloat16" else a
            for name, a in feed.items()
            if name in inputs
        }
        runs.append(session.run(names, plain))
    flat = [[a.reshape(-1, a.shape[-1]).astype(np.float32) for a in run] for run in runs]
    return {name: np.concatenate([run[i] for run in flat]) for i, name in enumerate(names)}


class Recorder:
    """Keeps every weight as it is, and what it was shown."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight) -> None:
        self.moments: dict[str, InputMoments] = {}
        self.visited: list[str] = []
        self.change = change

    def __call__(self, site: LinearSite, weight: torch.Tensor, moments: InputMoments) -> Replacement:
        assert weight.shape == (site.n, site.k) and weight.dtype == torch.float32
        self.visited.append(site.name)
        self.moments[site.activation] = moments
        return Replacement(self.change(weight))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unquantised_walk_is_a_plain_run(family: str, dtype: str, tiny_model, tmp_path: Path) -> None:
    model, plan = planned(tiny_model(family, dtype=dtype), quantize_lm_head=True)
    plan = plan.replace(activation_format="none")
    feeds = feeds_for(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    recorder = Recorder()
    result = walk(model, plan, feeds, recorder, scratch=tmp_path)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert not list(tmp_path.iterdir())
    assert recorder.visited == [site.name for site in plan.linears]  # each once, in graph order
    names = list(dict.fromkeys(site.activation for site in plan.linears))
    assert list(result.ranges) == names and result.tokens == sum(LENGTHS)
    expected = whole_activations(model, names, feeds)
    # Other fusions, other order of float32 sums; float16 also rounds at other places (5e-4 each).
    tolerance = 4e-3 if dtype == "float16" else 2e-5
    for name in names:
        peak = np.abs(expected[name]).max()
        assert result.ranges[name] == pytest.approx(peak, rel=tolerance)
        rows = result.rows[name]
        distance = np.abs(rows[:, None] - expected[name][None]).max(axis=-1).min(axis=1)
        assert rows.dtype == np.float32 and distance.max() <= tolerance * peak
        moments = recorder.moments[name]
        gram = expected[name].T @ expected[name] / len(expected[name])
        assert moments.tokens == sum(LENGTHS) and moments.cross is not None
        for found in (moments.gram, moments.cross):  # the original stream is the plain run as well
            np.testing.assert_allclose(found.numpy(), gram, rtol=0, atol=2 * tolerance * np.abs(gram).max())
