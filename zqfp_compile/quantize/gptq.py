"""GPTQ: weights rounded column by column, each column's error pushed into the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with activation order and fixed scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from zqfp_compile.formats.codebook import CODE_BOOKS
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.quantize.moments import DAMPING, InputMoments
from zqfp_compile.quantize.rounding import nearest_level, round_minifloat
from zqfp_compile.quantize.rtn import decoded_levels

# Columns worked on before their errors go to all later ones in one matrix product.
BLOCK = 128

RoundColumn = Callable[[torch.Tensor, int], torch.Tensor]


def gptq_round(
    weight: torch.Tensor, moments: InputMoments, nearest: RoundColumn, *, damping: float = DAMPING
) -> torch.Tensor:
    """Round W[N, K] so that the layer's output, not the weight, stays close.

    Minimises ``tr((W - Q) G (W - Q)^T)`` greedily, G the damped gram matrix of the input: columns are taken
    loudest first; each is rounded, and its error is compensated by the columns not yet rounded.

    Args:
        weight: [N, K], float32, on the moments' device.
        moments: Of the layer's input.
        nearest: ``nearest(column, index)`` returns the values nearest to column ``index`` of W, [N] -> [N].
        damping: Share of G's mean diagonal added to its diagonal.

    Returns:
        The rounded values, float32 [N, K].
    """
    factor, order = moments.inverse_factor(damping)
    # Columns of W as rows: each step then works on contiguous memory.
    work = weight.float()[:, order].t().contiguous()
    result = torch.empty_like(work)
    columns = order.tolist()
    for begin in range(0, len(work), BLOCK):
        end = min(begin + BLOCK, len(work))
        block, scaled = work[begin:end], torch.empty_like(work[begin:end])
        inner = factor[begin:end, begin:end]
        for at in range(end - begin):
            rounded = nearest(block[at], columns[begin + at])
            result[begin + at] = rounded
            scaled[at] = (block[at] - rounded) / inner[at, at]
            block[at + 1 :].addr_(inner[at, at + 1 :], scaled[at], alpha=-1)
        work[end:].addmm_(factor[begin:end, end:].t(), scaled, alpha=-1)
    values = torch.empty_like(result)
    values[order] = result
    return values.t()


def descend(
    target: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor, nearest: RoundColumn
) -> torch.Tensor:
    """Improve rounded values by one sweep of coordinate descent on ``tr((T - Q) G (T - Q)^T)``.

    Every column is set to the grid value nearest to its optimum given all others, so the error never grows
    (QuantEase, arXiv 2309.01885, algorithm 1).

    Args:
        target: T [N, K], float32.
        rounded: Q [N, K], grid values.
        gram: G, float32 [K, K].
        nearest: As in :func:`gptq_round`.

    Returns:
        The improved values, float32 [N, K].
    """
    values = rounded.t().contiguous()
    slope = gram @ (target.t() - values)
    size = gram.diagonal()
    for begin in range(0, len(values), BLOCK):
        end = min(begin + BLOCK, len(values))
        inner, changes = gram[begin:end, begin:end], torch.zeros_like(values[begin:end])
        for at in range(end - begin):
            column = begin + at
            best = values[column] + slope[column] / size[column].clamp_min(1e-30)
            changes[at] = nearest(best, column) - values[column]
            slope[begin:end].addr_(inner[at], changes[at], alpha=-1)
        values[begin:end] += changes
        slope[:begin].addmm_(gram[:begin, begin:end], changes, alpha=-1)
        slope[end:].addmm_(gram[end:, begin:end], changes, alpha=-1)
    return values.t()


class Grid:
    """The values a quantised weight can take when its scales are fixed."""

    def __init__(self, start: QuantizedWeight, device: torch.device | str) -> None:
        """Take the scales of ``start``; its codes do not matter."""
        self._start = start
        self._device = torch.device(device)
        if start.weight_format == "fp8":
            self._rows = torch.from_numpy(start.row_scales).to(device)
            return
        self._levels = decoded_levels(start, self._device)
        # [G, N, 8] and [G, N, 7]: one group's table is contiguous.
        self._table = self._levels.permute(2, 1, 0).contiguous()
        self._middles = ((self._table[..., 1:] + self._table[..., :-1]) / 2).contiguous()

    def nearest(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """Return the grid values nearest to column ``index`` of the weight, [N] -> [N]."""
        if self._start.weight_format == "fp8":
            return round_minifloat(column / self._rows, E4M3FN) * self._rows
        group = index // self._start.group_size if self._start.group_size else 0
        place = torch.searchsorted(self._middles[group], column.abs()[:, None])
        return self._table[group].gather(1, place)[:, 0].copysign_(column)

    def encode(self, values: torch.Tensor) -> QuantizedWeight:
        """Return the quantised weight with the grid values nearest to ``values`` [N, K]."""
        start = self._start
        if start.weight_format == "fp8":
            rounded = round_minifloat(values / self._rows[:, None], E4M3FN).to(torch.float8_e4m3fn)
            codes = rounded.contiguous().view(torch.uint8).cpu().numpy().view(E4M3FN.dtype)
            return dataclasses.replace(start, codes=codes)
        width = start.codes.shape[1]
        padded = torch.nn.functional.pad(values, (0, width - values.shape[1]))
        groups = padded.reshape(len(values), self._levels.shape[2], -1)
        index = nearest_level(groups.abs(), self._levels[..., None]).copysign_(groups)
        return dataclasses.replace(start, codes=index.reshape(padded.shape).to(torch.int8).cpu().numpy())


def refit_rows(quantized: QuantizedWeight, target: torch.Tensor, gram: torch.Tensor) -> QuantizedWeight:
    """Fit each row's scale R to the codes in closed form: ``R = (q G t) / (q G q)`` with q the row of w8.

    Only where R is free (``m2``, ``e4m3``, and ``fp8`` weights); others come back unchanged.
    """
    if quantized.weight_format in CODE_BOOKS and quantized.scale_constraint not in ("m2", "e4m3"):
        return quantized
    w8 = torch.from_numpy(quantized.fp8_weight()).to(target.device)
    weighted = w8 @ gram
    old = torch.from_numpy(quantized.row_scales).to(target.device)
    below = (weighted * w8).sum(dim=1)
    fitted = (weighted * target).sum(dim=1) / below.clamp_min(1e-30)
    good = (below > 0) & (fitted > 0.8 * old) & (fitted < 1.25 * old)
    rows = torch.where(good, fitted, old)
    return dataclasses.replace(quantized, row_scales=rows.cpu().numpy())
