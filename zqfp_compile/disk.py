"""Disk space and durability: a full disk becomes one clear line, a finished file survives a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zqfp_compile.errors import MissingDependencyError

_CHUNK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(MissingDependencyError):
    """There was no room for ``path``."""

    def __init__(self, path: Path, reason: str, written: int, free: int) -> None:
        """``written`` and ``free`` are bytes, at the time of the failure."""
        super().__init__(
            f"{path}: the disk is full ({reason}) with {format_bytes(written)} written "
            f"and {format_bytes(free)} free; "
            "free some space, raise the quota or choose another folder with --output"
        )
        self.path, self._reason, self._written, self._free = path, reason, written, free

    def named(self, path: Path) -> DiskFullError:
        """Return the same error about ``path``, under which the user knows what was written."""
        return DiskFullError(path, self._reason, self._written, self._free)


def ensure_free_space(path: Path, needed_bytes: int) -> None:
    """Check that ``needed_bytes`` fit on the disk that holds ``path`` (which need not exist yet).

    Raises:
        MissingDependencyError: When they do not.
    """
    free = _free_bytes(path)
    if free < needed_bytes:
        raise MissingDependencyError(
            f"{path}: {format_bytes(needed_bytes)} of disk are needed and {format_bytes(free)} are free; "
            "free some space or choose another folder with --output"
        )


@contextmanager
def full_disk_errors(path: Path) -> Iterator[None]:
    """Turn "disk full" from any library writing ``path`` into a diagnosed error.

    Raises:
        MissingDependencyError: In place of an ``OSError`` that says the disk, the quota or the file is full.
    """
    try:
        yield
    except OSError as error:
        diagnosed = diagnose_full_disk(error, path)
        if diagnosed is None:
            raise
        raise diagnosed from error


def diagnose_full_disk(
    error: BaseException | None, path: Path, written: Path | None = None
) -> DiskFullError | None:
    """Return the error to show when ``error`` is, or was caused by, a full disk; else ``None``.

    Args:
        error: What a writer raised.
        path: The file or folder the user knows.
        written: What was being written when it is not ``path``; its size is the least the disk must hold.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and _is_full(error):
            reason = error.strerror or str(error)
            return DiskFullError(path, reason, size_of(written or path), _free_bytes(path))
        error = error.__cause__ or error.__context__
    return None


def _is_full(error: OSError) -> bool:
    # numpy's tofile reports a short write without an errno.
    return error.errno in _FULL or (error.errno is None and "requested and" in str(error))


def _free_bytes(path: Path) -> int:
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def format_bytes(count: int) -> str:
    """Return ``count`` as text with a binary unit, such as ``1.5 GiB``."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_chunks(path: Path, offset: int = 0, length: int = sys.maxsize) -> Iterator[bytes]:
    """Yield a part of a file in pieces, to its end by default; fewer bytes when it ends before."""
    with path.open("rb") as file:
        file.seek(offset)
        while length > 0 and (chunk := file.read(min(length, _CHUNK))):
            length -= len(chunk)
            yield chunk


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the hex digest of a file; ``progress`` is called with the bytes read since the last call."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
        if progress is not None:
            progress(len(chunk))
    return digest.hexdigest()
