"""Torch forms of the roundings in ``formats``: same results bit for bit (tested), on CPU or CUDA."""

from __future__ import annotations

import torch

from zqfp_compile.formats.codebook import CodeBook
from zqfp_compile.formats.minifloat import MiniFloat


def round_minifloat(x: torch.Tensor, spec: MiniFloat) -> torch.Tensor:
    """Round to the nearest ``spec`` value, ties to even, saturating; float32 of x's shape.

    NaN stays NaN, infinity saturates, -0 becomes +0: :meth:`MiniFloat.round` in torch.
    """
    values = x.to(torch.float32).clamp(-spec.max_value, spec.max_value)
    power = values.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    power.clamp_(min=2.0**spec.min_exponent).mul_(1.5 * 2.0 ** (23 - spec.mantissa_bits))
    return values.add_(power).sub_(power)


def encode_codes(x: torch.Tensor, book: CodeBook) -> torch.Tensor:
    """Round to the nearest code, ties to the even code, saturating; int8 of x's shape.

    :meth:`CodeBook.encode` in torch, except that the code of a NaN is undefined.
    """
    values = x.to(torch.float32)
    levels = queued(torch.tensor(book.magnitudes, dtype=torch.float32), values.device)
    return nearest_level(values.abs(), levels).copysign_(values).to(torch.int8)


def decode_codes(codes: torch.Tensor, book: CodeBook) -> torch.Tensor:
    """Return the float32 values of int8 codes -7..7. :meth:`CodeBook.decode` in torch."""
    half = queued(torch.tensor(book.magnitudes, dtype=torch.float32), codes.device)
    table = torch.cat([-half[1:].flip(0), half])
    return table[codes.to(torch.int64) + 7]


def queued(small: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a small tensor of the host on ``device``, where it arrives in turn: a GPU is not waited for."""
    return small.to(device, non_blocking=True)  # pageable memory: it is free again at once


def nearest_level(sizes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index 0..7 of the nearest level for each size, as float32; a tie goes to the even index.

    Args:
        sizes: float32, non-negative, any shape.
        levels: float32 [8, ...], ascending along the first axis; ``levels[i]`` broadcasts to ``sizes``.
    """
    index = torch.zeros_like(sizes)
    above = torch.empty_like(sizes)
    for low in range(7):
        midpoint = (levels[low] + levels[low + 1]) / 2
        above.copy_(sizes)
        index += above.gt_(midpoint) if low % 2 == 0 else above.ge_(midpoint)
    return index
