"""Numbers as the report prints them; what was not measured is a dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_MISSING = "–"


def format_bytes(value: float | None) -> str:
    """File sizes, decimal: ``144.2 MB``."""
    return _scaled(value, 1000.0, ("B", "kB", "MB", "GB", "TB"))


def format_memory(value: float | None) -> str:
    """Memory, binary: ``1.52 GiB``."""
    return _scaled(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float | None, base: float, units: tuple[str, ...]) -> str:
    if value is None:
        return _MISSING
    power = 0
    # 999.95 would print as 1000.0: move to the next unit where rounding does.
    while value >= base - 0.05 and power < len(units) - 1:
        value /= base
        power += 1
    if power == 0:
        return f"{value:.0f} B"
    digits = 2 if value < 10 else 1
    return f"{value:.{digits}f} {units[power]}"


def format_number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A decimal number with its unit, or a dash when it was not measured."""
    if value is None or not math.isfinite(value):
        return _MISSING
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}{unit}"
    return f"{value:,.{digits}f}{unit}"


def format_seconds(value: float | None) -> str:
    """``0.42 s``, ``37.1 s``, ``4 min 05 s``."""
    if value is None or not math.isfinite(value):
        return _MISSING
    if value < 99.95:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def format_count(value: int | None) -> str:
    """An integer with thousands separators."""
    return _MISSING if value is None else f"{value:,}"


def format_option(value: Any) -> str:
    """One recipe value as a person would type it."""
    if value is None or value in ([], {}, (), ""):
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name}:{format_dims(dims)}" for name, dims in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def format_dims(dims: Sequence[int]) -> str:
    """``1x128``."""
    return "x".join(map(str, dims)) or "scalar"


def format_recipe(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options as a person would type them: (flag without its dashes, value)."""
    return [(name.replace("_", "-"), format_option(value)) for name, value in options.items()]


FILTERS: dict[str, Callable[..., Any]] = {
    "bytes": format_bytes,
    "memory": format_memory,
    "number": format_number,
    "seconds": format_seconds,
    "count": format_count,
    "option": format_option,
    "dims": format_dims,
    "recipe": format_recipe,
}
