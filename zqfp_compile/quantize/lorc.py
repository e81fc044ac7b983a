"""LoRC: low-rank compensation of a weight's quantisation error (ZeroQuant-V2, arXiv 2303.08302)."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from zqfp_compile.quantize.threads import one_torch_thread

# Below this size the exact decomposition takes milliseconds.
EXACT_SIZE = 256
# Quantisation errors are nearly white, the worst case of a range finder: these two reach 98% of the energy
# that the exact factors capture (measured, 1536 x 576, ranks 8 to 64) in a twentieth of the time.
OVERSAMPLING = 32
POWER_ITERATIONS = 6
# Up to this size threads gain nothing and, on a busy machine, wait for each other: 45 ms on one thread, 140
# to 2000 on two (measured, 1536 x 576, two cores at a load of 6).
ONE_THREAD_SIZE = 1 << 22


# Channels quieter than this share of the mean energy count as this loud: V is divided by their root.
QUIETEST = 1e-3


def low_rank_factors(
    error: torch.Tensor, rank: int, *, energy: torch.Tensor | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor an error matrix so that ``y += (x @ V) @ U`` adds its best rank-r part back.

    "Best" is by the error of the output: with the energies e_k of the input channels, the factors are the
    truncated SVD of ``diag(sqrt(e)) error^T``, unscaled again. It minimises the expected square of
    ``x @ (error^T - V @ U)`` for uncorrelated channels. LLM inputs have channels hundreds of times louder
    than others, so this is worth several dB over the plain SVD (docs/accuracy.md).

    Small matrices are decomposed exactly; larger ones by a randomised range finder with power iterations
    (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). The singular values are split evenly
    between the factors, so that both fit float16.

    Args:
        error: W - W_hat, [N, K], any float dtype, CPU or CUDA.
        rank: r, at least 1; cut to min(N, K).
        energy: Mean (or sum) of x_k^2 over samples of the input, [K]; ``None`` for equal energies.
        seed: Of the random range finder; the result is a function of (error, rank, seed).

    Returns:
        ``V`` [K, r] and ``U`` [r, N], float32 on the error's device, with ``V @ U ~ error^T``.

    Raises:
        ValueError: When the rank is below 1, the error is not a matrix, or the energies do not fit it.
    """
    if error.ndim != 2 or rank < 1:
        raise ValueError(
            f"rank {rank} of an error of shape {tuple(error.shape)}: need a matrix and a rank >= 1"
        )
    matrix = error.detach().to(torch.float32).t()
    loudness = _loudness(energy, matrix)
    matrix = matrix * loudness[:, None]
    rank = min(rank, *matrix.shape)
    with _threads_for(matrix):
        if min(matrix.shape) <= max(EXACT_SIZE, 2 * (rank + OVERSAMPLING)):
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        else:
            left, values, right = _randomised_svd(matrix, rank + OVERSAMPLING, seed)
    root = values[:rank].sqrt()
    v = left[:, :rank] * root / loudness[:, None]
    return v.contiguous(), (root[:, None] * right[:rank]).contiguous()


def _loudness(energy: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """Return the root of the channels' energies relative to their mean, float32 [K]."""
    channels = len(matrix)
    if energy is None:
        return torch.ones(channels, device=matrix.device)
    if energy.shape != (channels,) or not bool(torch.isfinite(energy).all()) or float(energy.min()) < 0:
        raise ValueError(f"energies {tuple(energy.shape)} are not {channels} finite, non-negative numbers")
    mean = energy.double().mean()
    relative = energy.double() / mean if float(mean) > 0 else torch.ones_like(energy, dtype=torch.float64)
    return relative.clamp_min(QUIETEST).sqrt().to(device=matrix.device, dtype=torch.float32)


def _threads_for(matrix: torch.Tensor) -> AbstractContextManager[object]:
    """Keep torch to one thread for the duration when the matrix is small."""
    if matrix.is_cuda or matrix.numel() > ONE_THREAD_SIZE:
        return contextlib.nullcontext()
    return one_torch_thread()


def _randomised_svd(
    matrix: torch.Tensor, width: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading ``width`` singular triples of a matrix, approximately."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ (matrix.t() @ basis)).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left, values, right
