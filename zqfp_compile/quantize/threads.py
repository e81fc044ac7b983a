"""How the quantisers use a machine's cores: torch on one thread each, several pieces of work at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


@contextlib.contextmanager
def one_torch_thread() -> Iterator[int]:
    """Keep torch's operations to one thread for the duration; yields how many it may have otherwise.

    Small operations gain little from threads and, on a busy machine, spend most of their time waiting for
    each other (measured on two cores: 1.5 times as fast when idle, a tenth of the speed when not).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def run_all(work: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Call ``work(*item)`` for every item, as many at a time as torch has threads, each on one thread.

    The items must not touch each other's results, so that these do not depend on the number of threads.
    """
    items = list(arguments)
    with one_torch_thread() as threads:
        if threads == 1 or len(items) == 1:
            for item in items:
                work(*item)
            return
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            for done in [pool.submit(work, *item) for item in items]:
                done.result()
