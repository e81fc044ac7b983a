"""``--auto`` and ``--lorc-budget``: from measured sensitivities to one precision per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.errors import UsageError
from zqfp_compile.plan import QuantPlan, SitePrecision
from zqfp_compile.precision import cache
from zqfp_compile.precision.assign import Assignment, Candidate, least_bits, least_cost
from zqfp_compile.precision.goal import Goal, Search
from zqfp_compile.precision.probe import Probe
from zqfp_compile.precision.sensitivity import (
    MAX_RUNS,
    LayerErrors,
    Statistics,
    candidates,
    measure,
    stored_bits,
)
from zqfp_compile.weights import read_weight

# Tokens that the sensitivities are measured on, in whole windows: 512 predict others well (docs/accuracy.md).
PROBE_TOKENS = 512


@dataclass(frozen=True)
class Choice:
    """One precision per layer.

    Attributes:
        precisions: By layer name, every planned layer.
        bits: Average stored bits per planned weight.
        cost: Predicted rise of the loss, nats per token.
        summary: One line for the user.
    """

    precisions: Mapping[str, SitePrecision]
    bits: float
    cost: float
    summary: str


def sensitivities(
    model: ir.Model,
    plan: QuantPlan,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
    statistics: Callable[[], Statistics],
    *,
    max_rank: int,
    seed: int,
    gptq: bool = False,
    device: str = "cpu",
    folder: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, detail: None,
) -> tuple[LayerErrors, ...]:
    """Measure what errors in every layer cost, or read it from an earlier run.

    Args:
        model: The original model.
        plan: Layers and formats.
        feeds: Calibration windows; a few of them are used.
        statistics: Returns those of the layers' inputs, over all windows; only called to measure anew.
        max_rank: Largest LoRC rank a layer may get.
        seed: Of LoRC's range finder.
        gptq: Whether the weights will be rounded by GPTQ, not to nearest.
        device: ``cpu`` or ``cuda``.
        folder: Where measurements are kept, by default :func:`zqfp_compile.precision.cache.default_folder`.
        progress: Called with (done, total, text).

    Raises:
        UsageError: When the model is no causal language model.
        ModelError: When ONNX Runtime cannot run it, or a weight is not finite.
    """
    interface = CausalLm.from_model(model)
    folder = folder or cache.default_folder()
    key = cache.cache_key(model, plan, feeds, max_rank, gptq, seed, MAX_RUNS, PROBE_TOKENS)
    found = cache.load(folder, key)
    if found is not None:
        return found
    windows = min(len(feeds), -(-PROBE_TOKENS // feeds[0]["input_ids"].size))
    chosen = np.unique(np.linspace(0, len(feeds) - 1, windows + 2)[1:-1].astype(int))
    probe = Probe(
        model, plan.linears, [feeds[index] for index in chosen], logits=interface.logits, device=device
    )
    found = measure(
        plan,
        lambda source: read_weight(model, source),
        probe,
        statistics(),
        max_rank=max_rank,
        gptq=gptq,
        seed=seed,
        progress=progress,
    )
    cache.save(folder, key, found)
    return found


class Chooser:
    """Turns sensitivities into precisions that meet the recipe's goal.

    Attributes:
        search: The search for a perplexity, ``None`` for other goals.
        warnings: What the user must know when the search has ended.
    """

    def __init__(
        self,
        plan: QuantPlan,
        layers: Sequence[LayerErrors],
        goal: Goal | None,
        lorc_budget: float | None = None,
    ) -> None:
        """Without a ``goal``, ``lorc_budget`` is LoRC's bits per weight and formats stay the plan's."""
        sites = {site.name: site for site in plan.linears}
        self._plan, self._layers, self._goal = plan, tuple(layers), goal
        self._lorc_budget = lorc_budget or 0.0
        self._sites = [sites[item.layers[0]] for item in layers]
        self._candidates = [
            candidates(plan, site, item, floats=goal is not None)
            for site, item in zip(self._sites, layers, strict=True)
        ]
        self._weights = sum(site.n * site.k for site in self._sites)
        self.search = Search(goal.nats) if goal is not None and goal.kind == "perplexity" else None
        self.warnings: tuple[str, ...] = ()

    def choose(self) -> Choice:
        """Return the assignment for the goal; for a perplexity, at the predicted cost the search is at.

        Raises:
            UsageError: When the goal is fewer bits than the smallest assignment has.
        """
        if self.search is not None:
            return self._choice(least_bits(self._candidates, self.search.predicted), "")
        bits = self._budget()
        found = least_cost(self._candidates, bits * self._weights)
        if found is None:
            least = sum(min(item.bits for item in items) for items in self._candidates) / self._weights
            raise UsageError(
                f"--auto: bits={bits:g} is below the {math.ceil(100 * least) / 100:.2f} bits of "
                f"{self._plan.weight_format} codes and scales; raise it"
            )
        return self._choice(found, f" of {bits:.2f}")

    def adjust(self, loss: float) -> bool:
        """Take the measured rise of the loss; returns whether to quantise again as :meth:`choose` then says.

        When the measurements are used up on an assignment that costs too much, the best one that fits is
        returned to once more.
        """
        if self.search is None:
            return False
        before, limit = self.search.predicted, self.search.limit
        chosen = self.choose().precisions
        if self.search.adjust(loss) and self.choose().precisions != chosen:
            return True
        if loss > limit and self.search.best is not None:
            self.search.predicted = self.search.best
            return before != self.search.best
        if loss > limit:
            self.warnings = (
                f"--auto: perplexity rises by {100 * math.expm1(loss):.2f}% on held-out calibration text, "
                f"{100 * math.expm1(limit):.2f}% were asked for; try --algorithm gptq or "
                "--activation-scale token",
            )
        return False

    def _budget(self) -> float:
        if self._goal is not None:
            return self._goal.value
        bare = sum(
            stored_bits(self._plan, site, self._plan.precision(site).weight_format, 0) for site in self._sites
        )
        return bare / self._weights + self._lorc_budget

    def _choice(self, found: Assignment | None, goal: str) -> Choice:
        if found is None:
            raise RuntimeError("layers left in float cost nothing")
        precisions = {
            name: SitePrecision(choice.weight_format, choice.lorc_rank)
            for item, choice in zip(self._layers, found.choices, strict=True)
            for name in item.layers
        }
        bits = found.bits / self._weights
        return Choice(precisions, bits, found.cost, _summary(found.choices, bits, goal, found.cost))


def _summary(choices: Sequence[Candidate], bits: float, goal: str, cost: float) -> str:
    formats = [item.weight_format for item in choices]
    ranks = [item.lorc_rank for item in choices if item.weight_format not in ("fp8", "none")]
    parts = [f"auto: bits {bits:.2f}{goal}"]
    parts += [f"{formats.count('fp8')} layers FP8"] if "fp8" in formats else []
    parts += [f"{formats.count('none')} layers in float"] if "none" in formats else []
    parts += [f"ranks {min(ranks)}-{max(ranks)}"] if any(ranks) else []
    return ", ".join([*parts, f"predicted loss +{cost:.4f} nats per token"])
