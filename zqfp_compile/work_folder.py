"""What is finished of a compile that has not ended yet, so that the same command can go on from there."""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from zqfp_compile.disk import full_disk_errors
from zqfp_compile.errors import AccuracyError, ModelError, UsageError, add_note
from zqfp_compile.text_file import UnreadableError, read_text

_KEY = "key"
_MAX_KEY_BYTES = 1024


class WorkFolder:
    """Context manager for the folder of finished work beside an output.

    It belongs to one key, a digest of everything the work depends on. Left by an exception, the folder stays
    when something in it is finished, and the exception gets a note that says so: another try may do better,
    or one with another limit, target or shape, which are not in the key. It is removed when nothing is
    finished, at success, and when the model cannot be compiled. Whoever uses it holds the output's lock
    (:class:`zqfp_compile.output_folder.OutputFolder`).
    """

    def __init__(self, path: Path, key: str, *, fresh: bool = False) -> None:
        """Name the folder; nothing is read or written before ``with``.

        Args:
            path: The folder.
            key: What the work depends on (:func:`zqfp_compile.work_key.work_key`).
            fresh: Do not go on from what is there.
        """
        self.path = path
        self._key = key
        self._fresh = fresh
        self.discarded = False  # whether there was work of another model, other options, or not wanted

    def __enter__(self) -> WorkFolder:
        """Open the folder; what is in it under another key is removed.

        Raises:
            MissingDependencyError: When the disk is full.
            UsageError: When somebody else's folder is there.
        """
        note = self.path / _KEY
        link = self.path.is_symlink()
        is_free = not link and (not self.path.exists() or _is_empty_folder(self.path))
        if not is_free:
            key = None if link else _read_key(note)
            if key is None:
                raise UsageError(
                    f"{self.path}: is not of zqfp-compile's making, and in its way; move it away"
                )
            if self._fresh or key != self._key:
                self.discarded = self.finished
                self._remove()
        with full_disk_errors(self.path):
            self.path.mkdir(mode=0o700, exist_ok=True)
            note.write_text(self._key, encoding="ascii")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep or remove the folder."""
        if error is None or isinstance(error, ModelError) or not self.finished:
            self._remove()
            return
        again = "the same command"
        if isinstance(error, (AccuracyError, UsageError)):
            again = "a command with another limit, target or shape"
        add_note(
            error, f"finished work is kept in {self.path}: {again} goes on from there, --fresh starts over"
        )

    def _remove(self) -> None:
        """Remove the folder, the key last: what an interruption leaves is still known to be ours."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _KEY:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether there is anything to go on from."""
        journals = any(file.stat().st_size > 0 for file in self.path.glob("*.jsonl"))
        return journals or any(self.path.glob("*.npz"))

    def keep(self, name: str, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Keep arrays under a name, to be found by :meth:`find`.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        content = io.BytesIO()
        np.savez(content, *arrays)
        path = self.path / f"{name}.npz"
        with full_disk_errors(path):
            path.with_suffix(".new").write_bytes(content.getbuffer())  # no copy
            path.with_suffix(".new").replace(path)

    def find(self, name: str) -> list[npt.NDArray[Any]] | None:
        """Return the arrays kept under a name; ``None`` when there are none, or a power cut spoilt them."""
        try:
            with np.load(self.path / f"{name}.npz") as file:
                return [file[f"arr_{index}"] for index in range(len(file.files))]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # zip files have checksums
            return None

    def drop(self, name: str) -> None:
        """Remove the arrays kept under a name, if there are any."""
        (self.path / f"{name}.npz").unlink(missing_ok=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _read_key(note: Path) -> str | None:
    """Return the key in a work folder; ``None`` when it holds none, and so is somebody else's."""
    try:
        key = read_text(note, _MAX_KEY_BYTES)
    except UnreadableError:
        return None
    # Empty and alone: a compile was killed while it wrote it.
    ours = re.fullmatch(r"[0-9a-z]+", key) or (not key and len(list(note.parent.iterdir())) == 1)
    return key if ours else None
