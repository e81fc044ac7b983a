"""SiLU times up on the GPU in float64: what ``kernels.reference`` has for numpy."""

from __future__ import annotations

import torch

from zqfp_compile.kernels.packing import GATED_ROWS


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, unrounded: float64 [..., K] of two [..., K]."""
    wide = gate.double()
    return wide / (1 + torch.exp(-wide)) * up.double()


def gated(y: torch.Tensor) -> torch.Tensor:
    """Return the same of a gated layer's rows: float64 [M, N / 2] of [M, N]."""
    gate, up = y.reshape(len(y), -1, 2, GATED_ROWS).unbind(2)
    return silu_mul(gate, up).reshape(len(y), -1)
