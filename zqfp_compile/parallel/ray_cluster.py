"""Work items on a Ray cluster (``--cluster``); a lost worker costs its item's time and nothing else."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Any

from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.parallel.executor import Item, Outcome, Result, attempt

# How often an item is given to another worker when the one that had it is lost.
_RETRIES = 5
_CONNECT_SECONDS = 10.0


class RayCluster:
    """An :class:`Executor` on the CPUs of a Ray cluster; use it as a context manager.

    The workers import this package, so it must be installed, in the same version, on every machine.
    """

    def __init__(self, address: str) -> None:
        """Name the cluster: ``auto`` for the one of this machine, or what ``ray start --head`` printed."""
        self._address = address
        self._ray: Any = None

    def as_completed(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """See :meth:`Executor.as_completed`."""
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(attempt)
        # As many again as run are queued: a worker never waits while a result is stored.
        ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        pending: dict[Any, int] = {}
        rest = iter(range(len(items)))
        try:
            for _ in items:
                for index in islice(rest, ahead - len(pending)):
                    pending[remote.remote(work, items[index])] = index
                index, outcome = self._finished(pending)
                yield index, outcome.unwrap()
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)

    def _finished(self, pending: dict[Any, int]) -> tuple[int, Outcome]:
        """Wait for one of the items, and take it out."""
        try:
            (ready,), _ = self._ray.wait(list(pending), num_returns=1)
            index, outcome = pending.pop(ready), self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise MissingDependencyError(
                f"--cluster {self._address}: an item failed on {_RETRIES + 1} workers ({reason}); "
                "look at the cluster with: ray status"
            ) from error
        return index, outcome

    def __enter__(self) -> RayCluster:
        """Connect.

        Raises:
            MissingDependencyError: When Ray is not installed, or there is no such cluster.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError(
                "--cluster: Ray is not installed; run: pip install 'zqfp-compile[cluster]'"
            ) from error
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _check_reachable(self._address)
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MissingDependencyError(
                f"--cluster {self._address}: cannot be reached ({reason}); start one with: ray start --head"
            ) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray's own ends the process without a word
        self._ray = ray
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; the cluster stays."""
        self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Connect to HOST:PORT once; Ray itself tries for minutes. Other forms (``auto``) are left to Ray.

    Raises:
        OSError: When nobody answers.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
