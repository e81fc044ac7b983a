"""Memory of this machine and of this process with its workers, as Linux counts it."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_SECONDS = 0.1
_M_MMAP_THRESHOLD = -3
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a process and its descendants.

    Attributes:
        anonymous: Bytes that are no file's; the rest of ``resident``, mapped weights mostly, is a cache that
            the kernel drops when somebody needs the room.
        resident: Bytes in memory; what two processes share counts twice.
    """

    anonymous: int = 0
    resident: int = 0


def memory_use() -> MemoryUse:
    """Return what this process and its descendants use now; zeros where there is no ``/proc``."""
    anonymous = resident = 0
    for process in _family("self"):
        with suppress(OSError):
            for line in (process / "status").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("RssAnon:"):
                    anonymous += 1024 * int(line.split()[1])
                elif line.startswith("VmRSS:"):
                    resident += 1024 * int(line.split()[1])
    return MemoryUse(anonymous, resident)


def _family(process: str) -> Iterator[Path]:
    folder = Path("/proc") / process
    yield folder
    with suppress(OSError):
        for task in (folder / "task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _family(child)


def available_memory() -> int | None:
    """Return the bytes that can still be allocated here, if known.

    The least of what the machine, its control group and the process's limits (``ulimit -v``, ``-d``) leave.
    """
    limits = []
    with suppress(OSError, ValueError, IndexError):
        limits += _kilobytes(Path("/proc/meminfo"), "MemAvailable:")
    for kind, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            with suppress(OSError, ValueError, IndexError):
                limits += [max(0, most - size) for size in _kilobytes(Path("/proc/self/status"), field)]
    with suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        used = next(int(line.split()[1]) for line in stat if line.startswith("anon "))
        limits.append(limit - used)
    return min(limits, default=None)


def _kilobytes(path: Path, field: str) -> list[int]:
    """Return the bytes that a file of /proc gives for ``field``, if it does."""
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return [1024 * int(line.split()[1]) for line in lines if line.startswith(field)]


def return_large_blocks() -> None:
    """Let glibc give freed blocks of 4 MiB and more back to the system at once, from now on.

    Left alone it keeps those below 32 MiB, and the activations of a large model, of many sizes, leave holes:
    calibrating 1.44e9 weights took 2.3 GB for one run, now 0.9, and as much for three. The page faults cost a
    quarter of the calibration's processor time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)


class MemoryWatch:
    """Context manager that looks ten times a second, in a thread, at how much memory the run uses."""

    def __init__(self, step: Callable[[], str]) -> None:
        """Take a function that names the step now running, or returns an empty text."""
        self._step = step
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self.peak = MemoryUse()
        self.by_step: dict[str, int] = {}  # most anonymous bytes

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            now, step = memory_use(), self._step()
            self.peak = MemoryUse(
                max(self.peak.anonymous, now.anonymous), max(self.peak.resident, now.resident)
            )
            if step:
                self.by_step[step] = max(self.by_step.get(step, 0), now.anonymous)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
