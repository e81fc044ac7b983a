"""Progress of a compile: named steps, a bar on everything that takes over two seconds, warnings."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

_SHOWN_FROM_SECONDS = 0.5
_SIGN_OF_LIFE_SECONDS = 30.0


# Control characters, and those that turn the direction of writing: a terminal obeys them.
_UNPRINTABLE = (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _UNPRINTABLE}


def printable(text: str) -> str:
    """Return one line for a terminal: names in it may come from a model, and are no orders."""
    return text.translate(_ESCAPES)


class Reporter(Protocol):
    """What the pipeline tells while it works. Implementations must not raise."""

    def start(self, step: str) -> None:
        """A named step begins."""

    def update(self, done: float, total: float | None, detail: str = "") -> None:
        """The running step has done ``done`` of ``total`` units (``None``: unknown)."""

    def finish(self, step: str, seconds: float) -> None:
        """The step ended after ``seconds``."""

    def info(self, text: str) -> None:
        """A line for the user."""

    def detail(self, text: str) -> None:
        """A line for a user who asked for more."""

    def warn(self, text: str) -> None:
        """A line the user should not miss."""


class SilentReporter:
    """Says nothing; the default of the Python API."""

    def start(self, step: str) -> None:
        """See :class:`Reporter`."""

    def update(self, done: float, total: float | None, detail: str = "") -> None:
        """See :class:`Reporter`."""

    def finish(self, step: str, seconds: float) -> None:
        """See :class:`Reporter`."""

    def info(self, text: str) -> None:
        """See :class:`Reporter`."""

    def detail(self, text: str) -> None:
        """See :class:`Reporter`."""

    def warn(self, text: str) -> None:
        """See :class:`Reporter`."""


class ConsoleReporter:
    """Rich bars on a terminal, plain lines elsewhere.

    A console that cannot be written any more (closed pipe, full disk) is left alone: the compile goes on.

    Args:
        console: Where to write.
        verbosity: -1 only warnings, 0 steps that take a while and results, 1 every step and details.
    """

    def __init__(self, console: Console, verbosity: int = 0) -> None:
        self._console = console
        self._verbosity = verbosity
        self._bars: Progress | None = None
        self._step = ""
        self._next_line = 0.0

    def start(self, step: str) -> None:
        """Show a bar for ``step``."""
        self._step = step
        self._next_line = time.monotonic() + _SIGN_OF_LIFE_SECONDS
        if self._verbosity < 0 or not self._console.is_terminal:
            return
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=self._console,
            transient=True,
        )
        with _unwritable_is_fine():
            self._bars.start()
            self._bars.add_task(step, total=None, detail="")

    def update(self, done: float, total: float | None, detail: str = "") -> None:
        """Move the bar; without a terminal, print a line now and then."""
        if self._bars is not None:
            if self._bars.task_ids:
                self._bars.update(self._bars.task_ids[0], completed=done, total=total, detail=detail)
        elif self._verbosity >= 0 and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SIGN_OF_LIFE_SECONDS
            count = "" if total is None else f"{done:g}/{total:g}"
            self._print(" ".join(filter(None, ("…", self._step, count, detail))))

    def finish(self, step: str, seconds: float) -> None:
        """Replace the bar by one line, unless the step was short."""
        self.stop()
        if self._verbosity > 0 or (self._verbosity == 0 and seconds >= _SHOWN_FROM_SECONDS):
            self._print(f"[green]✓[/green] {step} [dim]{seconds:.1f} s[/dim]", markup=True)

    def info(self, text: str) -> None:
        """Print a line unless quiet."""
        if self._verbosity >= 0:
            self._print(text)

    def detail(self, text: str) -> None:
        """Print a line when verbose."""
        if self._verbosity > 0:
            self._print(text, style="dim")

    def warn(self, text: str) -> None:
        """Print a warning always."""
        self._print(f"warning: {text}", style="yellow")

    def stop(self) -> None:
        """Remove a bar, also one left by an error or an interrupt."""
        if self._bars is not None:
            with _unwritable_is_fine():
                self._bars.stop()
            self._bars = None

    def _print(self, text: str, *, markup: bool = False, style: str | None = None) -> None:
        with _unwritable_is_fine():
            self._console.print(printable(text), style=style, highlight=False, soft_wrap=True, markup=markup)


class PatientConsole(Console):
    """A console whose reader may leave: rich would end the process and close standard output."""

    def on_broken_pipe(self) -> None:
        """Fall silent."""
        silence(self.file)


def silence(stream: IO[str]) -> None:
    """Send what is still written to ``stream`` nowhere, so that Python can flush it when it ends."""
    with suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)


@contextmanager
def _unwritable_is_fine() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):  # ValueError: the stream was closed
        silence(sys.stderr)


class StepTimer:
    """Runs named steps, tells the reporter, and keeps their seconds for the report."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}
        self.running = ""  # name of the step now

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step; a repeated name adds up."""
        self.reporter.start(name)
        self.running = name
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.running = ""
        elapsed = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        self.reporter.finish(name, elapsed)
