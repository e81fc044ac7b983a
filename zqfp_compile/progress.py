"""Progress of a compile: named steps, a bar on everything that takes over two seconds, warnings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


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

    def warn(self, text: str) -> None:
        """See :class:`Reporter`."""


class ConsoleReporter:
    """Rich bars on a terminal, plain lines elsewhere.

    Args:
        console: Where to write.
        verbosity: -1 only warnings, 0 steps and results, 1 details.
    """

    def __init__(self, console: Console, verbosity: int = 0) -> None:
        self._console = console
        self._verbosity = verbosity
        self._bars: Progress | None = None

    def start(self, step: str) -> None:
        """Show a bar for ``step``."""
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
        self._bars.start()
        self._bars.add_task(step, total=None, detail="")

    def update(self, done: float, total: float | None, detail: str = "") -> None:
        """Move the bar."""
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, total=total, detail=detail)

    def finish(self, step: str, seconds: float) -> None:
        """Replace the bar by one line."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        if self._verbosity >= 0:
            self._console.print(f"[green]✓[/green] {step} [dim]{seconds:.1f} s[/dim]", highlight=False)

    def info(self, text: str) -> None:
        """Print a line unless quiet."""
        if self._verbosity >= 0:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning always."""
        self._console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        """Remove a bar left by an error or an interrupt."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class StepTimer:
    """Runs named steps, tells the reporter, and keeps their seconds for the report."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step; a repeated name adds up."""
        self.reporter.start(name)
        begin = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        self.reporter.finish(name, elapsed)
