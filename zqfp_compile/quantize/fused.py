"""Triton forms of the column loops of GPTQ and coordinate descent, for 4-bit grids on a CUDA device.

A block of columns is a chain of dependent steps, but rows are independent of each other: one kernel walks the
columns with a few rows' values in registers. As a loop of torch calls each step is eight kernel launches
(measured on one H200, 2026-11-22: 93 s of launches to quantise SmolLM2-135M).
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from zqfp_compile.quantize.grid import Grid

# Rows a program walks. One H200, N = 2048, K = 4096, with 8, 16 and 32 of them: GPTQ 4.7, 4.8 and 6.0 ms,
# descent 9.4, 9.9 and 8.3, the search of scales 6.6, 7.3 and 14.8.
_ROUNDED, _DESCENDED, _SEARCHED = 16, 32, 16
# Groups that the search of scales does in one launch; those after them then see the changes in one product.
_SPAN = 4
# Groups whose errors a program measures.
_GROUPS = 256
# Columns of a group whose block of the gram matrix fits into a program's registers.
_WIDEST = 64
# Threads of several devices launch, and at first compile, one at a time.
_launching = threading.Lock()


def usable(grid: Grid, block: torch.Tensor) -> bool:
    """Return whether the kernels can do this block: a CUDA device with Triton, and a grid of level tables."""
    return block.is_cuda and grid.table is not None and _kernels() is not None


def groups(grid: Grid, columns: torch.Tensor) -> torch.Tensor:
    """Return the group of each column, int32 [B]."""
    size = grid.group_size
    found = torch.div(columns, size, rounding_mode="floor") if size else torch.zeros_like(columns)
    return found.to(torch.int32)


def round_block(
    block: torch.Tensor, inner: torch.Tensor, groups: torch.Tensor, grid: Grid, rounded: torch.Tensor
) -> torch.Tensor:
    """GPTQ's inner loop over one block: :func:`zqfp_compile.quantize.gptq.gptq_round`.

    Args:
        block: What is left of the block's columns, float32 [B, N]; not changed.
        inner: The block's part of the inverse's upper Cholesky factor, float32 [B, B], rows anywhere.
        groups: Group of each column, int32 [B].
        grid: Its levels.
        rounded: Takes the rounded columns, float32 [B, N].

    Returns:
        The errors over the factor's diagonal, float32 [B, N].
    """
    scaled = torch.empty_like(block)
    with _launching:
        _kernels()["round"][(-(-block.shape[1] // _ROUNDED),)](
            *(block, inner, inner.stride(0), grid.table, groups, rounded, scaled),
            *(*_sizes(block, grid), _ROUNDED),
        )
    return scaled


def descend_block(
    values: torch.Tensor, slope: torch.Tensor, inner: torch.Tensor, groups: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """The inner loop of :func:`zqfp_compile.quantize.descent.descend` over one block.

    Args:
        values: The block's grid values, float32 [B, N]; they change.
        slope: ``G (T - Q)`` in the block, float32 [B, N]; not changed.
        inner: The block of the gram matrix, float32 [B, B], rows anywhere.
        groups: Group of each column, int32 [B].
        grid: Its levels.

    Returns:
        The changes of the values, float32 [B, N].
    """
    changes = torch.empty_like(values)
    with _launching:
        _kernels()["descend"][(-(-values.shape[1] // _DESCENDED),)](
            *(values, slope, inner, inner.stride(0), grid.table, groups, changes),
            *(*_sizes(values, grid), _DESCENDED),
        )
    return changes


def searches(values: torch.Tensor, size: int) -> bool:
    """Return whether the kernel of :func:`search_scales` can do groups of so many columns."""
    return values.is_cuda and size <= _WIDEST and _search_kernels() is not None


def search_scales(
    values: torch.Tensor,
    rows: torch.Tensor,
    slope: torch.Tensor,
    gram: torch.Tensor,
    decoded: torch.Tensor,
    choices: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """The search of :func:`zqfp_compile.quantize.descent.refit_scales`, group by group.

    Args:
        values: Code-book values, float32 [N, K], rows anywhere.
        rows: R, float32 [N].
        slope: ``(T - Q) G``, float32 [N, K], rows anywhere; used up.
        gram: G, float32 [K, K], rows anywhere.
        decoded: Q, float32 [N, K], rows anywhere.
        choices: Scales, float32 [K / g, S, N]: what is there, then what to try.
        size: Columns g of a group.

    Returns:
        The best of the scales, float32 [K / g, N].
    """
    n, k = values.shape
    best = torch.empty(len(choices), n, device=values.device)
    change = torch.empty(n, _SPAN * size, device=values.device)
    width = max(16, 1 << (size - 1).bit_length())
    for first in range(0, len(best), _SPAN):
        last = min(first + _SPAN, len(best))
        with _launching:
            _search_kernels()["search"][(-(-n // _SEARCHED),)](
                *(values, rows, slope, gram, decoded, choices, best, change, n, k, first, last),
                *(size, width, choices.shape[1], _SEARCHED),
                *(part.stride(0) for part in (values, slope, gram, decoded, change)),
                num_warps=8,  # with four, its registers spill
                num_stages=1,
            )
        begin, end = first * size, last * size
        if end < k:
            slope[:, end:].addmm_(change, gram[begin:end, end:], alpha=-1)
    return best


def measures(sizes: torch.Tensor) -> bool:
    """Return whether the kernel of :func:`group_errors` can do these."""
    return sizes.is_cuda and _search_kernels() is not None


def group_errors(sizes: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Squared error of every group when its values take the nearest level: ``rtn``'s search in one pass.

    Args:
        sizes: Magnitudes, float32 [g, M].
        levels: Each group's levels, ascending from 0, C times over, float32 [L, C * M].
        importance: Factors on the squared errors, float32 [g, G], G a divisor of M: of group m at m modulo G.

    Returns:
        float32 [C * M].
    """
    (width, number), count = sizes.shape, levels.shape[1]
    errors = torch.empty_like(levels[0])
    factors, period = (sizes, 1) if importance is None else (importance, importance.shape[1])
    with _launching:
        _search_kernels()["errors"][(-(-count // _GROUPS),)](
            *(sizes, levels, factors, errors, count, number, width, period),
            *(len(levels), importance is not None, _GROUPS),
        )
    return errors


def _sizes(block: torch.Tensor, grid: Grid) -> tuple[int, int, int, int]:
    """Return N, B, B rounded up to a power of two, levels."""
    assert grid.table is not None
    columns = len(block)
    return block.shape[1], columns, max(16, 1 << (columns - 1).bit_length()), grid.table.shape[2]


@functools.cache
def _kernels() -> Any:
    """Compile-on-first-use kernels, or ``None`` without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def nearest(x, table, group, row, mask, n, levels: tl.constexpr):  # type: ignore[no-untyped-def]
        start = table + (group.to(tl.int64) * n + row) * levels
        size = tl.abs(x)
        low = tl.load(start, mask=mask, other=0.0)
        best = low
        for level in tl.static_range(1, levels):
            high = tl.load(start + level, mask=mask, other=0.0)
            best = tl.where(size > (low + high) / 2, high, best)
            low = high
        return tl.where(x < 0, -best, best)

    @triton.jit  # type: ignore[untyped-decorator]
    def round_kernel(  # type: ignore[no-untyped-def]
        block,
        inner,
        inner_stride,
        table,
        groups,
        rounded,
        scaled,
        n,
        columns,
        width: tl.constexpr,
        levels: tl.constexpr,
        rows: tl.constexpr,
    ):
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        mask = row < n
        along = tl.arange(0, width)
        both = (along < columns)[:, None] & mask[None, :]
        left = tl.load(block + along[:, None] * n + row[None, :], mask=both, other=0.0)
        for at in range(columns):
            factor = tl.load(inner + at * inner_stride + along, mask=along < columns, other=0.0)
            pivot = tl.load(inner + at * inner_stride + at)
            here = tl.sum(tl.where((along == at)[:, None], left, 0.0), axis=0)
            value = nearest(here, table, tl.load(groups + at), row, mask, n, levels)
            error = (here - value) / pivot
            left -= tl.where(along > at, factor, 0.0)[:, None] * error[None, :]
            tl.store(rounded + at * n + row, value, mask=mask)
            tl.store(scaled + at * n + row, error, mask=mask)

    @triton.jit  # type: ignore[untyped-decorator]
    def descend_kernel(  # type: ignore[no-untyped-def]
        values,
        slope,
        inner,
        inner_stride,
        table,
        groups,
        changes,
        n,
        columns,
        width: tl.constexpr,
        levels: tl.constexpr,
        rows: tl.constexpr,
    ):
        row = tl.program_id(0) * rows + tl.arange(0, rows)
        mask = row < n
        along = tl.arange(0, width)
        both = (along < columns)[:, None] & mask[None, :]
        left = tl.load(slope + along[:, None] * n + row[None, :], mask=both, other=0.0)
        for at in range(columns):
            gram = tl.load(inner + at * inner_stride + along, mask=along < columns, other=0.0)
            pivot = tl.maximum(tl.load(inner + at * inner_stride + at), 1e-30)
            here = tl.sum(tl.where((along == at)[:, None], left, 0.0), axis=0)
            old = tl.load(values + at * n + row, mask=mask, other=0.0)
            change = nearest(old + here / pivot, table, tl.load(groups + at), row, mask, n, levels) - old
            left -= gram[:, None] * change[None, :]
            tl.store(values + at * n + row, old + change, mask=mask)
            tl.store(changes + at * n + row, change, mask=mask)

    return {"round": round_kernel, "descend": descend_kernel}


@functools.cache
def _search_kernels() -> Any:
    """Likewise, those of :func:`search_scales` and :func:`group_errors`."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def search_kernel(  # type: ignore[no-untyped-def]
        values,
        rows,
        slope,
        gram,
        decoded,
        choices,
        best,
        change,
        n,
        k,
        first,
        last,
        size: tl.constexpr,
        width: tl.constexpr,
        tried: tl.constexpr,
        count: tl.constexpr,
        values_stride,
        slope_stride,
        gram_stride,
        decoded_stride,
        change_stride,
    ):
        row = tl.program_id(0).to(tl.int64) * count + tl.arange(0, count)
        along = tl.arange(0, width)
        mask, whole = row < n, along < size
        scale = tl.load(rows + row, mask=mask, other=1.0)
        for index in range(first, last):
            column = index * size + along
            inside = whole & (column < k)
            both = mask[:, None] & inside[None, :]
            pull = tl.load(slope + row[:, None] * slope_stride + column[None, :], mask=both, other=0.0)
            # What the groups before, of this launch, have changed.
            for before in range(first, index):
                moved = tl.load(
                    change + row[:, None] * change_stride + ((before - first) * size + along)[None, :],
                    mask=mask[:, None] & whole[None, :],
                    other=0.0,
                )
                block = tl.load(
                    gram + (before * size + along).to(tl.int64)[:, None] * gram_stride + column[None, :],
                    mask=whole[:, None] & inside[None, :],
                    other=0.0,
                )
                pull -= tl.dot(moved, block, input_precision="ieee")
            value = tl.load(values + row[:, None] * values_stride + column[None, :], mask=both, other=0.0)
            old = tl.load(decoded + row[:, None] * decoded_stride + column[None, :], mask=both, other=0.0)
            weigh = tl.load(
                gram + column.to(tl.int64)[:, None] * gram_stride + column[None, :],
                mask=inside[:, None] & inside[None, :],
                other=0.0,
            )
            lowest = tl.zeros([count], tl.float32)
            chosen = tl.load(choices + index * tried * n + row, mask=mask, other=1.0)
            move = tl.zeros([count, width], tl.float32)
            for at in tl.static_range(1, tried):
                choice = tl.load(choices + (index * tried + at) * n + row, mask=mask, other=1.0)
                # E4M3, as in rounding.round_minifloat.
                x = tl.minimum(tl.maximum(value * choice[:, None], -448.0), 448.0)
                power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                power = tl.maximum(power, 0.015625) * 1572864.0
                moved = ((x + power) - power) * scale[:, None] - old
                product = tl.dot(moved, weigh, input_precision="ieee")
                gain = tl.sum((product - 2 * pull) * moved, axis=1)
                better = gain < lowest
                lowest = tl.where(better, gain, lowest)
                chosen = tl.where(better, choice, chosen)
                move = tl.where(better[:, None], moved, move)
            tl.store(best + index * n + row, chosen, mask=mask)
            place = (index - first) * size + along
            tl.store(change + row[:, None] * change_stride + place[None, :], move, mask=both)
            tl.debug_barrier()  # the program's other threads read it

    @triton.jit  # type: ignore[untyped-decorator]
    def errors_kernel(  # type: ignore[no-untyped-def]
        sizes,
        levels,
        importance,
        errors,
        count,
        number,
        width,
        period,
        steps: tl.constexpr,
        weighed: tl.constexpr,
        groups: tl.constexpr,
    ):
        group = tl.program_id(0) * groups + tl.arange(0, groups)
        mask = group < count
        total = tl.zeros([groups], tl.float32)
        for at in range(width):
            size = tl.load(sizes + at * number + group % number, mask=mask, other=0.0)
            distance = size  # level 0 is zero
            for level in tl.static_range(1, steps):
                high = tl.load(levels + level * count + group, mask=mask, other=0.0)
                distance = tl.minimum(distance, tl.abs(size - high))
            error = distance * distance
            if weighed:
                error *= tl.load(importance + at * period + group % period, mask=mask, other=0.0)
            total += error
        tl.store(errors + group, total, mask=mask)

    return {"search": search_kernel, "errors": errors_kernel}
