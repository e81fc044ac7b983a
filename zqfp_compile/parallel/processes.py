"""Work items in several processes of this machine, one in each at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import cast

import zqfp_compile
from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.parallel.executor import Item, Outcome, Result

_WORKER = "zqfp_compile.parallel.worker"
# Items keep to one thread each; torch's pages of 2 MiB save a fifth of the time (docs/size.md).
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Processes:
    """An :class:`Executor` of ``jobs`` worker processes; use it as a context manager, which ends them.

    They are ended by SIGKILL, also when the block is left by an exception or this process dies.
    """

    def __init__(self, jobs: int) -> None:
        """Name the number of workers; they start with the first items."""
        self._jobs = jobs
        self._workers: dict[Connection, subprocess.Popen[bytes]] = {}

    def as_completed(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """See :meth:`Executor.as_completed`."""
        try:
            yield from self._as_completed(work, items)
        except BaseException:  # also when nobody takes the rest: what is still worked on must not come later
            self.close()
            raise

    def _as_completed(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        while len(self._workers) < min(self._jobs, len(items)):
            self._start()
        rest = iter(range(len(items)))
        busy: dict[Connection, int] = {}

        def give(channel: Connection) -> None:
            index = next(rest, None)
            if index is not None:
                self._give(channel, (work, items[index]))
                busy[channel] = index

        for channel in self._workers:
            give(channel)
        while busy:
            for channel in cast("list[Connection]", wait(list(busy))):
                index, outcome = busy.pop(channel), self._take(channel)
                give(channel)  # which need not wait while its result is stored
                yield index, outcome.unwrap()

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            here = str(Path(zqfp_compile.__path__[0]).parent)  # a checkout that is not installed
            path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
            self._workers[ours] = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(descriptor)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                pass_fds=(descriptor,),
                start_new_session=True,  # Ctrl-C in the terminal is for the parent
            )

    def _give(self, channel: Connection, message: object) -> None:
        try:
            channel.send(message)
        except ConnectionError as error:
            raise self._lost(channel) from error

    def _take(self, channel: Connection) -> Outcome:
        try:
            outcome: Outcome = channel.recv()
        except (EOFError, ConnectionError) as error:
            raise self._lost(channel) from error
        return outcome

    def _lost(self, channel: Connection) -> MissingDependencyError:
        code = self._workers[channel].wait()
        if code == -signal.SIGKILL:
            return MissingDependencyError(
                "a worker process was killed, most likely by the kernel for lack of memory; "
                "close other programs or lower --jobs"
            )
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return MissingDependencyError(f"a worker process ended ({how}); try --jobs 1")

    def close(self) -> None:
        """End the workers."""
        for channel, process in self._workers.items():
            channel.close()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._workers.values():
            process.wait()
        self._workers.clear()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
