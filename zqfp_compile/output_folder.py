"""The output folder appears complete or not at all, whatever happens while it is being made."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from zqfp_compile.disk import (
    DiskFullError,
    diagnose_full_disk,
    ensure_free_space,
    file_sha256,
    fsync_path,
    full_disk_errors,
)
from zqfp_compile.errors import MissingDependencyError, UsageError, ZqfpError, add_note, notes
from zqfp_compile.text_file import COMPANION_BYTES, UnreadableError, read_text

__all__ = [
    "ARTIFACT",
    "COMPANIONS",
    "MANIFEST",
    "ORT_MODEL",
    "TOKENIZER",
    "OutputFolder",
    "ensure_free_space",
]

# Files of a compiled folder. The companions are copied from beside the model, so that the folder can generate
# text wherever it is moved to.
MANIFEST = "manifest.json"
ARTIFACT = "model.zqfp.onnx"
ORT_MODEL = "onnxruntime.onnx"
TOKENIZER = "tokenizer.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
COMPANIONS = (TOKENIZER, CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, CHAT_TEMPLATE)
_TOOL = "zqfp-compile"
_LOCK, _CONTENT, _SCRATCH, _OLD = "lock", "content", "scratch", "old"

_log = logging.getLogger(__name__)


class OutputFolder:
    """Context manager that builds ``final`` in a hidden sibling and swaps it in on :meth:`commit`.

    The sibling ``.<name>.<random>.tmp`` holds ``content`` (becomes ``final``), ``scratch`` and a locked file
    ``lock`` with the process id. Leaving without :meth:`commit`, by an exception or Ctrl-C, removes it and
    leaves ``final`` as it was; what a killed process left is removed by the next run into the same output.
    """

    def __init__(self, final: Path, overwrite: bool = True) -> None:
        """Name the output; nothing is checked or written before ``with``.

        Args:
            final: Folder to make. One that an earlier run made is replaced, any other content is refused.
            overwrite: ``False`` refuses an existing output as well.
        """
        self.final = Path(os.path.realpath(final))
        self._overwrite = overwrite
        self._work: Path | None = None
        # Removes what a signal in the middle of the clean-up leaves, at the latest when Python ends.
        self._removal: weakref.finalize[..., OutputFolder] | None = None
        self._lock = -1

    @property
    def path(self) -> Path:
        """Where to write the output's files until :meth:`commit`."""
        return self._root / _CONTENT

    @property
    def scratch(self) -> Path:
        """A folder on the same disk for intermediate files; it never reaches the output."""
        return self._root / _SCRATCH

    @property
    def work(self) -> Path:
        """Where finished work may outlive this run (:class:`zqfp_compile.work_folder.WorkFolder`)."""
        return self.final.parent / f".{self.final.name}.work"

    @property
    def _root(self) -> Path:
        if self._work is None:
            raise RuntimeError("OutputFolder is used outside its with block or after commit()")
        return self._work

    def __enter__(self) -> OutputFolder:
        """Check everything that can be checked before hours of work, and make the temporary folder.

        Raises:
            UsageError: When ``final`` cannot be the output: a file, somebody's folder, no parent, in use.
            MissingDependencyError: When the place is not writable or the disk is full.
        """
        parent = self.final.parent
        if not parent.is_dir():
            raise UsageError(
                f"{self.final}: the folder {parent} does not exist; create it or choose another --output"
            )
        try:
            with full_disk_errors(self.final), _folder_lock(parent):
                self._recover_stale()
                _check_replaceable(self.final, self._overwrite)
                self._make_work()
        except OSError as error:
            self._discard()
            raise MissingDependencyError(
                f"{self.final}: cannot be written ({error.strerror or error}); "
                "change the permissions or choose another --output"
            ) from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary folder; a full disk in the block becomes ``MissingDependencyError``."""
        diagnosed = None
        if isinstance(error, DiskFullError) and not {self._work, self.work}.isdisjoint(error.path.parents):
            diagnosed = error.named(self.final)
        elif isinstance(error, Exception) and not isinstance(error, ZqfpError) and self._work is not None:
            diagnosed = diagnose_full_disk(error, self.final, written=self._work)
        self._discard()
        if diagnosed is not None and error is not None:
            for note in notes(error):
                add_note(diagnosed, note)
            raise diagnosed from error

    def commit(self, manifest: Mapping[str, Any], progress: Callable[[int, int], None] | None = None) -> None:
        """Write ``manifest.json`` last, flush everything to the disk and swap the folder in.

        Args:
            manifest: What to say about the run. ``tool`` and ``files`` (path -> ``sha256`` and ``bytes``) are
                added.
            progress: Called with (bytes hashed, bytes in all).

        Raises:
            ZqfpError: When the disk is full or ``final`` cannot be replaced; ``final`` is then as it was.
        """
        with _write_errors(self.final):
            files = _hash_files(self.path, progress)
            text = json.dumps({"tool": _TOOL, **manifest, "files": files}, indent=2) + "\n"
            (self.path / MANIFEST).write_text(text, encoding="utf-8")
            _fsync_tree(self.path)
            self._swap_in()
            fsync_path(self.final.parent)
            self._keep_foreign_files()
        self._discard()

    def _make_work(self) -> None:
        # Named before it is there: a signal may come in between.
        self._work = self.final.parent / f".{self.final.name}.{secrets.token_hex(4)}.tmp"
        self._removal = weakref.finalize(self, _remove_work, self._work)
        self._work.mkdir(mode=0o700)
        self._lock = os.open(self._work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(self._lock, str(os.getpid()).encode())
        self.path.mkdir()
        self.scratch.mkdir()

    def _recover_stale(self) -> None:
        """Remove what killed runs left; refuse while a live run works on the same output."""
        pattern = re.compile(re.escape(f".{self.final.name}.") + r"[a-z0-9_]{8}\.tmp")
        for work in self.final.parent.iterdir():
            if not pattern.fullmatch(work.name) or not _is_folder(work):
                continue
            if not (work / _LOCK).is_file():
                # Killed before the lock was made, or not ours: only an empty folder goes.
                with contextlib.suppress(OSError):
                    work.rmdir()
                continue
            owner = _live_owner(work)
            if owner is not None:
                raise UsageError(
                    f"{self.final}: another compile (process {owner}) is writing it; "
                    "wait for it to end or choose another --output"
                )
            if (work / _OLD).is_dir() and not self.final.exists():
                (work / _OLD).rename(self.final)
            _remove_work(work)

    def _swap_in(self) -> None:
        """Put ``content`` at ``final``; the old folder ends up in the temporary one."""
        if not self.final.exists():
            self.path.rename(self.final)
        elif not _exchange(self.path, self.final):
            old = self._root / _OLD
            self.final.rename(old)
            try:
                self.path.rename(self.final)
            except BaseException:
                old.rename(self.final)
                raise

    def _keep_foreign_files(self) -> None:
        """Save the replaced folder from removal when somebody put files into it during the run."""
        for old in (self.path, self._root / _OLD):
            if old.is_dir() and _foreign_file(old) is not None:
                kept = Path(tempfile.mkdtemp(prefix=f"{self.final.name}.old-", dir=self.final.parent))
                old.rename(kept)
                _log.warning(
                    "%s: files were added to it meanwhile; its old content is now %s", self.final, kept
                )

    def _discard(self) -> None:
        if self._work is not None and self._removal is not None:
            _remove_work(self._work)
            self._removal.detach()
            self._work = None
        if self._lock >= 0:
            # Forgotten first: a signal in between must not make a second call close it again.
            lock, self._lock = self._lock, -1
            os.close(lock)


def _remove_work(work: Path) -> None:
    # The lock goes last: what an interruption leaves can still be recognised.
    for name in (_CONTENT, _SCRATCH, _OLD):
        shutil.rmtree(work / name, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _write_errors(final: Path) -> Iterator[None]:
    """Diagnose every failure of the file system while ``final`` is made."""
    try:
        with full_disk_errors(final):
            yield
    except OSError as error:
        raise MissingDependencyError(
            f"{final}: cannot be written ({error.strerror or error}); "
            "change the permissions or choose another --output"
        ) from error


def _check_replaceable(final: Path, overwrite: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise UsageError(f"{final}: is a file; choose a folder with --output")
    if os.path.ismount(final):
        raise UsageError(f"{final}: is a mount point and cannot be replaced; choose a folder inside it")
    if not os.access(final, os.R_OK | os.W_OK | os.X_OK):
        # Renaming a folder to another parent changes its ".." entry.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(final))
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{final}: exists already; remove it or choose another --output")
    foreign = _foreign_file(final)
    if foreign is not None:
        raise UsageError(
            f"{final}: holds {foreign!r}, which zqfp-compile did not write, and would be replaced; "
            "move that away or choose another --output"
        )


def _foreign_file(folder: Path) -> str | None:
    """Return a file in ``folder`` that its manifest does not list, or ``None`` when all of it is ours."""
    known: set[str] = set()
    try:
        manifest = json.loads(read_text(folder / MANIFEST, COMPANION_BYTES))
        if manifest["tool"] == _TOOL:
            known = {MANIFEST, *manifest["files"]}
    except (UnreadableError, ValueError, KeyError, TypeError, RecursionError):
        pass
    names = (
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not _is_folder(path)
    )
    return next((name for name in names if name not in known), None)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _live_owner(work: Path) -> str | None:
    """Return the process id of the run that holds ``work``, or ``None`` when that run is gone."""
    try:
        descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(descriptor, 32).decode("ascii", "replace") or "unknown"
    finally:
        os.close(descriptor)
    return None


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Hold a short exclusive lock on ``folder`` itself, so that two starts see each other's work."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            # Network file systems cannot lock folders; only two starts within milliseconds would go unseen.
            _log.debug("%s: cannot be locked (%s)", folder, error)
        yield
    finally:
        os.close(descriptor)


def _hash_files(folder: Path, progress: Callable[[int, int], None] | None) -> dict[str, dict[str, Any]]:
    files = [path for path in sorted(folder.rglob("*")) if not _is_folder(path)]
    total = sum(path.stat().st_size for path in files)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path, tell), "bytes": path.stat().st_size}
        for path in files
    }


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        fsync_path(path)
    fsync_path(folder)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2``); ``False`` when this system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
