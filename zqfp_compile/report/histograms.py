"""What a layer's quantisation looks like: histograms of its weights, group scales and codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from zqfp_compile.report.svg import base_line, box, label, picture

WEIGHT_BINS = 61
_HEIGHT = 96


@dataclass(frozen=True)
class Histogram:
    """What one layer's quantisation looks like.

    Attributes:
        name: Layer name.
        edges: Bin edges over the weights' range, ``WEIGHT_BINS + 1`` values; the middle bin holds zero.
        original: Count of original weights per bin.
        decoded: Count of decoded weights per bin.
        exponents: (e, count) of group scales in [2^e, 2^(e+1)), every e from the smallest to the largest.
        codes: (code, count) for the signed 4-bit codes -7..7; empty when not given.
        weight_sqnr_db: SQNR of the decoded weights, dB; ``None`` when they are equal or all zero.
    """

    name: str
    edges: tuple[float, ...]
    original: tuple[int, ...]
    decoded: tuple[int, ...]
    exponents: tuple[tuple[int, int], ...]
    codes: tuple[tuple[int, int], ...] = ()
    weight_sqnr_db: float | None = None


def layer_histogram(
    name: str,
    weight: npt.NDArray[np.float32],
    decoded: npt.NDArray[np.float32],
    group_scales: npt.NDArray[np.float32] | None,
    codes: npt.NDArray[np.int8] | None = None,
) -> Histogram:
    """Count what the report draws for one layer.

    Args:
        name: Layer name.
        weight: Original weight, float [N, K].
        decoded: Weight as the compiled model decodes it, float [N, K].
        group_scales: Positive group scales [N, G] without the row scale; ``None`` for formats that have none.
        codes: Signed code-book indices -7..7, [N, Kp]; optional.

    Raises:
        ValueError: When the shapes of ``weight`` and ``decoded`` differ.
    """
    if weight.shape != decoded.shape:
        raise ValueError(f"{name}: weight is {weight.shape}, decoded is {decoded.shape}")
    limit = float(max(np.abs(weight).max(initial=0.0), np.abs(decoded).max(initial=0.0))) or 1.0
    original, edges = np.histogram(weight, bins=WEIGHT_BINS, range=(-limit, limit))
    rounded, _ = np.histogram(decoded, bins=WEIGHT_BINS, range=(-limit, limit))
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(weight, decoded, dtype=np.float64)).sum())
    return Histogram(
        name=name,
        edges=tuple(map(float, edges)),
        original=tuple(map(int, original)),
        decoded=tuple(map(int, rounded)),
        exponents=() if group_scales is None else _count_exponents(group_scales),
        codes=() if codes is None else _count_codes(codes),
        weight_sqnr_db=10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else None,
    )


def _count_exponents(scales: npt.NDArray[np.float32]) -> tuple[tuple[int, int], ...]:
    positive = scales[np.isfinite(scales) & (scales > 0)]
    if positive.size == 0:
        return ()
    # frexp is exact where log2 can round a power of two to the exponent below.
    values, counts = np.unique(np.frexp(positive)[1] - 1, return_counts=True)
    found = dict(zip(map(int, values), map(int, counts), strict=True))
    return tuple((e, found.get(e, 0)) for e in range(min(found), max(found) + 1))


def _count_codes(codes: npt.NDArray[np.int8]) -> tuple[tuple[int, int], ...]:
    values, counts = np.unique(codes.astype(np.int8), return_counts=True)
    found = dict(zip(map(int, values), map(int, counts), strict=True))
    return tuple((code, found.get(code, 0)) for code in range(-7, 8))


def weight_plot(histogram: Histogram) -> Markup:
    """Original weights as bars, decoded weights as ticks, on a logarithmic count axis (tails matter)."""
    top = math.log10(1 + max(max(histogram.original), max(histogram.decoded), 1))
    width = 100.0 / len(histogram.original)
    parts = []
    pairs = zip(histogram.original, histogram.decoded, strict=True)
    for i, (original, decoded) in enumerate(pairs):
        title = (
            f"{histogram.edges[i]:.4g} to {histogram.edges[i + 1]:.4g}: "
            f"{original:,} original, {decoded:,} decoded"
        )
        for kind, count, thick in (("original", original, None), ("decoded", decoded, 2.0)):
            tall = _HEIGHT * math.log10(1 + count) / top
            if count:
                parts.append(box(kind, i * width, _HEIGHT - tall, 0.9 * width, thick or tall, title))
    limit = histogram.edges[-1]
    parts += [
        base_line(_HEIGHT),
        _tick(0, f"−{limit:.3g}", "start"),
        _tick(50, "0"),
        _tick(100, f"{limit:.3g}", "end"),
    ]
    title = f"Weights of {histogram.name}, original and decoded"
    return picture(
        "".join(parts), _HEIGHT + 18, "bars", title, f"From −{limit:.3g} to {limit:.3g}, logarithmic counts"
    )


def count_plot(counts: Sequence[tuple[int, int]], what: str, name: str, *, powers: bool = False) -> Markup:
    """Bars of (value, count); ``powers`` writes the values as powers of two."""
    top = max(max((count for _, count in counts), default=0), 1)
    total = max(sum(count for _, count in counts), 1)
    width = 100.0 / max(len(counts), 1)
    every = 1 + len(counts) // 16
    parts, words = [], []
    for i, (value, count) in enumerate(counts):
        tall = _HEIGHT * count / top
        share = f"{f'2^{value}' if powers else value}: {count:,} ({100.0 * count / total:.1f}%)"
        if count:
            parts.append(box("original", (i + 0.1) * width, _HEIGHT - tall, 0.8 * width, tall, share))
        words.append(share)
        if i % every == 0:
            parts.append(_tick((i + 0.5) * width, f"{value}".replace("-", "−")))
    parts.append(base_line(_HEIGHT))
    return picture("".join(parts), _HEIGHT + 18, "bars", f"{what} of {name}", "; ".join(words))


def _tick(x: float, text: str, anchor: str = "middle") -> str:
    return label(x, _HEIGHT + 14, text, anchor)
