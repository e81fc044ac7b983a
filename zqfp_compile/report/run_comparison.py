"""Two compiles by their reports: which options, figures and layers differ (``zqfp-compile --compare``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zqfp_compile.report.stored import StoredLayer, StoredReport

Unit = Literal["count", "number", "bytes", "memory", "seconds", "dB", "percent", "share"]

# What is compared: name, unit, where it is in report.json.
_FIGURES: tuple[tuple[str, Unit, tuple[str, ...]], ...] = (
    ("bits per weight", "number", ("bits_per_weight",)),
    ("bits per weight with LoRC", "number", ("bits_per_weight_with_lorc",)),
    ("size", "bytes", ("size", "compiled_bytes")),
    ("size of the engine", "bytes", ("engine", "bytes")),
    ("perplexity, original", "number", ("perplexity", "original")),
    ("perplexity, compiled", "number", ("perplexity", "compiled")),
    ("perplexity increase", "percent", ("perplexity", "increase_percent")),
    ("logits SQNR", "dB", ("logits", "sqnr_db")),
    ("logits cosine", "number", ("logits", "cosine")),
    ("logits KL, nats", "number", ("logits", "kl")),
    ("top-1 agreement", "share", ("logits", "top1_agreement")),
    ("FP8 linears in the engine", "count", ("engine", "fp8_linears")),
    ("certificate mismatches", "count", ("certificate", "mismatches")),
    ("peak memory", "memory", ("peak_rss_bytes",)),
    ("files made", "bytes", ("resources", "disk_bytes")),
)
# A step is a figure of its own when it took this share of a run's time.
_LONG_STEP = 0.1


@dataclass(frozen=True)
class OptionDifference:
    """An option with another value: as in the recipe, ``None`` where a report does not have it."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Figure:
    """One number of both runs; ``None`` where it was not measured."""

    name: str
    unit: Unit
    a: float | None
    b: float | None


@dataclass(frozen=True)
class LayerDifference:
    """One layer that both runs list.

    Attributes:
        name: Layer name.
        a: Weight format and LoRC rank in A (``e2m1 r16``), ``float`` when it was left alone.
        b: The same in B.
        sqnr_a: SQNR of its output in A, dB; ``None``: not measured.
        sqnr_b: In B.
    """

    name: str
    a: str
    b: str
    sqnr_a: float | None
    sqnr_b: float | None

    @property
    def change(self) -> float | None:
        """By how many dB the layer is better in B."""
        return None if self.sqnr_a is None or self.sqnr_b is None else self.sqnr_b - self.sqnr_a


@dataclass(frozen=True)
class RunComparison:
    """What differs between the compiles A and B.

    Attributes:
        a: Folder of A.
        b: Folder of B.
        options: Options with another value, in the recipe's order.
        figures: Numbers that at least one of them has.
        layers: Layers whose SQNR or precision differs, the largest change of SQNR first.
        equal_layers: Layers that differ in neither.
        warnings: What makes the numbers hard to compare.
    """

    a: Path
    b: Path
    options: tuple[OptionDifference, ...]
    figures: tuple[Figure, ...]
    layers: tuple[LayerDifference, ...]
    equal_layers: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        plain = dataclasses.asdict(self)
        layers = [{**dataclasses.asdict(layer), "change": layer.change} for layer in self.layers]
        return {"schema_version": 1, **plain, "a": str(self.a), "b": str(self.b), "layers": layers}


def compare_runs(a: Path, b: Path) -> RunComparison:
    """Compare two compiled folders by their ``report.json``.

    Raises:
        UsageError: When a folder or its report is not there.
        ModelError: When a report cannot be read or has another form.
    """
    first, second = StoredReport.of(a), StoredReport.of(b)
    layers, equal_layers = _layers(first, second)
    return RunComparison(
        a,
        b,
        options=tuple(_options(first, second)),
        figures=tuple(item for item in _figures(first, second) if (item.a, item.b) != (None, None)),
        layers=layers,
        equal_layers=equal_layers,
        warnings=tuple(_warnings(first, second)),
    )


def _options(a: StoredReport, b: StoredReport) -> Iterator[OptionDifference]:
    for name in dict.fromkeys((*a.recipe, *b.recipe)):
        if a.recipe.get(name) != b.recipe.get(name):
            yield OptionDifference(name, a.recipe.get(name), b.recipe.get(name))


def _figures(a: StoredReport, b: StoredReport) -> Iterator[Figure]:
    yield Figure("layers rewritten", "count", _rewritten(a), _rewritten(b))
    for name, unit, keys in _FIGURES:
        yield Figure(name, unit, a.number(*keys), b.number(*keys))
    totals = sum(a.seconds.values()), sum(b.seconds.values())
    yield Figure("time", "seconds", *totals)
    for step in dict.fromkeys((*a.seconds, *b.seconds)):
        took = a.seconds.get(step), b.seconds.get(step)
        if any((value or 0) > _LONG_STEP * total for value, total in zip(took, totals, strict=True)):
            yield Figure(f"time of {step}", "seconds", *took)


def _rewritten(run: StoredReport) -> float:
    return sum(layer.rewritten for layer in run.layers.values())


def _layers(a: StoredReport, b: StoredReport) -> tuple[tuple[LayerDifference, ...], int]:
    """Return the layers that differ, the largest change of SQNR first, and how many do not."""
    common = [
        LayerDifference(
            name, _precision(layer), _precision(b.layers[name]), layer.sqnr_db, b.layers[name].sqnr_db
        )
        for name, layer in a.layers.items()
        if name in b.layers
    ]
    differ = [item for item in common if item.a != item.b or item.sqnr_a != item.sqnr_b]
    differ.sort(key=lambda item: -abs(item.change or 0.0))
    return tuple(differ), len(common) - len(differ)


def _precision(layer: StoredLayer) -> str:
    if not layer.rewritten:
        return "float"
    return f"{layer.weight_format} r{layer.lorc_rank}" if layer.lorc_rank else layer.weight_format


def _warnings(a: StoredReport, b: StoredReport) -> Iterator[str]:
    if a.text("source_sha256") != b.text("source_sha256"):
        yield "the runs compiled different model files"
    scored = [(run.text("perplexity", "text"), run.number("perplexity", "tokens")) for run in (a, b)]
    if None not in (scored[0][0], scored[1][0]) and scored[0] != scored[1]:
        yield "the perplexities are of different texts or numbers of tokens"
    for name, mine, theirs in (("first", a.layers, b.layers), ("second", b.layers, a.layers)):
        alone = [layer for layer in mine if layer not in theirs]
        if alone:
            yield f"{len(alone)} layers are in the {name} run only, such as {alone[0]}"
