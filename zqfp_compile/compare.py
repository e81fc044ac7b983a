"""Two models on the same inputs: how far apart their outputs are (``zqfp-validate``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zqfp_compile.backends.runners import EngineRunner, OrtRunner, Runner
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.compare_inputs import make_inputs
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.output_folder import ARTIFACT
from zqfp_compile.progress import Reporter, SilentReporter, StepTimer
from zqfp_compile.report import metrics
from zqfp_compile.specs import FP8

Array = npt.NDArray[Any]

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")


@dataclass(frozen=True)
class Gates:
    """What makes a comparison fail; ``None`` is not checked.

    Attributes:
        min_sqnr: Lowest SQNR in dB of the logits, or of every output when there are no logits.
        min_top1: Lowest top-1 agreement of the logits, percent.
        atol: Absolute tolerance of every element.
        rtol: Tolerance of every element relative to A.
    """

    min_sqnr: float | None = None
    min_top1: float | None = None
    atol: float | None = None
    rtol: float | None = None

    @property
    def elementwise(self) -> bool:
        """Whether elements are checked one by one: ``|b - a| <= atol + rtol * |a|``."""
        return self.atol is not None or self.rtol is not None


@dataclass(frozen=True)
class OutputComparison:
    """One output of A against the same output of B, over all samples.

    Attributes:
        name: Name in A.
        values: Elements compared.
        max_abs_error: Largest |b - a|; infinite where only one of them is finite.
        sqnr_db: ``inf`` for equal outputs.
        cosine: Of the outputs as one vector.
        kl: Mean KL(A || B) per position, nats; logits only.
        top1_agreement: Fraction of positions with the same largest logit; logits only.
        nonfinite: Elements that are NaN or infinite in one model and something else in the other.
        beyond_tolerance: Elements outside ``atol + rtol * |a|``; ``None`` when not asked.
    """

    name: str
    values: int
    max_abs_error: float
    sqnr_db: float
    cosine: float
    kl: float | None
    top1_agreement: float | None
    nonfinite: int
    beyond_tolerance: int | None

    @property
    def equal(self) -> bool:
        """Every element is the same."""
        return self.max_abs_error == 0 and self.nonfinite == 0


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare_models`.

    Attributes:
        a: Path of the reference.
        b: Path of the other.
        inputs: What they ran on, for a reader.
        samples: Runs of each.
        outputs: One entry per common output.
        warnings: What a reader must know, such as outputs only one model has.
        failures: Gates that did not hold, one sentence each.
        seconds: Wall time per step.
    """

    a: str
    b: str
    inputs: str
    samples: int
    outputs: tuple[OutputComparison, ...]
    warnings: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; NaN and infinities become ``None`` (see ``equal`` for an infinite SQNR)."""
        rows = []
        for output in self.outputs:
            row = {key: _finite(value) for key, value in vars(output).items()}
            rows.append({**row, "equal": output.equal})
        return {
            "schema_version": 1,
            "a": self.a,
            "b": self.b,
            "inputs": self.inputs,
            "samples": self.samples,
            "outputs": rows,
            "warnings": list(self.warnings),
            "failures": list(self.failures),
            "seconds": self.seconds,
        }


def compare_models(
    a: Path,
    b: Path,
    *,
    inputs: Path | None = None,
    text: Path | None = None,
    samples: int = 4,
    length: int = 128,
    seed: int = 0,
    gates: Gates | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Run A and B on the same inputs and compare every output both have.

    Args:
        a: The reference: an ONNX file, a compiled folder, or an engine.
        b: The other one, likewise.
        inputs: ``.npz`` with an array per input; else token windows of a text are used.
        text: UTF-8 text; ``None`` takes built-in text.
        samples: Number of runs.
        length: Tokens per run.
        seed: Seed of the random tokens used when neither model has a tokenizer beside it.
        gates: What to hold the result against; ``failures`` says what did not hold.
        reporter: Told about progress.

    Raises:
        UsageError: When a path or the inputs cannot be used.
        ModelError: When a model cannot be run, or the two have no output in common.
        MissingDependencyError: When the runtime or the GPU one of them needs is not there.
    """
    gates = gates or Gates()
    timer = StepTimer(reporter or SilentReporter())
    with timer.step("load"):
        runner_a, runner_b = open_runner(a), open_runner(b)
    with timer.step("inputs"):
        made = make_inputs(runner_a, runner_b, inputs, text, samples, length, seed)
    pairs, unmatched = _match_outputs(runner_a, runner_b)
    pairs, unscaled = _drop_unscaled(runner_a, runner_b, pairs)
    logits = _logits_name(runner_a)
    if gates.min_top1 is not None and logits not in pairs:
        raise UsageError(f"--min-top1: {a} and {b} have no logits output in common; use --min-sqnr")
    totals = {name: _Total(name, gates, is_logits=name == logits) for name in pairs}
    with timer.step("compare"):
        for done, (feed_a, feed_b) in enumerate(zip(made.feeds_a, made.feeds_b, strict=True)):
            timer.reporter.update(done, len(made.feeds_a))
            out_a, out_b = runner_a.run(feed_a), runner_b.run(feed_b)
            for name, other in pairs.items():
                totals[name].add(*_same_units(runner_a, runner_b, name, other, out_a[name], out_b[other]))
    outputs = tuple(total.result() for total in totals.values())
    return Comparison(
        a=str(a),
        b=str(b),
        inputs=made.description,
        samples=len(made.feeds_a),
        outputs=outputs,
        warnings=(*made.warnings, *unmatched, *unscaled),
        failures=tuple(_failures(outputs, gates, logits)),
        seconds=timer.seconds,
    )


def open_runner(path: Path) -> Runner:
    """Load what ``path`` names: an ONNX file, a compiled folder (its ``model.zqfp.onnx``), or an engine.

    Raises:
        UsageError: When there is nothing of the kind.
        ModelError: When it cannot be loaded.
        MissingDependencyError: When its runtime or GPU is not there.
    """
    if path.is_dir():
        if not (path / ARTIFACT).is_file():
            raise UsageError(f"{path}: no {ARTIFACT} in this folder; give a compiled folder or a model file")
        path = path / ARTIFACT
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give an ONNX model, a compiled folder or an engine")
    if path.suffix in ENGINE_SUFFIXES:
        return EngineRunner(path)
    return OrtRunner(path)


def _logits_name(runner: Runner) -> str | None:
    try:
        return CausalLm.from_inputs(runner.inputs, runner.outputs).logits
    except UsageError:
        return next((spec.name for spec in runner.outputs if spec.name == "logits"), None)


def _match_outputs(a: Runner, b: Runner) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return A's output names with B's, and a warning per output that only one has."""
    names_a, names_b = ([spec.name for spec in runner.outputs] for runner in (a, b))
    pairs = {name: name for name in names_a if name in names_b}
    logits_a, logits_b = _logits_name(a), _logits_name(b)
    if logits_a and logits_b and logits_a not in pairs and logits_b not in pairs.values():
        pairs = {logits_a: logits_b, **pairs}
    if not pairs:
        raise ModelError(
            f"no output in common: {a.path} has {_listing(names_a)}, {b.path} has {_listing(names_b)}; "
            "compare two forms of the same model"
        )
    warnings = []
    for runner, names, matched in ((a, names_a, pairs.keys()), (b, names_b, pairs.values())):
        extra = [name for name in names if name not in matched]
        if extra:
            warnings.append(f"not compared, only in {runner.path}: {_listing(extra)}")
    return pairs, tuple(warnings)


def _drop_unscaled(a: Runner, b: Runner, pairs: dict[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Leave out what is FP8 in one model only, by a scale that nobody knows; one warning for all."""
    types_a, types_b = ({spec.name: spec.dtype for spec in runner.outputs} for runner in (a, b))
    dropped = [
        name
        for name, other in pairs.items()
        if types_a[name] != types_b[other]
        and any(
            types[key] in FP8 and key not in runner.scales
            for types, key, runner in ((types_a, name, a), (types_b, other, b))
        )
    ]
    warnings = (f"not compared, FP8 by a scale only the .onnx knows: {_listing(dropped)}",) if dropped else ()
    return {name: other for name, other in pairs.items() if name not in dropped}, warnings


def _same_units(
    a: Runner, b: Runner, name: str, other: str, value_a: Array, value_b: Array
) -> tuple[Array, Array]:
    """Return both outputs as numbers; two of one type are compared as they are."""
    if value_a.dtype == value_b.dtype:
        return value_a, value_b
    scale_a, scale_b = a.scales.get(name), b.scales.get(other)
    return (
        value_a if scale_a is None else value_a.astype(np.float32) * np.float32(scale_a),
        value_b if scale_b is None else value_b.astype(np.float32) * np.float32(scale_b),
    )


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class _Total:
    """Sums over samples, in float64, from which one output's figures are computed."""

    def __init__(self, name: str, gates: Gates, *, is_logits: bool) -> None:
        self._name = name
        self._gates = gates
        self._is_logits = is_logits
        self._values = self._nonfinite = self._beyond = self._positions = 0
        self._signal = self._noise = self._dot = self._other = self._kl = self._agree = 0.0
        self._max_error = 0.0

    def add(self, a: Array, b: Array) -> None:
        """Take in one sample.

        Raises:
            ModelError: When the shapes differ.
        """
        if a.shape != b.shape:
            raise ModelError(
                f"output {self._name}: A gives {list(a.shape)}, B gives {list(b.shape)} on the same input; "
                "they are not two forms of the same model"
            )
        if self._is_logits and a.size:
            self._add_logits(a, b)
        exact, other = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        finite = np.isfinite(exact) & np.isfinite(other)
        same = (exact == other) | (np.isnan(exact) & np.isnan(other))
        odd = ~finite & ~same
        exact[~finite] = other[~finite] = 0.0
        error = np.abs(other - exact)
        self._values += exact.size
        self._nonfinite += int(odd.sum())
        self._signal += float(exact @ exact)
        self._other += float(other @ other)
        self._dot += float(exact @ other)
        self._noise += float(error @ error)
        self._max_error = max(self._max_error, float(error.max(initial=0.0)))
        if self._gates.elementwise:
            limit = (self._gates.atol or 0.0) + (self._gates.rtol or 0.0) * np.abs(exact)
            self._beyond += int((odd | (error > limit)).sum())

    def _add_logits(self, a: Array, b: Array) -> None:
        rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        with np.errstate(invalid="ignore", over="ignore"):
            self._kl += float(metrics.kl_divergence(rows_a, rows_b).sum())
        self._agree += metrics.top1_agreement(rows_a, rows_b) * len(rows_a)
        self._positions += len(rows_a)

    def result(self) -> OutputComparison:
        """Return the figures of all samples so far."""
        norms = math.sqrt(self._signal) * math.sqrt(self._other)
        # Both zero is a perfect match, one zero is none.
        cosine = min(1.0, self._dot / norms) if norms > 0 else float(self._signal == self._other)
        return OutputComparison(
            name=self._name,
            values=self._values,
            max_abs_error=math.inf if self._nonfinite else self._max_error,
            sqnr_db=math.nan if self._nonfinite else metrics.ratio_db(self._signal, self._noise),
            cosine=math.nan if self._nonfinite else cosine,
            kl=self._kl / self._positions if self._positions else None,
            top1_agreement=self._agree / self._positions if self._positions else None,
            nonfinite=self._nonfinite,
            beyond_tolerance=self._beyond if self._gates.elementwise else None,
        )


def _failures(outputs: Sequence[OutputComparison], gates: Gates, logits: str | None) -> Iterator[str]:
    """Say which gates do not hold. Comparisons are written so that NaN fails."""
    for output in outputs:
        if output.nonfinite:
            count = f"{output.nonfinite} of {output.values}"
            yield f"{output.name}: {count} values are NaN or infinite in one model only"
        if output.beyond_tolerance:
            yield f"{output.name}: {output.beyond_tolerance} of {output.values} values beyond the tolerance"
    found = [output for output in outputs if output.name == logits]
    for output in found or outputs:
        if gates.min_sqnr is not None and not output.sqnr_db >= gates.min_sqnr:
            limit = f"--min-sqnr {gates.min_sqnr:g} dB"
            yield f"{output.name}: SQNR {output.sqnr_db:.1f} dB is below {limit}"
    for output in found:
        percent = 100.0 * (output.top1_agreement or 0.0)
        if gates.min_top1 is not None and not percent >= gates.min_top1:
            yield f"{output.name}: top-1 agreement {percent:.1f}% is below --min-top1 {gates.min_top1:g}%"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
