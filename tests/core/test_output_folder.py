"""The output folder is complete or as it was: errors, Ctrl-C, SIGKILL, a full disk, two runs at once."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from zqfp_compile import output_folder
from zqfp_compile.errors import MissingDependencyError, UsageError
from zqfp_compile.output_folder import OutputFolder, ensure_free_space


def _build(final: Path, text: str, **extra: str) -> None:
    with OutputFolder(final) as folder:
        for name, content in {"model.onnx": text, "sub/data.bin": text * 2, **extra}.items():
            (folder.path / name).parent.mkdir(exist_ok=True)
            (folder.path / name).write_text(content)
        (folder.scratch / "big").write_text("intermediate")
        folder.commit({"version": text})


def _assert_complete(final: Path, text: str) -> None:
    """The manifest lists exactly the files there, with their hashes."""
    manifest = json.loads((final / "manifest.json").read_text())
    files = {path.relative_to(final).as_posix(): path for path in final.rglob("*") if path.is_file()}
    assert manifest["version"] == text and set(manifest["files"]) == set(files) - {"manifest.json"}
    assert (final / "model.onnx").read_text() == text
    for name, entry in manifest["files"].items():
        data = files[name].read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_then_replaced(tmp_path: Path) -> None:
    final = tmp_path / "model.zqfp"
    _build(final, "one", old="only in the first")
    _assert_complete(final, "one")
    _build(final, "two")
    _assert_complete(final, "two")
    assert _names(tmp_path) == ["model.zqfp"] and not (final / "old").exists()
    assert final.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_progress_of_hashing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with OutputFolder(tmp_path / "out") as folder:
        (folder.path / "a").write_bytes(bytes(5 << 20))
        folder.commit({}, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4 << 20, 5 << 20), (5 << 20, 5 << 20)]


def test_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two-rename path, for file systems without the exchange."""
    monkeypatch.setattr(output_folder, "_exchange", lambda first, second: False)
    final = tmp_path / "out"
    _build(final, "one")
    _build(final, "two")
    _assert_complete(final, "two")
    assert _names(tmp_path) == ["out"]


def test_failed_second_rename_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "_exchange", lambda first, second: False)
    final = tmp_path / "out"
    _build(final, "one")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "content":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MissingDependencyError, match="cannot be written"):
        _build(final, "two")
    _assert_complete(final, "one")
    assert _names(tmp_path) == ["out"]


def test_exchange_swaps_in_one_step(tmp_path: Path) -> None:
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("the C library has no renameat2")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert output_folder._exchange(tmp_path / "a", tmp_path / "b")
    assert _names(tmp_path / "a") == ["b"] and _names(tmp_path / "b") == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_errors_leave_the_old_folder(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    final = tmp_path / "out"
    if existing:
        _build(final, "one")
    with pytest.raises(error), OutputFolder(final) as folder:
        (folder.path / "model.onnx").write_text("half")
        raise error
    assert _names(tmp_path) == ["out"] * existing
    if existing:
        _assert_complete(final, "one")


def test_no_commit_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        (folder.path / "model.onnx").write_text("half")
    assert not _names(tmp_path)
    with pytest.raises(RuntimeError):
        _ = folder.path


def test_places_that_cannot_be_the_output(tmp_path: Path) -> None:
    """Each refused at the start, nothing touched."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "thesis.tex").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"tool": "another", "files": {}}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("[")
    _build(tmp_path / "ours", "one")
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name, wanted in {
        "file": "is a file",
        "user": "'thesis.tex', which zqfp-compile did not write",
        "other": "'manifest.json', which",
        "broken": "'manifest.json', which",
        "ours": "'notes.txt', which",
        "missing/out": "does not exist",
        "file/out": "does not exist",
    }.items():
        with pytest.raises(UsageError) as caught, OutputFolder(tmp_path / name):
            pytest.fail("must not start")
        message = str(caught.value)
        assert wanted in message and str(tmp_path / name) in message and "\n" not in message
        assert "--output" in message
    with pytest.raises(UsageError, match="mount point"), OutputFolder(Path("/proc")):
        pytest.fail("must not start")
    assert sorted(tmp_path.rglob("*")) == before


def test_empty_folder_and_link_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _build(tmp_path / "empty", "one")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    _build(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    _assert_complete(tmp_path / "empty", "two")


def test_no_overwrite(tmp_path: Path) -> None:
    _build(tmp_path / "out", "one")
    with pytest.raises(UsageError, match="exists already"), OutputFolder(tmp_path / "out", overwrite=False):
        pytest.fail("must not start")


def test_unwritable_parent() -> None:
    with pytest.raises(MissingDependencyError, match=r"cannot be written .*choose another --output"):
        _build(Path("/proc/self/out"), "one")


def test_file_added_during_the_run_is_kept(tmp_path: Path) -> None:
    final = tmp_path / "out"
    _build(final, "one")
    with OutputFolder(final) as folder:
        (folder.path / "model.onnx").write_text("two")
        (final / "notes.txt").write_text("mine")
        folder.commit({"version": "two"})
    _assert_complete(final, "two")
    (kept,) = tmp_path.glob("out.old-*")
    assert (kept / "notes.txt").read_text() == "mine" and _names(tmp_path) == ["out", kept.name]


def _child(script: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


_WORKING = """
    import pathlib, sys
    from zqfp_compile.output_folder import OutputFolder

    with OutputFolder(pathlib.Path(sys.argv[1])) as folder:
        (folder.path / "model.onnx").write_text("child")
        print("ready", flush=True)
        sys.stdin.read()
        folder.commit({"version": "child"})
"""


def test_two_runs_into_one_output(tmp_path: Path) -> None:
    final = tmp_path / "out"
    child = _child(_WORKING, final)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"another compile \\(process {child.pid}\\)"), OutputFolder(final):
        pytest.fail("must not start")
    assert sorted(tmp_path.rglob("*")) == before
    _build(tmp_path / "out2", "other")  # another name does not mind
    child.communicate(timeout=60)
    assert child.returncode == 0
    _assert_complete(final, "child")


@pytest.mark.parametrize("existing", [False, True])
def test_sigkill_leaves_the_old_folder_and_the_next_run_cleans(tmp_path: Path, existing: bool) -> None:
    final = tmp_path / "out"
    if existing:
        _build(final, "one")
    child = _child(_WORKING, final)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert final.exists() == existing
    if existing:
        _assert_complete(final, "one")
    assert len(_names(tmp_path)) == 1 + existing  # what the kill left
    _build(final, "two")
    _assert_complete(final, "two")
    assert _names(tmp_path) == ["out"]


_SWAPPING = """
    import os, pathlib, signal, sys
    from zqfp_compile import output_folder
    from zqfp_compile.output_folder import OutputFolder

    event, countdown = sys.argv[2], int(sys.argv[3])
    if event == "no-exchange":
        output_folder._exchange = lambda first, second: False

    def hook(name, arguments):
        # Each audited step of the commit that changes the file system is the last one once.
        global countdown
        if name in ("os.rename", "os.remove", "os.rmdir", "ctypes.dlsym", "shutil.rmtree"):
            countdown -= 1
            if countdown == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    with OutputFolder(pathlib.Path(sys.argv[1])) as folder:
        (folder.path / "model.onnx").write_text("child")
        sys.addaudithook(hook)
        folder.commit({"version": "child"})
"""


@pytest.mark.parametrize("event", ["exchange", "no-exchange"])
def test_sigkill_at_every_step_of_the_commit(tmp_path: Path, event: str) -> None:
    """Old or new, complete; with two renames also absent until the next run puts the old one back."""
    outcomes = set()
    for step in range(1, 30):
        final = tmp_path / f"out{step}"
        _build(final, "one")
        child = _child(_SWAPPING, final, Path(event), Path(str(step)))
        child.communicate(timeout=60)
        if final.exists():
            version = json.loads((final / "manifest.json").read_text())["version"]
            _assert_complete(final, version)
        else:
            assert event == "no-exchange"
            version = "absent"
        outcomes.add(version)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        with pytest.raises(ZeroDivisionError), OutputFolder(final):
            raise ZeroDivisionError  # a next run that fails: it must have put the old folder back
        _assert_complete(final, "one" if version == "absent" else version)
    else:
        pytest.fail("the commit never ended")
    assert outcomes == ({"one", "child"} | ({"absent"} if event == "no-exchange" else set()))
    assert all(not name.startswith(".") for name in _names(tmp_path))


_STOPPED = """
    import itertools, os, pathlib, shutil, sys, traceback
    from zqfp_compile import output_folder

    final = pathlib.Path(sys.argv[1])

    def stop_at(line):
        def trace(frame, event, _):
            nonlocal line
            if event == "line" and frame.f_code.co_filename in (output_folder.__file__, shutil.__file__):
                line -= 1
                if line == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with output_folder.OutputFolder(final) as folder:
                (folder.path / "model.onnx").write_text("two")
                if sys.argv[2] == "commit":
                    folder.commit({"version": "two"})
        except KeyboardInterrupt:
            sys.settrace(None)
            sys.exit(1)
        except OSError as error:
            sys.settrace(None)
            # rmtree closes twice what a signal comes after; the command line looks at what came before.
            ours = traceback.extract_tb(error.__traceback__)[-1].filename != shutil.__file__
            if ours or not isinstance(error.__context__, KeyboardInterrupt):
                print("not-the-signal", flush=True)
            sys.exit(1)

    for line in itertools.count(1):
        child = os.fork()
        if child == 0:
            stop_at(line)
            break
        stopped = os.waitpid(child, 0)[1] != 0
        left = set(os.listdir(final.parent)) - {final.name}
        if not {"model.onnx", "manifest.json"} <= set(os.listdir(final)):
            left.add("no-complete-folder")
        if left or not stopped:
            print(line, *left)
            break
"""


@pytest.mark.parametrize(("end", "wanted"), [("leave", "one"), ("commit", "two")])
def test_a_signal_at_any_line_leaves_nothing(tmp_path: Path, end: str, wanted: str) -> None:
    """Signals come between any two steps: in the middle of making the folder, committing and removing it."""
    final = tmp_path / "out"
    _build(final, "one")
    output, _ = _child(_STOPPED, final, Path(end)).communicate(timeout=120)
    lines, *left = output.split()
    assert not left and int(lines) > 100, output
    _assert_complete(final, wanted)


def test_unlocked_sibling_with_files_is_not_ours_to_delete(tmp_path: Path) -> None:
    theirs = tmp_path / ".out.abcdefgh.tmp"
    theirs.mkdir()
    (theirs / "precious").write_text("mine")
    _build(tmp_path / "out", "one")
    assert (theirs / "precious").read_text() == "mine"


def test_ensure_free_space(tmp_path: Path) -> None:
    ensure_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(MissingDependencyError, match=r" TiB of disk are needed and .* are free") as caught:
        ensure_free_space(tmp_path / "not" / "yet", 1 << 60)
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A 1 MiB file system, or ``None`` where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = (
        mount is not None
        and umount is not None
        and subprocess.run([mount, *options], capture_output=True, check=False).returncode == 0
    )
    yield folder if mounted else None
    if mounted:
        subprocess.run([str(umount), str(folder)], check=True)


def test_full_disk(small_disk: Path | None) -> None:
    """A disk that is really full, at writing, and again with room for all but the manifest, at commit."""
    if small_disk is None:
        pytest.skip("needs the right to mount a tmpfs; test_full_disk_by_limit runs everywhere")
    final = small_disk / "out"
    _build(final, "one")
    with pytest.raises(
        MissingDependencyError, match=r"disk is full .* written and .* free; free some"
    ) as caught:
        _build(final, "x" * (1 << 20))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 6
    _assert_complete(final, "one")
    assert _names(small_disk) == ["out"]

    with pytest.raises(MissingDependencyError, match="disk is full"), OutputFolder(final) as folder:
        (folder.path / "model.onnx").write_text("two")
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        folder.commit({"version": "two"})
    filler.unlink()
    _assert_complete(final, "one")
    assert _names(small_disk) == ["out"]


_LIMIT = """
    import pathlib, resource, sys
    from zqfp_compile.errors import MissingDependencyError
    from zqfp_compile.output_folder import OutputFolder

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        with OutputFolder(pathlib.Path(sys.argv[1])) as folder:
            try:
                (folder.path / "model.onnx").write_bytes(bytes(1 << 20))
            except OSError as error:
                raise RuntimeError("a library that wraps its errors") from error
    except MissingDependencyError as error:
        print(error)
"""


def test_full_disk_by_limit(tmp_path: Path) -> None:
    """The kernel refuses to grow the file; the error arrives wrapped, as libraries do."""
    _build(tmp_path / "out", "one")
    child = _child(_LIMIT, tmp_path / "out")
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "the disk is full" in output and "4.0 KiB written" in output and output.count("\n") == 1
    _assert_complete(tmp_path / "out", "one")
    assert _names(tmp_path) == ["out"]
