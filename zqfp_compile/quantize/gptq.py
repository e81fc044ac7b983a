"""GPTQ: weights rounded column by column, each column's error pushed into the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323), with activation order and fixed scales.
"""

from __future__ import annotations

import torch

from zqfp_compile.quantize import fused
from zqfp_compile.quantize.grid import Grid
from zqfp_compile.quantize.moments import DAMPING, InputMoments

# Columns worked on before their errors go to all later ones in one matrix product.
BLOCK = 128


def gptq_round(
    weight: torch.Tensor, moments: InputMoments, grid: Grid, *, damping: float = DAMPING
) -> torch.Tensor:
    """Round W[N, K] so that the layer's output, not the weight, stays close.

    Minimises ``tr((W - Q) G (W - Q)^T)`` greedily, G the damped gram matrix of the input: columns are taken
    loudest first; each is rounded, and its error is compensated by the columns not yet rounded.

    Args:
        weight: [N, K], float32, on the moments' device.
        moments: Of the layer's input.
        grid: The values allowed.
        damping: Share of G's mean diagonal added to its diagonal.

    Returns:
        The rounded values, float32 [N, K].
    """
    factor, order = moments.inverse_factor(damping)
    # Columns of W as rows: each step then works on contiguous memory.
    work = weight.float()[:, order].t().contiguous()
    result = torch.empty_like(work)
    groups = fused.groups(grid, order) if fused.usable(grid, work) else None
    for begin in range(0, len(work), BLOCK):
        end = min(begin + BLOCK, len(work))
        part = slice(begin, end)
        inner = factor[part, part]
        if groups is None:
            result[part], scaled = _round_block(work[part], inner, order[part], grid)
        else:
            scaled = fused.round_block(work[part], inner, groups[part], grid, result[part])
        work[end:].addmm_(factor[begin:end, end:].t(), scaled, alpha=-1)
    values = torch.empty_like(result)
    values[order] = result
    return values.t()


def _round_block(
    block: torch.Tensor, inner: torch.Tensor, columns: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block's rounded columns and errors over the factor's diagonal; ``block`` is used up."""
    result, scaled = torch.empty_like(block), torch.empty_like(block)
    for at, column in enumerate(columns.tolist()):
        result[at] = grid.nearest(block[at], column)
        scaled[at] = (block[at] - result[at]) / inner[at, at]
        block[at + 1 :].addr_(inner[at, at + 1 :], scaled[at], alpha=-1)
    return result, scaled
