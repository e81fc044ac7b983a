"""``onnxruntime.onnx`` in a session as anybody opens it, with none of our options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiled_models import TOKENS, quick, sqnr
from pass_contract import checked_passes

from zqfp_compile import compile_model
from zqfp_compile.calibrate.causal_lm import CausalLm

onnxruntime = pytest.importorskip("onnxruntime")

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "float32", {}),
    ("llama", "float16", {"activation_scale": "token", "lorc_rank": 0}),
    ("opt", "float16", {}),  # Gemm with a half bias: silently wrong with FP8 Q/DQ
    ("opt", "float32", {"weights": "none"}),
    ("qwen2", "float16", {"weights": "fp8", "activations": "fp8-e5m2"}),
    ("gpt2", "float16", {"activations": "int8"}),
    ("gpt2", "float32", {"activations": "none", "scale_constraint": "none"}),
    ("llama", "float16", {"kv_cache_dtype": "fp8", "attention": "fp8"}),
]


def run(path: Path, level: str, *, ours: bool) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    if ours:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    interface = CausalLm.from_session(session)
    feed = interface.make_feed(TOKENS)
    if any("float8" in spec.type for spec in session.get_inputs()):
        from zqfp_compile.backends.ort import run_session

        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, run_session(session, names, feed), strict=True))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize(("family", "dtype", "options"), CASES, ids=str)
def test_a_plain_session_gives_our_results(family, dtype, options, tiny_model, tmp_path) -> None:
    recipe = quick(target="onnxruntime", evaluate=False, **options)
    result = compile_model(tiny_model(family, "torch", dtype), recipe, output=tmp_path / "out")
    assert result.engine is not None and result.engine.name == "onnxruntime.onnx"
    artifact = run(result.artifact, "ORT_ENABLE_ALL", ours=True)
    for level in LEVELS:
        ours = run(result.engine, level, ours=True)
        plain = run(result.engine, level, ours=False)
        for name, value in ours.items():
            assert np.array_equal(plain[name], value), f"{name} at {level}"
            # Levels add in another order, which FP8 rounding amplifies to 20 dB (DESIGN section 9).
            assert sqnr(artifact[name].astype(np.float32), value.astype(np.float32)) > 20
        if level == "ORT_ENABLE_ALL":
            assert all(np.array_equal(artifact[name], value) for name, value in plain.items())


@pytest.mark.parametrize("evaluate", [False, True])
def test_beside_another_target(evaluate: bool, tiny_model, tmp_path) -> None:
    """Also when the evaluation had the FP8 form made: it is lowered once."""
    model = tiny_model("llama", "torch", "float16")
    own = compile_model(model, quick(target="onnxruntime", evaluate=False), output=tmp_path / "own")
    recipe = quick(target="none", emit=["onnxruntime"], evaluate=evaluate)
    with checked_passes() as ran:
        beside = compile_model(model, recipe, output=tmp_path / "beside")
    assert [pass_.name for pass_ in ran].count("lower-weights-fp8") == 1
    assert own.engine is not None and beside.engine is None
    wanted = run(own.engine, "ORT_ENABLE_ALL", ours=False)
    found = run(beside.folder / "onnxruntime.onnx", "ORT_ENABLE_ALL", ours=False)
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())
