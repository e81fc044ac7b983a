"""The assignment under a budget, against trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zqfp_compile.errors import UsageError
from zqfp_compile.precision.assign import Assignment, Candidate, least_bits, least_cost
from zqfp_compile.precision.goal import Goal, Search, parse_goal

Layers = Sequence[Sequence[Candidate]]


def candidate(bits: float, cost: float) -> Candidate:
    return Candidate("e2m1", 0, float(bits), float(cost))


def everything(layers: Layers) -> list[tuple[float, float]]:
    """(bits, cost) of every combination."""
    combinations = itertools.product(*layers)
    return [(sum(c.bits for c in combo), sum(c.cost for c in combo)) for combo in combinations]


def is_consistent(found: Assignment, layers: Layers) -> bool:
    sums = (sum(c.bits for c in found.choices), sum(c.cost for c in found.choices))
    return sums == (found.bits, found.cost) and all(
        choice in layer for choice, layer in zip(found.choices, layers, strict=True)
    )


# Whole numbers: sums are exact, and ties and dominated points are common.
POINT = st.builds(candidate, st.integers(1, 40), st.integers(0, 40))
LAYERS = st.lists(st.lists(POINT, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(LAYERS, st.integers(0, 200))
def test_least_cost_is_legal_and_at_most_one_step_from_the_optimum(layers: Layers, budget: int) -> None:
    fitting = [cost for bits, cost in everything(layers) if bits <= budget]
    found = least_cost(layers, budget)
    assert (found is None) == (not fitting)
    if found is None:
        return
    assert is_consistent(found, layers) and found.bits <= budget
    largest_step = max(max(c.cost for c in layer) - min(c.cost for c in layer) for layer in layers)
    assert min(fitting) <= found.cost <= min(fitting) + largest_step


@settings(max_examples=300, deadline=None)
@given(LAYERS, st.integers(0, 200))
def test_least_bits_is_legal_and_at_most_one_step_from_the_optimum(layers: Layers, limit: int) -> None:
    fitting = [bits for bits, cost in everything(layers) if cost <= limit]
    found = least_bits(layers, limit)
    assert (found is None) == (not fitting)
    if found is None:
        return
    assert is_consistent(found, layers) and found.cost <= limit
    largest_step = max(max(c.bits for c in layer) - min(c.bits for c in layer) for layer in layers)
    assert min(fitting) <= found.bits <= min(fitting) + largest_step


@settings(max_examples=200, deadline=None)
@given(LAYERS, st.sampled_from([0.3, 1.0, 4.0]))
def test_optimum_of_an_exchange_rate_is_found_exactly(layers: Layers, rate: float) -> None:
    """Where the budget is what some exchange rate spends, nothing is lost to rounding to whole layers."""
    best = min(cost + rate * bits for bits, cost in everything(layers))
    budgets = [bits for bits, cost in everything(layers) if cost + rate * bits == pytest.approx(best)]
    for budget in (min(budgets), max(budgets)):
        optimum = min(cost for bits, cost in everything(layers) if bits <= budget)
        found = least_cost(layers, budget)
        assert found is not None and found.cost == pytest.approx(optimum)
        reverse = least_bits(layers, optimum)
        assert reverse is not None and reverse.bits <= budget


@settings(max_examples=100, deadline=None)
@given(st.lists(POINT, min_size=1, max_size=6), st.integers(0, 60))
def test_one_layer_is_solved_exactly(layer: list[Candidate], budget: int) -> None:
    fitting = [c.cost for c in layer if c.bits <= budget]
    found = least_cost([layer], budget)
    assert (None if found is None else found.cost) == (min(fitting) if fitting else None)
    cheap = [c.bits for c in layer if c.cost <= budget]
    reverse = least_bits([layer], budget)
    assert (None if reverse is None else reverse.bits) == (min(cheap) if cheap else None)


def test_bits_go_to_the_layer_that_gains_most() -> None:
    layers = [[candidate(4, 1), candidate(8, 0.9)], [candidate(4, 1), candidate(8, 0.1)]]
    found = least_cost(layers, 12)
    assert found is not None and [c.bits for c in found.choices] == [4, 8]


def test_rest_of_the_budget_buys_a_point_off_the_hull() -> None:
    # (8, 9) lies above the line from (4, 10) to (16, 0): the hull alone would leave the 4 bits unused.
    layers = [[candidate(4, 10), candidate(8, 9), candidate(16, 0)]]
    found = least_cost(layers, 8)
    assert found is not None and found.cost == 9


def test_hundreds_of_layers_are_within_half_a_percent_of_the_lower_bound() -> None:
    random = np.random.default_rng(0)
    layers = []
    for _ in range(300):
        size, weight = random.integers(1, 30), random.lognormal(0, 1.5)
        points = [(4.13 + 0.2 * r, 1 / (1 + 0.4 * r)) for r in range(9)] + [(8.0, 0.01), (16.0, 0.0)]
        layers.append([candidate(size * bits, size * weight * cost) for bits, cost in points])
    smallest = sum(min(c.bits for c in layer) for layer in layers)
    for factor in (1.05, 1.2, 1.5, 2.5):
        budget = factor * smallest
        found = least_cost(layers, budget)
        assert found is not None and found.bits <= budget * (1 + 1e-6)
        rates = np.geomspace(1e-5, 1e2, 2000)
        dual = max(
            sum(min(c.cost + rate * c.bits for c in layer) for layer in layers) - rate * budget
            for rate in rates
        )
        assert dual <= found.cost * (1 + 1e-9)
        # The dual is a lower bound of the optimum, which single layers of these sizes miss by 1e-3.
        assert found.cost <= dual * 1.005
        reverse = least_bits(layers, found.cost)
        assert reverse is not None and reverse.bits <= found.bits * 1.005


def test_a_layer_without_candidates_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        least_cost([[]], 10)


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("bits=4.5", Goal("bits", 4.5)),
        ("perplexity=+2%", Goal("perplexity", 2.0)),
        ("perplexity=0.5%", Goal("perplexity", 0.5)),
    ],
)
def test_goals_are_read(text: str, goal: Goal) -> None:
    assert parse_goal(text) == goal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4.5",
        "bits=",
        "bits=4.5.1",
        "bits=0.5",
        "bits=33",
        "perplexity=2",
        "perplexity=+0%",
        "perplexity=-2%",
    ],
)
def test_other_goals_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="--auto: "):
        parse_goal(text)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.2, 5.0), st.floats(0.6, 1.6), st.floats(0.005, 0.2))
def test_search_ends_below_the_limit_and_close_to_it(factor: float, power: float, limit: float) -> None:
    """The prediction may be off by a factor, and by a power of the size of the error."""
    search, measurements = Search(limit), []
    while True:
        measurements.append(factor * limit * (search.predicted / limit) ** power)
        if not search.adjust(measurements[-1]):
            break
    assert len(measurements) <= 4
    assert search.best is not None
    assert max(value for value in measurements if value <= limit) >= 0.6 * limit


def test_search_gives_up_on_a_cost_that_never_falls() -> None:
    search, count = Search(0.02), 1
    while search.adjust(0.05):
        count += 1
    assert count == 4 and search.best is None
