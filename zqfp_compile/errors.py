"""Errors a user can see: one line that says what is wrong, where, and what to do.

Each class carries the process exit code of the command-line tools (``EXIT_CODES`` in the README).
"""

from __future__ import annotations


class ZqfpError(Exception):
    """Base of every diagnosed error. ``str(error)`` is the one line shown to the user."""

    exit_code = 1


class UsageError(ZqfpError):
    """An option or recipe value is wrong (exit code 2)."""

    exit_code = 2


class ModelError(ZqfpError):
    """The input model cannot be compiled: malformed, unsafe or unsupported (exit code 3)."""

    exit_code = 3


class AccuracyError(ZqfpError):
    """The compiled model lost more accuracy than the gate allows (exit code 4)."""

    exit_code = 4


class BuilderError(ZqfpError):
    """The engine builder failed, crashed or produced a plan that fails the lint (exit code 5)."""

    exit_code = 5


class MissingDependencyError(ZqfpError):
    """The environment lacks something: a library, a GPU, memory, disk, permission (exit code 6)."""

    exit_code = 6


def add_note(error: BaseException, text: str) -> None:
    """Add a clause to the line that the user sees, whatever the exception."""
    # What Python 3.11's method of this name does.
    error.__notes__ = [*notes(error), text]  # type: ignore[attr-defined]


def notes(error: BaseException) -> list[str]:
    """Return the clauses that :func:`add_note` added."""
    return list(getattr(error, "__notes__", ()))
