"""Runs hostile cases through the real commands, each in a process of its own, and says what went wrong.

A fresh server process imports the package once and forks per case, so that a crash, a hang or a memory bomb
ends one case only.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hostile_case import COMPILE, GENERATE, VALIDATE, HostileCase

ROOT = Path(__file__).resolve().parents[2]
_PRELOAD = ["zqfp_compile.pipeline", "zqfp_compile.cli_generate", "zqfp_compile.cli_validate"]
_PRELOAD += ["zqfp_compile.runtime.engine", "zqfp_compile.report.html", "onnxruntime", "onnxscript"]
# More than any of them needs; a bomb ends here instead of taking the machine's memory.
_ADDRESS_SPACE = 16 << 30
_LONGEST_LINE = 1000


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        case: What it was given.
        code: Exit code; negative is the signal that killed it.
        hung: Whether it was still running at the limit.
        out, err: What it printed.
        left: Files that were not there before.
        gone: Files that were.
        seconds: Wall time.
    """

    case: HostileCase
    code: int
    hung: bool
    out: str
    err: str
    left: tuple[str, ...]
    gone: tuple[str, ...]
    seconds: float

    @property
    def traceback(self) -> bool:
        """Whether the user saw a traceback, or was told of a bug of ours."""
        return any(word in self.err for word in ("Traceback", "panicked at", "internal error"))

    @property
    def line(self) -> str:
        """The error line; empty when there is none."""
        return next((line for line in self.err.splitlines() if "error:" in line), "")

    @cached_property
    def faults(self) -> list[str]:
        """What is not as it must be: one line, the expected exit code and words, nothing left."""
        lines = self.err.splitlines()
        errors = [line for line in lines if "error:" in line]
        wanted = self.case.code
        missing = [text for text in self.case.says if text not in self.line]
        found = {
            "hang": self.hung,
            f"killed by {-self.code}": self.code < 0 and not self.hung,
            "traceback": self.traceback,
            f"exit code {self.code}, not {wanted}": self.code != wanted and self.code >= 0,
            f"{len(errors)} error lines": len(errors) != 1 or lines[-1] != errors[0],
            f"a line of {len(self.line)} characters": len(self.line) > _LONGEST_LINE,
            "control characters": re.search(r"[\x00-\x08\x0b-\x1f\x7f]", self.err) is not None,
            f"does not say {missing}": bool(missing),
            f"printed {self.out[:80]!r}": bool(self.out),
            f"left {', '.join(self.left)}": bool(self.left),
            f"removed {', '.join(self.gone)}": bool(self.gone),
        }
        return [fault for fault, is_so in found.items() if is_so]


class HostileRunner:
    """Makes cases and runs them; bases are made once, in ``folder``."""

    def __init__(self, folder: Path, limit: float) -> None:
        """``limit``: seconds after which a command counts as hung."""
        self._folder = folder
        self._limit = limit
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._bases = folder / "bases"
        code = self._wait(_make_bases, 300.0, self._bases)
        assert code == 0, f"the base models cannot be made (exit code {code}); see the output above"

    def make(self, case: HostileCase) -> Path:
        """Write a case into a folder of its name and return that."""
        place = self._folder / case.name
        place.mkdir()
        if case.base:
            shutil.copytree(self._bases / case.base, place / "m")
        case.make(place)
        return place

    def run(self, case: HostileCase) -> Outcome:
        """Make a case, run its command, and look at what is there afterwards."""
        place = self.make(case)
        aside = Path(tempfile.mkdtemp(dir=self._folder))
        (aside / "tmp").mkdir()
        for name in ("out", "err"):
            (aside / name).touch()
        before = _listing(place)
        begin = time.monotonic()
        code = self._wait(_run_command, self._limit, case.command, place, aside)
        seconds = time.monotonic() - begin
        out, err = ((aside / name).read_text("utf-8", "replace") for name in ("out", "err"))
        after = _listing(place)
        left, gone = sorted({*after, *_listing(aside / "tmp")} - before), sorted(before - after)
        shutil.rmtree(aside)
        return Outcome(
            case,
            -signal.SIGKILL if code is None else code,
            code is None,
            out,
            err,
            tuple(left),
            tuple(gone),
            seconds,
        )

    def _wait(self, function: Callable[..., object], limit: float, *arguments: object) -> int | None:
        """Return the exit code of a function in a process of its own, ``None`` at the limit."""
        process = self._context.Process(target=function, args=arguments)
        process.start()
        process.join(limit)
        hung = process.is_alive()
        if hung:
            process.kill()
            process.join()
        return None if hung else process.exitcode


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the figures of a run in one line."""
    diagnosed = sum(not outcome.faults for outcome in outcomes)
    tracebacks = sum(outcome.traceback for outcome in outcomes)
    hangs = sum(outcome.hung for outcome in outcomes)
    left = sum(len(outcome.left) for outcome in outcomes)
    return (
        f"{diagnosed} of {len(outcomes)} diagnosed, {tracebacks} tracebacks, {hangs} hangs, "
        f"{left} files left behind"
    )


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _make_bases(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "models"))
    from compiled_models import quick
    from small_lm import write_model_folder

    from zqfp_compile import compile_model

    model = write_model_folder(folder / "model")
    compile_model(model, quick(target="onnxruntime", evaluate=False), output=folder / "compiled")


def _run_command(command: tuple[str, ...], place: Path, aside: Path) -> None:
    """Become the command: its folder, its streams, its arguments."""
    from zqfp_compile import cli, cli_generate, cli_validate

    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(aside / name, os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = str(aside / "tmp")
    os.chdir(place)
    sys.argv = list(command)
    {COMPILE: cli.main, GENERATE: cli_generate.main, VALIDATE: cli_validate.main}[command[0]]()
