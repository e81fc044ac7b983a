"""What of a walk outlives its process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zqfp_compile.work_folder import WorkFolder


class KeptWalk:
    """Activations, and per step range and rows, in a work folder.

    Activations are not flushed to the disk, so after a restart of the machine they do not count.
    """

    def __init__(self, work: WorkFolder, key: str) -> None:
        """Take the folder and what the walk depends on besides its key."""
        self._work = work
        self._name = f"walk-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.folder = work.path / self._name

    def keep(self, index: int, peak: float, rows: npt.NDArray[np.float32]) -> None:
        """Keep what a step found."""
        self._work.keep(f"{self._name}-{index}", [np.array(peak), rows])

    def find(self, index: int) -> tuple[float, npt.NDArray[np.float32]]:
        """Return it, as :meth:`step` has said that it is there."""
        found = self._work.find(f"{self._name}-{index}")
        assert found is not None
        return float(found[0]), found[1]

    def state(self, index: int) -> str:
        """Return what names the state after a step, in this life of the machine."""
        return f"{index} {_boot()}"

    def step(self, states: set[str | None]) -> int | None:
        """Return the step that all streams are at; ``None`` when they are not at one, or it is lost."""
        if len(states) != 1 or None in states:
            return None
        index, _, boot = str(*states).partition(" ")
        found = boot == _boot() and all(
            self._work.find(f"{self._name}-{earlier}") is not None for earlier in range(int(index) + 1)
        )
        return int(index) if found else None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
