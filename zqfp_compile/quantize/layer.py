"""One linear layer's weight, quantised by the chosen algorithm with its low-rank compensation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
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

# From so many weights on a layer is rounded in two halves, which two devices do at once: those of 7B.
HALVED_SIZE = 1 << 24


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

    @property
    def rounds(self) -> int:
        """How many times the compensation is computed."""
        return self.options.repeats + 1 if self.options.lorc_rank else 0

    def halves(self) -> list[slice]:
        """Return the rows that are quantised at once: all, or of a large weight each half."""
        n, k = self.weight.shape
        if n * k < HALVED_SIZE or n < 2 * self.options.scale_rows:
            return [slice(0, n)]
        middle = n // 2 // self.options.scale_rows * self.options.scale_rows
        return [slice(0, middle), slice(middle, n)]


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
    """Quantise layers of one input on several devices: each as :func:`quantize_layer` does, bit for bit.

    Rows are rounded independently of each other, so the devices share a large layer, always cut at the same
    row. Its compensation, which needs all of its error, is one device's work.

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
        halves = [(index, rows) for index, task in enumerate(self._tasks) for rows in task.halves()]
        parts = list(self._threads.map(self._begin, halves))
        for repeat in range(max(task.rounds for task in self._tasks)):
            wanted = [index for index, task in enumerate(self._tasks) if repeat < task.rounds]
            if repeat:
                list(self._threads.map(self._again, [(part, part.index in wanted) for part in parts]))
            mine = [(repeat, index, [part for part in parts if part.index == index]) for index in wanted]
            for (_, index, _), found in zip(mine, self._threads.map(self._compensate, mine), strict=True):
                self._low_rank[index] = found
        rows = [
            [part.quantized for part in parts if part.index == index] for index in range(len(self._tasks))
        ]
        return [
            QuantizedLayer(joined(found, self._threads.main), low_rank)
            for found, low_rank in zip(rows, self._low_rank, strict=True)
        ]

    def _begin(self, place: int, half: tuple[int, slice]) -> _Rows:
        index, rows = half
        task, moments = self._tasks[index], self._moments[place]
        # A half is copied in any case: products may round otherwise where a factor is aligned otherwise.
        weight = task.weight[rows].to(
            self._threads.devices[place], torch.float32, copy=rows != slice(0, len(task.weight))
        )
        target = weight if moments is None else corrected(weight, moments, task.options)
        part = _Rows(index, rows, task, moments, target)
        part.round(None)
        return part

    def _again(self, _: int, item: tuple[_Rows, bool]) -> None:
        part, wanted = item
        if wanted:
            part.round(self._low_rank[part.index])

    def _compensate(self, place: int, item: tuple[int, int, list[_Rows]]) -> LowRank:
        repeat, index, parts = item
        task, moments = self._tasks[index], self._moments[place]
        errors = [part.error().to(self._threads.devices[place]) for part in parts]
        found = low_rank_factors(
            errors[0] if len(errors) == 1 else torch.cat(errors),
            task.options.lorc_rank,
            moment=self._energy if moments is None else moments.gram,
            dtype=task.options.lorc_dtype,
            seed=task.seed + repeat,
        )
        return found.to(self._threads.main)


@dataclass(eq=False)
class _Rows:
    """Some rows of a layer on one device, while they are quantised.

    Attributes:
        index: The layer.
        rows: Which.
        task: What to do.
        moments: On the device.
        target: The weight wanted there, float32.
        quantized: The rows as they are now.
    """

    index: int
    rows: slice
    task: LayerTask
    moments: InputMoments | None
    target: torch.Tensor
    quantized: QuantizedTensors = field(init=False)

    def round(self, low_rank: LowRank | None) -> None:
        """Quantise the target, less what the compensation adds."""
        target = self.target
        if low_rank is not None:
            target = target - low_rank.to(target.device).weight(self.rows)
        self.quantized = _quantize(target, self.task.options, self.moments, self.task.name)

    def error(self) -> torch.Tensor:
        """Return what the quantised rows lack."""
        return self.target - decoded(self.quantized, self.target.device)


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
