"""What ``--auto`` asks for, and the search for the perplexity it asks for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from zqfp_compile.errors import UsageError

# Less than one code per weight cannot be stored; more than float32 cannot be meant.
_BITS = (1.0, 32.0)
# The search ends when the rise lies between this share of what is allowed and all of it.
CLOSE_ENOUGH = 0.85
MAX_ADJUSTMENTS = 3
# Measurements are noisy and assignments whole: slopes and steps beyond these are not believed.
_SLOPES = (0.4, 2.5)
_LARGEST_STEP = 8.0


@dataclass(frozen=True)
class Goal:
    """A target of automatic mixed precision.

    Attributes:
        kind: ``bits``: average bits per weight; ``perplexity``: rise of the perplexity.
        value: Bits, or percent.
    """

    kind: Literal["bits", "perplexity"]
    value: float

    @property
    def nats(self) -> float:
        """The rise of the loss, nats per token, that a perplexity goal allows."""
        return math.log1p(self.value / 100.0)


def parse_goal(text: str) -> Goal:
    """Read ``bits=4.5`` or ``perplexity=+2%``.

    Raises:
        UsageError: When the text is neither.
    """
    match = re.fullmatch(r"\s*(bits)=([0-9.]+)\s*|\s*(perplexity)=\+?([0-9.]+)%\s*", text)
    try:
        value = float(match[2] or match[4]) if match else math.nan
    except ValueError:  # 1.2.3
        value = math.nan
    if match is None or math.isnan(value):
        raise UsageError(f"--auto: {text!r} is not of the form bits=4.5 or perplexity=+2%")
    if match[1]:
        if not _BITS[0] <= value <= _BITS[1]:
            raise UsageError(f"--auto: {value:g} bits per weight is outside {_BITS[0]:g}..{_BITS[1]:g}")
        return Goal("bits", value)
    if not 0 < value <= 1000:
        raise UsageError(f"--auto: a perplexity rise of {value:g}% is outside 0..1000%, 0 excluded")
    return Goal("perplexity", value)


class Search:
    """Finds the predicted cost whose measured cost is as large as allowed, in few measurements.

    The prediction errs by a factor that varies little between neighbouring assignments: dividing it out comes
    close in one step; from the second measurement on, the line through the last two in logarithms is
    followed. A step that would leave the interval known so far is replaced by the middle of it.
    """

    def __init__(self, limit: float) -> None:
        """Start at the prediction itself; ``limit`` is the allowed cost, nats."""
        self.limit = limit
        self.predicted = limit
        self._fits = 0.0
        self._too_much = math.inf
        self._measured: list[tuple[float, float]] = []

    @property
    def best(self) -> float | None:
        """The largest predicted cost that was measured and fits, or ``None``."""
        return self._fits or None

    def adjust(self, measured: float) -> bool:
        """Take the measured cost at ``predicted``; returns whether to measure again at the new one."""
        self._measured.append((self.predicted, max(measured, 0.01 * self.limit)))
        if measured <= self.limit:
            self._fits = max(self._fits, self.predicted)
            if measured >= CLOSE_ENOUGH * self.limit:
                return False
        else:
            self._too_much = min(self._too_much, self.predicted)
        if len(self._measured) > MAX_ADJUSTMENTS:
            return False
        step = self._step()
        if not self._fits < step < self._too_much:
            step = 0.5 * (self._fits + self._too_much)
        self.predicted = step
        return True

    def _step(self) -> float:
        predicted, measured = self._measured[-1]
        slope = 1.0
        if len(self._measured) > 1:
            before, cost = self._measured[-2]
            run = math.log(predicted / before)
            slope = math.log(measured / cost) / run if run else 1.0
        # Aims a little below the limit: landing above it is useless.
        aim = 0.5 * (1 + CLOSE_ENOUGH) * self.limit
        ratio = math.pow(aim / measured, 1 / min(_SLOPES[1], max(_SLOPES[0], slope)))
        return predicted * min(_LARGEST_STEP, max(1 / _LARGEST_STEP, ratio))
