"""Every layer as one cell: decoder blocks across, kinds of projection down, darker where to look."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from zqfp_compile.report.model import LayerReport
from zqfp_compile.report.svg import box, label, picture

SHADES = 7
_OPERATOR = re.compile(r"(MatMul|Gemm)(_\d+)?")
_CELL_PX = 20


@dataclass(frozen=True)
class Measure:
    """What a map shows of a layer.

    Attributes:
        name: What it is, with its unit, for a reader.
        value: The number, or ``None`` where it is not known.
        tell: The number in words.
        low_is_dark: Whether the lowest numbers have the strongest shade.
    """

    name: str
    value: Callable[[LayerReport], float | None]
    tell: Callable[[LayerReport], str]
    low_is_dark: bool = False


def _bits(layer: LayerReport) -> float | None:
    return layer.bits if layer.bits_with_lorc is None else layer.bits_with_lorc


SQNR = Measure("SQNR, dB", lambda item: item.sqnr_db, lambda item: f"{item.sqnr_db:.1f} dB", low_is_dark=True)
BITS = Measure(
    "bits per weight",
    _bits,
    lambda item: f"{_bits(item):.2f} bits, {'float' if item.weight_format == 'none' else item.weight_format}",
)
RANK = Measure(
    "LoRC rank",
    lambda item: float(item.lorc_rank) if item.rewritten else None,
    lambda item: f"rank {item.lorc_rank}",
)


@dataclass(frozen=True)
class HeatRow:
    """One kind of projection over all blocks: label, SVG of its cells, lowest, median and highest number."""

    label: str
    svg: Markup
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class HeatMap:
    """A number per layer by block and kind.

    Attributes:
        measure: What the number is.
        rows: Kinds in graph order.
        axis: SVG of the block numbers under the cells.
        pale: The number at the palest shade's end.
        dark: The number at the strongest shade's end.
        blocks: Whether columns are decoder blocks (else layers in graph order).
    """

    measure: Measure
    rows: tuple[HeatRow, ...]
    axis: Markup
    pale: float
    dark: float
    blocks: bool


@dataclass(frozen=True)
class _Place:
    row: tuple[str, str]
    column: int
    layer: LayerReport
    value: float


def heat_map(
    layers: Sequence[LayerReport], measure: Measure, marked: Sequence[LayerReport] = ()
) -> HeatMap | None:
    """Arrange the layers that have this number by block and kind; ``None`` when no layer has it.

    Args:
        layers: All of them, in graph order, so that rows come in the same order in every map.
        measure: What to show.
        marked: Layers whose cell gets a ring.
    """
    everywhere, blocks = _places(layers, measure)
    places = [place for place in everywhere if math.isfinite(place.value)]
    if not places:
        return None
    values = [place.value for place in places]
    ends = (float(math.floor(min(values))), float(math.ceil(max(values))))
    pale, dark = ends[::-1] if measure.low_is_dark else ends
    columns = range(min(p.column for p in places), max(p.column for p in places) + 1)
    names = {layer.name for layer in marked}
    rows = []
    present = {place.row for place in places}
    for key, title in _row_labels([place.row for place in everywhere if place.row in present]).items():
        mine = [place for place in places if place.row == key]
        scores = [place.value for place in mine]
        low, median, high = min(scores), float(np.median(scores)), max(scores)
        svg = picture(
            "".join(_cells(mine, columns, measure, (pale, dark), names)),
            _CELL_PX,
            "cells",
            f"{title}: {measure.name} {'per block' if blocks else 'per layer'}",
            f"lowest {low:.2f}, median {median:.2f}, highest {high:.2f} of {len(mine)}",
        )
        rows.append(HeatRow(title, svg, low, median, high))
    return HeatMap(measure, tuple(rows), _axis(columns), pale, dark, blocks)


def _number(measure: Measure, layer: LayerReport) -> float:
    value = measure.value(layer)
    return math.nan if value is None else value


def _places(layers: Sequence[LayerReport], measure: Measure) -> tuple[list[_Place], bool]:
    """Find (row, column) of each layer; names without any block number make one row in graph order."""
    split = [_split_name(layer.name) for layer in layers]
    numbers = [block for _, block, _ in split if block is not None]
    if not numbers:
        row = ("", "layers in graph order")
        return [_Place(row, i, layer, _number(measure, layer)) for i, layer in enumerate(layers)], False
    places = [
        _Place((prefix, suffix), min(numbers) if block is None else block, layer, _number(measure, layer))
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


def shade(value: float, pale: float, dark: float) -> int:
    """Return 0 (palest) .. SHADES - 1 (strongest) of ``value`` between the two ends."""
    if pale == dark:
        return 0
    return min(SHADES - 1, max(0, int((value - pale) / (dark - pale) * SHADES)))


def _cells(
    places: Sequence[_Place], columns: range, measure: Measure, ends: tuple[float, float], marked: set[str]
) -> list[str]:
    """Draw one row. Experts share a cell: it shows the one with the strongest shade."""
    by_column: dict[int, list[_Place]] = {}
    for place in places:
        by_column.setdefault(place.column, []).append(place)
    width = 100.0 / len(columns)
    boxes = []
    for column, mine in sorted(by_column.items()):
        shown = (min if measure.low_is_dark else max)(mine, key=lambda place: place.value)
        more = f" ({'lowest' if measure.low_is_dark else 'highest'} of {len(mine)})" if len(mine) > 1 else ""
        ring = " worst" if any(place.layer.name in marked for place in mine) else ""
        boxes.append(
            box(
                f"s{shade(shown.value, *ends)}{ring}",
                (column - columns.start + 0.06) * width,
                2,
                0.88 * width,
                _CELL_PX - 4,
                f"{shown.layer.name}: {measure.tell(shown.layer)}{more}",
                radius=2,
            )
        )
    return boxes


def _axis(columns: range) -> Markup:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if len(columns) / s <= 10)
    width = 100.0 / len(columns)
    content = (
        label((column - columns.start + 0.5) * width, 12, str(column))
        for column in columns
        if column % step == 0
    )
    return picture("".join(content), 16, "axis", "block number", f"{columns.start} to {columns.stop - 1}")
