"""Activation statistics of one model: largest magnitudes, and sample rows for the per-layer checks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.calibrate.block_runs import PICK, BlockRuns, Measured, Progress
from zqfp_compile.calibrate.blocks import cut_into_blocks
from zqfp_compile.errors import UsageError
from zqfp_compile.plan import LinearSite
from zqfp_compile.work_folder import WorkFolder

Float32 = npt.NDArray[np.float32]

_FORMAT_MAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
# The attention of a 7B layer has 134 MB in float16, its feed-forward 270. ONNX Runtime holds them in float32.
BLOCK_BYTES = 1 << 27


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
    sites: Sequence[LinearSite] = (),
    block_bytes: int = BLOCK_BYTES,
    rows_per_activation: int = 64,
    seed: int = 0,
    work: WorkFolder | None = None,
    progress: Progress = lambda done, total, detail: None,
) -> CalibrationResult:
    """Run ``model`` in ONNX Runtime and measure activations.

    The measuring happens in a copy of the graph: a maximum and a few rows leave the session, never a whole
    activation, and everything that no activation needs (lm_head, cache outputs) is cut off first. The rest is
    cut into blocks (``blocks.py``): each runs all samples before the next one is opened, so that memory holds
    the weights of one.

    Args:
        model: The model; external data stays where it is.
        activations: Names of float values [..., K].
        feeds: Inputs of each run.
        sites: Planned linears, in graph order, to cut the graph at; without any it runs in one piece.
        block_bytes: Weights of a block's linears, see :func:`cut_into_blocks`.
        rows_per_activation: Rows kept per activation over all runs (each run gives the same number).
        seed: Seed of the choice of rows.
        work: Where finished runs of a block are kept, and found again; its key covers model and feeds.
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
    blocks = cut_into_blocks(model, sites, names, block_bytes)
    random = np.random.default_rng(seed)
    per_run = -(-rows_per_activation // len(feeds))
    # Below 1 by enough that float32 rounding never reaches the row after the last.
    picks = [np.sort(random.uniform(0.0, 0.999, per_run)).astype(np.float32) for _ in feeds]
    runs = BlockRuns(model, names, blocks, work, repr((rows_per_activation, seed, names)))
    # In one file: reading what each run of a block has kept takes a second at 7B.
    whole = f"{runs.prefix}-whole"
    found = None if work is None else work.find(whole)
    if found is None:
        inputs = [{**feed, PICK: pick} for feed, pick in zip(feeds, picks, strict=True)]
        found = _all_runs(runs.run(inputs, progress), names)
        if work is not None:
            work.keep(whole, found)
    tokens = sum(int(feed["input_ids"].size) for feed in feeds if "input_ids" in feed)
    return CalibrationResult(
        {name: float(peak) for name, peak in zip(names, found[::3], strict=True)},
        dict(zip(names, found[1::3], strict=True)),
        dict(zip(names, found[2::3], strict=True)),
        tokens,
        time.perf_counter() - begin,
    )


def _all_runs(found: Mapping[str, Sequence[Measured]], names: Sequence[str]) -> list[npt.NDArray[Any]]:
    """Return range, rows and energies of every activation over all runs."""
    arrays: list[npt.NDArray[Any]] = []
    for name in names:
        arrays.append(np.array(max(measured.peak for measured in found[name])))
        arrays.append(np.concatenate([measured.rows for measured in found[name]]))
        arrays.append(_total_energy(found[name]))
    return arrays


def _total_energy(runs: Sequence[Measured]) -> npt.NDArray[np.float64]:
    total = np.zeros_like(runs[0].energy, np.float64)
    for run in runs:  # the graph divides by the peak: squares of large activations would leave float32
        total += run.energy.astype(np.float64) * run.peak**2
    return total


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
