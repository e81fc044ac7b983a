"""The walk through a model, layer by layer, against ONNX Runtime's own run of the whole model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from compiled_models import quick, sqnr, walked_bytes

import zqfp_compile.calibrate.walk as walk_module
from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.causal_lm import CausalLm, graph_inputs
from zqfp_compile.calibrate.linears import ActivationQuantizer, FloatLinear, QuantizedLinear, Replacement
from zqfp_compile.calibrate.samples import load_samples
from zqfp_compile.calibrate.sessions import run_bound
from zqfp_compile.calibrate.torch_segment import TorchSegment
from zqfp_compile.calibrate.walk import walk
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.model_io import load_model
from zqfp_compile.pipeline import compile_model
from zqfp_compile.plan import LinearSite, QuantPlan, SitePrecision
from zqfp_compile.quantize.activation import fake_quantize_activation
from zqfp_compile.quantize.layer import LayerOptions, quantize_layer
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.quantize.threads import DeviceThreads
from zqfp_compile.quantize_model import quantize_while_walking
from zqfp_compile.registry import create_pass
from zqfp_compile.tensor_store import TensorStore

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


def whole_activations(
    model: ir.Model, names: list[str], feeds: Sequence, folder: Path | None = None
) -> dict[str, np.ndarray]:
    """Every activation over all runs, [tokens, K], from one session of the whole model."""
    full = model.clone()
    if uses_bfloat16(full):
        widen_bfloat16(full)
    values = {value.name: value for node in full.graph for value in node.outputs}
    full.graph.outputs.clear()
    full.graph.outputs.extend(values[name] for name in names)
    session = create_session(ir.to_proto(full).SerializeToString(), external_data=folder)
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

    def __call__(
        self, sites: Sequence[LinearSite], weights: Sequence[torch.Tensor], moments: InputMoments
    ) -> list[Replacement]:
        for site, weight in zip(sites, weights, strict=True):
            assert weight.shape == (site.n, site.k) and weight.dtype == torch.float32
            assert site.activation == sites[0].activation
            self.visited.append(site.name)
        self.moments[sites[0].activation] = moments
        return [Replacement(self.change(weight)) for weight in weights]


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


def test_streams_differ_as_the_models_do(tiny_model, tmp_path: Path) -> None:
    """With other weights, one stream is the changed model and the other still the original."""

    def coarse(weight: torch.Tensor) -> torch.Tensor:
        return (weight * 16).round() / 16

    model, plan = planned(tiny_model("llama"))
    plan = plan.replace(activation_format="none")
    feeds = feeds_for(model)
    recorder = Recorder(coarse)
    result = walk(model, plan, feeds, recorder, scratch=tmp_path)
    names = list(result.ranges)
    original = whole_activations(model, names, feeds)
    changed = model.clone()
    for site in plan.linears:
        value = changed.graph.initializers[site.weight.initializer]
        value.const_value = ir.tensor(coarse(torch.tensor(value.const_value.numpy())).numpy())
    seen = whole_activations(changed, names, feeds)
    for name in names:
        moments, tokens = recorder.moments[name], sum(LENGTHS)
        for found, left in ((moments.gram, seen[name]), (moments.cross, original[name])):
            expected = left.T @ seen[name] / tokens
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    drift = np.abs(seen[names[-1]] - original[names[-1]]).max()
    assert drift > 1e-2 * np.abs(original[names[-1]]).max(), "the change is too small to tell streams apart"


def test_one_stream_alone(tiny_model, tmp_path: Path) -> None:
    model, plan = planned(tiny_model("opt"))
    both, alone = Recorder(), Recorder()
    walk(model, plan, feeds_for(model), both, scratch=tmp_path)
    walk(model, plan, feeds_for(model), alone, scratch=tmp_path, cross=False)
    for name, moments in alone.moments.items():
        assert moments.cross is None and torch.equal(moments.gram, both.moments[name].gram)


def test_little_is_kept_between_segments(tiny_model, tmp_path: Path) -> None:
    """At most the residual, the step's activation and one value more, whatever the depth."""
    model, plan = planned(tiny_model("llama"))
    feeds = [feeds_for(model)[0]] * 2
    most = 0

    def count(
        sites: Sequence[LinearSite], weights: Sequence[torch.Tensor], moments: InputMoments
    ) -> list[Replacement]:
        nonlocal most
        most = max(most, len(list(tmp_path.rglob("*.npy"))))
        return [Replacement(weight) for weight in weights]

    walk(model, plan, feeds, count, scratch=tmp_path, cross=False)
    assert 2 <= most <= 3 * len(feeds)


def test_tensors_bound_to_a_device_give_the_same(tiny_model, tmp_path: Path, monkeypatch) -> None:
    """The path of GPUs (DLPack in and out), with the CPU as the device."""
    model, plan = planned(tiny_model("llama", dtype="float16"))
    feeds = feeds_for(model)
    first, second = Recorder(), Recorder()
    walk(model, plan, feeds, first, scratch=tmp_path, in_torch=False)
    monkeypatch.setattr(
        "zqfp_compile.calibrate.walk.run_session",
        lambda session, feed: [
            tensor.numpy()
            for tensor in run_bound(session, {name: torch.from_numpy(a) for name, a in feed.items()}, "cpu")
        ],
    )
    walk(model, plan, feeds, second, scratch=tmp_path, in_torch=False)
    for name, moments in first.moments.items():
        assert torch.equal(moments.gram, second.moments[name].gram)


def test_layers_left_out_run_as_they_are(tiny_model, tmp_path: Path) -> None:
    model, plan = planned(tiny_model("llama"))
    plan = plan.replace(activation_format="none")
    kept = [site for site in plan.linears if "layers.0" in site.name or "down_proj" in site.name]
    feeds = feeds_for(model)
    left = plan.replace(precisions={site.name: SitePrecision("none", 0) for site in kept})
    recorder = Recorder()
    result = walk(model, left, feeds, recorder, scratch=tmp_path)
    assert recorder.visited == [site.name for site in plan.linears if site not in kept]
    expected = whole_activations(model, list(result.ranges), feeds)
    for name, peak in result.ranges.items():
        assert peak == pytest.approx(np.abs(expected[name]).max(), rel=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_optimum_exports(family: str, tiny_model, tmp_path: Path) -> None:
    model, plan = planned(tiny_model(family, exporter="optimum"))
    plan = plan.replace(activation_format="none")
    feeds = feeds_for(model)
    result = walk(model, plan, feeds, Recorder(), scratch=tmp_path)
    expected = whole_activations(model, list(result.ranges), feeds)
    for name, peak in result.ranges.items():
        assert peak == pytest.approx(np.abs(expected[name]).max(), rel=2e-5)


@pytest.mark.parametrize(
    ("family", "scales"),
    [("llama", {}), ("gpt2", {}), ("llama", {"scale_constraint": "m2", "scale_rows": 16, "group_size": 32})],
)
def test_the_walk_sees_what_the_artifact_computes(
    family: str, scales: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    """Every layer's input while walking, against the compiled model's own in ONNX Runtime."""
    path = tiny_model(family)
    recipe = quick(algorithm="gptq", lorc_rank=4, calibration_length=32, calibration=__file__, **scales)
    compiled = compile_model(path, recipe, output=tmp_path / "out")
    report = compiled.report
    assert report.certificate is not None and report.certificate.mismatches == 0
    model, plan = planned(path)
    feeds = load_feeds(model, path, recipe.calibration_samples, recipe.calibration_length)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with TensorStore(scratch) as store:
        plan = plan.replace(lorc_rank=4, **scales)
        plan, result = quantize_while_walking(
            model,
            plan,
            store,
            feeds,
            scratch=scratch,
            seed=0,
            progress=lambda done, total, detail: None,
        )
    names = list(result.rows)
    found = whole_activations(load_model(compiled.artifact), names, feeds, compiled.folder)
    for name in names:
        rows = result.rows[name]
        nearest = np.abs(rows[:, None] - found[name][None]).sum(axis=-1).argmin(axis=1)
        # FP8 roundings that fall the other way leave 21 dB and more between correct implementations.
        assert sqnr(found[name][nearest], rows) > 20, name


def load_feeds(model: ir.Model, path: Path, samples: int, length: int) -> tuple:
    return load_samples(
        __file__,
        tokenizer_path=path.parent / "tokenizer.json",
        interface=CausalLm.from_model(model),
        inputs=graph_inputs(model),
        samples=samples,
        length=length,
        seed=0,
    ).feeds


@pytest.mark.parametrize("scale", [None, 0.02])
@pytest.mark.parametrize("form", ["e4m3", "e5m2", "int8"])
def test_quantised_layers_compute_the_definition(form: str, scale: float | None) -> None:
    """y = a R (x8 w8^T) + (x V) U + bias, against the product in float64."""
    torch.manual_seed(0)
    x, bias = torch.randn(33, 72), torch.randn(40)
    layer = quantize_layer(torch.randn(40, 72), LayerOptions(algorithm="rtn", lorc_rank=3, group_size=32))
    quantizer = ActivationQuantizer(form, scale)
    x8, a = quantizer.split(x)
    x_hat = fake_quantize_activation(x, form, scale)
    torch.testing.assert_close(x8 * a, x_hat, rtol=0, atol=0)
    y = QuantizedLinear(Replacement.of(layer), bias, torch.float32, form)(x, x8, a)
    assert layer.lorc is not None
    lorc = x.double() @ layer.lorc.v.double() @ layer.lorc.u.double()
    expected = x_hat.double() @ layer.effective_weight().double().t() + lorc + bias
    # float32 sums of 72 products; bfloat16 products would be a thousand times further off.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


TIED = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[b, 8] x, float[8, 8] W) => (float[b, 8] y) {
        h = MatMul(x, W)  r = Relu(h)  i = MatMul(r, W)  s = Tanh(i)  y = MatMul(s, W)
    }
"""


def small(text: str) -> tuple[ir.Model, QuantPlan]:
    model = ir.from_onnx_text(text)
    (value,) = [value for value in model.graph.inputs if value.name == "W"]
    weight = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)
    value.const_value = ir.tensor(weight, name="W")
    model.graph.inputs.remove(value)
    model.graph.initializers["W"] = value
    plan = create_pass("select-linears", quantize_lm_head=True).call(model).plan
    assert plan is not None
    return model, plan


@pytest.mark.parametrize(("lorc_format", "overlapped"), [("float", False), ("fp8", False), ("fp8", True)])
def test_a_shared_weight_is_quantised_once(
    lorc_format: str, overlapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when weights are read and tensors stored beside the work, as for a GPU."""
    if overlapped:
        monkeypatch.setattr(DeviceThreads, "on_gpu", True)
    model, plan = small(TIED)
    plan = plan.replace(lorc_rank=2, lorc_format=lorc_format, group_size=32)
    feeds = [{"x": np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)}]
    calls: list[tuple[int, int, str]] = []
    with TensorStore(tmp_path) as store:
        plan, result = quantize_while_walking(
            model,
            plan,
            store,
            feeds,
            scratch=tmp_path,
            seed=0,
            progress=lambda *call: calls.append(call),
        )
        tensors = list(plan.tensors.values())
        assert len(tensors) == 3 and all(item is tensors[0] for item in tensors)
        weight = torch.from_numpy(plan.quantized_weight(plan.linears[0]).dequantize())
    assert [(done, total) for done, total, _ in calls] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    # The second layer runs with the same stored weight as the first: its output is about x @ W_hat twice.
    x_hat = fake_quantize_activation(torch.from_numpy(result.rows["r"]), "e4m3", result.ranges["r"] / 448)
    seen = torch.from_numpy(result.rows["s"])
    assert sqnr(seen.numpy(), torch.tanh(x_hat @ weight.t()).numpy()) > 10


OVERFLOW = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[b, 8] x, float[8, 8] W) => (float[b, 8] y) {
        h = MatMul(x, W)  r = Exp(h)  y = MatMul(r, W)
    }
"""


def test_errors_are_one_line(tmp_path: Path) -> None:
    model, plan = small(OVERFLOW)

    def run(feeds: list[dict[str, np.ndarray]]) -> None:
        walk(model, plan, feeds, Recorder(), scratch=tmp_path)

    with pytest.raises(UsageError, match="no samples"):
        run([])
    column = model.graph.initializers["W"].const_value.numpy()[:, 0]
    with pytest.raises(ModelError, match="activation r reaches inf"):
        run([{"x": np.tile(np.sign(column) * 1e3, (2, 1)).astype(np.float32)}])
    with pytest.raises(ModelError, match="activation x reaches nan"):
        run([{"x": np.full((2, 8), np.nan, np.float32)}])
    with pytest.raises(ModelError, match="sample 0 has no input 'x'"):
        run([{"z": np.zeros((2, 8), np.float32)}])
    assert not list(tmp_path.iterdir())


def test_a_run_is_repeatable(tiny_model, tmp_path: Path) -> None:
    model, plan = planned(tiny_model("gpt2"))
    feeds = feeds_for(model)
    first, second = (walk(model, plan, feeds, Recorder(), scratch=tmp_path, seed=3) for _ in range(2))
    assert first.ranges == second.ranges
    assert all((first.rows[name] == second.rows[name]).all() for name in first.rows)


@pytest.mark.parametrize("in_torch", [True, False])
def test_no_bit_depends_on_the_number_of_devices(in_torch: bool, tiny_model, tmp_path: Path) -> None:
    """Eleven samples, in groups of two and one, of which four devices take unequal shares."""
    model, plan = planned(tiny_model("llama"))
    interface, random = CausalLm.from_model(model), np.random.default_rng(6)
    feeds = [interface.make_feed(random.integers(2, 320, (1, 8 + index))) for index in range(11)]
    found = []
    for count in (1, 4):
        recorder = Recorder(lambda weight: weight.round(decimals=2))
        with DeviceThreads(["cpu"] * count) as threads:
            result = walk(model, plan, feeds, recorder, scratch=tmp_path, threads=threads, in_torch=in_torch)
        found.append((result, recorder))
    (one, alone), (four, together) = found
    assert one.ranges == four.ranges and alone.visited == together.visited
    for name, moments in alone.moments.items():
        np.testing.assert_array_equal(one.rows[name], four.rows[name])
        assert moments.tokens == together.moments[name].tokens == sum(range(8, 19))
        assert torch.equal(moments.gram, together.moments[name].gram)
        assert moments.drift is not None and moments.drift.any()
        assert torch.equal(moments.drift, together.moments[name].drift)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linears_of_several_samples_at_once(family: str, tiny_model, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU, whatever fits: samples of a group of eight lengths, by threes, twos and one."""
    model, plan = planned(tiny_model(family))
    interface, random = CausalLm.from_model(model), np.random.default_rng(6)
    feeds = [interface.make_feed(random.integers(2, 320, (1, 8 + index))) for index in range(24)]
    alone, together = Recorder(), Recorder()
    one = walk(model, plan, feeds, alone, scratch=tmp_path, in_torch=True)
    rows, multiply = [], FloatLinear.__call__
    monkeypatch.setattr(DeviceThreads, "on_gpu", True)
    monkeypatch.setattr(
        FloatLinear, "__call__", lambda layer, x: (rows.append(len(x)), multiply(layer, x))[1]
    )
    widest = max(max(site.n, site.k) for site in plan.rewritten)
    monkeypatch.setattr(walk_module, "_AT_ONCE", 50 * widest)
    several = walk(model, plan, feeds, together, scratch=tmp_path, in_torch=True)
    assert {8 + 9 + 10, 17 + 18, 30, 31} <= set(rows) and max(rows) > 50  # narrow layers take more
    assert several.ranges == pytest.approx(one.ranges, rel=1e-5)
    for name, moments in alone.moments.items():
        assert moments.tokens == together.moments[name].tokens
        torch.testing.assert_close(together.moments[name].gram, moments.gram, rtol=1e-3, atol=1e-4)


def test_no_bit_depends_on_where_activations_lie(tiny_model, tmp_path: Path, monkeypatch) -> None:
    """GPTQ and LoRC with activations on disk, as on a CPU, and in memory, as where a GPU has room."""
    model, plan = planned(tiny_model("llama", dtype="float16"))
    plan = plan.replace(lorc_rank=4, lorc_format="fp8")
    files, save = [], np.save
    monkeypatch.setattr(np, "save", lambda path, array: (files.append(path), save(path, array)))
    found = []
    for room in ({}, {"cpu": 1 << 30}):
        monkeypatch.setattr(walk_module, "activation_room", lambda devices, room=room: room)
        files.clear()
        found.append(walked_bytes(model, plan, feeds_for(model), tmp_path / str(len(room))))
        assert bool(files) == (not room)
    on_disk, in_memory = found
    assert len(on_disk) >= 14 * 5 and on_disk == in_memory


@pytest.mark.parametrize("room", [{}, {"cpu": 1 << 30}], ids=["on disk", "in memory"])
def test_one_thread_queues_for_all_gpus(
    room: dict[str, int], tiny_model, tmp_path: Path, monkeypatch
) -> None:
    """Unless activations lie on disk. Inputs are copied once for each of the two models."""

    class Counted(dict):
        reads = 0

        def __getitem__(self, name: str) -> np.ndarray:
            self.reads += 1
            return super().__getitem__(name)

    model, plan = planned(tiny_model("llama"))
    interface, random = CausalLm.from_model(model), np.random.default_rng(6)
    feeds = [Counted(interface.make_feed(random.integers(2, 320, (1, 40 + index)))) for index in range(11)]
    alone, together = Recorder(), Recorder()
    one = walk(model, plan, feeds, alone, scratch=tmp_path, in_torch=True)
    assert feeds[0].reads > 20
    feeds[0].reads = 0
    workers, run = [], TorchSegment.run
    monkeypatch.setattr(
        TorchSegment,
        "run",
        lambda segment, inputs: (workers.append(threading.get_ident()), run(segment, inputs))[1],
    )
    monkeypatch.setattr(DeviceThreads, "on_gpu", True)
    monkeypatch.setattr(walk_module, "activation_room", lambda devices: room)
    monkeypatch.setattr(walk_module, "_AT_ONCE", 1)
    with DeviceThreads(["cpu", "cpu"]) as threads:
        two = walk(model, plan, feeds, together, scratch=tmp_path, in_torch=True, threads=threads)
    assert feeds[0].reads == 2 * len(feeds[0]) + 1  # and the tokens are counted
    assert one.ranges == two.ranges
    for name, moments in alone.moments.items():
        np.testing.assert_array_equal(one.rows[name], two.rows[name])
        assert torch.equal(moments.gram, together.moments[name].gram)
    assert (set(workers) == {threading.get_ident()}) == bool(room)
    assert len(set(workers)) <= 3


def test_an_error_on_a_device_is_raised(tiny_model, tmp_path: Path) -> None:
    model, plan = planned(tiny_model("llama"))
    feeds = [{**feed} for feed in feeds_for(model)]
    del feeds[2]["input_ids"]
    with DeviceThreads(["cpu", "cpu"]) as threads, pytest.raises(ModelError, match="sample 2 has no input"):
        walk(model, plan, feeds, Recorder(), scratch=tmp_path, threads=threads)
