"""Second moments of a linear layer's input: all that GPTQ and LoRC need to know about the data."""

from __future__ import annotations

import torch

# Share of the mean diagonal that is added to the diagonal before inverting (GPTQ, arXiv 2210.17323, step 2).
DAMPING = 0.01


class InputMoments:
    """Running second moments of one activation over calibration tokens.

    ``x_hat`` is the input as the FP8 GEMM sees it: computed by quantised predecessors and rounded by the
    activation quantiser. ``x`` is what the original model has there for the same tokens.

    Attributes:
        tokens: Rows added so far.
    """

    def __init__(self, k: int, *, device: torch.device | str = "cpu", cross: bool = False) -> None:
        """Start empty moments of a [..., k] activation; ``cross`` also collects the mixed moment."""
        self.tokens = 0
        self._gram = torch.zeros(k, k, device=device)
        self._cross = torch.zeros(k, k, device=device) if cross else None
        self._factors: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, seen: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add tokens.

        Args:
            seen: x_hat, [..., K].
            original: x, [..., K], the same tokens; needed exactly when the cross moment is collected.
        """
        rows = _rows(seen, self._gram)
        self._gram.addmm_(rows.t(), rows)
        if self._cross is not None:
            if original is None:
                raise ValueError("the cross moment needs the original model's input")
            self._cross.addmm_(_rows(original, self._gram).t(), rows)
        self.tokens += len(rows)
        self._factors.clear()

    @property
    def gram(self) -> torch.Tensor:
        """Mean of ``x_hat^T x_hat``, float32 [K, K]."""
        return self._gram / max(1, self.tokens)

    @property
    def cross(self) -> torch.Tensor | None:
        """Mean of ``x^T x_hat``, float32 [K, K], or ``None``."""
        return None if self._cross is None else self._cross / max(1, self.tokens)

    @property
    def energy(self) -> torch.Tensor:
        """Mean square of every channel of x_hat, float32 [K]."""
        return self._gram.diagonal() / max(1, self.tokens)

    def inverse_factor(self, damping: float = DAMPING) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the upper Cholesky factor of the damped inverse of the gram matrix, and the column order.

        Columns are taken loudest first (GPTQ's activation order). The result is kept: layers that share an
        input share it.

        Returns:
            ``(U, order)``: int64 order [K], and float32 [K, K] with
            ``U^T U = (gram[order][:, order] + damping * mean * I)^-1``.
        """
        if damping not in self._factors:
            gram = self.gram
            order = torch.argsort(gram.diagonal(), descending=True, stable=True)
            damped = damp(gram[order][:, order].double(), damping)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            self._factors[damping] = torch.linalg.cholesky(inverse, upper=True).float(), order
        return self._factors[damping]

    def conditional_energy(self, damping: float = DAMPING) -> torch.Tensor:
        """Return every channel's energy that the other channels do not predict, float32 [K].

        It is what an error in this channel's weights costs after the other weights have made up for it.
        """
        factor, order = self.inverse_factor(damping)
        energy = torch.empty(len(order), device=factor.device)
        energy[order] = 1.0 / factor.square().sum(dim=0)
        return energy


def damp(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Add ``damping`` times the mean diagonal to the diagonal, in place; silent channels count as 1."""
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * mean
    return gram


def _rows(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, len(like)).to(device=like.device, dtype=like.dtype)
