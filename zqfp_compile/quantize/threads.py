"""Torch on one thread, where its threads would only wait for each other; several side by side; devices."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

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
    return one_torch_thread() if _is_small(matrix) else contextlib.nullcontext()


def side_by_side(
    work: Callable[[_Item], _Result], items: Sequence[_Item], matrices: Sequence[torch.Tensor]
) -> list[_Result]:
    """Return ``[work(item) for item in items]``, on as many cores as torch may use when that helps.

    Small matrices keep to one torch thread each (:func:`threads_for`), so several fit beside each other:
    torch lets other Python threads run while it computes. Large ones and a GPU are used up by one at a time.
    Every item is computed in the same way either way.

    Args:
        work: Computes one item; may run in another thread.
        items: Whatever it takes.
        matrices: The matrix that each item works on.
    """
    workers = min(len(items), torch.get_num_threads())
    if workers < 2 or not all(map(_is_small, matrices)):
        return [work(item) for item in items]
    return list(in_threads(work, items, workers))


def in_threads(work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int) -> Iterator[_Result]:
    """Yield ``work(item)`` for each item in order, done in ``workers`` threads with one torch thread each."""
    # The number of threads is one setting for all: nobody changes it while they run.
    with one_torch_thread(), ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(work, items)
        finally:  # after an error, or a signal, what has not begun is left
            pool.shutdown(wait=False, cancel_futures=True)


class DeviceThreads:
    """Does work items on devices side by side, with one thread for each of several.

    Item i goes to device i modulo their number. Who computes an item changes no bit of it as long as the
    devices are alike and the work depends on nothing but the item; so no result depends on how many devices
    there are. Use it as a context manager when there are several.
    """

    def __init__(self, devices: Sequence[str] = ("cpu",)) -> None:
        """Take torch devices, such as ``cuda:0``; a name may come twice."""
        self.devices = tuple(devices)
        self._pools = [ThreadPoolExecutor(1) for _ in devices] if len(self.devices) > 1 else []
        if self._pools and self.on_gpu:
            # Torch loads its GPU linear algebra at the first call, which must not be two threads' at once.
            torch.linalg.cholesky(torch.eye(2, device=self.main))

    @property
    def main(self) -> str:
        """The device that has what is not spread."""
        return self.devices[0]

    @property
    def on_gpu(self) -> bool:
        """Whether they are GPUs."""
        return torch.device(self.main).type == "cuda"

    def map(
        self, work: Callable[[int, _Item], _Result], items: Sequence[_Item], *, waits: bool = True
    ) -> Iterator[_Result]:
        """Yield ``work(place, item)`` for each item in order, ``place`` being its device's in ``devices``.

        One device computes an item when its result is asked for; several begin at once.

        Args:
            work: What to do.
            items: With what.
            waits: Whether the work waits for its device. What only queues work on GPUs this thread does for
                all: several would wait for each other at every launch, the interpreter being one.
        """
        mode = torch.is_inference_mode_enabled()
        places = [index % len(self.devices) for index in range(len(items))]
        if not self._pools or not waits:
            yield from (self._do(work, place, item, mode) for place, item in zip(places, items, strict=True))
            return
        futures = deque(
            self._pools[place].submit(self._do, work, place, item, mode)
            for place, item in zip(places, items, strict=True)
        )
        try:
            while futures:
                yield futures.popleft().result()  # and nobody keeps it
        finally:  # after an error what has not begun is left
            for future in futures:
                future.cancel()
            wait(futures)

    def _do(self, work: Callable[[int, _Item], _Result], place: int, item: _Item, mode: bool) -> _Result:
        device = torch.device(self.devices[place])
        # Triton's kernels run on the current device, which every thread has its own of; so is inference mode.
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        inference = torch.inference_mode() if mode else contextlib.nullcontext()
        with inference, current:
            return work(place, item)

    def __enter__(self) -> DeviceThreads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


def _is_small(matrix: torch.Tensor) -> bool:
    return not matrix.is_cuda and matrix.numel() <= ONE_THREAD_SIZE
