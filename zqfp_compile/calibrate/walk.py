"""One pass through a model that calibrates and quantises: every layer sees its predecessors quantised.

The graph is cut at the planned linears (``segments.py``). Torch (``torch_segment.py``) or ONNX Runtime
computes what lies between them; torch the linears themselves, first to measure their input, then with their
new weights. Samples are spread over the devices. Activations between two segments lie on disk or on the GPU
that has their sample, so memory holds the weights of one step and the activations of one sample per device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.backends.ort import is_large
from zqfp_compile.calibrate.activation_cache import ActivationCache
from zqfp_compile.calibrate.block_runs import finite_range
from zqfp_compile.calibrate.kept_walk import KeptWalk
from zqfp_compile.calibrate.linears import (
    ActivationQuantizer,
    FloatLinear,
    QuantizedLinear,
    Replacement,
    load_weight,
)
from zqfp_compile.calibrate.segments import Partition, Step, partition, segment_model
from zqfp_compile.calibrate.sessions import open_model, run_bound, run_session, widened
from zqfp_compile.calibrate.statistics import CalibrationResult, activation_scale
from zqfp_compile.calibrate.torch_segment import TorchSegment, runs_in_torch
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.device import CUDA_PROVIDER, activation_room, providers_for
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.plan import LinearSite, QuantPlan
from zqfp_compile.quantize.copies import CopyStream
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.quantize.products import full_products
from zqfp_compile.quantize.rounding import queued
from zqfp_compile.quantize.threads import DeviceThreads
from zqfp_compile.weights import read_bias
from zqfp_compile.work_folder import WorkFolder

Array = npt.NDArray[Any]
Progress = Callable[[int, int, str], None]
# (layers of one input, their W float32 [N, K], its moments) -> what each multiplies with from now on. Without
# moments they are finished.
QuantizeSites = Callable[
    [Sequence[LinearSite], Sequence[torch.Tensor], InputMoments | None], Sequence[Replacement]
]
# Whether an earlier walk finished these layers, of one input.
FinishedSites = Callable[[Sequence[LinearSite]], bool]

# Groups of samples: a device takes whole ones, and their moments are added up in one order, so that no bit
# depends on the number of devices.
_GROUPS = 8
# A GPU computes the linears of several samples of a group at once, a quarter of the launches: as many as keep
# an input or an output below so many numbers.
_AT_ONCE = 1 << 27


def walk(
    model: ir.Model,
    plan: QuantPlan,
    feeds: Sequence[Mapping[str, Array]],
    quantize: QuantizeSites,
    *,
    scratch: Path,
    finished: FinishedSites = lambda sites: False,
    work: WorkFolder | None = None,
    key: str = "walk",
    cross: bool = True,
    threads: DeviceThreads | None = None,
    in_torch: bool | None = None,
    rows_per_activation: int = 64,
    seed: int = 0,
    progress: Progress = lambda done, total, detail: None,
) -> CalibrationResult:
    """Calibrate and quantise ``plan.rewritten``, layer by layer in graph order.

    ``quantize`` is called once per activation with the layers that read it, when everything before them
    computes with its own replacement. The moments of bfloat16 models are taken in float32.

    Args:
        model: The model; it is not changed, external data stays where it is.
        plan: Layers and activation format.
        feeds: Inputs of each run, of any lengths.
        quantize: See :data:`QuantizeSites`. Tensors are on the first device.
        finished: See :data:`FinishedSites`. Over such layers the walk goes without measuring moments.
        scratch: Folder for activations: two samples' worth of what a layer passes on, times the samples.
        work: Where the walk's state after each step is kept, and found again when their layers are finished;
            its key covers model and feeds. Not with activations on a GPU: then the walk goes over all again.
        key: What the state depends on besides, for :class:`zqfp_compile.work_folder.WorkFolder`.
        cross: Also run the original model beside it, for the mixed moments.
        threads: The devices that compute, by default the CPU. GPUs without torch's operators are not spread
            over: then the first does it all.
        in_torch: Whether torch computes what lies between the layers, in float32, or ONNX Runtime. By default
            torch when it has all operators, where nothing leaves a GPU and attention takes a third of the
            time on a CPU; on a CPU, ONNX Runtime for large models, whose weights it need not copy.
        rows_per_activation: Rows kept per activation over all runs, as the quantised layers see them.
        seed: Seed of the choice of rows.
        progress: Called with (steps done, steps, layer name).

    Returns:
        Ranges and sample rows of the inputs of the quantised layers; no energies.

    Raises:
        ModelError: When an activation is NaN or infinite, the layers cannot be visited in order, or ONNX
            Runtime cannot run the model.
        UsageError: When there is nothing to run.
        MissingDependencyError: When the disk is full.
    """
    if not feeds:
        raise UsageError("calibration has no samples; pass a longer --calibration text")
    begin = time.perf_counter()
    graph_model = model
    if uses_bfloat16(model):
        graph_model = model.clone()
        widen_bfloat16(graph_model)
    parts = partition(graph_model.graph, plan.rewritten)
    threads = threads or DeviceThreads()
    if in_torch is None:
        in_torch = (threads.on_gpu or not is_large(model)) and runs_in_torch(graph_model, parts)
    if threads.on_gpu and not in_torch:
        threads = DeviceThreads([threads.main])
    random = np.random.default_rng(seed)
    per_run = -(-rows_per_activation // len(feeds))
    picks = [np.sort(random.uniform(0.0, 0.999, per_run)) for _ in feeds]
    with ExitStack() as stack:
        room = {device: size // 2 for device, size in activation_room(threads.devices).items()}
        kept = None if work is None or room else KeptWalk(work, key)
        place = scratch if kept is None else kept.folder
        caches = [
            ActivationCache(place / f"activations-{index}", gpu_bytes=room, keep=kept is not None)
            for index in range(2 if cross else 1)
        ]
        streams = [_Stream(feeds, stack.enter_context(cache)) for cache in caches]
        reader = stack.enter_context(ThreadPoolExecutor(1))
        state = _Walk(
            *(model, graph_model, plan, parts, quantize, finished, threads, reader),
            *(in_torch, streams, picks, kept),
        )
        with torch.inference_mode():
            state.run(progress)
    tokens = sum(int(feed["input_ids"].size) for feed in feeds if "input_ids" in feed)
    return CalibrationResult(state.ranges, state.rows, {}, tokens, time.perf_counter() - begin)


@dataclass(frozen=True)
class _Stream:
    """The values of one form of the model, per sample: graph inputs, and what is kept between segments."""

    feeds: Sequence[Mapping[str, Array]]
    cache: ActivationCache

    def value(self, sample: int, name: str) -> torch.Tensor:
        tensor = self.cache.get(sample, name)
        if tensor is None:
            if name not in self.feeds[sample]:
                raise ModelError(f"calibration sample {sample} has no input {name!r}; add it to the samples")
            tensor = torch.from_numpy(widened(self.feeds[sample][name]))
        return tensor

    def settle(self, sample: int, device: str) -> None:
        """Move a sample's inputs to its GPU: a copy when one is read would wait for all that is queued."""
        for name in self.feeds[sample]:
            tensor = self.value(sample, name)
            if tensor.ndim > 1:  # a vector may be a shape, which is read on the host
                self.cache.put(sample, name, tensor.to(device))


@dataclass(frozen=True)
class _Visited:
    """A step whose layers have their new weights."""

    step: Step
    quantizer: ActivationQuantizer
    # Per layer whose output is needed: its name, the original and the new layer.
    layers: Sequence[tuple[str, FloatLinear | None, QuantizedLinear]]

    @property
    def widest(self) -> int:
        """Channels of the widest of what the layers read and write."""
        return max(max(layer.replacement.weight.shape) for _, _, layer in self.layers)

    def outputs(self, x: torch.Tensor, original: bool) -> dict[str, torch.Tensor]:
        """Return the layers' outputs [T, N] by name for the activation x, float32 [T, K]."""
        if original:
            return {name: layer(x) for name, layer, _ in self.layers if layer is not None}
        x8, a = self.quantizer.split(x)
        return {name: layer(x, x8, a) for name, _, layer in self.layers}


@dataclass
class _Walk:
    """State of one walk. ``streams[0]`` is quantised up to where the walk is, ``streams[1]`` the original."""

    model: ir.Model
    graph_model: ir.Model
    plan: QuantPlan
    parts: Partition
    quantize: QuantizeSites
    finished: FinishedSites
    threads: DeviceThreads
    reader: ThreadPoolExecutor
    in_torch: bool
    streams: Sequence[_Stream]
    picks: Sequence[npt.NDArray[np.float64]]
    kept: KeptWalk | None = None
    ranges: dict[str, float] = field(default_factory=dict)
    rows: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._copies = CopyStream(self.threads.main)

    def run(self, progress: Progress) -> None:
        steps = self.parts.steps
        visited: Sequence[_Visited] = ()
        begin = self._restore()
        if self.in_torch and self.threads.on_gpu:
            list(self.threads.map(self._settle, self.groups))
        ahead: Callable[[], list[torch.Tensor]] | None = None
        for index, step in enumerate(steps[begin:], begin):
            progress(index, len(steps), step.sites[0].name)
            weights = ahead or self._weights(step)
            if index > begin or not self.ranges:
                self._advance(index, visited)
            quantizer = self._survey(step)
            if index + 1 < len(steps):
                ahead = self._weights(steps[index + 1])
            visited = self._visit(step, quantizer, weights)
            self._commit(index)
        progress(len(steps), len(steps), "")

    def _weights(self, step: Step) -> Callable[[], list[torch.Tensor]]:
        """Return what gives a step's weights on the first device: a GPU's are read while it computes."""

        def load() -> list[torch.Tensor]:
            with self._copies.after():
                weights = [load_weight(self.model, site.weight, self.threads.main) for site in step.sites]
            return [self._copies.hand_over(weight) for weight in weights]

        return self.reader.submit(load).result if self.threads.on_gpu else load

    @property
    def groups(self) -> list[list[int]]:
        """The samples of each group."""
        count = min(_GROUPS, len(self.picks))
        return [group.tolist() for group in np.array_split(np.arange(len(self.picks)), count)]

    @property
    def _waits(self) -> bool:
        """Whether who reads or keeps activations waits for a GPU: not where all of them lie there."""
        return not self.threads.on_gpu or any(stream.cache.on_disk for stream in self.streams)

    def _settle(self, place: int, group: Sequence[int]) -> None:
        for sample in group:
            for stream in self.streams:
                stream.settle(sample, self.threads.devices[place])

    def _commit(self, index: int) -> None:
        """Keep the state after a step."""
        if self.kept is None:
            return
        name = self.parts.steps[index].activation
        self.kept.keep(index, self.ranges[name], self.rows[name])
        for stream in self.streams:
            stream.cache.commit(self.kept.state(index))

    def _restore(self) -> int:
        """Return the index of the step to begin with; one that is done but for its linears is done again."""
        if self.kept is None:
            return 0
        states = {stream.cache.restore() for stream in self.streams}
        step = self.kept.step(states)
        if step is None or not all(self.finished(item.sites) for item in self.parts.steps[: step + 1]):
            for stream in self.streams:
                stream.cache.clear()
            return 0
        for index in range(step + 1):
            name = self.parts.steps[index].activation
            self.ranges[name], self.rows[name] = self.kept.find(index)
        return step

    def _advance(self, index: int, visited: Sequence[_Visited]) -> None:
        """Compute the linears of the last step and the segment behind them, for every sample.

        Args:
            index: The segment.
            visited: The last step on each device; none before the first.
        """
        runner = TorchSegment if self.in_torch else _Session
        segments = [runner(self.graph_model, self.parts, index, device) for device in self.threads.devices]

        def advance(place: int, group: Sequence[int]) -> None:
            layers = visited[place] if visited else None
            for samples in self._at_once(group, layers):
                for stream in self.streams:
                    outputs = self._outputs(layers, stream, samples, place)
                    for sample, known in zip(samples, outputs, strict=True):
                        self._run(segments[place], index, stream, sample, known)

        list(self.threads.map(advance, self.groups, waits=self._waits))

    def _at_once(self, group: Sequence[int], visited: _Visited | None) -> list[list[int]]:
        """Return the samples of a group whose linears are computed together."""
        runs: list[list[int]] = []
        room = 0
        for sample in group:
            size = 0
            if self.threads.on_gpu and visited is not None and visited.layers:
                x = self.streams[0].value(sample, visited.step.activation)
                size = x.numel() // x.shape[-1] * visited.widest
            if not runs or not size or size > room:
                runs.append([])
                room = _AT_ONCE
            runs[-1].append(sample)
            room -= size
        return runs

    def _run(
        self,
        segment: TorchSegment | _Session,
        index: int,
        stream: _Stream,
        sample: int,
        known: Mapping[str, torch.Tensor],
    ) -> None:
        """Run a segment on a sample, and keep what later ones read; ``known`` are its linears' outputs."""
        inputs = {
            name: known[name] if name in known else stream.value(sample, name) for name in segment.inputs
        }
        # Threads wait for each other's products: where there are none they need not.
        with full_products() if segment.multiplies else nullcontext():
            found = segment.run(inputs)
        for name, tensor in {**known, **found}.items():
            if self.parts.last_use[name] > index:
                stream.cache.put(sample, name, tensor)
        stream.cache.drop(sample, segment.finished)

    def _outputs(
        self, visited: _Visited | None, stream: _Stream, samples: Sequence[int], place: int
    ) -> list[dict[str, torch.Tensor]]:
        """Return the outputs of the last step's linears by name for each sample."""
        if visited is None or not visited.layers:
            return [{} for _ in samples]
        xs = [stream.value(sample, visited.step.activation) for sample in samples]
        rows = [self._rows(x, place) for x in xs]
        outputs = visited.outputs(
            rows[0] if len(rows) == 1 else torch.cat(rows), original=stream is not self.streams[0]
        )
        parts = {name: torch.split(y, [len(part) for part in rows]) for name, y in outputs.items()}
        return [
            {name: part[index].reshape(*x.shape[:-1], -1) for name, part in parts.items()}
            for index, x in enumerate(xs)
        ]

    def _rows(self, x: torch.Tensor, place: int) -> torch.Tensor:
        """Return an activation [..., K] as float32 [T, K] on a device."""
        return x.reshape(-1, x.shape[-1]).to(self.threads.devices[place]).to(torch.float32)

    def _survey(self, step: Step) -> ActivationQuantizer:
        """Find the activation's range and sample rows; return how it is quantised."""
        name = step.activation

        def look(place: int, group: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            found = [self._look(name, sample, place) for sample in group]
            return torch.cat([extremes for extremes, _ in found]), torch.cat([rows for _, rows in found])

        # No device is waited for before all of them have everything to do.
        found = list(self.threads.map(look, self.groups, waits=self._waits))
        peak = finite_range(float(torch.cat([extremes.cpu() for extremes, _ in found]).abs().max()), name)
        self.ranges[name] = peak
        self.rows[name] = torch.cat([rows.cpu() for _, rows in found]).numpy()
        form = self.plan.activation_format
        if form == "none" or self.plan.per_token:
            return ActivationQuantizer(form)
        return ActivationQuantizer(form, activation_scale(peak, form))

    def _look(self, name: str, sample: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sample's smallest and largest number [2] and some of its rows, there."""
        x = self._rows(self.streams[0].value(sample, name), place)
        picked = queued(torch.from_numpy(self.picks[sample] * len(x)).long(), x.device)
        return torch.stack(torch.aminmax(x)), x[picked]

    def _measure(self, step: Step, quantizer: ActivationQuantizer) -> InputMoments:
        """Return the moments of all samples, on the first device."""
        measure = partial(self._measure_group, step, quantizer)
        groups = self.threads.map(measure, self.groups, waits=self._waits)
        # Those of every other group first: two devices add up their own.
        sums: list[InputMoments] = []
        for index, group in enumerate(groups):
            if index < 2:
                sums.append(group)
            else:
                sums[index % 2].merge(group)
        moments = sums[0]
        for other in sums[1:]:
            moments.merge(other)
        if moments.drift is not None:
            finite_range(float(moments.drift.abs().amax()), step.activation)
        return moments

    def _measure_group(
        self, step: Step, quantizer: ActivationQuantizer, place: int, group: Sequence[int]
    ) -> InputMoments:
        cross = len(self.streams) > 1
        moments = InputMoments(step.sites[0].k, device=self.threads.devices[place], cross=cross)
        for sample in group:
            x8, a = quantizer.split(self._rows(self.streams[0].value(sample, step.activation), place))
            original = None
            if cross:
                original = self._rows(self.streams[1].value(sample, step.activation), place)
            moments.add(x8, original, scale=a if quantizer.rounds else None)
        return moments

    def _visit(
        self, step: Step, quantizer: ActivationQuantizer, load: Callable[[], list[torch.Tensor]]
    ) -> list[_Visited]:
        """Let the step's layers be quantised; return them for every device."""
        moments = None if self.finished(step.sites) else self._measure(step, quantizer)
        weights = load()
        replacements = self.quantize(step.sites, weights, moments)
        layers: list[list[tuple[str, FloatLinear | None, QuantizedLinear]]] = [
            [] for _ in self.threads.devices
        ]
        for site, weight, replacement in zip(step.sites, weights, replacements, strict=True):
            if site.output not in step.computed:
                continue
            for place, device in enumerate(self.threads.devices):
                layers[place].append((site.output, *self._linears(site, weight, replacement, device)))
        return [_Visited(step, quantizer, found) for found in layers]

    def _linears(
        self, site: LinearSite, weight: torch.Tensor, replacement: Replacement, device: str
    ) -> tuple[FloatLinear | None, QuantizedLinear]:
        bias = read_bias(self.model, site)
        row = None if bias is None else torch.from_numpy(bias).to(device)
        # bfloat16 graphs were widened.
        dtype = torch.float16 if site.dtype == ir.DataType.FLOAT16 else torch.float32
        original = FloatLinear(weight.to(device), row, dtype) if len(self.streams) > 1 else None
        return original, QuantizedLinear(replacement.to(device), row, dtype, self.plan.activation_format)


class _Session:
    """A segment in ONNX Runtime, opened when the types of its first inputs are known."""

    def __init__(self, model: ir.Model, parts: Partition, index: int, device: str) -> None:
        self._model = model
        self._segment = parts.segments[index]
        self._device = device
        self._session: Any = None
        self.inputs = self._segment.inputs
        self.multiplies = False  # not in torch
        self.finished = [name for name, last in parts.last_use.items() if last == index]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the segment's outputs by name."""
        names = self._segment.outputs
        if not names:
            return {}
        if self._session is None:
            self._open(inputs)
        if self._session.get_providers()[0] == CUDA_PROVIDER:
            return dict(zip(names, run_bound(self._session, inputs, "cuda"), strict=True))
        arrays = run_session(self._session, {name: tensor.cpu().numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    def _open(self, inputs: Mapping[str, torch.Tensor]) -> None:
        types = {
            name: (ir.DataType.from_numpy(torch.empty(0, dtype=tensor.dtype).numpy().dtype), tensor.ndim)
            for name, tensor in inputs.items()
        }
        model = segment_model(self._model, self._segment, types)
        self._session = open_model(model, providers_for(self._device))
        for output in self._session.get_outputs():
            if not output.type.startswith("tensor(") or output.type == "tensor(string)":
                raise ModelError(
                    f"value {output.name!r} is no tensor of numbers; layers cannot be calibrated across it"
                )
