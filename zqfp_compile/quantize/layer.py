"""One linear layer's weight, quantised by the chosen algorithm with its low-rank compensation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch

from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.quantize.descent import descend, refit_rows, refit_scales
from zqfp_compile.quantize.gptq import gptq_round
from zqfp_compile.quantize.grid import WeightGrid, decoded
from zqfp_compile.quantize.lorc import LowRank, low_rank_factors
from zqfp_compile.quantize.moments import DAMPING, InputMoments
from zqfp_compile.quantize.quantized_tensors import QuantizedTensors, joined
from zqfp_compile.quantize.rtn import check_finite, quantize_tensors
from zqfp_compile.quantize.threads import DeviceThreads, one_torch_thread, threads_for

Algorithm = Literal["rtn", "gptq"]

# From so many weights on rows are rounded in two halves, which two devices do at once: those of 7B.
HALVED_SIZE = 1 << 24

# Rows of a layer: its index, and which.
Piece = tuple[int, slice]


@dataclass(frozen=True)
class LayerOptions:
    """How to quantise one layer.

    Attributes:
        algorithm: ``rtn`` (nearest, needs no data) or ``gptq``.
        weight_format: ``e2m1``, ``e3m0``, ``int4`` or ``fp8``.
        group_size: Weights along K per group scale.
        scale_constraint: ``none``, ``m1``, ``m2`` or ``e4m3``.
        scale_rows: Rows that share one row scale (``m2`` only).
        lorc_rank: Rank of the compensation; 0 for none.
        lorc_dtype: Storage of its factors (:data:`zqfp_compile.quantize.lorc.FACTOR_DTYPES`).
        repeats: Times that quantisation is repeated on the weight less its compensation.
        sweeps: Sweeps of coordinate descent after GPTQ.
        correction: Share of the correction for what earlier layers' errors did to the input, 0 to 1.
        correction_damping: Damping of that correction, a share of the mean energy of the channels.
        damping: GPTQ's damping.
        importance: What an error in an input channel counts in GPTQ's choice of scales: the same everywhere,
            the channel's energy, or the part of its energy that other channels do not predict.
    """

    algorithm: Algorithm = "gptq"
    weight_format: str = "e2m1"
    group_size: int = 64
    scale_constraint: str = "e4m3"
    scale_rows: int = 1
    lorc_rank: int = 0
    lorc_dtype: str = "float16"
    repeats: int = 1
    sweeps: int = 1
    correction: float = 1.0
    correction_damping: float = 0.3
    damping: float = DAMPING
    importance: Literal["none", "energy", "conditional"] = "conditional"

    @property
    def rounds(self) -> int:
        """How many times the compensation is computed."""
        return self.repeats + 1 if self.lorc_rank else 0


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A quantised weight, where it was computed, and its compensation."""

    tensors: QuantizedTensors
    lorc: LowRank | None

    @cached_property
    def weight(self) -> QuantizedWeight:
        """The weight, checked and on the host."""
        return self.tensors.checked()

    def effective_weight(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return W_hat, float32 [N, K], without the compensation."""
        return decoded(self.tensors, device)


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A layer to quantise.

    Attributes:
        weight: W [N, K], any float dtype.
        options: What to do.
        seed: Of LoRC's range finder.
        name: The layer, for errors.
    """

    weight: torch.Tensor
    options: LayerOptions
    seed: int = 0
    name: str = "weight"


def work_items(tasks: Sequence[LayerTask]) -> list[list[Piece]]:
    """Return the rows that are rounded at once, whoever does it.

    Rows do not depend on each other. So layers with the same options, such as Q, K and V, are one matrix,
    their rows one below the other: its columns are walked once, with a third of the launches. It is cut in
    the middle when it is large. Layers whose rows share row scales stay alone.
    """
    stacks: dict[tuple[LayerOptions, int], list[int]] = {}
    for index, task in enumerate(tasks):
        alone = index if task.options.scale_rows > 1 else -1
        stacks.setdefault((task.options, alone), []).append(index)
    return [item for stack in stacks.values() for item in _halves(tasks, stack)]


def _halves(tasks: Sequence[LayerTask], stack: Sequence[int]) -> list[list[Piece]]:
    ends = list(accumulate((len(tasks[index].weight) for index in stack), initial=0))
    rows, block = ends[-1], tasks[stack[0]].options.scale_rows
    cut = rows // 2 // block * block
    large = rows * tasks[stack[0]].weight.shape[1] >= HALVED_SIZE and cut
    halves = []
    for begin, end in pairwise([0, cut, rows] if large else [0, rows]):
        pieces = [
            (index, slice(max(begin, first) - first, min(end, last) - first))
            for index, (first, last) in zip(stack, pairwise(ends), strict=True)
            if max(begin, first) < min(end, last)
        ]
        halves.append(pieces)
    return halves


def quantize_layer(
    weight: torch.Tensor,
    options: LayerOptions,
    *,
    moments: InputMoments | None = None,
    energy: torch.Tensor | None = None,
    seed: int = 0,
    name: str = "weight",
) -> QuantizedLayer:
    """Quantise W[N, K] where the moments are, or where it is.

    Args:
        weight: [N, K], any float dtype.
        options: What to do.
        moments: Second moments of the input; GPTQ needs them, LoRC weighs the error with them. With a cross
            moment the weight is first moved to ``W* = W C G^-1``, the weight that best turns the quantised
            model's input into the original model's output.
        energy: Mean square of every input channel [K], for LoRC without moments.
        seed: Of LoRC's range finder.
        name: The layer, for errors.

    Raises:
        ModelError: When the weight holds NaN, infinity or values beyond 2^126.
        ValueError: When GPTQ has no moments.
    """
    task = LayerTask(weight.detach(), options, seed, name)
    threads = DeviceThreads([str(weight.device if moments is None else moments.gram.device)])
    (layer,) = quantize_layers([task], threads, moments=moments, energy=energy)
    return layer


def quantize_layers(
    tasks: Sequence[LayerTask],
    threads: DeviceThreads,
    *,
    moments: InputMoments | None = None,
    energy: torch.Tensor | None = None,
) -> list[QuantizedLayer]:
    """Quantise layers of one input on several devices, each as :func:`quantize_layer` does.

    The devices share the rows (:func:`work_items`). A layer's compensation, which needs all of its error, is
    one device's work. How many devices there are changes no bit; the layers beside a layer may change the
    last ones, when they are rounded together.

    Args:
        tasks: The layers, weights on any device.
        threads: Who works; the first device gets the results.
        moments: See :func:`quantize_layer`.
        energy: Likewise.

    Raises:
        ModelError: See :func:`quantize_layer`.
        ValueError: Likewise.
    """
    for task in tasks:
        if task.options.algorithm == "gptq" and moments is None:
            raise ValueError(f"{task.name}: GPTQ needs the input's second moments")
        check_finite(task.weight, task.name)
    if not tasks:
        return []
    # Several threads leave the number of torch's own alone, which is one setting for all.
    alone = one_torch_thread() if len(threads.devices) > 1 else threads_for(tasks[0].weight)
    with alone:
        return _Layers(tasks, threads, moments, energy).quantize()


class _Layers:
    """Working state of :func:`quantize_layers`."""

    def __init__(
        self,
        tasks: Sequence[LayerTask],
        threads: DeviceThreads,
        moments: InputMoments | None,
        energy: torch.Tensor | None,
    ) -> None:
        self._tasks = tasks
        self._threads = threads
        self._moments = [None if moments is None else moments.on(device) for device in threads.devices]
        self._energy = energy
        self._low_rank: list[LowRank | None] = [None] * len(tasks)

    def quantize(self) -> list[QuantizedLayer]:
        parts = list(self._threads.map(self._begin, work_items(self._tasks)))
        for repeat in range(max(task.options.rounds for task in self._tasks)):
            wanted = [index for index, task in enumerate(self._tasks) if repeat < task.options.rounds]
            if repeat:
                list(self._threads.map(self._again, [(part, repeat) for part in parts]))
            errors = [(repeat, index, [part for part in parts if index in part.places]) for index in wanted]
            for index, found in zip(wanted, self._threads.map(self._compensate, errors), strict=True):
                self._low_rank[index] = found
        rows = [
            [part.quantized.rows(part.places[index]) for part in parts if index in part.places]
            for index in range(len(self._tasks))
        ]
        return [
            QuantizedLayer(joined(found, self._threads.main), low_rank)
            for found, low_rank in zip(rows, self._low_rank, strict=True)
        ]

    def _begin(self, place: int, pieces: list[Piece]) -> _Part:
        tasks = [self._tasks[index] for index, _ in pieces]
        device = self._threads.devices[place]
        whole = len(pieces) == 1 and pieces[0][1] == slice(0, len(tasks[0].weight))
        # A part is copied in any case: products may round otherwise where a factor is aligned otherwise.
        weight = _stacked(
            [
                task.weight[rows].to(device, torch.float32, copy=not whole)
                for task, (_, rows) in zip(tasks, pieces, strict=True)
            ]
        )
        moments, options = self._moments[place], tasks[0].options
        if moments is not None and options.algorithm == "gptq":
            moments.prepare(options.damping, options.correction_damping)
        target = weight if moments is None else corrected(weight, moments, options)
        part = _Part(pieces, options, moments, target, ", ".join(task.name for task in tasks))
        part.round()
        return part

    def _again(self, _: int, item: tuple[_Part, int]) -> None:
        part, repeat = item
        if repeat < part.options.rounds:
            part.round({index: self._low_rank[index] for index in part.places})

    def _compensate(self, place: int, item: tuple[int, int, list[_Part]]) -> LowRank:
        repeat, index, parts = item
        task, moments = self._tasks[index], self._moments[place]
        found = low_rank_factors(
            _stacked([part.error(index).to(self._threads.devices[place]) for part in parts]),
            task.options.lorc_rank,
            moment=self._energy if moments is None else moments.gram,
            dtype=task.options.lorc_dtype,
            seed=task.seed + repeat,
        )
        return found.to(self._threads.main)


@dataclass(eq=False)
class _Part:
    """Rows of some layers on one device, one below the other, while they are quantised.

    Attributes:
        pieces: Which.
        options: What to do.
        moments: On the device.
        target: The weight wanted there, float32.
        name: The layers, for errors.
        quantized: The rows as they are now.
    """

    pieces: Sequence[Piece]
    options: LayerOptions
    moments: InputMoments | None
    target: torch.Tensor
    name: str
    quantized: QuantizedTensors = field(init=False)

    @cached_property
    def places(self) -> dict[int, slice]:
        """Where each layer's rows are in this part."""
        ends = accumulate((rows.stop - rows.start for _, rows in self.pieces), initial=0)
        return {index: slice(*span) for (index, _), span in zip(self.pieces, pairwise(ends), strict=True)}

    def round(self, low_rank: Mapping[int, LowRank | None] | None = None) -> None:
        """Quantise the target, less what the layers' compensations add."""
        target = self.target
        if low_rank is not None:
            found = [(low_rank[index], rows) for index, rows in self.pieces]
            added = [each.to(target.device).weight(rows) for each, rows in found if each is not None]
            target = target - _stacked(added)
        self.quantized = _quantize(target, self.options, self.moments, self.name)

    def error(self, index: int) -> torch.Tensor:
        """Return what a layer's quantised rows lack."""
        rows = self.places[index]
        return self.target[rows] - decoded(self.quantized.rows(rows), self.target.device)


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def corrected(weight: torch.Tensor, moments: InputMoments, options: LayerOptions) -> torch.Tensor:
    """Return ``W* = W + share * W (C - G) (G + damping)^-1``, float32 [N, K]; W without a cross moment.

    W* minimises ``E |W x - W* x_hat|^2``: it undoes what is linear in the errors that earlier layers left in
    x_hat (GPTAQ, arXiv 2504.02692, solves the same problem column by column).
    """
    if moments.drift is None or not options.correction:
        return weight
    factor = moments.correction_factor(options.correction_damping)
    move = torch.cholesky_solve((weight @ moments.drift).t(), factor).t()
    return weight + options.correction * move


def _quantize(
    target: torch.Tensor, options: LayerOptions, moments: InputMoments | None, name: str
) -> QuantizedTensors:
    if options.algorithm == "rtn":
        moments = None  # LoRC alone weighs with them
    importance = None
    if moments is not None and options.importance == "energy":
        importance = moments.energy
    elif moments is not None and options.importance == "conditional":
        importance = moments.conditional_energy(options.damping)
    start = quantize_tensors(
        target,
        weight_format=options.weight_format,
        group_size=options.group_size,
        scale_constraint=options.scale_constraint,
        scale_rows=options.scale_rows,
        name=name,
        importance=importance,
    )
    if moments is None:
        return start
    grid = WeightGrid(start, target.device)
    quantized = grid.encode(gptq_round(target, moments, grid, damping=options.damping))
    gram = moments.damped_gram(options.damping)
    for _ in range(options.sweeps):
        quantized = refit_rows(refit_scales(quantized, target, gram), target, gram)
        grid = WeightGrid(quantized, target.device)
        values = decoded(quantized, target.device)
        quantized = grid.encode(descend(target, values, gram, grid))
    return quantized
