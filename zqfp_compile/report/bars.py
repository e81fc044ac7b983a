"""Horizontal bars: a few quantities of one unit, each with its label and number above it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from zqfp_compile.report.model import EngineReport, Perplexity, SizeReport
from zqfp_compile.report.svg import box, label, picture
from zqfp_compile.report.units import format_bytes, format_number

_ROW_PX, _TEXT_PX, _BAR_PX = 42, 13, 14
_THINNEST = 0.3  # percent: what is there can be seen


@dataclass(frozen=True)
class Part:
    """One stretch of a bar: its CSS class, what it is, and how much."""

    kind: str
    name: str
    value: float


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, its number as text, and the parts it consists of."""

    name: str
    text: str
    parts: tuple[Part, ...]


def bar_plot(title: str, bars: Sequence[Bar]) -> Markup:
    """Draw bars on one scale that starts at zero."""
    longest = max(sum(part.value for part in bar.parts) for bar in bars) or 1.0
    content = []
    for i, bar in enumerate(bars):
        top, x = i * _ROW_PX, 0.0
        content += [label(0, top + _TEXT_PX, bar.name, "start"), label(100, top + _TEXT_PX, bar.text, "end")]
        for part in bar.parts:
            width = max(_THINNEST, 100.0 * part.value / longest)
            content.append(box(part.kind, x, top + 20, width, _BAR_PX, f"{bar.name}: {part.name}"))
            x += width
    words = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    return picture("".join(content), _ROW_PX * len(bars), "quantities", title, words)


def perplexity_plot(found: Perplexity | None) -> Markup | None:
    """Original against compiled; ``None`` when one of them was not measured."""
    if found is None:
        return None
    bars = [
        Bar(name, format_number(value, 3), (Part(name.lower(), format_number(value, 3), value),))
        for name, value in (("Original", found.original), ("Compiled", found.compiled))
        if value is not None and math.isfinite(value) and value > 0
    ]
    if len(bars) < 2:
        return None
    return bar_plot("Perplexity before and after, lower is better", bars)


def size_plot(size: SizeReport, engine: EngineReport | None) -> Markup | None:
    """Bytes before and after, the compiled model by what it holds; ``None`` when nothing was measured."""
    bars = []
    if size.original_fp16_bytes:
        bars.append(_one_part("Original, 16 bits", "original", size.original_fp16_bytes))
    if size.compiled_bytes:
        bars.append(Bar("Compiled", format_bytes(size.compiled_bytes), compiled_parts(size)))
    if engine is not None and engine.bytes:
        bars.append(_one_part("Engine", "engine", engine.bytes))
    return bar_plot("Bytes before and after", bars) if bars else None


def _one_part(name: str, kind: str, size: int) -> Bar:
    return Bar(name, format_bytes(size), (Part(kind, format_bytes(size), size),))


def compiled_parts(size: SizeReport) -> tuple[Part, ...]:
    """What the compiled model's bytes are: one part when that was not measured."""
    total = size.compiled_bytes or 0
    if size.linear_bytes is None or size.lorc_bytes is None:
        return (Part("compiled", format_bytes(total), total),)
    rest = total - size.linear_bytes - size.lorc_bytes
    named = (
        ("compiled", "weights of the rewritten layers", size.linear_bytes),
        ("lorc", "LoRC factors", size.lorc_bytes),
        ("rest", "embeddings, layers left alone, graph", rest),
    )
    return tuple(
        Part(kind, f"{name}, {format_bytes(value)}", value) for kind, name, value in named if value > 0
    )
