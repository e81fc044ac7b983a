"""The quantize step: every planned weight becomes codes, scales and LoRC factors on disk, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.calibrate.linears import Replacement
from zqfp_compile.calibrate.statistics import CalibrationResult
from zqfp_compile.calibrate.walk import walk
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan, SitePrecision, WeightSource
from zqfp_compile.quantize.layer import LayerOptions, QuantizedLayer, quantize_layer
from zqfp_compile.quantize.lorc import LowRank, low_rank_factors
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.quantize.rtn import quantize_weight
from zqfp_compile.quantize.threads import side_by_side
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import read_weight


def quantize_model(
    model: ir.Model,
    plan: QuantPlan,
    store: TensorStore,
    *,
    energies: Mapping[str, npt.NDArray[np.float64]],
    seed: int,
    progress: Callable[[int, int, str], None],
) -> QuantPlan:
    """Quantise the plan's weights: round-to-nearest with error search, then LoRC on the rest.

    Each layer gets the format and the rank of ``plan.precision``; LoRC is ``x @ V @ U`` of ``W - W_hat``
    (ZeroQuant-V2, section 5). Linears that share a weight and its precision share its tensors. At most one
    weight is in memory.

    Args:
        model: Model the weights are read from (memory-mapped external data).
        plan: Layers, formats and ranks.
        store: Where the quantised tensors go.
        energies: Energy of every input channel [K] per activation name; LoRC weighs the error with them. An
            activation that is not in it counts as equally loud everywhere.
        seed: Seed of the randomised SVD.
        progress: Called with (done, total, layer name).

    Returns:
        The plan with ``tensors`` filled for every layer whose weight is quantised.

    Raises:
        ModelError: When a weight holds NaN or Inf.
    """
    loudness = _energy_per_weight(plan, energies)
    done = _shared_tables(plan)
    tensors: dict[str, LinearTensors] = {}
    sites = [site for site in plan.linears if plan.precision(site).weight_format != "none"]
    for index, site in enumerate(sites):
        progress(index, len(sites), site.name)
        precision = plan.precision(site)
        key = (site.weight, precision)
        if key not in done:
            weight = torch.from_numpy(read_weight(model, site.weight))
            quantized = quantize_weight(
                weight,
                weight_format=precision.weight_format,
                group_size=plan.group_size,
                scale_constraint=plan.scale_constraint,
                scale_rows=plan.scale_rows,
                name=site.name,
            )
            energy = loudness.get(site.weight)
            factors = _lorc(weight, quantized, precision.lorc_rank, plan.factor_dtype(site), energy, seed)
            done[key] = store_layer(store, site.name, quantized, factors, site.dtype)
        tensors[site.name] = done[key]
    progress(len(sites), len(sites), "")
    return plan.replace(tensors=tensors)


def quantize_embeddings(model: ir.Model, plan: QuantPlan, store: TensorStore) -> QuantPlan:
    """Quantise the plan's embedding tables: E4M3, rounded to nearest under one scale per row.

    Linears that share a table take its tensors over, whatever their algorithm; so this comes before them.

    Args:
        model: Model the tables are read from.
        plan: The embeddings.
        store: Where the quantised tensors go.

    Returns:
        The plan with ``embedding_tensors`` filled.

    Raises:
        ModelError: When a table holds NaN or Inf.
    """
    tensors: dict[str, LinearTensors] = {}
    for site in plan.embeddings:
        quantized = quantize_weight(
            torch.from_numpy(read_weight(model, site.source)),
            weight_format="fp8",
            group_size=plan.group_size,
            scale_constraint=plan.scale_constraint,
            name=site.name,
        )
        tensors[site.name] = store_layer(store, site.name, quantized, None, site.dtype)
    return plan.replace(embedding_tensors=tensors)


def _shared_tables(plan: QuantPlan) -> dict[tuple[WeightSource, SitePrecision], LinearTensors]:
    """Return the tensors that linears share with an embedding, by their weight and precision."""
    return {
        (site.source, SitePrecision("fp8", 0)): plan.embedding_tensors[site.name]
        for site in plan.embeddings
        if site.linears and site.name in plan.embedding_tensors
    }


def quantize_while_walking(
    model: ir.Model,
    plan: QuantPlan,
    store: TensorStore,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
    *,
    scratch: Path,
    device: str,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> tuple[QuantPlan, CalibrationResult]:
    """Calibrate and quantise by GPTQ in one pass: every layer sees its predecessors quantised.

    Linears that share a weight and its precision share its tensors: the first one in graph order decides,
    with the moments of its own input. A layer whose format is ``none`` keeps its weight.

    Args:
        model: Model the weights are read from (memory-mapped external data).
        plan: Layers, formats and ranks.
        store: Where the quantised tensors go.
        feeds: Calibration samples.
        scratch: Folder for activations.
        device: ``cpu`` or ``cuda``.
        seed: Seed of the sample rows and of LoRC.
        progress: Called with (done, total, layer name).

    Returns:
        The plan with ``tensors`` filled for every layer whose weight is quantised, and what :func:`walk`
        measured.

    Raises:
        ModelError: When a weight or an activation holds NaN or Inf, or see :func:`walk`.
    """
    layers = _Layers(plan, store, seed)
    result = walk(
        model, plan, feeds, layers.quantize, scratch=scratch, device=device, seed=seed, progress=progress
    )
    return plan.replace(tensors=layers.tensors), result


class _Layers:
    """Quantises the layers of a walk, those of one input side by side, and stores them in order."""

    def __init__(self, plan: QuantPlan, store: TensorStore, seed: int) -> None:
        self.tensors: dict[str, LinearTensors] = {}
        self._plan = plan
        self._store = store
        self._seed = seed
        self._first: dict[tuple[WeightSource, SitePrecision], LinearSite] = {}
        self._tables = _shared_tables(plan)

    def quantize(
        self, sites: Sequence[LinearSite], weights: Sequence[torch.Tensor], moments: InputMoments
    ) -> list[Replacement]:
        pairs = list(zip(sites, weights, strict=True))
        new = [(site, weight) for site, weight in pairs if self._is_new(site)]
        layers = side_by_side(lambda pair: self._layer(*pair, moments), new, [weight for _, weight in new])
        found = {site.name: layer for (site, _), layer in zip(new, layers, strict=True)}
        return [self._replace(site, weight, found.get(site.name)) for site, weight in pairs]

    def _is_new(self, site: LinearSite) -> bool:
        """Whether to quantise a layer, which the first one with its weight and precision decides."""
        precision = self._plan.precision(site)
        if (site.weight, precision) in self._tables:
            return False
        first = self._first.setdefault((site.weight, precision), site)
        return precision.weight_format != "none" and first is site

    def _layer(self, site: LinearSite, weight: torch.Tensor, moments: InputMoments) -> QuantizedLayer:
        options = _layer_options(self._plan, site)
        return quantize_layer(weight, options, moments=moments, seed=self._seed, name=site.name)

    def _replace(self, site: LinearSite, weight: torch.Tensor, layer: QuantizedLayer | None) -> Replacement:
        precision = self._plan.precision(site)
        if precision.weight_format == "none":  # its activation is quantised all the same
            return Replacement(weight)
        if layer is None:
            table = self._tables.get((site.weight, precision))
            first = self._first.get((site.weight, precision), site)
            self.tensors[site.name] = self.tensors[first.name] if table is None else table
            return Replacement.of(self._read(site))
        self.tensors[site.name] = store_layer(self._store, site.name, layer.weight, layer.lorc, site.dtype)
        return Replacement.of(layer)

    def _read(self, site: LinearSite) -> QuantizedLayer:
        plan = self._plan.replace(tensors=self.tensors)
        factors = plan.low_rank(site)
        lorc = None if factors is None else LowRank(*map(torch.from_numpy, factors))
        return QuantizedLayer(plan.quantized_weight(site), lorc)


def _layer_options(plan: QuantPlan, site: LinearSite) -> LayerOptions:
    precision = plan.precision(site)
    return LayerOptions(
        algorithm="gptq",
        weight_format=precision.weight_format,
        group_size=plan.group_size,
        scale_constraint=plan.scale_constraint,
        scale_rows=plan.scale_rows,
        lorc_rank=precision.lorc_rank,
        lorc_dtype=plan.factor_dtype(site),
    )


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
    weight: torch.Tensor,
    quantized: QuantizedWeight,
    rank: int,
    dtype: str,
    energy: torch.Tensor | None,
    seed: int,
) -> LowRank | None:
    if rank == 0:
        return None
    error = weight.sub_(torch.from_numpy(quantized.dequantize()))  # the weight is not needed any more
    return low_rank_factors(error, rank, moment=energy, dtype=dtype, seed=seed)


def store_layer(
    store: TensorStore, name: str, quantized: QuantizedWeight, lorc: LowRank | None, dtype: ir.DataType
) -> LinearTensors:
    """Write one quantised layer to ``store``.

    Args:
        store: Where the tensors go.
        name: Layer name, the prefix of the tensors' names.
        quantized: The weight.
        lorc: Its compensation, factors rounded to ``dtype`` or to FP8 with scales.
        dtype: The layer's element type.
    """
    fp8 = quantized.weight_format == "fp8"
    scale_type = ir.DataType.FLOAT if quantized.scale_constraint == "none" else ir.DataType.FLOAT8E4M3FN
    code_type = ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.INT4
    group_scales = quantized.group_scales
    return LinearTensors(
        codes=store.put(f"{name}.codes", quantized.codes, code_type),
        group_scales=None
        if group_scales is None
        else store.put(f"{name}.group_scales", group_scales, scale_type),
        row_scales=store.put(f"{name}.row_scales", quantized.row_scales, ir.DataType.FLOAT),
        **({} if lorc is None else store_factors(store, name, lorc, dtype)),
    )


def store_factors(
    store: TensorStore, name: str, lorc: LowRank, dtype: ir.DataType
) -> dict[str, ir.TensorProtocol]:
    """Write LoRC factors, rounded to ``dtype`` or FP8; returns them by field of :class:`LinearTensors`."""
    v, u = lorc.v.cpu().numpy(), lorc.u.cpu().numpy()
    if lorc.v_scale is None or lorc.u_scale is None:
        arrays = {"lorc_v": (v, dtype), "lorc_u": (u, dtype)}
    else:
        v_scale, u_scale = lorc.v_scale.cpu().numpy(), lorc.u_scale.cpu().numpy()
        # The quotients are an ulp off E4M3 numbers at most, and encoding takes the nearest.
        e4m3 = ir.DataType.FLOAT8E4M3FN
        arrays = {
            "lorc_v": (E4M3FN.encode(v / v_scale[None, :]), e4m3),
            "lorc_u": (E4M3FN.encode(u / u_scale[:, None]), e4m3),
            "lorc_v_scale": (v_scale, ir.DataType.FLOAT),
            "lorc_u_scale": (u_scale, ir.DataType.FLOAT),
        }
    return {key: store.put(f"{name}.{key}", array, kind) for key, (array, kind) in arrays.items()}
