"""200 generated graphs a run, half of them other ones each week; ``docs/generated_graphs.md`` has the rest.

    python tools/fuzz_graphs.py --seed SEED --count 1

repeats one of them.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from pathlib import Path

import onnx
import pytest
from graph_checks import check_graph
from random_blocks import random_graph
from random_linears import DECLINED_REASONS

pytest.importorskip("onnxruntime")

# bfloat16 with beta * C; float16 numbers so small that rounding one is a large step; a call that is dead.
OPEN_ONCE = (101080, 101344, 103254)
FIXED = (*range(100), *OPEN_ONCE)


def _fresh() -> range:
    """Seeds of $ZQFP_GRAPH_SEED and those after it, or others every week."""
    given = os.environ.get("ZQFP_GRAPH_SEED")
    if given is not None:
        return range(int(given), int(given) + 100)
    week = datetime.date.today().isocalendar()
    begin = 10_000 * (100 * week.year + week.week)
    return range(begin, begin + 100)


@pytest.mark.parametrize("seed", [*FIXED, *_fresh()])
def test_generated_graph(seed: int, tmp_path: Path) -> None:
    try:
        check_graph(seed, tmp_path)
    except Exception as error:
        again = f"python tools/fuzz_graphs.py --seed {seed} --count 1"
        raise AssertionError(f"{type(error).__name__}: {error}; repeat it with: {again}") from error


def test_the_generator_makes_what_it_should() -> None:
    """Valid models, nearly all with something to compile, and every kind of thing in some of them."""
    graphs = [random_graph(seed) for seed in range(200)]
    for graph in graphs:
        onnx.checker.check_model(graph.proto, full_check=True)
    assert sum(bool(graph.rewritten) for graph in graphs) >= 190
    assert {graph.opset for graph in graphs} == set(range(13, 25))
    assert {feature for graph in graphs for feature in graph.features} == {
        "attention",
        "cache",
        "embedding",
        "lm_head",
    }
    reasons = Counter(reason for graph in graphs for _, reason in graph.declined)
    assert set(DECLINED_REASONS) <= set(reasons)
    assert any(graph.inlined for graph in graphs) and any(graph.vanishing for graph in graphs)


def test_a_seed_is_one_graph() -> None:
    for seed in (1, 2):
        first, again = (random_graph(seed).proto.SerializeToString(deterministic=True) for _ in range(2))
        assert first == again
