"""Compiles of the tiny models, and what their artifacts compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.plan import QuantPlan
from zqfp_compile.quantize_model import quantize_while_walking
from zqfp_compile.recipe import Recipe
from zqfp_compile.tensor_store import TensorStore

# Linears of the two decoder layers: q k v o gate up down; q k v o fc1 fc2; c_attn c_proj c_fc c_proj.
LINEARS = {"llama": 14, "qwen2": 14, "opt": 12, "gpt2": 8}
TOKENS = np.random.default_rng(7).integers(2, 320, (2, 12))


def quick(**options: Any) -> Recipe:
    """A recipe whose calibration and evaluation take a tenth of a second each."""
    values = {
        "target": "none",
        "calibration_samples": 2,
        "calibration_length": 48,
        "eval_tokens": 128,
        "eval_length": 64,
        # Any text does, and the built-in one takes a while to tokenise.
        "calibration": __file__,
        "eval_text": __file__,
        **options,
    }
    return Recipe.from_dict(values)


def walked_bytes(
    model: ir.Model,
    plan: QuantPlan,
    feeds: Sequence[Mapping[str, Any]],
    folder: Path,
    devices: Sequence[str] = ("cpu",),
) -> dict[tuple[str, str], bytes]:
    """Every tensor that GPTQ makes of a model, by layer and field; ``folder`` is made."""
    folder.mkdir()
    with TensorStore(folder) as store:
        found, _ = quantize_while_walking(
            model, plan, store, feeds, scratch=folder, devices=devices, seed=0, progress=lambda *_: None
        )
        return {
            (name, field): tensor.tobytes()
            for name, tensors in found.tensors.items()
            for field, tensor in vars(tensors).items()
            if tensor is not None
        }


def pairwise(
    factors: Mapping[str, Sequence[Any]], legal: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Choose few legal combinations in which every legal pair of two factors' values occurs."""
    cases = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    cases = [case for case in cases if legal(case)]
    open_pairs = set().union(*(pairs_of(case) for case in cases))
    chosen = []
    while open_pairs:
        best = max(cases, key=lambda case: len(pairs_of(case) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs_of(best)
    return chosen


def pairs_of(case: dict[str, Any]) -> set[Any]:
    return set(combinations(case.items(), 2))


def run_artifact(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run a model from an empty cache, and token by token from a cache of 8.

    Returns all outputs of the 12 tokens at once [2, 12, ...], and the logits [2, 4, V] of the last 4 tokens
    computed one at a time.
    """
    session = _session(path)
    interface = CausalLm.from_session(session)
    names = [output.name for output in session.get_outputs()]

    def step(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, feed), strict=True))

    at_once = step(interface.make_feed(TOKENS))
    outputs = step(interface.make_feed(TOKENS[:, :8]))
    logits = []
    for position in range(8, 12):
        past = interface.next_past(outputs)
        assert past and all(value.shape[2] == position for value in past.values())
        outputs = step(interface.make_feed_with_past(TOKENS[:, position : position + 1], past))
        logits.append(outputs[interface.logits])
    return at_once, np.concatenate(logits, axis=1)


def _session(path: Path) -> Any:
    model = ir.load(path)
    if not uses_bfloat16(model):
        return create_session(path, threads=1)
    widen_bfloat16(model)  # ONNX Runtime's CPU provider has no bfloat16 kernels
    return create_session(ir.to_proto(model).SerializeToString(), external_data=path.parent, threads=1)


def check_valid(path: Path) -> onnx.ModelProto:
    """Check a written model and return it without its weights."""
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path, load_external_data=False)
    opset = {item.domain: item.version for item in proto.opset_import}
    assert opset[""] >= 21 and proto.ir_version >= 10
    return proto


def sqnr(exact: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise, dB; infinite for equal arrays."""
    exact, other = exact.astype(np.float64), other.astype(np.float64)
    noise = np.square(other - exact).sum()
    return float(np.inf if noise == 0 else 10 * np.log10(np.square(exact).sum() / noise))
