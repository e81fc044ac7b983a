"""What each way to store a layer costs: the rise of the model's loss, in nats per token.

The loss rises in proportion to the energy of a small error in a layer's output (the error is as often right
as wrong, so the first order vanishes). The factor differs by orders of magnitude between layers and is
measured end to end: a group of layers gets its 4-bit rounding errors, and the divergence of the predictions
is what the group costs at those errors. Within the group, and for other formats and LoRC ranks, the energy
of the output error relative to the output's, ``tr(E D E^T) / tr(W D W^T)`` with D the mean squares of the
input channels, scales it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from zqfp_compile.formats.quantized import group_width
from zqfp_compile.plan import LinearSite, QuantPlan, WeightSource
from zqfp_compile.precision.assign import Candidate
from zqfp_compile.precision.probe import Probe
from zqfp_compile.quantize.activation import fake_quantize_activation
from zqfp_compile.quantize.lorc import LowRank, low_rank_factors
from zqfp_compile.quantize.rtn import quantize_weight

Progress = Callable[[int, int, str], None]
Float32 = npt.NDArray[np.float32]
Energy = npt.NDArray[np.float64]
ReadWeight = Callable[[WeightSource], Float32]

# Ranks up to 16 in steps of 4, then wider: the gain of the next rank falls.
RANKS = (0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# GPTQ's error is taken to be what LoRC of this rank under channel energies leaves of round-to-nearest's: in
# SmolLM2 the two are as large, and LoRC after GPTQ gains what the next ranks gain (docs/accuracy.md).
GPTQ_RANK = 16
# Runs of the model that the groups may take. Docs/accuracy.md compares it with one per layer.
MAX_RUNS = 48


@dataclass(frozen=True)
class Statistics:
    """What calibration measured, per activation name.

    Attributes:
        energies: Sum or mean of squares per channel, float64 [K].
        rows: Sample rows, float32 [m, K].
        scales: Static scale of the quantised activation; empty when scales are per token.
    """

    energies: Mapping[str, Energy]
    rows: Mapping[str, Float32]
    scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one weight's output, relative to the output's energy, and what they do.

    Attributes:
        layers: Names of the layers that share the weight.
        weight: Relative error of the plan's weight format per LoRC rank.
        fp8: Relative error of FP8 weights.
        activation: Relative error that rounding the activation makes, whatever the weight's format.
        divergence: Nats per token that ``weight[0]`` costs.
    """

    layers: tuple[str, ...]
    weight: Mapping[int, float]
    fp8: float
    activation: float
    divergence: float = field(default=0.0)

    def cost(self, error: float) -> float:
        """Return the nats per token of another relative error."""
        return self.divergence * error / self.weight[0] if self.weight[0] else 0.0


def measure(
    plan: QuantPlan,
    read_weight: ReadWeight,
    probe: Probe,
    statistics: Statistics,
    *,
    max_rank: int,
    max_runs: int = MAX_RUNS,
    gptq: bool = False,
    seed: int = 0,
    progress: Progress = lambda done, total, detail: None,
) -> tuple[LayerErrors, ...]:
    """Measure every planned weight.

    Args:
        plan: Layers and formats; ``plan.weight_format`` is the 4-bit format.
        read_weight: Returns W, float32 [N, K].
        probe: Opened for the plan's layers.
        statistics: Of the layers' activations.
        max_rank: Largest LoRC rank to look at.
        max_runs: The most runs of the probe; layers of a kind are measured together to stay below.
        gptq: Whether the weights will be rounded by GPTQ, not to nearest.
        seed: Of LoRC's range finder.
        progress: Called with (runs done, runs, text).
    """
    units = _units(plan)
    groups = group_layers([unit[0].name for unit in units], max_runs)
    result: dict[int, LayerErrors] = {}
    for done, group in enumerate(groups):
        progress(done, len(groups), f"sensitivity of {units[group[0]][0].name}")
        errors: dict[str, Float32] = {}
        for index in group:
            sites = units[index]
            weight = torch.from_numpy(read_weight(sites[0].weight))
            result[index], error = _weigh(plan, sites, weight, statistics, max_rank, gptq, seed)
            errors.update({site.name: error for site in sites})
        divergence = probe.divergence(errors)
        total = sum(result[index].weight[0] for index in group)
        for index in group:
            found = result[index]
            share = found.weight[0] / total if total else 0.0
            result[index] = LayerErrors(
                found.layers, found.weight, found.fp8, found.activation, divergence * share
            )
    progress(len(groups), len(groups), "")
    return tuple(result[index] for index in range(len(units)))


def group_layers(names: Sequence[str], max_groups: int) -> list[list[int]]:
    """Put layers of one kind and neighbouring blocks together; indices of ``names``, at most ``max_groups``.

    A kind is a name without its numbers. Layers of one kind and similar depth react alike to relative errors;
    the first and last of a kind do not, so they stay alone where that many groups are allowed.
    """
    kinds: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(index)
    if len(kinds) > max_groups:
        return _runs(list(range(len(names))), max_groups)
    singles = [members for members in kinds.values() if len(members) == 1]
    many = [members for members in kinds.values() if len(members) > 1]
    if not many:
        return singles
    each = (max_groups - len(singles)) // len(many)
    return singles + [run for members in many for run in _split_kind(members, each)]


def _split_kind(members: list[int], parts: int) -> list[list[int]]:
    if parts < 4 or len(members) <= parts:
        return _runs(members, parts)
    return [members[:1], *_runs(members[1:-1], parts - 2), members[-1:]]


def _runs(members: list[int], parts: int) -> list[list[int]]:
    return [chunk.tolist() for chunk in np.array_split(members, max(1, min(parts, len(members))))]


def candidates(
    plan: QuantPlan, site: LinearSite, errors: LayerErrors, *, floats: bool = True
) -> list[Candidate]:
    """Return the ways to store a layer's weight with their bits and nats per token.

    Args:
        plan: The 4-bit format, group size and storage of LoRC factors.
        site: One of the layers that share the weight.
        errors: What was measured.
        floats: Also offer FP8 weights, and leaving the layer as it is. A layer that shares its table with an
            embedding has FP8 and no 4-bit form: next to that the embedding would keep the float table.
    """
    tied = site.name in plan.tied
    result = [
        Candidate(
            plan.weight_format,
            rank,
            stored_bits(plan, site, plan.weight_format, rank),
            errors.cost(error + errors.activation),
        )
        for rank, error in errors.weight.items()
        if not tied
    ]
    if floats or tied:
        cost = errors.cost(errors.fp8 + errors.activation)
        result.append(Candidate("fp8", 0, stored_bits(plan, site, "fp8", 0), cost))
    if floats:
        result.append(Candidate("none", 0, stored_bits(plan, site, "none", 0), 0.0))
    return result


def stored_bits(plan: QuantPlan, site: LinearSite, weight_format: str, rank: int) -> int:
    """Return the bits that a layer's weight takes: codes, scales and LoRC factors."""
    n, k = site.n, site.k
    if weight_format == "none":
        return n * k * site.dtype.bitwidth
    if weight_format == "fp8":
        return 8 * n * k + 32 * n
    groups = -(-k // group_width(k, plan.group_size))
    scale_bits = 32 if plan.scale_constraint == "none" else 8
    bits = n * groups * (4 * group_width(k, plan.group_size) + scale_bits) + 32 * n
    factor_bits = 8 if plan.lorc_format == "fp8" else site.dtype.bitwidth
    return bits + rank * (n + k) * factor_bits + (64 * rank if plan.lorc_format == "fp8" else 0)


def _units(plan: QuantPlan) -> list[tuple[LinearSite, ...]]:
    """Group the layers that share a weight: it is stored once, so it has one precision."""
    shared: dict[WeightSource, list[LinearSite]] = {}
    for site in plan.linears:
        shared.setdefault(site.weight, []).append(site)
    return [tuple(sites) for sites in shared.values()]


def _weigh(
    plan: QuantPlan,
    sites: Sequence[LinearSite],
    weight: torch.Tensor,
    statistics: Statistics,
    max_rank: int,
    gptq: bool,
    seed: int,
) -> tuple[LayerErrors, Float32]:
    """Return the relative errors of one weight, and its 4-bit error W_hat - W, float32 [N, K]."""
    site = sites[0]
    energy = torch.from_numpy(sum(statistics.energies[item.activation] for item in sites)).float()
    output = _energy(weight, energy)
    error = _rounding_error(plan, site, weight, plan.weight_format)
    if gptq:
        made_up = low_rank_factors(-error, min(GPTQ_RANK, *weight.shape), moment=energy, seed=seed)
        error += (made_up.v @ made_up.u).T
    ranks = [rank for rank in RANKS if rank <= min(max_rank, *weight.shape)]
    left = {0: _energy(error, energy)}
    if len(ranks) > 1:
        dtype = plan.factor_dtype(site)
        factors = low_rank_factors(-error, ranks[-1], moment=energy, dtype=dtype, seed=seed)
        left = _remaining(left[0], factors, energy, ranks)
    fp8 = _energy(_rounding_error(plan, site, weight, "fp8"), energy)
    relative = {rank: value / output if output else 0.0 for rank, value in left.items()}
    activation = sum(_activation_error(plan, item, weight, statistics) for item in sites) / len(sites)
    found = LayerErrors(
        tuple(item.name for item in sites), relative, fp8 / output if output else 0.0, activation
    )
    return found, error.numpy()


def _rounding_error(
    plan: QuantPlan, site: LinearSite, weight: torch.Tensor, weight_format: str
) -> torch.Tensor:
    quantized = quantize_weight(
        weight,
        weight_format=weight_format,
        group_size=plan.group_size,
        scale_constraint=plan.scale_constraint,
        scale_rows=plan.scale_rows,
        name=site.name,
    )
    return torch.from_numpy(quantized.dequantize()) - weight


def _energy(matrix: torch.Tensor, energy: torch.Tensor) -> float:
    """Return tr(M D M^T) for M [N, K] and the diagonal D [K]."""
    return float((matrix.square().sum(dim=0).double() * energy).sum())


def _remaining(
    total: float, factors: LowRank, energy: torch.Tensor, ranks: Sequence[int]
) -> dict[int, float]:
    """Return the output error's energy after LoRC of each rank, from the factors of the largest.

    The leading components are those of a smaller rank, and they are orthogonal to each other.
    """
    captured = (factors.v.square() * energy[:, None]).sum(dim=0) * factors.u.square().sum(dim=1)
    sums = torch.cat([torch.zeros(1), captured]).cumsum(0).tolist()
    return {rank: max(0.0, total - sums[rank]) for rank in ranks}


def _activation_error(
    plan: QuantPlan, site: LinearSite, weight: torch.Tensor, statistics: Statistics
) -> float:
    """Return the relative output error that rounding the activation makes, on sample rows."""
    if plan.activation_format == "none":
        return 0.0
    rows = torch.from_numpy(statistics.rows[site.activation])
    scale = None if plan.per_token else statistics.scales[site.activation]
    error = fake_quantize_activation(rows, plan.activation_format, scale) - rows
    columns = weight.square().sum(dim=0).double()
    output = float((rows.square().double() @ columns).sum())
    return float((error.square().double() @ columns).sum()) / output if output else 0.0
