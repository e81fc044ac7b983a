"""The quantize step: every planned weight becomes codes, scales and LoRC factors on disk, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.calibrate.linears import Replacement
from zqfp_compile.calibrate.statistics import CalibrationResult
from zqfp_compile.calibrate.walk import walk
from zqfp_compile.layer_item import LayerItem, pack_layer, quantize_item
from zqfp_compile.parallel.executor import Executor, InProcess
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan, SitePrecision, WeightSource
from zqfp_compile.quantize.copies import CopyStream
from zqfp_compile.quantize.layer import LayerOptions, LayerTask, QuantizedLayer, quantize_layers
from zqfp_compile.quantize.lorc import LowRank
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.quantize.quantized_tensors import QuantizedTensors
from zqfp_compile.quantize.threads import DeviceThreads, side_by_side
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import locate_weight
from zqfp_compile.work_folder import WorkFolder

WeightKey: TypeAlias = tuple[WeightSource, SitePrecision, str]


def quantize_model(
    model: ir.Model,
    plan: QuantPlan,
    store: TensorStore,
    *,
    energies: Mapping[str, npt.NDArray[np.float64]],
    seed: int,
    executor: Executor | None = None,
    progress: Callable[[int, int, str], None],
) -> QuantPlan:
    """Quantise the plan's weights: round-to-nearest with error search, then LoRC on the rest.

    Each layer gets the format and the rank of ``plan.precision``; LoRC is ``x @ V @ U`` of ``W - W_hat``
    (ZeroQuant-V2, section 5). Linears that share a weight and its precision share its tensors. Weights that
    ``store`` has from an earlier run are left as they are; the others are work items.

    Args:
        model: Model the weights are read from (memory-mapped external data).
        plan: Layers, formats and ranks.
        store: Where the quantised tensors go.
        energies: Energy of every input channel [K] per activation name; LoRC weighs the error with them. An
            activation that is not in it counts as equally loud everywhere.
        seed: Seed of the randomised SVD.
        executor: Who does the work, by default this process, one weight in memory.
        progress: Called with (done, total, layer name).

    Returns:
        The plan with ``tensors`` filled for every layer whose weight is quantised.

    Raises:
        ModelError: When a weight holds NaN or Inf.
        MissingDependencyError: When the disk is full, or a worker is lost.
    """
    loudness = _energy_per_weight(plan, energies)
    done = _shared_tables(plan)
    sites = [site for site in plan.linears if plan.precision(site).weight_format != "none"]
    items: dict[WeightKey, LayerItem] = {}
    for site in sites:
        key = _weight_key(plan, site)
        if key not in done and key not in items:
            items[key] = _item(model, plan, site, loudness.get(site.weight), seed)
    missing = [item for item in items.values() if item.key not in store]
    progress(len(items) - len(missing), len(items), "")
    results = (executor or InProcess()).as_completed(quantize_item, missing)
    # Stored at once, in whatever order: a kill costs what is under way, not what waits for its turn.
    for count, (index, packed) in enumerate(results, 1 + len(items) - len(missing)):
        store.add(missing[index].key, packed)
        progress(count, len(items), missing[index].name)
    for key, item in items.items():
        done[key] = _tensors(store.get(item.key) or {})
    return plan.replace(tensors={site.name: done[_weight_key(plan, site)] for site in sites})


def _tensors(stored: Mapping[str, ir.TensorProtocol]) -> LinearTensors:
    return LinearTensors(**{"group_scales": None, **stored})  # type: ignore[arg-type]


def _weight_key(plan: QuantPlan, site: LinearSite) -> WeightKey:
    """What layers that share their tensors have in common: LoRC factors are of the layer's own type."""
    precision = plan.precision(site)
    return site.weight, precision, plan.factor_dtype(site) if precision.lorc_rank else ""


def _item(
    model: ir.Model, plan: QuantPlan, site: LinearSite, energy: npt.NDArray[np.float64] | None, seed: int
) -> LayerItem:
    precision = plan.precision(site)
    return LayerItem(
        name=site.name,
        weight=locate_weight(model, site.weight),
        dtype=site.dtype,
        precision=precision,
        group_size=plan.group_size,
        scale_constraint=plan.scale_constraint,
        scale_rows=plan.scale_rows,
        factor_dtype=plan.factor_dtype(site),
        energy=energy if precision.lorc_rank else None,
        seed=seed,
    )


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
        weight = locate_weight(model, site.source)
        precision = SitePrecision("fp8", 0)
        item = LayerItem(site.name, weight, site.dtype, precision, plan.group_size, plan.scale_constraint)
        stored = store.get(item.key) or store.add(item.key, quantize_item(item))
        tensors[site.name] = _tensors(stored)
    return plan.replace(embedding_tensors=tensors)


def _shared_tables(plan: QuantPlan) -> dict[WeightKey, LinearTensors]:
    """Return the tensors that linears share with an embedding, by their weight and precision."""
    return {
        (site.source, SitePrecision("fp8", 0), ""): plan.embedding_tensors[site.name]
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
    work: WorkFolder | None = None,
    devices: Sequence[str] = ("cpu",),
    seed: int,
    progress: Callable[[int, int, str], None],
) -> tuple[QuantPlan, CalibrationResult]:
    """Calibrate and quantise by GPTQ in one pass: every layer sees its predecessors quantised.

    Linears that share a weight and its precision share its tensors: the first one in graph order decides,
    with the moments of its own input. A layer whose format is ``none`` keeps its weight. Layers that are in
    ``store`` from an earlier run, of the same model and samples, stay as they are.

    Args:
        model: Model the weights are read from (memory-mapped external data).
        plan: Layers, formats and ranks.
        store: Where the quantised tensors go.
        feeds: Calibration samples.
        scratch: Folder for activations.
        work: Where the walk's state is kept, see :func:`walk`.
        devices: Where to compute, see :class:`DeviceThreads`; how many there are changes no bit.
        seed: Seed of the sample rows and of LoRC.
        progress: Called with (done, total, layer name).

    Returns:
        The plan with ``tensors`` filled for every layer whose weight is quantised, and what :func:`walk`
        measured.

    Raises:
        ModelError: When a weight or an activation holds NaN or Inf, or see :func:`walk`.
    """
    with DeviceThreads(devices) as threads, ThreadPoolExecutor(1) as writer:
        layers = _Layers(plan, store, seed, threads, writer)
        result = walk(
            model,
            plan,
            feeds,
            layers.quantize,
            finished=layers.finished,
            work=work,
            key=layers.key,
            scratch=scratch,
            threads=threads,
            seed=seed,
            progress=progress,
        )
        layers.wait()
    return plan.replace(tensors=layers.tensors), result


class _Layers:
    """Quantises the layers of a walk, those of one input side by side, and stores them in order."""

    def __init__(
        self,
        plan: QuantPlan,
        store: TensorStore,
        seed: int,
        threads: DeviceThreads,
        writer: ThreadPoolExecutor,
    ) -> None:
        self.tensors: dict[str, LinearTensors] = {}
        self._plan = plan
        self._store = store
        self._seed = seed
        self._threads = threads
        self._writer = writer
        self._copies = CopyStream(threads.main)
        # What is stored meanwhile, of this input and of the one before.
        self._written: list[Future[None]] = []
        self._before: list[Future[None]] = []
        self._first: dict[WeightKey, LinearSite] = {}
        self._tables = _shared_tables(plan)
        # A layer depends on how all before it are quantised.
        formats = (plan.group_size, plan.scale_constraint, plan.scale_rows, plan.lorc_format, seed)
        precisions = [(site.name, site.weight, plan.precision(site)) for site in plan.linears]
        activations = (plan.activation_format, plan.per_token)
        self.key = hashlib.sha256(repr((formats, activations, precisions)).encode()).hexdigest()

    def finished(self, sites: Sequence[LinearSite]) -> bool:
        """Take what an earlier run stored of all these layers; ``False`` when something is missing."""
        if any(self._item(site) not in self._store for site in sites if self._is_new(site)):
            return False
        for site in sites:
            if self._plan.precision(site).weight_format != "none":
                self.tensors[site.name] = self._known(site)
        return True

    def _item(self, site: LinearSite) -> str:
        return f"gptq {site.name} {self.key}"

    def quantize(
        self, sites: Sequence[LinearSite], weights: Sequence[torch.Tensor], moments: InputMoments | None
    ) -> list[Replacement]:
        pairs = list(zip(sites, weights, strict=True))
        found: dict[str, QuantizedLayer] = {}
        # Storing an input's layers may take as long as rounding the next one's, not longer.
        _results(self._before)
        self._before, self._written = self._written, []
        if moments is not None:
            new = [(site, weight) for site, weight in pairs if self._is_new(site)]
            tasks = [
                LayerTask(weight, _layer_options(self._plan, site), self._seed, site.name)
                for site, weight in new
            ]
            layers = self._layers(tasks, moments)
            found = {site.name: layer for (site, _), layer in zip(new, layers, strict=True)}
        return [self._replace(site, weight, found.get(site.name)) for site, weight in pairs]

    def _is_new(self, site: LinearSite) -> bool:
        """Whether to quantise a layer, which the first one with its weight and precision decides."""
        key = _weight_key(self._plan, site)
        if key in self._tables:
            return False
        first = self._first.setdefault(key, site)
        return self._plan.precision(site).weight_format != "none" and first is site

    def _layers(self, tasks: Sequence[LayerTask], moments: InputMoments) -> list[QuantizedLayer]:
        if self._threads.on_gpu:
            return quantize_layers(tasks, self._threads, moments=moments)
        # All CPU devices are this one.
        return side_by_side(
            lambda task: quantize_layers([task], DeviceThreads(), moments=moments)[0],
            tasks,
            [task.weight for task in tasks],
        )

    def _replace(self, site: LinearSite, weight: torch.Tensor, layer: QuantizedLayer | None) -> Replacement:
        precision = self._plan.precision(site)
        if precision.weight_format == "none":  # its activation is quantised all the same
            return Replacement(weight)
        if layer is None:
            self.tensors[site.name] = self._known(site)
            return Replacement.of(self._read(site), weight.device)
        if self._threads.on_gpu:  # which goes on in the meantime
            done = self._copies.now()
            self._written.append(self._writer.submit(self._write, site, layer, done))
        else:
            self._write(site, layer)
        return Replacement.of(layer, weight.device)

    def _write(
        self, site: LinearSite, layer: QuantizedLayer, computed: torch.cuda.Event | None = None
    ) -> None:
        with self._copies.after(computed):
            packed = pack_layer(site.name, layer.weight, layer.lorc, site.dtype)
        self.tensors[site.name] = _tensors(self._store.add(self._item(site), packed))

    def wait(self) -> None:
        """Wait until everything is stored.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        _results(self._before)
        _results(self._written)

    def _known(self, site: LinearSite) -> LinearTensors:
        """Return the tensors of a layer that is finished, or that shares its weight with one."""
        key = _weight_key(self._plan, site)
        if key in self._tables:
            return self._tables[key]
        self.wait()
        first = self._first[key]
        return self.tensors.get(first.name) or _tensors(self._store.get(self._item(first)) or {})

    def _read(self, site: LinearSite) -> QuantizedLayer:
        plan = self._plan.replace(tensors=self.tensors)
        factors = plan.low_rank(site)
        lorc = None if factors is None else LowRank(*map(torch.from_numpy, factors))
        return QuantizedLayer(QuantizedTensors.of(plan.quantized_weight(site), "cpu"), lorc)


def _results(futures: list[Future[None]]) -> None:
    """Wait for all of them, and forget them."""
    while futures:
        futures.pop(0).result()


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
) -> dict[WeightSource, npt.NDArray[np.float64]]:
    """Add up the energies of all activations a weight is multiplied with."""
    result: dict[WeightSource, npt.NDArray[np.float64]] = {}
    for site in plan.linears:
        if site.activation in energies:
            energy = energies[site.activation]
            result[site.weight] = result[site.weight] + energy if site.weight in result else energy
    return result
