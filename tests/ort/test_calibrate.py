"""Activation statistics against the same activations taken whole out of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.blocks import cut_into_blocks
from zqfp_compile.calibrate.causal_lm import CausalLm, graph_inputs
from zqfp_compile.calibrate.samples import load_samples
from zqfp_compile.calibrate.sessions import run_session
from zqfp_compile.calibrate.statistics import (
    CalibrationResult,
    activation_scale,
    activation_scales,
    collect,
)
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.model_io import load_model
from zqfp_compile.plan import LinearSite
from zqfp_compile.registry import create_pass
from zqfp_compile.work_folder import WorkFolder

pytest.importorskip("onnxruntime")


def planned(path: Path) -> tuple[ir.Model, tuple[LinearSite, ...]]:
    model = load_model(path)
    for name in ("strip-metadata", "raise-opset"):
        create_pass(name).call(model)
    plan = create_pass("select-linears").call(model).plan
    assert plan is not None
    return model, plan.linears


def prepared(path: Path) -> tuple[ir.Model, list[str]]:
    model, sites = planned(path)
    return model, list(dict.fromkeys(site.activation for site in sites))


def samples_for(model: ir.Model, path: Path, count: int = 3, length: int = 24) -> tuple:
    return load_samples(
        None,
        tokenizer_path=path.parent / "tokenizer.json",
        interface=CausalLm.from_model(model),
        inputs=graph_inputs(model),
        samples=count,
        length=length,
        seed=0,
    ).feeds


def whole_activations(model: ir.Model, names: list[str], feeds: tuple) -> dict[str, np.ndarray]:
    """Every activation of every run, [tokens, K], through a session that returns them as they are."""
    full = model.clone()
    values = {v.name: v for node in full.graph for v in node.outputs}
    full.graph.outputs.clear()
    full.graph.outputs.extend(values[name] for name in names)
    session = create_session(ir.to_proto(full).SerializeToString())
    runs = [session.run(names, feed) for feed in feeds]
    flat = [[a.reshape(-1, a.shape[-1]).astype(np.float32) for a in run] for run in runs]
    return {name: np.concatenate([run[i] for run in flat]) for i, name in enumerate(names)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_ranges_and_rows_are_the_activations(family: str, dtype: str, tiny_model) -> None:
    path = tiny_model(family, dtype=dtype)
    model, names = prepared(path)
    feeds = samples_for(model, path)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = collect(model, names, feeds, rows_per_activation=10)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert result.tokens == 72 and list(result.ranges) == names
    expected = whole_activations(model, names, feeds)
    # The two sessions fuse differently: float32 sums in another order, float16 one rounding (5e-4) apart.
    tolerance = 1e-5 if dtype == "float32" else 4e-3
    for name in names:
        peak = np.abs(expected[name]).max()
        assert result.ranges[name] == pytest.approx(peak, rel=tolerance)
        rows = result.rows[name]
        assert rows.shape == (12, expected[name].shape[1]) and rows.dtype == np.float32
        distance = np.abs(rows[:, None] - expected[name][None]).max(axis=-1).min(axis=1)
        assert distance.max() <= tolerance * peak, "a row is no row of the activation"
        assert len(np.unique(rows, axis=0)) > 6  # rows come from different tokens
        energy = np.square(expected[name].astype(np.float64)).sum(axis=0)
        np.testing.assert_allclose(
            result.energies[name], energy, rtol=2 * tolerance, atol=tolerance * energy.max()
        )


def test_bfloat16_runs_as_float32(tiny_model) -> None:
    path = tiny_model("llama", dtype="bfloat16")
    model, names = prepared(path)
    result = collect(model, names, samples_for(model, path))
    reference_path = tiny_model("llama", dtype="float32")
    reference, reference_names = prepared(reference_path)
    expected = collect(reference, reference_names, samples_for(reference, reference_path))
    # Same seeded weights, rounded to 8 bits in one of them: layer inputs a few percent apart.
    assert list(result.ranges.values()) == pytest.approx(list(expected.ranges.values()), rel=0.1)


def test_bfloat16_in_subgraphs() -> None:
    """Initializers and inputs of branches and loop bodies are widened as well."""
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (bfloat16[2,4] x, bool flag) => (bfloat16[2,4] y)
        <int64 trips = {2}>
        {
           h = If (flag) <
             then_branch = t () => (bfloat16[2,4] a) { a = Mul (x, x) },
             else_branch = e () => (bfloat16[2,4] b) { b = Neg (x) }
           >
           y = Loop (trips, flag, h) <
             body = l (int64 i, bool on, bfloat16[2,4] v) => (bool still, bfloat16[2,4] w)
             { still = Identity (on)  w = Add (v, x) }
           >
        }
        """
    )
    bfloat16 = ir.DataType.BFLOAT16.numpy()
    branch = model.graph[0].attributes["then_branch"].as_graph()
    half = ir.val("half", const_value=ir.tensor(np.array(0.5, bfloat16), name="half"))
    branch.register_initializer(half)
    branch[0].replace_input_with(1, half)
    feed = {"x": np.ones((2, 4), bfloat16), "flag": np.array(True)}
    assert collect(model, ["y"], [feed]).ranges == {"y": 2.5}


def test_a_bfloat16_initializer_that_is_also_an_input() -> None:
    text = "g (bfloat16[2,4] x, bfloat16[4] c) => (bfloat16[2,4] y) <bfloat16[4] c = {16256, 0, 0, 0}> {"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text} y = Sub (x, c) }}')
    feed = {"x": np.full((2, 4), -1, ir.DataType.BFLOAT16.numpy())}
    assert collect(model, ["y"], [feed]).ranges == {"y": 2.0}


def test_external_data_of_a_branch_alone(tmp_path: Path) -> None:
    text = "then_branch = t () => (float[2,4] a) { a = Add (x, x) }, else_branch = e () => (float[2,4] b)"
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2,4] x, bool flag) => (float[2,4] y) '
        f"{{ y = If (flag) <{text} {{ b = Neg (x) }}> }}"
    )
    np.full((2, 4), 5, np.float32).tofile(tmp_path / "data")
    shape = ir.Shape([2, 4])
    five = ir.ExternalTensor("data", 0, 32, ir.DataType.FLOAT, shape=shape, name="five", base_dir=tmp_path)
    branch = model.graph[0].attributes["then_branch"].as_graph()
    branch.register_initializer(ir.val("five", const_value=five))
    branch[0].replace_input_with(1, branch.initializers["five"])
    feed = {"x": np.ones((2, 4), np.float32), "flag": np.array(True)}
    assert collect(model, ["y"], [feed]).ranges == {"y": 6.0}


def test_names_of_subgraphs_are_not_taken() -> None:
    """Values of a branch called as onnx-ir calls values without a name."""
    chain = " ".join(f"val_{number} = Neg (val_{number - 1})" for number in range(1, 20))
    model = ir.from_onnx_text(
        f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2,4] x, bool flag) => (float[2,4] y)
        {{
           y = If (flag) <
             then_branch = t () => (float[2,4] val_19) {{ val_0 = Neg (x) {chain} }},
             else_branch = e () => (float[2,4] b) {{ b = Neg (x) }}
           >
        }}
        """
    )
    feed = {"x": np.full((2, 4), 3, np.float32), "flag": np.array(True)}
    assert collect(model, ["x", "y"], [feed]).ranges == {"x": 3.0, "y": 3.0}


def test_calibration_is_repeatable(tiny_model) -> None:
    path = tiny_model("gpt2")
    model, names = prepared(path)
    feeds = samples_for(model, path)
    first, second = (collect(model, names, feeds, seed=3) for _ in range(2))
    assert first.ranges == second.ranges
    assert all((first.rows[name] == second.rows[name]).all() for name in names)


def same(found: CalibrationResult, expected: CalibrationResult) -> bool:
    """Whether two calibrations agree to the last bit."""
    names = list(expected.ranges)
    return (
        found.ranges == expected.ranges
        and all(np.array_equal(found.rows[name], expected.rows[name]) for name in names)
        and all(np.array_equal(found.energies[name], expected.energies[name]) for name in names)
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_blocks_are_the_whole_graph(family: str, dtype: str, tiny_model) -> None:
    """To the last bit, but where ONNX Runtime fuses otherwise: it makes no Add + LayerNormalization one node
    when the sum is handed on; then sums of float32, and one rounding of float16, differ."""
    path = tiny_model(family, dtype=dtype)
    model, sites = planned(path)
    names = list(dict.fromkeys(site.activation for site in sites))
    assert len(cut_into_blocks(model, sites, names, 1)) > 1
    feeds = samples_for(model, path)
    whole = collect(model, names, feeds)
    found = collect(model, names, feeds, sites=sites, block_bytes=1)
    if family in ("llama", "qwen2"):
        assert same(found, whole)
    for name in names:
        distance = np.abs(found.rows[name] - whole.rows[name]).max()
        assert distance <= whole.ranges[name] * (2e-3 if dtype == "float16" else 2e-6)


@pytest.mark.parametrize("lost", [False, True])
def test_blocks_go_on_where_they_stopped(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """What was finished is not run again, unless a power cut took what the next block needs."""
    path = tiny_model("llama")
    model, sites = planned(path)
    names = list(dict.fromkeys(site.activation for site in sites))
    feeds = samples_for(model, path)
    how = {"sites": sites, "block_bytes": 1}
    blocks = len(cut_into_blocks(model, sites, names, 1))
    assert blocks > 2
    runs = []

    def stop(done: int, total: int, _: str) -> None:
        if done == 4:  # the second of three samples, in the second block
            raise KeyboardInterrupt

    def count(*arguments: object) -> object:
        runs.append(arguments)
        return run_session(*arguments)  # type: ignore[arg-type]

    with WorkFolder(tmp_path / "work", "key") as work:
        with pytest.raises(KeyboardInterrupt):
            collect(model, names, feeds, **how, work=work, progress=stop)
        kept = sorted(work.path.glob("*-values.npz"))
        assert len(kept) == len(feeds), "values of blocks that nothing needs any more stay"
        if lost:
            kept[-1].write_bytes(kept[-1].read_bytes()[:100])  # of the first sample, after two blocks
        monkeypatch.setattr("zqfp_compile.calibrate.block_runs.run_session", count)
        found = collect(model, names, feeds, **how, work=work)
        assert not list(work.path.glob("*-values.npz"))
        for one in work.path.glob("calibration-*-[0-9].npz"):
            one.unlink()
        assert same(found, collect(model, names, feeds, **how, work=work)), "what is whole needs no runs"
    assert len(runs) == 3 * blocks - (2 if lost else 4)
    assert same(found, collect(model, names, feeds, **how))


def test_progress_and_order(tiny_model) -> None:
    path = tiny_model("llama")
    model, names = prepared(path)
    calls: list[tuple[int, int]] = []
    collect(
        model,
        names[:1],
        samples_for(model, path),
        progress=lambda done, total, _: calls.append((done, total)),
    )
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


def _overflowing() -> ir.Model:
    return ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[b, 2] x) => (float[b, 2] y) { h = Exp(x)  y = Neg(h) }
        """
    )


def test_overflow_names_the_activation() -> None:
    feed = {"x": np.array([[1, 1000]], np.float32)}
    with pytest.raises(ModelError, match="activation h reaches inf"):
        collect(_overflowing(), ["h"], [feed])


def test_nothing_to_run() -> None:
    with pytest.raises(UsageError, match="no samples"):
        collect(_overflowing(), ["h"], [])
    with pytest.raises(ModelError, match="no value 'z'"):
        collect(_overflowing(), ["z"], [{"x": np.zeros((1, 2), np.float32)}])


def test_runtime_errors_are_one_line() -> None:
    with pytest.raises(ModelError, match="ONNX Runtime cannot run") as caught:
        collect(_overflowing(), ["h"], [{"x": np.zeros((1, 3), np.float32)}])
    assert "\n" not in str(caught.value)


def test_scales() -> None:
    assert activation_scale(448.0, "e4m3") == 1.0
    assert activation_scale(12.7, "int8") == pytest.approx(0.1, rel=1e-6)
    assert activation_scale(57344.0, "e5m2") == 1.0
    scales, warnings = activation_scales({"a": 4.48, "dead": 0.0}, "e4m3")
    assert scales["a"] == float(np.float32(4.48 / 448)) and scales["dead"] == 1.0
    assert len(warnings) == 1 and "dead" in warnings[0]
