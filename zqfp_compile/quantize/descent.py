"""Coordinate descent on a layer's output error: codes, group scales and row scales in turn.

All minimise ``tr((T - Q) G (T - Q)^T)``, T the weight wanted, Q the decoded weight, G the gram matrix of the
input; none of them ever makes it larger.
"""

from __future__ import annotations

import dataclasses

import torch

from zqfp_compile.formats.codebook import CODE_BOOKS
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.scales import legal_scales
from zqfp_compile.quantize import fused
from zqfp_compile.quantize.grid import Grid, decoded, decoded_w8
from zqfp_compile.quantize.quantized_tensors import QuantizedTensors
from zqfp_compile.quantize.rounding import decode_codes, queued, round_minifloat
from zqfp_compile.quantize.rtn import over_blocks

# Columns worked on before their changes go to all others in one matrix product.
BLOCK = 128
# Places among the legal scales that a group's scale may move in one sweep.
STEPS = (-2, -1, 1, 2)
# A row scale may move by this factor at most: its group scales were chosen for the old one.
LARGEST_MOVE = 1.25
_TINY = 1e-30


def descend(target: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Improve rounded values by one sweep of coordinate descent on ``tr((T - Q) G (T - Q)^T)``.

    Every column is set to the grid value nearest to its optimum given all others, so the error never grows
    (QuantEase, arXiv 2309.01885, algorithm 1).

    Args:
        target: T [N, K], float32.
        rounded: Q [N, K], grid values.
        gram: G, float32 [K, K].
        grid: The values allowed.

    Returns:
        The improved values, float32 [N, K].
    """
    values = rounded.t().contiguous()
    slope = gram @ (target.t() - values)
    order = torch.arange(len(values), device=values.device)
    groups = fused.groups(grid, order) if fused.usable(grid, values) else None
    for begin in range(0, len(values), BLOCK):
        end = min(begin + BLOCK, len(values))
        part = slice(begin, end)
        inner = gram[part, part]
        if groups is None:
            changes = _descend_block(values[part], slope[part], inner, order[part], grid)
            values[part] += changes
        else:
            changes = fused.descend_block(values[part], slope[part], inner, groups[part], grid)
        slope[end:].addmm_(gram[end:, part], changes, alpha=-1)
    return values.t()


def _descend_block(
    values: torch.Tensor, slope: torch.Tensor, inner: torch.Tensor, columns: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the changes [B, N] of one block's values, given the slope ``G (T - Q)`` in it."""
    slope, changes = slope.clone(), torch.empty_like(values)
    size = inner.diagonal().clamp_min(_TINY)
    for at, column in enumerate(columns.tolist()):
        changes[at] = grid.nearest(values[at] + slope[at] / size[at], column) - values[at]
        slope.addr_(inner[at], changes[at], alpha=-1)
    return changes


def refit_rows(quantized: QuantizedTensors, target: torch.Tensor, gram: torch.Tensor) -> QuantizedTensors:
    """Fit each row's scale R to the codes in closed form: ``R = (q G t) / (q G q)`` with q the row of w8.

    Rows of one compute group have one R: both products are summed over them.
    Only where R is free (``m2``, ``e4m3``, and ``fp8`` weights); others come back unchanged.
    """
    if quantized.weight_format in CODE_BOOKS and quantized.scale_constraint not in ("m2", "e4m3"):
        return quantized
    w8 = decoded_w8(quantized, target.device)
    weighted = w8 @ gram
    old = quantized.row_scales
    below, above = (
        over_blocks((weighted * other).sum(dim=1), quantized.scale_rows, torch.sum) for other in (w8, target)
    )
    fitted = above / below.clamp_min(_TINY)
    good = (below > 0) & (fitted * LARGEST_MOVE > old) & (fitted < LARGEST_MOVE * old)
    return dataclasses.replace(quantized, row_scales=torch.where(good, fitted, old))


def refit_scales(quantized: QuantizedTensors, target: torch.Tensor, gram: torch.Tensor) -> QuantizedTensors:
    """Move each group's scale to the best of its neighbours, group by group, the codes staying.

    Only ``e4m3`` scales have neighbours close enough to win with unchanged codes, and ``none`` allows any
    number: there the scale is fitted in closed form. Others come back unchanged.
    """
    if quantized.group_scales is None or quantized.scale_constraint not in ("e4m3", "none"):
        return quantized
    device = target.device
    book = CODE_BOOKS[quantized.weight_format]
    values = decode_codes(quantized.codes, book)[:, : quantized.k]
    rows = quantized.row_scales
    # A group after the other, each group's scales one piece.
    old = quantized.group_scales.t().contiguous()
    choices = _choices(old, queued(torch.from_numpy(legal_scales("e4m3", book)), device))
    weight = decoded(quantized, device)
    slope = (target - weight) @ gram
    size = values.shape[1] if quantized.group_size == 0 else quantized.group_size
    if quantized.scale_constraint == "e4m3" and fused.searches(values, size):
        found = fused.search_scales(values, rows, slope, gram, weight, choices, size)
        return dataclasses.replace(quantized, group_scales=found.t().contiguous())
    found = torch.empty_like(old)
    for index in range(len(old)):
        part = slice(index * size, min((index + 1) * size, quantized.k))
        group = _Group(values[:, part], rows, slope[:, part], gram[part, part], weight[:, part])
        if quantized.scale_constraint == "none":
            found[index], change = group.fit(old[index])
        else:
            found[index], change = group.search(choices[index])
        # Nobody looks at the slope of the groups before.
        slope[:, part.stop :].addmm_(change, gram[part, part.stop :], alpha=-1)
    return dataclasses.replace(quantized, group_scales=found.t().contiguous())


def _choices(scales: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return every scale [G, N] and those :data:`STEPS` away in ``table``, float32 [G, 1 + S, N]."""
    steps = queued(torch.tensor(STEPS), scales.device)[:, None]
    places = (torch.searchsorted(table, scales)[:, None] + steps).clamp_(0, len(table) - 1)
    return torch.cat([scales[:, None], table[places]], dim=1)  # what is there first: it wins ties


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """One group of every row: code-book values, slopes, decoded weights [N, g], R [N], G's block [g, g]."""

    values: torch.Tensor
    rows: torch.Tensor
    slope: torch.Tensor
    gram: torch.Tensor
    decoded: torch.Tensor

    def search(self, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best scales [N] among ``choices`` [1 + S, N], and how weights change."""
        moved = round_minifloat(self.values * choices[1:, :, None], E4M3FN) * self.rows[:, None]
        moved -= self.decoded
        gains = ((moved @ self.gram - 2 * self.slope) * moved).sum(dim=2).nan_to_num(0.0)
        best = torch.cat([torch.zeros_like(choices[:1]), gains]).argmin(dim=0)
        changes = torch.cat([torch.zeros_like(self.decoded)[None], moved])
        rows = torch.arange(len(best), device=best.device)
        return choices[best, rows], changes[best, rows]

    def fit(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the optimal real scales [N], positive, and the change of the weights."""
        below = ((self.values @ self.gram) * self.values).sum(dim=1)
        move = (self.values * self.slope).sum(dim=1) / below.clamp_min(_TINY)
        move = torch.where(below > 0, move, 0.0)
        best = torch.where(scales + move > scales / LARGEST_MOVE, scales + move, scales)
        return best, (best - scales)[:, None] * self.values
