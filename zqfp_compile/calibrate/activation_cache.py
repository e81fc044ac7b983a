"""Activations of calibration samples: on disk, so that memory holds one sample at a time, or on GPUs."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from zqfp_compile.disk import full_disk_errors

# Smaller tensors (shapes, empty caches) are not worth a file, and an empty one cannot be mapped.
_SMALL_BYTES = 1 << 12
_INDEX = "index.json"


class ActivationCache:
    """Tensors by sample and name: one ``.npy`` file each, mapped when read.

    Use it as a context manager; closing removes everything, unless it is kept. A kept cache that a killed
    process left is as it was at its last :meth:`commit`. Threads may put, get and drop, each its own samples.
    """

    def __init__(
        self, folder: Path, *, gpu_bytes: Mapping[str, int] | None = None, keep: bool = False
    ) -> None:
        """Name the cache's own folder; ``with`` makes it, or opens the kept one that is there.

        Args:
            folder: Where the files go.
            gpu_bytes: By GPU (``cuda:0``), how many bytes of the tensors on it are kept there, where they do
                not outlive the process.
            keep: Leave the files to whoever owns what is around the folder.
        """
        self._folder = folder
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._gpu_bytes = dict(gpu_bytes or {})
        self._lock = threading.Lock()
        self._keep = keep
        self._files: dict[tuple[int, str], Path] = {}
        self._dropped: list[Path] = []
        self._made = 0

    @property
    def on_disk(self) -> bool:
        """Whether any tensor is in a file."""
        return bool(self._files)

    def put(self, sample: int, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor, which nothing writes to any more.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        key = (sample, name)
        with self._lock:
            room = self._gpu_bytes.get(str(tensor.device), 0)
            if tensor.nbytes < _SMALL_BYTES or tensor.nbytes <= room:
                self._tensors[key] = tensor
                self._take(tensor, tensor.nbytes)
                return
        self._files[key] = self._save(tensor)

    def get(self, sample: int, name: str) -> torch.Tensor | None:
        """Return a tensor, to be read only, or ``None`` when it was not put."""
        key = (sample, name)
        if key in self._files:
            # Copy on write: torch refuses to share what it must not write to.
            return torch.from_numpy(np.load(self._files[key], mmap_mode="c"))
        return self._tensors.get(key)

    def drop(self, sample: int, names: Iterable[str]) -> None:
        """Remove a sample's tensors of these names, as far as there are any."""
        with self._lock:
            for name in names:
                tensor = self._tensors.pop((sample, name), None)
                if tensor is not None:
                    self._take(tensor, -tensor.nbytes)
                path = self._files.pop((sample, name), None)
                if path is not None:
                    self._dropped.append(path)
            if not self._keep:
                self._remove_dropped()

    def commit(self, state: str) -> None:
        """Make what is there now what :meth:`restore` finds; ``state`` is what it returns.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        small = {key: self._save(tensor) for key, tensor in self._tensors.items()}
        files = [(*key, path.name, key in small) for key, path in {**self._files, **small}.items()]
        index = self._folder / _INDEX
        with full_disk_errors(index):
            index.with_suffix(".new").write_text(
                json.dumps({"state": state, "made": self._made, "files": files}), encoding="utf-8"
            )
            index.with_suffix(".new").replace(index)
        self._remove_dropped()
        self._dropped += small.values()

    def restore(self) -> str | None:
        """Go back to the last commit of an earlier process; return its state, ``None`` without one."""
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
            self._made = index["made"]
            for sample, name, file, small in index["files"]:
                path = self._folder / file
                if small:
                    self._tensors[sample, name] = torch.from_numpy(np.load(path))
                    self._dropped.append(path)
                else:
                    self._files[sample, name] = path
            return str(index["state"])
        except (OSError, ValueError, KeyError, TypeError):
            self._tensors.clear()
            self._files.clear()
            return None

    def clear(self) -> None:
        """Forget everything, also what was restored."""
        self._tensors.clear()
        self._dropped += self._files.values()
        self._files.clear()

    def close(self) -> None:
        """Remove everything that is not kept."""
        self._tensors.clear()
        self._files.clear()
        if not self._keep:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _take(self, tensor: torch.Tensor, size: int) -> None:
        device = str(tensor.device)
        if device in self._gpu_bytes:
            self._gpu_bytes[device] -= size

    def _save(self, tensor: torch.Tensor) -> Path:
        with self._lock:
            self._made += 1
            path = self._folder / f"{self._made}.npy"
        with full_disk_errors(path):
            np.save(path, tensor.cpu().numpy())
        return path

    def _remove_dropped(self) -> None:
        for path in self._dropped:
            path.unlink(missing_ok=True)
        self._dropped.clear()

    def __enter__(self) -> ActivationCache:
        with full_disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
