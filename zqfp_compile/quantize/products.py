"""Matrix products of factors that need few bits, on hardware that is faster with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def short_products(allowed: bool = True) -> Iterator[None]:
    """Let matrix products of float32 tensors round their factors to bfloat16 or TF32, sums staying float32.

    Factors of at most 8 significant bits (FP8 and INT8 numbers) are the same numbers there: such products
    lose nothing, and are four times as fast on processors with AMX. Others are off by 2^-9 a factor, -50 dB.
    The setting holds for the whole process; it is not for threads that run side by side.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
