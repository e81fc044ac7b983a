"""Pictures of the report as inline SVG.

Drawn by hand instead of by a plotting library: coordinates along x are percentages, so one picture is sharp
and its text readable at every page width, colours are CSS classes that follow the reader's light or dark
scheme, and 210 layers take tens of kilobytes. Every name is escaped here: names come from an untrusted model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from zqfp_compile.report.model import LayerReport

SHADES = 7
WEIGHT_BINS = 61
_OPERATOR = re.compile(r"(MatMul|Gemm)(_\d+)?")
_CELL_PX = 20


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


# --- the heat map


@dataclass(frozen=True)
class HeatRow:
    """One kind of projection over all blocks: label, SVG of its cells, lowest and median SQNR in dB."""

    label: str
    svg: Markup
    low: float
    median: float


@dataclass(frozen=True)
class HeatMap:
    """Per-layer SQNR by block and kind.

    Attributes:
        rows: Kinds in graph order.
        axis: SVG of the block numbers under the cells.
        low: SQNR of the darkest shade's end, dB.
        high: SQNR of the palest shade's end, dB.
        blocks: Whether columns are decoder blocks (else layers in graph order).
    """

    rows: tuple[HeatRow, ...]
    axis: Markup
    low: float
    high: float
    blocks: bool


@dataclass(frozen=True)
class _Place:
    row: tuple[str, str]
    column: int
    layer: LayerReport


def heat_map(layers: Sequence[LayerReport], worst: Sequence[LayerReport]) -> HeatMap | None:
    """Arrange measured layers by block and kind, marking ``worst``; ``None`` without measurements."""
    measured = [layer for layer in layers if layer.sqnr_db is not None and math.isfinite(layer.sqnr_db)]
    if not measured:
        return None
    places, blocks = _places(measured)
    values = [layer.sqnr_db or 0.0 for layer in measured]
    low, high = math.floor(min(values)), math.ceil(max(values))
    columns = range(min(p.column for p in places), max(p.column for p in places) + 1)
    marked = {layer.name for layer in worst}
    labels = _row_labels([place.row for place in places])
    rows = []
    for key, label in labels.items():
        mine = [place for place in places if place.row == key]
        scores = [place.layer.sqnr_db or 0.0 for place in mine]
        svg = _cells(mine, columns, low, high, marked)
        rows.append(HeatRow(label, svg, min(scores), float(np.median(scores))))
    return HeatMap(tuple(rows), _axis(columns), low, high, blocks)


def _places(layers: Sequence[LayerReport]) -> tuple[list[_Place], bool]:
    """Find (row, column) of each layer; names without any block number make one row in graph order."""
    split = [_split_name(layer.name) for layer in layers]
    if not any(block is not None for _, block, _ in split):
        return [_Place(("", "layers in graph order"), i, layer) for i, layer in enumerate(layers)], False
    first = min(block for _, block, _ in split if block is not None)
    places = [
        _Place((prefix, suffix), first if block is None else block, layer)
        for layer, (prefix, block, suffix) in zip(layers, split, strict=True)
    ]
    return places, True


def _split_name(name: str) -> tuple[str, int | None, str]:
    """``model.layers.3.mlp.experts.7.up_proj`` -> (``model.layers``, 3, ``mlp.experts.*.up_proj``)."""
    parts = [part for part in re.split(r"[./]", name) if part]
    if len(parts) > 1 and _OPERATOR.fullmatch(parts[-1]):
        parts.pop()
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal() and len(part) < 5]
    if not numbers:
        return "", None, ".".join(parts) or name
    at = numbers[0]
    rest = ("*" if part.isdecimal() else part for part in parts[at + 1 :])
    return ".".join(parts[:at]), int(parts[at]), ".".join(rest)


def _row_labels(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Give each row the shortest tail of its name that no other row shares."""
    unique = list(dict.fromkeys(keys))
    forms = {key: (key[1].rpartition(".")[2], key[1], f"{key[0]}.*.{key[1]}") for key in unique}
    counts = [Counter(form[i] for form in forms.values()) for i in range(3)]
    return {
        key: next((form[i] for i in range(3) if counts[i][form[i]] == 1), form[2])
        for key, form in forms.items()
    }


def shade(value: float, low: float, high: float) -> int:
    """Return 0 (best) .. SHADES - 1 (worst) of ``value`` between ``low`` and ``high`` dB."""
    if not high > low:
        return 0
    return min(SHADES - 1, max(0, int((high - value) / (high - low) * SHADES)))


def _cells(places: Sequence[_Place], columns: range, low: float, high: float, marked: set[str]) -> Markup:
    """Draw one row. Experts share a cell: it shows the worst of them."""
    by_column: dict[int, list[LayerReport]] = {}
    for place in places:
        by_column.setdefault(place.column, []).append(place.layer)
    width = 100.0 / len(columns)
    parts = []
    for column, layers in sorted(by_column.items()):
        layer = min(layers, key=lambda item: item.sqnr_db or 0.0)
        value = layer.sqnr_db or 0.0
        more = f" (lowest of {len(layers)})" if len(layers) > 1 else ""
        x = (column - columns.start) * width
        mark = " worst" if any(item.name in marked for item in layers) else ""
        parts.append(
            f'<rect class="s{shade(value, low, high)}{mark}" x="{x + 0.06 * width:.3f}%" y="2"'
            f' width="{0.88 * width:.3f}%" height="{_CELL_PX - 4}" rx="2">'
            f"<title>{escape(layer.name)}: {value:.1f} dB{more}</title></rect>"
        )
    return _svg("".join(parts), _CELL_PX, "cells", "SQNR per block")


def _axis(columns: range) -> Markup:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if len(columns) / s <= 10)
    width = 100.0 / len(columns)
    labels = [
        f'<text x="{(column - columns.start + 0.5) * width:.3f}%" y="12">{column}</text>'
        for column in columns
        if column % step == 0
    ]
    return _svg("".join(labels), 16, "axis", "block number")


# --- histograms


def weight_plot(histogram: Histogram) -> Markup:
    """Original weights as bars, decoded weights as ticks, on a logarithmic count axis (tails matter)."""
    top = math.log10(1 + max(max(histogram.original), max(histogram.decoded), 1))
    width = 100.0 / len(histogram.original)
    height = 96
    parts = []
    pairs = zip(histogram.original, histogram.decoded, strict=True)
    for i, (original, decoded) in enumerate(pairs):
        title = (
            f"<title>{histogram.edges[i]:.4g} to {histogram.edges[i + 1]:.4g}: "
            f"{original:,} original, {decoded:,} decoded</title>"
        )
        tall = height * math.log10(1 + original) / top
        mark = height * math.log10(1 + decoded) / top
        x = i * width
        if original:
            parts.append(
                f'<rect class="original" x="{x:.3f}%" y="{height - tall:.1f}"'
                f' width="{0.9 * width:.3f}%" height="{tall:.1f}">{title}</rect>'
            )
        if decoded:
            parts.append(
                f'<rect class="decoded" x="{x:.3f}%" y="{height - mark:.1f}"'
                f' width="{0.9 * width:.3f}%" height="2">{title}</rect>'
            )
    parts.append(f'<line x1="0" x2="100%" y1="{height}" y2="{height}"/>')
    limit = histogram.edges[-1]
    parts.append(_label(0, height, f"−{limit:.3g}", "start"))
    parts.append(_label(50, height, "0", "middle"))
    parts.append(_label(100, height, f"{limit:.3g}", "end"))
    return _svg("".join(parts), height + 18, "bars", f"weights of {histogram.name}, original and decoded")


def count_plot(counts: Sequence[tuple[int, int]], what: str, name: str, *, powers: bool = False) -> Markup:
    """Bars of (value, count); ``powers`` writes the values as powers of two."""
    height = 96
    top = max(max((count for _, count in counts), default=0), 1)
    total = max(sum(count for _, count in counts), 1)
    width = 100.0 / max(len(counts), 1)
    every = 1 + len(counts) // 16
    parts = []
    for i, (value, count) in enumerate(counts):
        tall = height * count / top
        label = f"2^{value}" if powers else f"{value}"
        parts.append(
            f'<rect class="original" x="{(i + 0.1) * width:.3f}%" y="{height - tall:.1f}"'
            f' width="{0.8 * width:.3f}%" height="{tall:.1f}">'
            f"<title>{label}: {count:,} ({100.0 * count / total:.1f}%)</title></rect>"
        )
        if i % every == 0:
            parts.append(_label((i + 0.5) * width, height, f"{value}".replace("-", "−"), "middle"))
    parts.append(f'<line x1="0" x2="100%" y1="{height}" y2="{height}"/>')
    return _svg("".join(parts), height + 18, "bars", f"{what} of {name}")


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.3f}%" y="{y + 14}" style="text-anchor:{anchor}">{escape(text)}</text>'


def _svg(content: str, height: int, kind: str, title: str) -> Markup:
    """Wrap ``content``, which holds numbers and escaped names only."""
    label = escape(title)
    return Markup(
        f'<svg class="{kind}" width="100%" height="{height}" role="img" aria-label="{label}">{content}</svg>'
    )
