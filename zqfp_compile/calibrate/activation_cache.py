"""Activations of calibration samples: on disk, so that memory holds one sample at a time, or on the GPU."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from zqfp_compile.disk import full_disk_errors

# Smaller tensors (shapes, empty caches) are not worth a file, and an empty one cannot be mapped.
_SMALL_BYTES = 1 << 12


class ActivationCache:
    """Tensors by sample and name: one ``.npy`` file each, mapped when read.

    Use it as a context manager; closing removes everything.
    """

    def __init__(self, folder: Path, *, gpu_bytes: int = 0) -> None:
        """Create a private folder in ``folder``, which must exist.

        Args:
            folder: Where the files go.
            gpu_bytes: As much of tensors on a GPU is kept there.
        """
        self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=folder))
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._gpu_bytes = gpu_bytes
        self._files: dict[tuple[int, str], Path] = {}
        self._made = 0

    def put(self, sample: int, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor, which nothing writes to any more.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        key = (sample, name)
        if tensor.nbytes < _SMALL_BYTES or (tensor.is_cuda and tensor.nbytes <= self._gpu_bytes):
            self._tensors[key] = tensor
            self._gpu_bytes -= tensor.nbytes if tensor.is_cuda else 0
            return
        self._made += 1
        path = self._folder / f"{self._made}.npy"
        with full_disk_errors(path):
            np.save(path, tensor.cpu().numpy())
        self._files[key] = path

    def get(self, sample: int, name: str) -> torch.Tensor | None:
        """Return a tensor, to be read only, or ``None`` when it was not put."""
        key = (sample, name)
        if key in self._files:
            # Copy on write: torch refuses to share what it must not write to.
            return torch.from_numpy(np.load(self._files[key], mmap_mode="c"))
        return self._tensors.get(key)

    def drop(self, sample: int, names: Iterable[str]) -> None:
        """Remove a sample's tensors of these names, as far as there are any."""
        for name in names:
            tensor = self._tensors.pop((sample, name), None)
            if tensor is not None and tensor.is_cuda:
                self._gpu_bytes += tensor.nbytes
            path = self._files.pop((sample, name), None)
            if path is not None:
                path.unlink()

    def close(self) -> None:
        """Remove everything."""
        self._tensors.clear()
        self._files.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
