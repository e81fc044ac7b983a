"""``zqfp-compile --compare``: the comparison of two compiles as tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from zqfp_compile import json_file
from zqfp_compile.progress import PatientConsole
from zqfp_compile.report.run_comparison import Figure, LayerDifference, RunComparison, Unit, compare_runs
from zqfp_compile.report.units import (
    format_bytes,
    format_count,
    format_memory,
    format_number,
    format_option,
    format_seconds,
)

_SHOWN_LAYERS = 10
_LONGEST = 500  # characters of a name or an option
# Unit -> scale and digits of a difference that is not written as percent of A.
_PLAIN_CHANGE: dict[Unit, tuple[int, int]] = {
    "count": (1, 0),
    "dB": (1, 1),
    "percent": (1, 2),
    "share": (100, 2),
}
_WRITE: dict[Unit, Callable[[float | None], str]] = {
    "count": lambda value: format_count(None if value is None else round(value)),
    "number": lambda value: format_number(value) if value is None else f"{value:,.5g}",
    "bytes": format_bytes,
    "memory": format_memory,
    "seconds": format_seconds,
    "dB": lambda value: format_number(value, 1, " dB"),
    "percent": lambda value: format_number(value, 2, "%"),
    "share": lambda value: format_number(None if value is None else 100 * value, 2, "%"),
}


def compare(a: Path, b: Path, *, json_path: Path | None, every_layer: bool, quiet: bool) -> None:
    """Compare two compiled folders and print what differs.

    Raises:
        UsageError: When a folder or its report is not there.
        ModelError: When a report cannot be read or has another form.
        MissingDependencyError: When the JSON file cannot be written.
    """
    json_file.check_folder(json_path)
    found = compare_runs(a, b)
    json_file.write(found.to_dict(), json_path)
    if not quiet:
        _print(found, every_layer)


def _print(found: RunComparison, every_layer: bool) -> None:
    console = PatientConsole(highlight=False, soft_wrap=True)
    console.print(f"A  {_plain(found.a)}\nB  {_plain(found.b)}")
    for warning in found.warnings:
        console.print(f"warning: {_plain(warning)}", style="yellow")
    if found.options:
        table = _table("Option", "A", "B")
        for option in found.options:
            values = (_plain(format_option(value)) for value in (option.a, option.b))
            table.add_row(f"--{_plain(option.name.replace('_', '-'))}", *values)
        console.print(table)
    else:
        console.print("The options are the same.")
    table = _table("", ">A", ">B", ">change")
    for figure in found.figures:
        write = _WRITE[figure.unit]
        table.add_row(_plain(figure.name), write(figure.a), write(figure.b), _change(figure))
    console.print(table)
    if found.layers:
        console.print("SQNR of each layer's output, the largest change first:")
        shown = found.layers if every_layer else found.layers[:_SHOWN_LAYERS]
        console.print(_layers(shown))
    else:
        console.print("No layer differs.")
    _print_rest(console, found, every_layer)


def _print_rest(console: PatientConsole, found: RunComparison, every_layer: bool) -> None:
    hidden = 0 if every_layer else max(0, len(found.layers) - _SHOWN_LAYERS)
    if hidden:
        console.print(f"Layers that differ less: {hidden}; -v shows them.", style="dim")
    if found.layers and found.equal_layers:
        console.print(f"Layers that are the same in both: {found.equal_layers}.", style="dim")


def _layers(layers: tuple[LayerDifference, ...]) -> Table:
    table = _table("Layer", "Precision", ">A, dB", ">B, dB", ">change")
    for layer in layers:
        change = "–" if layer.change is None else f"{layer.change:+.1f}"
        numbers = (format_number(value, 1) for value in (layer.sqnr_a, layer.sqnr_b))
        precision = layer.a if layer.a == layer.b else f"{layer.a} → {layer.b}"
        table.add_row(_plain(layer.name), _plain(precision), *numbers, change)
    return table


def _table(*heads: str) -> Table:
    """Make an empty table; a head that starts with ``>`` is a column of numbers."""
    table = Table()
    for head in heads:
        number = head.startswith(">")
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(head.lstrip(">"), justify=justify, no_wrap=number, overflow="fold")
    return table


def _change(figure: Figure) -> str:
    """How B differs from A: percent of A, or the plain difference where the numbers are ratios already."""
    if figure.a is None or figure.b is None:
        return "–"
    if figure.a == figure.b:
        return "="
    if figure.unit in _PLAIN_CHANGE:
        scale, digits = _PLAIN_CHANGE[figure.unit]
        return f"{scale * (figure.b - figure.a):+.{digits}f}"
    return f"{100 * (figure.b / figure.a - 1):+.1f}%" if figure.a > 0 else "–"


def _plain(text: Any) -> str:
    """Make text from a file safe for a terminal: no control characters, no markup, no end in sight."""
    shown = str(text)[:_LONGEST]
    return escape("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in shown))
