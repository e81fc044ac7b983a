"""Torch on one thread, where its threads would only wait for each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

# Up to this size threads gain nothing and, on a busy machine, wait for each other: 45 ms on one thread, 140
# to 2000 on two (measured on a randomised SVD, 1536 x 576, two cores at a load of 6).
ONE_THREAD_SIZE = 1 << 22


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch's operations to one thread for the duration.

    Small operations gain little from threads and, on a busy machine, spend most of their time waiting for
    each other: measured on two cores, up to 1.5 times as fast when idle, a tenth of the speed when not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_for(matrix: torch.Tensor) -> AbstractContextManager[None]:
    """Keep torch to one thread for the duration when the matrix worked on is small and on the CPU."""
    if matrix.is_cuda or matrix.numel() > ONE_THREAD_SIZE:
        return contextlib.nullcontext()
    return one_torch_thread()
