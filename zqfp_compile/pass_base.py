"""What a pass is. Passes live in the ``passes`` package, one rewrite per file.

A pass is a frozen dataclass whose fields are its options. It has a kebab-case ``name`` and one method,
``call(model) -> PassResult``. It changes the model in place, keeps nothing between calls and reports honestly
whether it changed anything: a second run over its own output must report ``modified=False``.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from zqfp_compile.errors import ModelError
from zqfp_compile.plan import QuantPlan


class PassError(ModelError):
    """A pass met a graph it cannot rewrite correctly. The text names the node and what to do."""


@dataclass(frozen=True)
class Declined:
    """A place a pass looked at and left alone.

    Attributes:
        place: Layer or node name.
        reason: One sentence, shown by ``--explain``.
    """

    place: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """Outcome of one pass.

    Attributes:
        model: The model, changed in place.
        modified: Whether the graph changed.
        declined: Places left alone, with reasons.
        plan: The quantisation plan, when the pass learned or changed it; else ``None``.
    """

    model: ir.Model
    modified: bool
    declined: tuple[Declined, ...] = ()
    plan: QuantPlan | None = None


@dataclass(frozen=True)
class Pass(abc.ABC):
    """Base class of every pass."""

    name: ClassVar[str]

    @abc.abstractmethod
    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place.

        Raises:
            PassError: When the graph cannot be rewritten correctly.
        """
