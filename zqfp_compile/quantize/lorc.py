"""LoRC: low-rank compensation of a weight's quantisation error (ZeroQuant-V2, arXiv 2303.08302)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.quantize.rounding import round_minifloat
from zqfp_compile.quantize.rtn import SMALLEST_ROW
from zqfp_compile.quantize.threads import threads_for

# Up to this many rows the exact decomposition takes milliseconds.
EXACT_SIZE = 256
# Quantisation errors are nearly white, the worst case of a range finder: these two reach 98% of the energy
# that the exact factors capture (measured, 1536 x 576, ranks 8 to 64) in a twentieth of the time.
OVERSAMPLING = 32
POWER_ITERATIONS = 6

# Share of the mean energy that is added to every direction's in the fit of U.
_RIDGE = 1e-6

# Elements of the error in float64 at once.
_BLOCK = 1 << 20

_FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FACTOR_DTYPES = (*_FLOAT_DTYPES, "fp8")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The factors of ``y += (x @ V) @ U``, holding values their storage type can take.

    Attributes:
        v: float32 [K, r].
        u: float32 [r, N].
        v_scale: float32 [r] when the factors are FP8: ``v / v_scale`` are E4M3 numbers; else ``None``.
        u_scale: float32 [r] likewise: ``u / u_scale[:, None]`` are E4M3 numbers.
    """

    v: torch.Tensor
    u: torch.Tensor
    v_scale: torch.Tensor | None = None
    u_scale: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of V."""
        return int(self.v.shape[1])

    def weight(self, rows: slice = slice(None)) -> torch.Tensor:
        """Return ``(V @ U)^T``, float32 [N, K], or some rows of it: what the branch adds to the weight."""
        return (self.v @ self.u[:, rows]).t()

    def to(self, device: torch.device | str) -> LowRank:
        """Return it on ``device``."""
        scales = [None if scale is None else scale.to(device) for scale in (self.v_scale, self.u_scale)]
        return LowRank(self.v.to(device), self.u.to(device), *scales)


def low_rank_factors(
    error: torch.Tensor,
    rank: int,
    *,
    moment: torch.Tensor | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> LowRank:
    """Factor an error matrix so that ``y += (x @ V) @ U`` adds its best rank-r part back.

    "Best" is by the error of the output, ``tr((E - B) M (E - B)^T)`` with E the error, B of rank r and M the
    second moment of the input. The optimum projects E on the r leading eigenvectors P of ``E M E^T``:
    ``B = P P^T E``, so V = E^T P needs no inverse of M. With M = I it is the paper's truncated SVD.
    LLM inputs have channels hundreds of times louder than others: M is worth several dB (docs/accuracy.md).

    Few rows are decomposed exactly; more by randomised subspace iteration (Halko, Martinsson, Tropp,
    arXiv 0909.4061, algorithm 4.4). V is rounded first; U is then fitted to the rounded V and rounded.

    Args:
        error: W - W_hat, [N, K], any float dtype, CPU or CUDA.
        rank: r, at least 1; cut to min(N, K).
        moment: Second moment of the input: [K, K], or its diagonal [K]; ``None`` is the identity.
        dtype: What the factors are stored in: ``float32``, ``float16``, ``bfloat16``, or ``fp8`` (E4M3 with
            one float scale per rank and factor).
        seed: Of the random range finder.

    Returns:
        The rounded factors, float32 on the error's device, ``V @ U ~ error^T``.

    Raises:
        ValueError: When the rank is below 1, the error is not a matrix, the moment does not fit it or is not
            finite, or the dtype is unknown.
    """
    if error.ndim != 2 or rank < 1:
        raise ValueError(
            f"rank {rank} of an error of shape {tuple(error.shape)}: need a matrix and a rank >= 1"
        )
    if dtype not in FACTOR_DTYPES:
        raise ValueError(f"unknown factor type {dtype!r}; take one of {', '.join(FACTOR_DTYPES)}")
    error = error.detach().to(torch.float32)
    if not float(error.abs().max()) >= SMALLEST_ROW:  # that of weights that count as zeros
        error = torch.zeros_like(error)
    metric = _Metric(moment, error)
    rank = min(rank, *error.shape)
    with threads_for(error):
        leading = _leading_vectors(error, metric, rank, seed)
        v = error.t() @ leading
        v, u = _balanced(v, leading.t())
        v, v_scale = round_factor(v, dtype, axis=0)
        u, u_scale = round_factor(_fitted(error, metric, v, u), dtype, axis=1)
    return LowRank(v, u, v_scale, u_scale)


class _Metric:
    """The product with the input's second moment, scaled to a mean diagonal of one."""

    def __init__(self, moment: torch.Tensor | None, error: torch.Tensor) -> None:
        k = error.shape[1]
        self._moment = None
        if moment is None:
            return
        if moment.shape not in ((k,), (k, k)) or not bool(torch.isfinite(moment).all()):
            raise ValueError(f"moments {tuple(moment.shape)} are not finite numbers for {k} channels")
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        if float(diagonal.min()) < 0:
            raise ValueError("a channel's mean square is negative")
        mean = float(diagonal.double().mean())
        if mean > 0:
            self._moment = (moment / mean).to(device=error.device, dtype=torch.float32)

    @property
    def norm(self) -> float:
        """A bound on the moment's largest eigenvalue."""
        if self._moment is None:
            return 1.0
        return float(self._moment.max()) if self._moment.ndim == 1 else float(self._moment.trace())

    def __call__(self, columns: torch.Tensor) -> torch.Tensor:
        """Return ``M @ columns`` for columns [K, w]."""
        if self._moment is None:
            return columns
        return self._moment[:, None] * columns if self._moment.ndim == 1 else self._moment @ columns


def _leading_vectors(error: torch.Tensor, metric: _Metric, rank: int, seed: int) -> torch.Tensor:
    """Return the ``rank`` leading eigenvectors of ``E M E^T`` as orthonormal columns [N, r]."""
    if len(error) <= max(EXACT_SIZE, 2 * (rank + OVERSAMPLING)):
        basis = torch.eye(len(error), device=error.device)
    else:
        start = _start(error.shape[1], rank + OVERSAMPLING, seed, error.device)
        basis = torch.linalg.qr(error @ metric(start)).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(error @ metric(error.t() @ basis)).Q
    projected = error.t() @ basis
    small = (projected.t() @ metric(projected)).double()
    vectors: torch.Tensor = torch.linalg.eigh((small + small.t()) / 2).eigenvectors.flip(1)[:, :rank]
    return basis @ vectors.to(torch.float32)


@lru_cache(maxsize=16)
def _start(k: int, width: int, seed: int, device: torch.device) -> torch.Tensor:
    """Return random columns, float32 [K, w], not to be written to: kept, as a model has few K's."""
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed)).to(device)


def _balanced(v: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each pair of column and row to equal maxima, by powers of two, so that both fit float16."""
    tall, wide = v.abs().amax(dim=0), u.abs().amax(dim=1)
    ratio = torch.where((tall > 0) & (wide > 0), wide / tall, 1.0)
    factor = torch.exp2((ratio.log2() / 2).round())
    return v * factor, u / factor[:, None]


def _fitted(error: torch.Tensor, metric: _Metric, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return the U [r, N] that goes best with a rounded V: least squares ``(V^T M V) U = V^T M E^T``.

    In directions that M does not see, with fewer tokens than channels for one, U stays what it is: there M is
    rounding, and dividing by it made factors of 1e7.
    """
    weighted = metric(v).double()
    normal = v.double().t() @ weighted
    normal = (normal + normal.t()) / 2
    normal.diagonal().add_(_RIDGE * normal.diagonal().mean().clamp_min(0))
    energies, directions = torch.linalg.eigh(normal)
    # A quarter of the bound: errors of a sum cancel.
    rounding = torch.finfo(torch.float32).eps / 4 * metric.norm * float(v.square().sum(dim=0).max())
    missing = -normal @ u.double()
    # The whole error in float64 would be its size twice over, for which a GPU has room.
    step = len(error) if error.is_cuda else max(1, _BLOCK // error.shape[1])
    for start in range(0, len(error), step):
        block = error[start : start + step].double()
        missing[:, start : start + step] += weighted.t() @ block.t()
    inverse = torch.where(energies > rounding, 1.0 / energies, 0.0)
    change: torch.Tensor = (directions * inverse) @ (directions.t() @ missing)
    return (u + change).to(torch.float32)


def round_factor(factor: torch.Tensor, dtype: str, axis: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round a factor to its storage type; ``axis`` is the one that does not run over ranks."""
    if dtype != "fp8":
        return factor.to(_FLOAT_DTYPES[dtype]).float(), None
    largest = factor.abs().amax(dim=axis, keepdim=True)
    scale = torch.where(largest > 0, largest / E4M3FN.max_value, 1.0)
    return round_minifloat(factor / scale, E4M3FN) * scale, scale.reshape(-1)
