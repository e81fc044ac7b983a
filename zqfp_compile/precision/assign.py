"""One precision per layer under a total budget: a multiple-choice knapsack.

Only the points of a layer's lower convex hull in the (bits, cost) plane can be optimal for some exchange rate
between the two. Walking the steps between hull points in the order of gain per bit visits the optimum of
every exchange rate (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27,
1979), so the result is at most one step away from the optimum: nothing among hundreds of layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

# Sums of thousands of floats: a budget is met when it is exceeded by rounding only.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer.

    Attributes:
        weight_format: ``e2m1``, ``e3m0``, ``int4``, ``fp8`` or ``none``.
        lorc_rank: Rank of the error compensation, 0 for none.
        bits: Everything the layer stores: codes, scales, factors.
        cost: What it loses, in a currency that all layers share (nats per token), not negative.
    """

    weight_format: str
    lorc_rank: int
    bits: float
    cost: float


@dataclass(frozen=True)
class Assignment:
    """One candidate per layer.

    Attributes:
        choices: The chosen candidates, in the layers' order.
        bits: Their sum of bits.
        cost: Their sum of costs.
    """

    choices: tuple[Candidate, ...]
    bits: float
    cost: float


@dataclass(frozen=True)
class _Step:
    """From one hull point of a layer to the next: more bits, less cost."""

    layer: int
    target: Candidate
    bits: float
    gain: float

    @property
    def rate(self) -> float:
        return self.gain / self.bits


def least_cost(layers: Sequence[Sequence[Candidate]], budget: float) -> Assignment | None:
    """Choose one candidate per layer so that the bits fit the budget and the cost is small.

    Args:
        layers: The candidates of each layer, at least one each.
        budget: Bits over all layers.

    Returns:
        The assignment, or ``None`` when even the smallest candidates take more bits.
    """
    hulls = [_hull(candidates) for candidates in layers]
    chosen = [hull[0] for hull in hulls]
    room = budget * (1 + _ROUNDING) - sum(item.bits for item in chosen)
    if room < 0:
        return None
    stuck: set[int] = set()
    for step in _steps(hulls):
        if step.layer in stuck or step.bits > room:
            stuck.add(step.layer)  # its later steps start where this one would have led
            continue
        chosen[step.layer] = step.target
        room -= step.bits
    _exchange(layers, chosen, room, price="bits", goal="cost")
    return _assignment(chosen)


def least_bits(layers: Sequence[Sequence[Candidate]], cost: float) -> Assignment | None:
    """Choose one candidate per layer so that the total cost stays below a limit and the bits are few.

    Returns:
        The assignment, or ``None`` when even the most precise candidates cost more.
    """
    hulls = [_hull(candidates) for candidates in layers]
    chosen = [hull[0] for hull in hulls]
    excess = sum(item.cost for item in chosen) - cost * (1 + _ROUNDING)
    for step in _steps(hulls):
        if excess <= 0:
            break
        chosen[step.layer] = step.target
        excess -= step.gain
    if excess > 0:
        return None
    _exchange(layers, chosen, -excess, price="cost", goal="bits")
    return _assignment(chosen)


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the lower convex hull: bits rise, costs fall, the gain per bit falls."""
    if not candidates:
        raise ValueError("a layer has no candidates")
    hull: list[Candidate] = []
    for item in sorted(candidates, key=lambda item: (item.bits, item.cost)):
        if hull and item.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-2], item):
            hull.pop()
        hull.append(item)
    return hull


def _rate(smaller: Candidate, larger: Candidate) -> float:
    return (smaller.cost - larger.cost) / (larger.bits - smaller.bits)


def _steps(hulls: Sequence[Sequence[Candidate]]) -> Iterable[_Step]:
    """Return all steps, the best gain per bit first; those of a layer stay in order."""
    steps = [
        _Step(index, after, after.bits - before.bits, before.cost - after.cost)
        for index, hull in enumerate(hulls)
        for before, after in itertools.pairwise(hull)
    ]
    return sorted(steps, key=lambda step: -step.rate)


def _exchange(
    layers: Sequence[Sequence[Candidate]], chosen: list[Candidate], room: float, *, price: str, goal: str
) -> None:
    """Use what a limit leaves over, points off the hull included: the largest reduction of ``goal`` first.

    Args:
        layers: The candidates of each layer.
        chosen: One of each; changed.
        room: By how much the sum of ``price`` may still rise.
        price: The field that is limited, ``bits`` or ``cost``.
        goal: The field to reduce, the other one.
    """
    paid, lost = attrgetter(price), attrgetter(goal)
    while True:
        gain, index, item = max(
            (
                (lost(chosen[index]) - lost(item), index, item)
                for index, candidates in enumerate(layers)
                for item in candidates
                if paid(item) - paid(chosen[index]) <= room
            ),
            key=lambda found: found[0],
        )
        if gain <= 0:
            return
        room -= paid(item) - paid(chosen[index])
        chosen[index] = item


def _assignment(chosen: Sequence[Candidate]) -> Assignment:
    return Assignment(tuple(chosen), sum(item.bits for item in chosen), sum(item.cost for item in chosen))
