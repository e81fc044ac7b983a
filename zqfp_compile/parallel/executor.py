"""What does the work items, and the one that does them here and now.

An item is a value that can be pickled, the work a function of a module. Who works on it and how many do at
once changes nothing about a result, only which one is finished first.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from zqfp_compile import errors
from zqfp_compile.errors import MissingDependencyError, ZqfpError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Does work items."""

    def as_completed(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, ``work(items[index])``) for each item as soon as it is finished.

        A result that nobody takes keeps its worker waiting: only a few are ahead of the one taken.

        Raises:
            ZqfpError: What the work raised, or ``MissingDependencyError`` when who does it is lost.
        """


class InProcess:
    """Does one item after the other in this process: an :class:`Executor`."""

    def as_completed(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """See :meth:`Executor.as_completed`."""
        return enumerate(map(work, items))


@dataclass(frozen=True)
class Outcome:
    """What became of an item in another process.

    Attributes:
        value: The result.
        error: Name of the :mod:`zqfp_compile.errors` class, or of any other exception; ``None`` on success.
        text: Its one line, or the traceback of an exception that nobody diagnosed.
    """

    value: Any = None
    error: str | None = None
    text: str = ""

    def unwrap(self) -> Any:
        """Return the result, or raise the error as if it had happened here."""
        if self.error is None:
            return self.value
        if self.error == "MemoryError":
            raise MissingDependencyError("a worker ran out of memory; close other programs or lower --jobs")
        kind = getattr(errors, self.error, None)
        if kind is not None and issubclass(kind, ZqfpError):
            raise kind(self.text)
        raise RuntimeError(f"in a worker: {self.text}")


def attempt(work: Callable[[Any], Any], item: Any) -> Outcome:
    """Do an item; every exception becomes part of the outcome, which can be sent anywhere."""
    try:
        return Outcome(work(item))
    except ZqfpError as error:
        # A subclass with arguments of its own travels as what the user sees.
        public = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return Outcome(error=public.__name__, text=str(error))
    except MemoryError:
        return Outcome(error="MemoryError")
    except Exception as error:
        return Outcome(error=type(error).__name__, text=traceback.format_exc())
