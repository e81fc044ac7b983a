"""Formats of the paper's tables that the product does not ship: INT8, asymmetric integers, E5M2 weights.

They exist to be compared with (``tools/paper_table.py``): fake quantisation only, no packing. Min-max scales,
for a group of weights (a run of K, or a whole row) or for an activation (per token or per tensor), with the
formats of ZeroQuant-V2 (arXiv 2303.08302) and ZeroQuant-FP (arXiv 2307.09782):

    integer, symmetric   s = max|w| / m,  m = 2^(b-1) - 1    q = clamp(round(w / s), -m, m)
    integer, asymmetric  s = (max w - min w) / (2^b - 1)     q = clamp(round(w / s) + z, 0, 2^b - 1)
                         z = round(-min w / s)               the range is widened to hold 0, as in ONNX
    FP8 E5M2             s = max|w| / 57344                  q = E5M2(w / s)

The value is ``s * q``, asymmetric ``s * (q - z)``. All rounding is to nearest even; scales are real numbers.
Integer weights also try shrunken ranges, as the product's formats do, and keep the best by squared error.
INT4 symmetric is a code book of the product (``weight_format="int4"``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zqfp_compile.formats.minifloat import E5M2
from zqfp_compile.quantize.descent import descend
from zqfp_compile.quantize.gptq import gptq_round
from zqfp_compile.quantize.layer import LayerOptions, corrected
from zqfp_compile.quantize.lorc import LowRank, low_rank_factors
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.quantize.rounding import round_minifloat
from zqfp_compile.quantize.rtn import check_finite


@dataclass(frozen=True)
class _Format:
    """``bits`` per code; integers have codes ``low..high``, of which asymmetric ones use a zero point."""

    bits: int
    low: int = 0
    high: int = 0
    asymmetric: bool = False

    @property
    def largest(self) -> float:
        """What a scale maps the largest magnitude to."""
        return float(self.high) if self.high else E5M2.max_value


REFERENCE_WEIGHTS = {
    "int4-asym": _Format(4, 0, 15, asymmetric=True),
    "int8": _Format(8, -127, 127),
    "int8-asym": _Format(8, 0, 255, asymmetric=True),
    "fp8-e5m2": _Format(8),
}
# Shrunken ranges that the search tries, as RTN's does for the product's formats.
CLIP_FACTORS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78)
SCALE_BITS = 32


class ReferenceGrid:
    """The values W[N, K] can take in a format, scales fixed.

    Attributes:
        scale: float32 [N, G].
        zero: float32 [N, G], the zero points; 0 for symmetric formats.
    """

    def __init__(self, weight: torch.Tensor, weight_format: str, group_size: int, *, search: bool) -> None:
        """Choose the scales for ``weight``.

        Args:
            weight: float32 [N, K].
            weight_format: A key of :data:`REFERENCE_WEIGHTS`.
            group_size: Weights along K per scale; 0 for a whole row.
            search: Choose each group's range among shrunken ones by the squared error.
        """
        self.format = REFERENCE_WEIGHTS[weight_format]
        self.table: torch.Tensor | None = None  # grid.Grid: not made of symmetric magnitudes
        self.group_size = group_size
        self._k = weight.shape[1]
        self._width = min(group_size, self._k) if group_size else self._k
        groups = self._grouped(weight)
        factors = CLIP_FACTORS if search and self.format.high else (1.0,)
        lowest = torch.full_like(groups[..., 0], torch.inf)
        self.scale, self.zero = torch.ones_like(lowest), torch.zeros_like(lowest)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        for factor in factors:
            scale, zero = self._parameters(low * factor, high * factor)
            error = (self._round(groups, scale[..., None], zero[..., None]) - groups).square_().sum(dim=2)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            self.scale = torch.where(better, scale, self.scale)
            self.zero = torch.where(better, zero, self.zero)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight: codes, scales (32 bits, as the constraint ``none``), zero points."""
        per_group = SCALE_BITS + (self.format.bits if self.format.asymmetric else 0)
        return self.format.bits + per_group * self.scale.shape[1] / self._k

    def nearest(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """Return the grid values nearest to column ``index`` of W, [N] -> [N] (``grid.Grid``)."""
        group = index // self._width
        return self._round(column, self.scale[:, group], self.zero[:, group])

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the grid values nearest to W, float32 [N, K]."""
        values = self._round(self._grouped(weight), self.scale[..., None], self.zero[..., None])
        return values.flatten(1)[:, : self._k]

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] -> [N, G, width]; the last group is padded with zeros, which every format can hold."""
        padded = torch.nn.functional.pad(weight, (0, -self._k % self._width))
        return padded.view(len(weight), -1, self._width)

    def _parameters(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.format.asymmetric:
            return asymmetric_parameters(low, high, self.format.high)
        largest = torch.maximum(-low, high)
        scale = torch.where(largest > 0, largest / self.format.largest, 1.0)
        return scale, torch.zeros_like(scale)

    def _round(self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        if not self.format.high:
            return round_minifloat(values / scale, E5M2) * scale
        codes = (values / scale).round_().add_(zero).clamp_(self.format.low, self.format.high)
        return codes.sub_(zero).mul_(scale)


def asymmetric_parameters(
    low: torch.Tensor, high: torch.Tensor, top: int = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero point (an integer, as float32) of codes 0..top for values in [low, high]."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = torch.where(high > low, (high - low) / top, 1.0)
    return scale, (-low / scale).round().clamp(0, top)


def fake_quantize_asymmetric(
    x: torch.Tensor, scale: torch.Tensor | None = None, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Return an activation [..., K] rounded to asymmetric INT8 (codes 0..255), float32.

    Args:
        x: Any float dtype.
        scale: Broadcastable to x; ``None`` takes a range per token (the last axis).
        zero: The zero point that belongs to ``scale``.
    """
    x = x.float()
    if scale is None or zero is None:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        scale, zero = asymmetric_parameters(low, high)
    return ((x / scale).round_().add_(zero).clamp_(0, 255)).sub_(zero).mul_(scale)


@dataclass(frozen=True, eq=False)
class ReferenceLayer:
    """A fake-quantised weight W_hat, float32 [N, K], its compensation, and its bits per weight without it."""

    weight: torch.Tensor
    lorc: LowRank | None
    bits_per_weight: float


def quantize_reference(
    weight: torch.Tensor,
    weight_format: str,
    options: LayerOptions,
    *,
    moments: InputMoments | None = None,
    name: str = "weight",
) -> ReferenceLayer:
    """Quantise W[N, K] to a reference format: :func:`zqfp_compile.quantize.layer.quantize_layer` for these.

    Args:
        weight: [N, K], any float dtype.
        weight_format: A key of :data:`REFERENCE_WEIGHTS`.
        options: ``weight_format`` and ``scale_constraint`` are not looked at; group size 0 is a whole row.
        moments: Second moments of the input; needed by GPTQ, used by LoRC.
        name: The layer, for errors.

    Raises:
        ModelError: When the weight holds NaN or infinity.
        ValueError: When the format is unknown, or GPTQ has no moments.
    """
    if weight_format not in REFERENCE_WEIGHTS:
        raise ValueError(
            f"unknown reference format {weight_format!r}; take one of {', '.join(REFERENCE_WEIGHTS)}"
        )
    if options.algorithm == "gptq" and moments is None:
        raise ValueError(f"{name}: GPTQ needs the input's second moments")
    check_finite(weight.detach(), name)
    weight = weight.detach().float()
    target = weight if moments is None else corrected(weight, moments, options)
    gram = None if moments is None else moments.gram
    values, bits = _quantize(target, weight_format, options, moments)
    if not options.lorc_rank:
        return ReferenceLayer(values, None, bits)
    low_rank = _compensate(target - values, options, gram)
    for _ in range(options.repeats):
        values, bits = _quantize(target - low_rank.weight(), weight_format, options, moments)
        low_rank = _compensate(target - values, options, gram)
    return ReferenceLayer(values, low_rank, bits)


def _compensate(error: torch.Tensor, options: LayerOptions, gram: torch.Tensor | None) -> LowRank:
    return low_rank_factors(error, options.lorc_rank, moment=gram, dtype=options.lorc_dtype)


def _quantize(
    target: torch.Tensor, weight_format: str, options: LayerOptions, moments: InputMoments | None
) -> tuple[torch.Tensor, float]:
    """Return W_hat and the bits per weight."""
    grid = ReferenceGrid(target, weight_format, options.group_size, search=True)
    if options.algorithm == "rtn" or moments is None:
        return grid.round(target), grid.bits_per_weight
    values = gptq_round(target, moments, grid, damping=options.damping)
    gram = moments.damped_gram(options.damping)
    for _ in range(options.sweeps):
        values = descend(target, values, gram, grid)
    return values, grid.bits_per_weight
