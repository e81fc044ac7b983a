"""Who does the work items: what the user asked for, or what pays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from zqfp_compile.errors import UsageError
from zqfp_compile.estimate import job_bytes
from zqfp_compile.memory import available_memory
from zqfp_compile.parallel.executor import Executor, InProcess
from zqfp_compile.parallel.processes import Processes

# Below so many weights in all, starting processes (2 s of a core each) costs more than they save.
WORTH_PROCESSES = 1 << 28


@dataclass(frozen=True)
class Workers:
    """Who is to work.

    Attributes:
        jobs: Number of processes; ``None``: one per core for large models, else none but this one.
        cluster: Address of a Ray cluster, or ``None``.

    Raises:
        UsageError: When both are given, or fewer than one job.
    """

    jobs: int | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs: {self.jobs} is below 1")
        if self.jobs is not None and self.cluster is not None:
            raise UsageError("--jobs are processes of this machine, --cluster works on others; drop one")

    def processes(self, sizes: Sequence[int]) -> int:
        """Return how many processes work on weights of these sizes; 1 is this process alone."""
        if self.jobs is not None:
            return min(self.jobs, max(1, len(sizes)))
        if sum(sizes) < WORTH_PROCESSES:
            return 1
        available = available_memory()
        fit = cores() if available is None else available // job_bytes(max(sizes))
        return max(1, min(cores(), fit))

    @contextmanager
    def executor(self, sizes: Sequence[int]) -> Iterator[Executor]:
        """Provide the executor for weights of these sizes.

        Raises:
            MissingDependencyError: When there is no such cluster.
        """
        if self.cluster is not None:
            from zqfp_compile.parallel.ray_cluster import RayCluster

            with RayCluster(self.cluster) as ray:
                yield ray
            return
        count = self.processes(sizes)
        if count == 1:
            yield InProcess()
            return
        with Processes(count) as processes:
            yield processes


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
