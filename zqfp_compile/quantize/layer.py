"""One linear layer's weight, quantised by the chosen algorithm with its low-rank compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.quantize.descent import descend, refit_rows, refit_scales
from zqfp_compile.quantize.gptq import gptq_round
from zqfp_compile.quantize.grid import WeightGrid, decoded
from zqfp_compile.quantize.lorc import LowRank, low_rank_factors
from zqfp_compile.quantize.moments import DAMPING, InputMoments
from zqfp_compile.quantize.rtn import check_finite, quantize_weight
from zqfp_compile.quantize.threads import threads_for

Algorithm = Literal["rtn", "gptq"]


@dataclass(frozen=True)
class LayerOptions:
    """How to quantise one layer.

    Attributes:
        algorithm: ``rtn`` (nearest, needs no data) or ``gptq``.
        weight_format: ``e2m1``, ``e3m0``, ``int4`` or ``fp8``.
        group_size: Weights along K per group scale.
        scale_constraint: ``none``, ``m1``, ``m2`` or ``e4m3``.
        scale_rows: Rows that share one row scale (``m2`` only).
        lorc_rank: Rank of the compensation; 0 for none.
        lorc_dtype: Storage of its factors (:data:`zqfp_compile.quantize.lorc.FACTOR_DTYPES`).
        repeats: Times that quantisation is repeated on the weight less its compensation.
        sweeps: Sweeps of coordinate descent after GPTQ.
        correction: Share of the correction for what earlier layers' errors did to the input, 0 to 1.
        correction_damping: Damping of that correction, a share of the mean energy of the channels.
        damping: GPTQ's damping.
        importance: What an error in an input channel counts in GPTQ's choice of scales: the same everywhere,
            the channel's energy, or the part of its energy that other channels do not predict.
    """

    algorithm: Algorithm = "gptq"
    weight_format: str = "e2m1"
    group_size: int = 64
    scale_constraint: str = "e4m3"
    scale_rows: int = 1
    lorc_rank: int = 0
    lorc_dtype: str = "float16"
    repeats: int = 1
    sweeps: int = 1
    correction: float = 1.0
    correction_damping: float = 0.3
    damping: float = DAMPING
    importance: Literal["none", "energy", "conditional"] = "conditional"


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A quantised weight and its compensation."""

    weight: QuantizedWeight
    lorc: LowRank | None

    def effective_weight(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return W_hat, float32 [N, K], without the compensation."""
        return decoded(self.weight, device)


def quantize_layer(
    weight: torch.Tensor,
    options: LayerOptions,
    *,
    moments: InputMoments | None = None,
    energy: torch.Tensor | None = None,
    seed: int = 0,
    name: str = "weight",
) -> QuantizedLayer:
    """Quantise W[N, K].

    Args:
        weight: [N, K], any float dtype.
        options: What to do.
        moments: Second moments of the input; GPTQ needs them, LoRC weighs the error with them. With a cross
            moment the weight is first moved to ``W* = W C G^-1``, the weight that best turns the quantised
            model's input into the original model's output.
        energy: Mean square of every input channel [K], for LoRC without moments.
        seed: Of LoRC's range finder.
        name: The layer, for errors.

    Raises:
        ModelError: When the weight holds NaN, infinity or values beyond 2^126.
        ValueError: When GPTQ has no moments.
    """
    if options.algorithm == "gptq" and moments is None:
        raise ValueError(f"{name}: GPTQ needs the input's second moments")
    check_finite(weight.detach(), name)
    device = weight.device if moments is None else moments.gram.device
    weight = weight.detach().to(device=device, dtype=torch.float32)
    moment = energy if moments is None else moments.gram
    with threads_for(weight):
        target = weight if moments is None else corrected(weight, moments, options)
        quantized = _quantize(target, options, moments, name)
        low_rank: LowRank | None = None
        for repeat in range(options.repeats + 1 if options.lorc_rank else 0):
            if low_rank is not None:
                quantized = _quantize(target - low_rank.weight(), options, moments, name)
            error = target - decoded(quantized, device)
            low_rank = low_rank_factors(
                error, options.lorc_rank, moment=moment, dtype=options.lorc_dtype, seed=seed + repeat
            )
    return QuantizedLayer(quantized, low_rank)


def corrected(weight: torch.Tensor, moments: InputMoments, options: LayerOptions) -> torch.Tensor:
    """Return ``W* = W + share * W (C - G) (G + damping)^-1``, float32 [N, K]; W without a cross moment.

    W* minimises ``E |W x - W* x_hat|^2``: it undoes what is linear in the errors that earlier layers left in
    x_hat (GPTAQ, arXiv 2504.02692, solves the same problem column by column).
    """
    if moments.drift is None or not options.correction:
        return weight
    factor = moments.correction_factor(options.correction_damping)
    move = torch.cholesky_solve((weight @ moments.drift).t(), factor).t()
    return weight + options.correction * move


def _quantize(
    target: torch.Tensor, options: LayerOptions, moments: InputMoments | None, name: str
) -> QuantizedWeight:
    if options.algorithm == "rtn":
        moments = None  # LoRC alone weighs with them
    importance = None
    if moments is not None and options.importance == "energy":
        importance = moments.energy
    elif moments is not None and options.importance == "conditional":
        importance = moments.conditional_energy(options.damping)
    start = quantize_weight(
        target,
        weight_format=options.weight_format,
        group_size=options.group_size,
        scale_constraint=options.scale_constraint,
        scale_rows=options.scale_rows,
        name=name,
        importance=importance,
    )
    if moments is None:
        return start
    grid = WeightGrid(start, target.device)
    quantized = grid.encode(gptq_round(target, moments, grid, damping=options.damping))
    gram = moments.damped_gram(options.damping)
    for _ in range(options.sweeps):
        quantized = refit_rows(refit_scales(quantized, target, gram), target, gram)
        grid = WeightGrid(quantized, target.device)
        values = decoded(quantized, target.device)
        quantized = grid.encode(descend(target, values, gram, grid))
    return quantized
