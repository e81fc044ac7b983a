"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zqfp_compile.errors import UsageError

Logits = npt.NDArray[Any]
Picker = Callable[[Logits], int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy: the most likely one.

    Attributes:
        temperature: 0 is greedy; else logits are divided by it and a token is drawn.
        top_k: Draw among the k most likely tokens; 0 is all of them.
        top_p: Draw among the fewest tokens whose probabilities sum to at least this.
        seed: Repeats a draw; ``None`` is another one every time.

    Raises:
        UsageError: When a value is out of range, or would have no effect because the choice is greedy.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise UsageError(f"--temperature {self.temperature:g}: give 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}: give 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g}: give a number above 0 and up to 1")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"--seed {self.seed}: give 0 or a positive number")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.seed is not None):
            raise UsageError("--top-k, --top-p and --seed need --temperature above 0, such as 0.7")

    def picker(self) -> Picker:
        """Return the function from logits [V] to a token number, with its own random state."""
        if self.temperature == 0:
            return lambda logits: int(logits.argmax())
        random = np.random.default_rng(self.seed)
        return lambda logits: int(random.choice(logits.size, p=self.probabilities(logits)))

    def probabilities(self, logits: Logits) -> npt.NDArray[np.float64]:
        """Return what tokens are drawn with, [V], for a temperature above 0."""
        scaled = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < scaled.size:
            scaled[scaled < np.partition(scaled, -self.top_k)[-self.top_k]] = -np.inf
        shares: npt.NDArray[np.float64] = np.exp(scaled - scaled.max())
        shares /= shares.sum()
        if self.top_p < 1:
            order = np.argsort(-shares, kind="stable")
            before = np.cumsum(shares[order]) - shares[order]
            shares[order[before >= self.top_p]] = 0.0
            shares /= shares.sum()
        return shares
