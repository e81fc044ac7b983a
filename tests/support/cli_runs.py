"""Runs of ``zqfp-compile`` that fail: started as a process, and what must be true afterwards."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = [sys.executable, "-m", "zqfp_compile"]


def start(place: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [*PROGRAM, "m/model.onnx", *arguments]
    options = {"stdout": pipe, "stderr": pipe, "preexec_fn": _heed_signals, **options}
    return subprocess.Popen(command, cwd=place, text=True, **options)  # type: ignore[call-overload, no-any-return]


def _heed_signals() -> None:
    # A shell's background job starts with SIGINT ignored, nohup's with SIGHUP: children inherit that.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def keeps_work(folder: Path, line: str) -> bool:
    """Whether a failed run kept finished work; the line tells, and it is removed."""
    kept = list(folder.rglob(".*.work"))
    assert ("finished work is kept in" in line) == bool(kept)
    for work in kept:
        assert str(work) in line and "--fresh" in line
        assert any(path.suffix in (".jsonl", ".npz") and path.stat().st_size for path in work.iterdir())
        shutil.rmtree(work)
    return bool(kept)


def only_error(text: str) -> str:
    """The error line: the last one, the only one, with no traceback and no control characters around it."""
    assert "Traceback" not in text and "\x1b" not in text, text
    errors = [line for line in text.splitlines() if "error:" in line]
    assert len(errors) == 1 and text.splitlines()[-1] == errors[0], text
    assert errors[0].startswith("zqfp-compile: error: ") and len(errors[0]) < 700, text
    assert "internal error" not in errors[0]
    return errors[0]
