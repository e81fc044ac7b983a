"""Engines that run: every lowering against the portable model in ONNX Runtime, on the same inputs.

``make test-tensorrt`` runs this file where TensorRT or TensorRT-RTX and a GPU are, and keeps the verdict.
Targets that cannot run here are skipped with the doctor's reason; ONNX Runtime always runs, so the tests are
tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled_models import quick, sqnr
from onnx import TensorProto, helper, numpy_helper

from zqfp_compile import Engine, compile_model
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.doctor import TargetVerdict, diagnose

pytest.importorskip("onnxruntime")

TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
K, N = 1024, 128
# A linear layer on identical input: 14 bits of accumulator and the rounding to half leave 60 dB or more; a
# wrong scale, code or overflow leaves less than 20.
LINEAR_DB = 40.0
# Whole models: activations that fall on another FP8 number leave 21 to 25 dB (DESIGN section 9).
MODEL_DB = 15.0


@pytest.fixture(scope="session")
def verdicts() -> dict[str, TargetVerdict]:
    return {verdict.target: verdict for verdict in diagnose().targets}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, verdicts: dict[str, TargetVerdict]) -> str:
    verdict = verdicts[request.param]
    if verdict.build_fix or verdict.run_fix:
        pytest.skip(f"{verdict.target}: {verdict.build_fix or verdict.run_fix}")
    return str(request.param)


@pytest.fixture(params=["fp8", "int4"])
def lowering(request: pytest.FixtureRequest, target: str) -> str:
    if target == "onnxruntime" and request.param != "fp8":
        pytest.skip("ONNX Runtime has one lowering")
    return str(request.param)


def both(folder: Path, target: str, linears: int) -> tuple[Engine, Engine]:
    """The engine and the portable model, after a look at the plan lint."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["certificate"]["ok"]
    if target != "onnxruntime":
        assert report["engine"]["lint"]["ok"] and report["engine"]["fp8_linears"] == linears
    engine = Engine.load(folder, device="cpu" if target == "onnxruntime" else "cuda")
    assert engine.path.name == {"onnxruntime": "onnxruntime.onnx"}.get(target, f"{target}.engine")
    return engine, Engine.load(folder / "model.zqfp.onnx", device="cpu")


def linears(path: Path, kind: str) -> Path:
    """Half-precision layers whose channels differ by 2^8; ``merged`` share x, ``twice`` do not."""
    random = np.random.default_rng(5)
    inputs = {"one": ["x"], "merged": ["x", "x", "x"], "twice": ["x", "z"]}[kind]
    weights = [
        (random.normal(size=(K, N)) * np.exp2(random.uniform(-9, -1, N)) / np.sqrt(K)).astype(np.float16)
        for _ in inputs
    ]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [name, f"w{i}"], [f"y{i}"], name=f"layer.{i}")
            for i, name in enumerate(inputs)
        ],
        "linears",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", K])
            for name in dict.fromkeys(inputs)
        ],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT16, ["batch", N])
            for i in range(len(inputs))
        ],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("kind", ["one", "merged", "twice"])
def test_linears_at_the_magnitudes_of_an_llm(kind: str, target: str, lowering: str, tmp_path: Path) -> None:
    """Outliers take an unscaled accumulator out of float16; channels show a scale in the wrong place."""
    random = np.random.default_rng(6)
    names = ("x", "z") if kind == "twice" else ("x",)
    arrays = {name: random.normal(size=(4, 16, K)).astype(np.float16) for name in names}
    for array in arrays.values():
        array[..., :: K // 8] *= 60
    np.savez(tmp_path / "x.npz", **arrays)
    recipe = quick(
        target=target,
        evaluate=False,
        calibration=str(tmp_path / "x.npz"),
        weight_lowering=lowering,
        lorc_rank=8,
    )
    model = linears(tmp_path / "model.onnx", kind)
    folder = compile_model(model, recipe, output=tmp_path / "out").folder
    engine, portable = both(folder, target, {"one": 1, "merged": 3, "twice": 2}[kind])
    for rows in (1, 4):  # the default profile takes a batch of 1 to 4
        found, wanted = (
            runner.run({name: array[1, :rows] for name, array in arrays.items()})
            for runner in (engine, portable)
        )
        for name, exact in wanted.items():
            assert np.isfinite(found[name]).all() and np.abs(exact).max() > 1
            assert sqnr(exact, found[name]) > LINEAR_DB, name


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_a_model_through_both_profiles_and_its_cache(
    cache: str, target: str, lowering: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """16 tokens at once, then 8 one by one, each engine with its own cache."""
    recipe = quick(target=target, evaluate=False, kv_cache_dtype=cache, weight_lowering=lowering)
    folder = compile_model(tiny_model("llama", dtype="float16"), recipe, output=tmp_path / "out").folder
    tokens = np.random.default_rng(8).integers(2, 320, (1, 24))
    found, wanted = (logits_of(runner, tokens) for runner in both(folder, target, 14))
    assert sqnr(wanted[:, :16], found[:, :16]) > MODEL_DB
    assert sqnr(wanted[:, 16:], found[:, 16:]) > MODEL_DB


def logits_of(engine: Engine, tokens: np.ndarray) -> np.ndarray:
    interface = CausalLm.from_inputs(engine.inputs, engine.outputs)
    outputs: dict[str, Any] = engine.run(interface.make_feed(tokens[:, :16]))
    logits = [outputs["logits"]]
    for position in range(16, tokens.shape[1]):
        past = interface.next_past(outputs)
        outputs = engine.run(interface.make_feed_with_past(tokens[:, position : position + 1], past))
        logits.append(outputs["logits"])
    return np.concatenate(logits, axis=1)
