"""A compile with too little memory or disk, or stopped at any moment: one line, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_runs import keeps_work, listing, only_error, start
from small_lm import write_model_folder

pytest.importorskip("onnxruntime")

OPTIONS = ("--target", "onnxruntime", "--no-evaluate", "--calibration", "m/text.txt", "-o", "out")
# Threads reserve address space for their stacks, on every core some.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
STOPS = 8


@pytest.fixture
def place(tmp_path: Path, models_folder: Path) -> Path:
    """A folder with the smallest model, its tokenizer and a text in ``m``."""
    write_model_folder(tmp_path / "m")
    return tmp_path


def _limited(place: Path, limit: int, size: int) -> str:
    """Run under a limit of the kernel, which must end with exit code 6; return the error line."""
    before = listing(place)
    process = start(
        place, *OPTIONS, env=ONE_THREAD, preexec_fn=lambda: resource.setrlimit(limit, (size, size))
    )
    _, err = process.communicate(timeout=120)
    line = only_error(err)
    assert process.returncode == 6, line
    keeps_work(place, line)
    assert listing(place) == before
    return line


def test_memory_that_cannot_do_is_refused_before_the_work(place: Path) -> None:
    line = _limited(place, resource.RLIMIT_AS, 1100 << 20)
    assert "of memory are needed and" in line and "are available; close other programs" in line


def test_memory_that_takes_no_library(place: Path) -> None:
    assert "cannot be loaded" in _limited(place, resource.RLIMIT_AS, 320 << 20)


@pytest.mark.parametrize("size", [1 << 10, 100 << 10])
def test_files_that_may_not_grow(place: Path, size: int) -> None:
    """Also without the right to mount a small disk, as the tests of a full one need."""
    line = _limited(place, resource.RLIMIT_FSIZE, size)
    assert "the disk is full (File too large)" in line and "--output" in line


def test_ctrl_c_at_any_moment_leaves_nothing_half_written(place: Path) -> None:
    """Eight moments from the interpreter's start to the end; then the same command completes."""
    begin = time.monotonic()
    whole = start(place, *OPTIONS)
    whole.communicate(timeout=120)
    assert whole.returncode == 0
    seconds = time.monotonic() - begin
    wanted = _artifact(place)
    shutil.rmtree(place / "out")
    moments = random.Random(0)
    for _ in range(STOPS):
        _stop(place, seconds * moments.random())
    last = start(place, *OPTIONS)
    last.communicate(timeout=120)
    assert last.returncode == 0 and _artifact(place) == wanted
    assert not list(place.glob(".out*"))


def _artifact(place: Path) -> bytes:
    return (place / "out" / "onnxruntime.onnx.data").read_bytes()


def _stop(place: Path, after: float) -> None:
    """Start a compile and press Ctrl-C; the work that it may keep stays for the next one."""
    process = start(place, *OPTIONS)
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    left = {path.name for path in place.iterdir()} - {"m"}
    assert left <= {"out", ".out.work"}
    if "stopped by" in err:
        assert process.returncode == 128 + signal.SIGINT
        assert "finished work is kept" not in only_error(err) or ".out.work" in left
    elif process.returncode != 0:  # Python itself was starting: nothing of ours had run
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT) and "out" not in left, err
    else:
        assert "Traceback" not in err and "out" in left
    if "out" in left:
        manifest = json.loads((place / "out" / "manifest.json").read_text(encoding="utf-8"))
        assert {*manifest["files"], "manifest.json"} == set(listing(place / "out"))
        shutil.rmtree(place / "out")
