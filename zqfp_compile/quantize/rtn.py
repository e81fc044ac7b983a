"""Round-to-nearest weight quantisation with an error search over group and row scales.

The search compares *decoded* weights, the values the engine multiplies with, so the rounding of
``e2m1(c) * s`` to E4M3 is inside the choice and not an afterthought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from zqfp_compile.errors import ModelError
from zqfp_compile.formats.codebook import CODE_BOOKS, CodeBook
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.quantized import QuantizedWeight, group_width
from zqfp_compile.formats.scales import SCALE_CONSTRAINTS, top_scale
from zqfp_compile.quantize import fused
from zqfp_compile.quantize.quantized_tensors import AnyWeight, QuantizedTensors
from zqfp_compile.quantize.rounding import nearest_level, queued, round_minifloat
from zqfp_compile.quantize.threads import one_torch_thread

# Elements of the rows worked on at once: three float32 arrays of it stay in one core's cache. Measured with
# one thread each, 15000 to 30000 elements take 1.5 times as long (calls), 250000 take 1.2 times (memory).
CPU_CHUNK = 1 << 17
CUDA_CHUNK = 1 << 25

# Larger weights would overflow float32 when decoded; rows below the floor count as rows of zeros.
LARGEST_WEIGHT = 2.0**126
SMALLEST_ROW = 2.0**-100

# Places above the smallest legal scale that does not saturate. Among powers of two the next larger
# scale (k - 1) has no value up to the group's maximum that this one lacks: only the clipping k + 1 can win.
# For e4m3, four places up is half as much again: the maximum lands on 4 instead of 6.
SCALE_STEPS = {"m1": (0, -1), "m2": (0, -1), "e4m3": (0, 1, -1, -2, 4)}
# Factors on the row scale: m2 has one free mantissa per row; for e4m3 they shift the grid by parts of a step.
ROW_FACTORS = {
    "m1": (1.0,),
    "m2": tuple(2.0 ** (phase / 8) for phase in range(8)),
    "e4m3": (1.0, 1.03),
}
# With so few groups a row, powers of two and m2's R can beat e4m3's grid (a third of rows of one group, none
# of rows of nine): e4m3 tries m2's choices as well, all legal for it.
FEW_GROUPS = 4
# Unconstrained scales, as multiples of the one that just fits.
CLIP_FACTORS = (
    1.0,
    1.5,
    1.45,
    1.4,
    1.35,
    1.3,
    1.22,
    1.18,
    1.14,
    1.1,
    1.06,
    0.97,
    0.94,
    0.9,
    0.86,
    0.82,
    0.78,
)


@dataclass(frozen=True)
class _Rule:
    """What to quantise to."""

    book: CodeBook
    width: int  # weights per group
    constraint: str
    search: bool
    scale_rows: int = 1
    importance: torch.Tensor | None = None  # float32 [g, G], largest 1, on the weight's device


def quantize_weight(weight: torch.Tensor, **options: Any) -> QuantizedWeight:
    """:func:`quantize_tensors`, checked and on the host."""
    return quantize_tensors(weight, **options).checked()


def quantize_tensors(
    weight: torch.Tensor,
    *,
    weight_format: str = "e2m1",
    group_size: int = 64,
    scale_constraint: str = "e4m3",
    scale_rows: int = 1,
    search: bool = True,
    importance: torch.Tensor | None = None,
    name: str = "weight",
) -> QuantizedTensors:
    """Quantise W[N, K] to the nearest values its format can take.

    Args:
        weight: [N, K], any float dtype, CPU or CUDA; K need not be a multiple of the group size.
        weight_format: ``e2m1``, ``e3m0``, ``int4``, or ``fp8`` (E4M3 with R = max|row| / 448, no groups).
        group_size: Weights along K per group scale; 0: one scale per row.
        scale_constraint: ``none``, ``m1``, ``m2`` or ``e4m3`` (DESIGN section 2); unused for ``fp8``.
        scale_rows: Rows that share one R (a compute group of ``m2``); groups too small for the range that R
            leaves are lifted to its lowest scale.
        search: Choose scales by the squared error of the decoded weight; otherwise each group takes the
            smallest scale that does not saturate it (:func:`zqfp_compile.formats.scales.constrain_scales`).
        importance: [K], finite and not negative: factor on each column's squared error in the search, for
            example the input's second moment. Its size does not matter; ``None`` weighs all alike.
        name: The tensor's name, for errors.

    Returns:
        The quantised weight, on W's device. Rows of zeros (below 2^-100) have codes 0, and R = 1 unless they
        share another row's.

    Raises:
        ModelError: When the weight holds NaN, infinity or values beyond 2^126.
        ValueError: On an unknown format or constraint, ``scale_rows`` without ``m2``, a weight that is not a
            non-empty matrix, or an importance that does not fit it.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(weight.shape)} is not a non-empty matrix")
    if scale_constraint not in SCALE_CONSTRAINTS:
        raise ValueError(f"unknown scale constraint {scale_constraint!r}")
    if scale_rows < 1 or (scale_rows > 1 and scale_constraint != "m2"):
        raise ValueError(f"{scale_constraint} scales have no compute groups of {scale_rows} rows")
    weight = weight.detach()
    check_finite(weight, name)
    if weight_format == "fp8":
        return _quantize_fp8(weight, group_size, scale_constraint)
    if weight_format not in CODE_BOOKS:
        raise ValueError(f"unknown weight format {weight_format!r}")
    width = group_width(weight.shape[1], group_size)
    columns = None if importance is None else _group_importance(importance, weight, width)
    rule = _Rule(CODE_BOOKS[weight_format], width, scale_constraint, search, scale_rows, columns)
    return _quantize_4bit(weight, rule, group_size)


def decoded_levels(weight: AnyWeight, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the magnitudes that a decoded weight of each group can take, float32 [8, N, G] in code order.

    ``levels[abs(c), n, j]`` is exactly ``abs(weight.dequantize()[n, k])`` for ``c = weight.codes[n, k]`` in
    group j; the code's sign is the value's.

    Raises:
        ValueError: For ``fp8`` weights, which have no code book.
    """
    weight = QuantizedTensors.of(weight, device)
    scales = weight.group_scales
    if scales is None:
        raise ValueError(f"{weight.weight_format} weights have no code book")
    width = group_width(weight.k, weight.group_size)
    rule = _Rule(CODE_BOOKS[weight.weight_format], width, weight.scale_constraint, search=False)
    return _levels(scales, weight.row_scales, rule).view(-1, *scales.shape)


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Check that every value is finite and at most 2^126.

    Raises:
        ModelError: Naming the tensor and the number of bad values.
    """
    low, high = torch.aminmax(weight)
    if float(low) >= -LARGEST_WEIGHT and float(high) <= LARGEST_WEIGHT:
        return
    bad = int((~(weight.double().abs() <= LARGEST_WEIGHT)).sum())
    raise ModelError(
        f"weight {name!r}: {bad} of {weight.numel()} values are NaN, infinite or beyond 2^126; "
        "repair the weight, or leave the layer out with --exclude"
    )


def _group_importance(importance: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
    """Return importance [K] as float32 [g, G] with a largest value of 1, so that errors cannot overflow."""
    values = importance.detach().to(weight.device, torch.float32)
    if values.shape != weight.shape[1:]:
        raise ValueError(f"importance {tuple(values.shape)} does not fit a weight {tuple(weight.shape)}")
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError("importance must be finite and not negative")
    largest = values.max()
    # Nothing matters: then everything matters alike.
    values = torch.where(largest > 0, values / largest, 1.0)
    values = torch.nn.functional.pad(values, (0, -len(values) % width))
    return values.view(-1, width).t().contiguous()


def _quantize_fp8(weight: torch.Tensor, group_size: int, scale_constraint: str) -> QuantizedTensors:
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    row_scales = torch.empty(n, device=weight.device)

    def work(start: int, stop: int) -> None:
        rows, factor = _normalise(weight[start:stop], 1)
        largest = rows.abs().amax(dim=1)
        scale = torch.where(largest > 0, largest / E4M3FN.max_value, 1.0)
        codes[start:stop] = round_minifloat(rows / scale[:, None], E4M3FN)
        row_scales[start:stop] = scale * factor

    _for_row_chunks(weight, k, 1, work)
    return QuantizedTensors(codes, None, row_scales, k, "fp8", group_size, scale_constraint)


def _quantize_4bit(weight: torch.Tensor, rule: _Rule, group_size: int) -> QuantizedTensors:
    n, k = weight.shape
    groups = -(-k // rule.width)
    padded = groups * rule.width
    codes = torch.empty(n, padded, dtype=torch.int8, device=weight.device)
    group_scales = torch.empty(n, groups, device=weight.device)
    row_scales = torch.empty(n, device=weight.device)

    def work(start: int, stop: int) -> None:
        values, factor = _normalise(weight[start:stop], rule.scale_rows)
        values = torch.nn.functional.pad(values, (0, padded - k))
        signed, scales, rows = _quantize_rows(values, rule)
        if rule.constraint == "none":
            scales, factor = scales * factor[:, None], torch.ones_like(factor)
        codes[start:stop] = signed
        group_scales[start:stop] = scales
        row_scales[start:stop] = rows * factor

    _for_row_chunks(weight, padded, rule.scale_rows, work)
    return QuantizedTensors(
        codes, group_scales, row_scales, k, rule.book.name, group_size, rule.constraint, rule.scale_rows
    )


def _for_row_chunks(
    weight: torch.Tensor, row_length: int, block: int, work: Callable[[int, int], None]
) -> None:
    """Call ``work(start, stop)`` for runs of whole blocks of rows, about a chunk each; it fills its rows."""
    chunk = CUDA_CHUNK if weight.is_cuda else CPU_CHUNK
    step = block * max(1, chunk // (row_length * block))
    # A pool of Python threads over the chunks was tried: 1.4 times the processor time.
    with one_torch_thread():
        for start in range(0, len(weight), step):
            work(start, min(start + step, len(weight)))


def _normalise(rows: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale blocks of rows to maxima in [1, 2) by powers of two: squares neither overflow nor vanish.

    Returns:
        float32 rows [r, K], those below the floor being all zeros, and the factors [r] that undo the scaling.
    """
    rows = rows.to(torch.float32)
    largest = over_blocks(rows.abs().amax(dim=1), block, torch.amax)
    usable = largest >= SMALLEST_ROW
    power = largest.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    factor = torch.where(usable, power, 1.0)
    return torch.where(usable[:, None], rows / factor[:, None], 0.0), factor


def over_blocks(values: torch.Tensor, block: int, combine: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Replace each of the values [r] by ``combine`` (``torch.sum``, ``torch.amax``) of its block of rows.

    The last block may be short: zeros fill it up, so values to take a maximum of must not be negative.
    """
    if block == 1:
        return values
    padded = torch.nn.functional.pad(values, (0, -len(values) % block))
    return combine(padded.view(-1, block), dim=1).repeat_interleave(block)[: len(values)]


def _quantize_rows(values: torch.Tensor, rule: _Rule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise normalised, padded rows: float32 [r, Kp] -> int8 codes [r, Kp], s [r, G], R [r]."""
    # The group goes first, so that a scale per group is a contiguous row to broadcast.
    sizes = values.abs().view(-1, rule.width).t().contiguous()
    ideal = sizes.amax(dim=0).view(len(values), -1) / rule.book.max_magnitude
    scales, rows = _choose_scales(sizes, ideal, rule)
    index = nearest_level(sizes, _levels(scales, rows, rule)).t().reshape(values.shape)
    return index.copysign_(values).to(torch.int8), scales, rows


def _levels(scales: torch.Tensor, rows: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """Return the eight magnitudes of a decoded weight: s [..., r, G], R [r] -> float32 [8, ... * r * G]."""
    magnitudes = queued(torch.tensor(rule.book.magnitudes, dtype=torch.float32), scales.device)
    levels = magnitudes.view(-1, *(1 for _ in scales.shape)) * scales
    if rule.constraint != "none":
        levels = round_minifloat(levels, E4M3FN).mul_(rows[:, None])
    return levels.view(len(magnitudes), -1)


def _choose_scales(
    sizes: torch.Tensor, ideal: torch.Tensor, rule: _Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return group scales s [r, G] and row scales R [r].

    Args:
        sizes: float32 [g, r * G], magnitudes of normalised weights.
        ideal: float32 [r, G], the real scale at which each group just fits.
        rule: What to quantise to.
    """
    candidates = _candidates(ideal, rule)
    if not rule.search:
        rows, (scales, *_) = candidates[0]
        return scales, rows
    best_error = torch.full_like(ideal[:, 0], torch.inf)
    best_scales, best_rows = torch.empty_like(ideal), torch.empty_like(best_error)
    for rows, choices in candidates:
        lowest, scales = _best(sizes, rows, choices, rule)
        row_error = over_blocks(lowest.sum(dim=1), rule.scale_rows, torch.sum)
        better = row_error < best_error
        best_error = torch.where(better, row_error, best_error)
        best_scales = torch.where(better[:, None], scales, best_scales)
        best_rows = torch.where(better, rows, best_rows)
    return best_scales, best_rows


def _best(
    sizes: torch.Tensor, rows: torch.Tensor, choices: Sequence[torch.Tensor], rule: _Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each group's smallest error [r, G], and the first of the scales [r, G] that has it."""
    if fused.measures(sizes):  # all at once: launches cost more than they compute
        tried = torch.stack(list(choices))
        errors = _group_errors(sizes, _levels(tried, rows, rule), rule.importance).view(tried.shape)
        lowest, best = errors.min(dim=0)
        return lowest, tried.gather(0, best[None])[0]
    lowest, scales = torch.full_like(choices[0], torch.inf), choices[0]
    for choice in choices:
        error = _group_errors(sizes, _levels(choice, rows, rule), rule.importance).view(choice.shape)
        scales = torch.where(error < lowest, choice, scales)
        lowest = torch.minimum(error, lowest)
    return lowest, scales


def _group_errors(sizes: torch.Tensor, levels: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Return the squared error [M] of each group when sizes [g, M] take the nearest of the levels [8, M].

    Args:
        sizes: Magnitudes; M runs over rows, then groups.
        levels: Each group's levels, ascending from 0; on a GPU of several sets, [8, C * M] -> [C * M].
        importance: Factors [g, G] on the squared errors, alike for all rows.
    """
    if fused.measures(sizes):
        return fused.group_errors(sizes, levels, importance)
    nearest = sizes.clone()  # level 0 is zero
    distance = torch.empty_like(sizes)
    for level in levels[1:]:
        torch.sub(sizes, level, out=distance)
        torch.minimum(nearest, distance.abs_(), out=nearest)
    nearest.square_()
    if importance is not None:
        nearest.view(len(sizes), -1, importance.shape[1]).mul_(importance[:, None])
    return nearest.sum(dim=0)


def _candidates(ideal: torch.Tensor, rule: _Rule) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Return row scales R [r], each with the group scales [r, G] to try under it; the plain choice first."""
    largest = over_blocks(ideal.amax(dim=1), rule.scale_rows, torch.amax)
    if rule.constraint == "none":
        base = torch.where(ideal > 0, ideal, 1.0)
        return [(torch.ones_like(largest), [base * factor for factor in CLIP_FACTORS])]
    result = []
    for factor in ROW_FACTORS[rule.constraint]:
        rows = _row_scale(largest, rule) * factor
        wanted = ideal / rows[:, None] * (1 - 1e-6)  # R carries a rounding error
        result.append((rows, _legal_scales(wanted, SCALE_STEPS[rule.constraint], rule)))
    if rule.constraint == "e4m3" and ideal.shape[1] <= FEW_GROUPS:
        result += _candidates(ideal, replace(rule, constraint="m2"))
    return result


def _row_scale(largest: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """:func:`zqfp_compile.formats.scales.row_scale` in torch; rows of zeros get 1."""
    scale = largest
    if rule.constraint == "m1":  # 2^ceil(log2)
        scale = (largest.view(torch.int32) + 0x7FFFFF).bitwise_and(0x7F800000).view(torch.float32)
    return torch.where(largest > 0, scale / top_scale(rule.constraint, rule.book), 1.0)


def _legal_scales(wanted: torch.Tensor, steps: Sequence[int], rule: _Rule) -> list[torch.Tensor]:
    """Return the legal scales so many places above the smallest one >= ``wanted``, within the range.

    Without their low mantissa bits, the bits of a float32 count the legal scales upwards.
    """
    dropped = 20 if rule.constraint == "e4m3" else 23
    low, high = torch.tensor([rule.book.min_scale, rule.book.max_scale]).view(torch.int32).tolist()
    place = (wanted.view(torch.int32) + ((1 << dropped) - 1)) >> dropped
    places = [(place + step).clamp_(low >> dropped, high >> dropped) for step in steps]
    return [each.bitwise_left_shift_(dropped).view(torch.float32) for each in places]
