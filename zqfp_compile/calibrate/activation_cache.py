"""Activations of calibration samples on disk, so that memory holds one sample at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from zqfp_compile.disk import full_disk_errors

Array = npt.NDArray[Any]

# Smaller arrays (shapes, empty caches) are not worth a file, and an empty one cannot be mapped.
_SMALL_BYTES = 1 << 12


class ActivationCache:
    """Arrays by sample and name: one ``.npy`` file each, mapped when read.

    Use it as a context manager; closing removes everything.
    """

    def __init__(self, folder: Path) -> None:
        """Create a private folder in ``folder``, which must exist."""
        self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=folder))
        self._small: dict[tuple[int, str], Array] = {}
        self._files: dict[tuple[int, str], Path] = {}
        self._made = 0

    def put(self, sample: int, name: str, array: Array) -> None:
        """Keep an array.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        key = (sample, name)
        if array.nbytes < _SMALL_BYTES:
            self._small[key] = array
            return
        self._made += 1
        path = self._folder / f"{self._made}.npy"
        with full_disk_errors(path):
            np.save(path, array)
        self._files[key] = path

    def get(self, sample: int, name: str) -> Array | None:
        """Return an array, to be read only, or ``None`` when it was not put."""
        key = (sample, name)
        if key in self._files:
            # Copy on write: torch refuses to share what it must not write to.
            return np.load(self._files[key], mmap_mode="c")  # type: ignore[no-any-return]
        return self._small.get(key)

    def drop(self, sample: int, names: Iterable[str]) -> None:
        """Remove a sample's arrays of these names, as far as there are any."""
        for name in names:
            self._small.pop((sample, name), None)
            path = self._files.pop((sample, name), None)
            if path is not None:
                path.unlink()

    def __len__(self) -> int:
        """The number of arrays kept."""
        return len(self._small) + len(self._files)

    def close(self) -> None:
        """Remove everything."""
        self._small.clear()
        self._files.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
