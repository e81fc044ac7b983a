"""Activation statistics of one model: largest magnitudes, and sample rows for the per-layer checks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from zqfp_compile.calibrate.sessions import open_model, run_session
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.work_folder import WorkFolder

Progress = Callable[[int, int, str], None]
Float32 = npt.NDArray[np.float32]

_FORMAT_MAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
# Where in a run the sample rows come from: an extra input, fractions of the run's rows.
_PICK = "zqfp_pick"


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration measured.

    Attributes:
        ranges: Largest magnitude per activation over all runs.
        rows: Sample rows per activation, float32 [m, K], spread over all runs.
        energies: Sum of squares of every channel over all rows of all runs, per activation, float64 [K].
        tokens: Tokens that went through the model.
        seconds: Wall time including opening the model.
    """

    ranges: Mapping[str, float]
    rows: Mapping[str, Float32]
    energies: Mapping[str, npt.NDArray[np.float64]]
    tokens: int
    seconds: float


def collect(
    model: ir.Model,
    activations: Sequence[str],
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
    *,
    rows_per_activation: int = 64,
    seed: int = 0,
    work: WorkFolder | None = None,
    progress: Progress = lambda done, total, detail: None,
) -> CalibrationResult:
    """Run ``model`` in ONNX Runtime and measure activations.

    The measuring happens in a copy of the graph: a maximum and a few rows leave the session, never a whole
    activation, and everything that no activation needs (lm_head, cache outputs) is cut off first.

    Args:
        model: The model; external data stays where it is.
        activations: Names of float values [..., K].
        feeds: Inputs of each run.
        rows_per_activation: Rows kept per activation over all runs (each run gives the same number).
        seed: Seed of the choice of rows.
        work: Where finished runs are kept, and found again; its key covers model and feeds.
        progress: Called with (runs done, runs, text).

    Raises:
        ModelError: When an activation is NaN or infinite, or ONNX Runtime cannot run the model.
        UsageError: When there is nothing to run.
        MissingDependencyError: When the disk is full.
    """
    if not feeds:
        raise UsageError("calibration has no samples; pass a longer --calibration text")
    begin = time.perf_counter()
    names = list(dict.fromkeys(activations))
    if not names:
        return CalibrationResult({}, {}, {}, 0, 0.0)
    runs = _Runs(model, names, work, repr((names, rows_per_activation, len(feeds), seed)))
    random = np.random.default_rng(seed)
    per_run = -(-rows_per_activation // len(feeds))
    ranges = dict.fromkeys(names, 0.0)
    rows: dict[str, list[Float32]] = {name: [] for name in names}
    energies: dict[str, npt.NDArray[np.float64]] = {}
    for index, feed in enumerate(feeds):
        progress(index, len(feeds), "calibration runs")
        # Below 1 by enough that float32 rounding never reaches the row after the last.
        pick = np.sort(random.uniform(0.0, 0.999, per_run)).astype(np.float32)
        outputs = runs.outputs(index, {**feed, _PICK: pick})
        for name, peak, sample, energy in zip(names, outputs[::3], outputs[1::3], outputs[2::3], strict=True):
            ranges[name] = max(ranges[name], finite_range(float(peak), name))
            rows[name].append(sample)
            # The graph divides by the peak: squares of large activations would leave float32.
            energies[name] = energies.get(name, 0.0) + energy.astype(np.float64) * float(peak) ** 2
    progress(len(feeds), len(feeds), "calibration runs")
    tokens = sum(int(feed["input_ids"].size) for feed in feeds if "input_ids" in feed)
    stacked = {name: np.concatenate(parts) for name, parts in rows.items()}
    return CalibrationResult(ranges, stacked, energies, tokens, time.perf_counter() - begin)


class _Runs:
    """Runs of a measuring model, which is opened when one is not found finished."""

    def __init__(self, model: ir.Model, names: Sequence[str], work: WorkFolder | None, what: str) -> None:
        self._model, self._names, self._work = model, names, work
        self._prefix = f"calibration-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
        self._session: Any = None

    def outputs(self, index: int, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        name = f"{self._prefix}-{index}"
        found = None if self._work is None else self._work.find(name)
        if found is not None:
            return found
        if self._session is None:
            self._session = open_model(_measuring_model(self._model, self._names))
        wanted = {arg.name for arg in self._session.get_inputs()}
        outputs = run_session(self._session, {key: value for key, value in feed.items() if key in wanted})
        if self._work is not None:
            self._work.keep(name, outputs)
        return outputs


def activation_scale(amax: float, activation_format: str) -> float:
    """Return the static scale ``a`` with which ``x / a`` fills the format: ``amax / max``, a float32 value.

    An activation that was always zero gets 1.0: any positive scale represents it, and engines want > 0.

    Args:
        amax: Largest magnitude seen.
        activation_format: ``e4m3`` (448), ``e5m2`` (57344) or ``int8`` (127).
    """
    scale = np.float32(amax / _FORMAT_MAX[activation_format])
    return float(scale) if scale >= np.finfo(np.float32).tiny else 1.0


def activation_scales(
    ranges: Mapping[str, float], activation_format: str
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the scale per activation, and one warning per activation the calibration never excited."""
    scales = {name: activation_scale(amax, activation_format) for name, amax in ranges.items()}
    dead = [name for name, amax in ranges.items() if amax < np.finfo(np.float32).tiny]
    warnings = tuple(
        f"activation {name} was zero on every calibration sample, its scale is a guess (1.0); "
        "calibrate with text that uses it"
        for name in dead
    )
    return scales, warnings


def _measuring_model(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy whose outputs are, per activation, the largest magnitude, some rows and the energies."""
    copy = model.clone()
    values = {value.name: value for value in _all_values(copy.graph)}
    missing = [name for name in names if name not in values]
    if missing:
        raise ModelError(
            f"the graph has no value {missing[0]!r} to calibrate; compile the original export again"
        )
    graph = copy.graph
    pick = ir.Value(name=_PICK, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["zqfp_rows"]))
    graph.inputs.append(pick)
    graph.outputs.clear()
    for index, name in enumerate(names):
        for kind, value in zip(("max", "rows", "energy"), _measure(graph, values[name], pick), strict=True):
            value.name = f"zqfp_{kind}_{index}"
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)
    RemoveUnusedNodesPass()(copy)
    if uses_bfloat16(copy):
        widen_bfloat16(copy)
    return copy


def _measure(graph: ir.Graph, x: ir.Value, pick: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    def add(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or None)
        # Named here: what the graph would call it may be a name of a subgraph, such as torch's val_7.
        node.outputs[0].name = f"zqfp_measure_{len(graph)}"
        graph.append(node)
        return node.outputs[0]

    as_float = add("Cast", x, to=ir.DataType.FLOAT)
    peak = add("ReduceMax", add("Abs", as_float), keepdims=0)
    flat = add("Flatten", as_float, axis=-1)
    zero = add("Constant", value=ir.tensor(np.zeros(1, np.int64)))
    count = add("Cast", add("Gather", add("Shape", flat), zero), to=ir.DataType.FLOAT)
    rows = add("Cast", add("Mul", pick, count), to=ir.DataType.INT64)
    floor = add("Constant", value=ir.tensor(np.array(np.finfo(np.float32).tiny)))
    relative = add("Div", flat, add("Max", peak, floor))
    energy = add("ReduceSum", add("Mul", relative, relative), zero, keepdims=0)
    return peak, add("Gather", flat, rows), energy


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]


def finite_range(value: float, name: str) -> float:
    """Return an activation's range.

    Raises:
        ModelError: When it is NaN or infinite.
    """
    if not np.isfinite(value):
        raise ModelError(
            f"activation {name} reaches {value} on the calibration samples; "
            "the model overflows before quantisation: export it in float32 or bfloat16"
        )
    return value
