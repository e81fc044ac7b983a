"""The quantize step: every planned weight becomes codes, scales and LoRC factors on disk, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.plan import LinearTensors, QuantPlan, WeightSource
from zqfp_compile.quantize.lorc import low_rank_factors
from zqfp_compile.quantize.rtn import quantize_weight
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import read_weight

_NUMPY_DTYPES = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def quantize_model(
    model: ir.Model,
    plan: QuantPlan,
    store: TensorStore,
    *,
    lorc_rank: int,
    energies: Mapping[str, npt.NDArray[np.float64]],
    seed: int,
    progress: Callable[[int, int, str], None],
) -> QuantPlan:
    """Quantise the weights of ``plan.linears``: round-to-nearest with error search, then LoRC on the rest.

    Linears that share a weight share its tensors. At most one weight is in memory.

    Args:
        model: Model the weights are read from (memory-mapped external data).
        plan: Layers and formats.
        store: Where the quantised tensors go.
        lorc_rank: Rank of the compensation ``x @ V @ U`` of ``W - W_hat`` (ZeroQuant-V2, section 5); 0: none.
        energies: Energy of every input channel [K] per activation name; LoRC weighs the error with them. An
            activation that is not in it counts as equally loud everywhere.
        seed: Seed of the randomised SVD.
        progress: Called with (done, total, layer name).

    Returns:
        The plan with ``tensors`` filled.

    Raises:
        ModelError: When a weight holds NaN or Inf.
    """
    loudness = _energy_per_weight(plan, energies)
    done: dict[WeightSource, LinearTensors] = {}
    tensors: dict[str, LinearTensors] = {}
    for index, site in enumerate(plan.linears):
        progress(index, len(plan.linears), site.name)
        if site.weight not in done:
            weight = torch.from_numpy(read_weight(model, site.weight))
            quantized = quantize_weight(
                weight,
                weight_format=plan.weight_format,
                group_size=plan.group_size,
                scale_constraint=plan.scale_constraint,
                scale_rows=plan.scale_rows,
                name=site.name,
            )
            factors = _lorc(weight, quantized, lorc_rank, loudness.get(site.weight), seed)
            done[site.weight] = _store(store, site.name, quantized, factors, site.dtype)
        tensors[site.name] = done[site.weight]
    progress(len(plan.linears), len(plan.linears), "")
    return plan.replace(tensors=tensors)


def _energy_per_weight(
    plan: QuantPlan, energies: Mapping[str, npt.NDArray[np.float64]]
) -> dict[WeightSource, torch.Tensor]:
    """Add up the energies of all activations a weight is multiplied with."""
    result: dict[WeightSource, torch.Tensor] = {}
    for site in plan.linears:
        if site.activation in energies:
            energy = torch.from_numpy(energies[site.activation])
            result[site.weight] = result[site.weight] + energy if site.weight in result else energy
    return result


def _lorc(
    weight: torch.Tensor, quantized: QuantizedWeight, rank: int, energy: torch.Tensor | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if rank == 0:
        return None
    error = weight.sub_(torch.from_numpy(quantized.dequantize()))  # the weight is not needed any more
    factors = low_rank_factors(error, rank, moment=energy, seed=seed)
    return factors.v, factors.u


def _store(
    store: TensorStore,
    name: str,
    quantized: QuantizedWeight,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: ir.DataType,
) -> LinearTensors:
    fp8 = quantized.weight_format == "fp8"
    scale_type = ir.DataType.FLOAT if quantized.scale_constraint == "none" else ir.DataType.FLOAT8E4M3FN
    code_type = ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.INT4
    group_scales = quantized.group_scales
    lorc_v = lorc_u = None
    if factors is not None:
        v, u = (factor.numpy().astype(_NUMPY_DTYPES[dtype]) for factor in factors)
        lorc_v = store.put(f"{name}.lorc_v", v, dtype)
        lorc_u = store.put(f"{name}.lorc_u", u, dtype)
    return LinearTensors(
        codes=store.put(f"{name}.codes", quantized.codes, code_type),
        group_scales=None
        if group_scales is None
        else store.put(f"{name}.group_scales", group_scales, scale_type),
        row_scales=store.put(f"{name}.row_scales", quantized.row_scales, ir.DataType.FLOAT),
        lorc_v=lorc_v,
        lorc_u=lorc_u,
    )
