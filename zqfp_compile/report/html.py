"""``report.html``: one self-contained page for people."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jinja2

from zqfp_compile.recipe import Recipe
from zqfp_compile.report.bars import compiled_parts, perplexity_plot, size_plot
from zqfp_compile.report.heat_map import BITS, RANK, SHADES, SQNR, HeatMap, heat_map
from zqfp_compile.report.histograms import Histogram, count_plot, weight_plot
from zqfp_compile.report.model import Report
from zqfp_compile.report.units import FILTERS

WORST_LAYERS = 8
# Passes over a small graph take milliseconds each: steps under this share of the time are one line.
_SHORT_STEP = 0.005


def write_html(report: Report, path: str | Path, histograms: Sequence[Histogram] = ()) -> None:
    """Write the page: no script, no network, works with any part of the report missing.

    Args:
        report: What to print.
        path: File to write.
        histograms: Of the layers worth a closer look, the worst first.

    Raises:
        OSError: When the file cannot be written.
    """
    text = render_html(report, histograms)
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


@functools.cache
def _environment() -> jinja2.Environment:
    """The templates, compiled once for all reports of a process."""
    # Autoescape always: layer names, paths and warnings come from an untrusted model.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zqfp_compile.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(FILTERS)
    return environment


def render_html(report: Report, histograms: Sequence[Histogram] = ()) -> str:
    """Return the page as text."""
    worst = report.worst_layers(WORST_LAYERS)
    total = sum(report.seconds.values())
    defaults = Recipe().to_dict()
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            lint=report.engine.lint if report.engine else None,
            worst=worst,
            shades=range(SHADES),
            sqnr=heat_map(report.layers, SQNR, worst),
            precision=_precision_maps(report),
            perplexity_plot=perplexity_plot(report.perplexity),
            size_plot=size_plot(report.size, report.engine),
            size_parts=compiled_parts(report.size),
            histograms=histograms,
            weight_plot=weight_plot,
            count_plot=count_plot,
            changed={name: value for name, value in report.recipe.items() if value != defaults.get(name)},
            short_steps=[name for name, seconds in report.seconds.items() if seconds < _SHORT_STEP * total],
        )
    )


def _precision_maps(report: Report) -> list[HeatMap]:
    """Bits of every layer that was looked at, and LoRC ranks where they differ from layer to layer."""
    maps = [heat_map(report.layers, BITS)]
    if len({layer.lorc_rank for layer in report.rewritten}) > 1:
        maps.append(heat_map(report.layers, RANK))
    return [found for found in maps if found is not None]
