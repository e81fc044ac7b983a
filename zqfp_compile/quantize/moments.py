"""Second moments of a linear layer's input: all that GPTQ and LoRC need to know about the data."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from zqfp_compile.quantize.products import short_products

_T = TypeVar("_T")

# Share of the mean diagonal that is added to the diagonal before inverting (GPTQ, arXiv 2210.17323, step 2).
DAMPING = 0.01
# Up to this size a triangular matrix is inverted at once.
_SOLVED_SIZE = 2048


class InputMoments:
    """Running second moments of one activation over calibration tokens.

    ``x_hat`` is the input as the FP8 GEMM sees it: computed by quantised predecessors and rounded by the
    activation quantiser. ``x`` is what the original model has there for the same tokens.

    Attributes:
        tokens: Rows added so far.
        gram: Mean of ``x_hat^T x_hat``, float32 [K, K]; not to be written to.
        drift: Mean of ``(x - x_hat)^T x_hat``, float32 [K, K], or ``None``; likewise.
    """

    def __init__(self, k: int, *, device: torch.device | str = "cpu", cross: bool = False) -> None:
        """Start empty moments of a [..., k] activation; ``cross`` also collects the mixed moment."""
        self.tokens = 0
        self.gram = torch.zeros(k, k, device=device)
        self.drift = torch.zeros(k, k, device=device) if cross else None
        self._derived: dict[tuple[str, float], Any] = {}
        self._locks: dict[tuple[str, float], threading.RLock] = {}
        self._original: weakref.ref[InputMoments] | None = None  # a cycle would keep their memory
        self._copies: list[InputMoments] = []

    def add(
        self,
        seen: torch.Tensor,
        original: torch.Tensor | None = None,
        *,
        scale: torch.Tensor | float | None = None,
    ) -> None:
        """Add tokens.

        Args:
            seen: x_hat, [..., K]; or x8, when there is a ``scale``.
            original: x, [..., K], the same tokens; needed exactly when the cross moment is collected.
            scale: a of ``x_hat = a * x8``: a number, or one per token [T, 1]. Products then may be taken of
                factors of 8 significant bits, which all x8 of one scale are (:func:`short_products`).
        """
        rows = _rows(seen, self.gram)
        factor = 1.0
        if isinstance(scale, torch.Tensor):
            rows = rows * scale
        elif scale is not None:
            factor = scale
        before, self.tokens = self.tokens, self.tokens + len(rows)
        keep, share = before / max(1, self.tokens), factor / max(1, self.tokens)
        with short_products(scale is not None):
            self.gram.addmm_(rows.t(), rows, beta=keep, alpha=share * factor)
            if self.drift is not None:
                if original is None:
                    raise ValueError("the cross moment needs the original model's input")
                # Of the difference: what is rounded of it is small against the drift, not against x.
                moved = torch.sub(_rows(original, self.gram), rows, alpha=factor)
                self.drift.addmm_(moved.t(), rows, beta=keep, alpha=share)
        self._forget()

    def merge(self, other: InputMoments) -> None:
        """Add the tokens of other moments of the same activation, which may lie on another device."""
        before, self.tokens = self.tokens, self.tokens + other.tokens
        keep, share = before / max(1, self.tokens), other.tokens / max(1, self.tokens)
        self.gram.mul_(keep).add_(other.gram.to(self.gram.device), alpha=share)
        if self.drift is not None:
            if other.drift is None:
                raise ValueError("one of the moments has no cross moment")
            self.drift.mul_(keep).add_(other.drift.to(self.drift.device), alpha=share)
        self._forget()

    def on(self, device: torch.device | str) -> InputMoments:
        """Return them on a device: themselves, or a copy that is kept until tokens are added.

        Each factor is computed on one device, and copied: the inverse's on this one, the correction's on that
        of the first copy. See :meth:`prepare`.
        """
        if torch.device(device) == self.gram.device:
            return self
        return self._once(f"on {device}", 0.0, lambda _: self._copy(device))

    def _copy(self, device: torch.device | str) -> InputMoments:
        copy = InputMoments(0, device=device)
        copy.tokens, copy.gram = self.tokens, self.gram.to(device)
        copy.drift = None if self.drift is None else self.drift.to(device)
        copy._original = weakref.ref(self)
        self._copies.append(copy)
        return copy

    def prepare(self, damping: float, correction_damping: float) -> None:
        """Compute the factor that is this device's task, before it waits for another's."""
        if self._first() is self:
            self.inverse_factor(damping)
        elif self.drift is not None:
            self.correction_factor(correction_damping)

    @property
    def cross(self) -> torch.Tensor | None:
        """Mean of ``x^T x_hat``, float32 [K, K], or ``None``."""
        return None if self.drift is None else self.gram + self.drift

    @property
    def energy(self) -> torch.Tensor:
        """Mean square of every channel of x_hat, float32 [K]."""
        return self.gram.diagonal()

    def inverse_factor(self, damping: float = DAMPING) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the upper Cholesky factor of the damped inverse of the gram matrix, and the column order.

        Columns are taken loudest first (GPTQ's activation order).

        Returns:
            ``(U, order)``: int64 order [K], and float32 [K, K] with
            ``U^T U = (gram[order][:, order] + damping * mean * I)^-1``.
        """
        return self._once("inverse", damping, self._inverse_factor)

    def correction_factor(self, damping: float) -> torch.Tensor:
        """Return the lower Cholesky factor of the damped gram matrix, float32 [K, K]."""
        return self._once("factor", damping, self._correction_factor)

    def damped_gram(self, damping: float = DAMPING) -> torch.Tensor:
        """Return :func:`damp` of the gram matrix, not to be written to."""
        return self._once("damped", damping, lambda share: damp(self.gram.clone(), share))

    def conditional_energy(self, damping: float = DAMPING) -> torch.Tensor:
        """Return every channel's energy that the other channels do not predict, float32 [K].

        It is what an error in this channel's weights costs after the other weights have made up for it.
        """
        return self._once("conditional", damping, self._conditional_energy)

    def _inverse_factor(self, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        if (first := self._first()) is not self:
            factor, order = first.inverse_factor(damping)
            return factor.to(self.gram.device), order.to(self.gram.device)
        order = torch.argsort(self.gram.diagonal(), descending=True, stable=True)
        back = order.flip(0)
        factor = torch.linalg.cholesky(damp(self.gram[back][:, back].double(), damping))
        # Its inverse, read backwards, is the factor: half the work of inverting, and factoring that.
        return _inverse_of_lower(factor).flip(0, 1).float(), order

    def _correction_factor(self, damping: float) -> torch.Tensor:
        copies = self._first()._copies
        if copies and copies[0] is not self:
            return copies[0].correction_factor(damping).to(self.gram.device)
        factor: torch.Tensor = torch.linalg.cholesky(damp(self.gram.double(), damping))
        return factor.float()

    def _conditional_energy(self, damping: float) -> torch.Tensor:
        factor, order = self.inverse_factor(damping)
        energy = torch.empty(len(order), device=factor.device)
        energy[order] = 1.0 / factor.square().sum(dim=0)
        return energy

    def _once(self, what: str, damping: float, compute: Callable[[float], _T]) -> _T:
        """Return ``compute(damping)``, kept until tokens are added: layers that share an input share it."""
        key = (what, damping)
        # One for each, as a device waits for another's factor while that waits for its own.
        with self._locks.setdefault(key, threading.RLock()):
            if key not in self._derived:
                self._derived[key] = compute(damping)
            result: _T = self._derived[key]
            return result

    def _first(self) -> InputMoments:
        """Return what this is a copy of, itself otherwise."""
        original = None if self._original is None else self._original()
        return self if original is None else original

    def _forget(self) -> None:
        self._derived.clear()
        self._copies.clear()


def damp(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Add ``damping`` times the mean diagonal to the diagonal, in place; silent channels count as 1."""
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * mean
    return gram


def _inverse_of_lower(factor: torch.Tensor) -> torch.Tensor:
    """Invert a lower triangular matrix [K, K]; a large one by quarters, one of which is zero.

    Solving for the unit matrix would take half as many operations more, and few of them in products.
    """
    if len(factor) <= _SOLVED_SIZE:
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        solved: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return solved
    middle = len(factor) // 2
    inverse = torch.zeros_like(factor)
    inverse[:middle, :middle] = upper = _inverse_of_lower(factor[:middle, :middle])
    inverse[middle:, middle:] = lower = _inverse_of_lower(factor[middle:, middle:])
    torch.mm(lower, factor[middle:, :middle] @ upper, out=inverse[middle:, :middle]).neg_()
    return inverse


def _rows(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, len(like)).to(device=like.device, dtype=like.dtype)
