"""Runs the blocks of a graph on all samples, measures activations in them, and keeps what is finished."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from zqfp_compile.calibrate.blocks import Block
from zqfp_compile.calibrate.segments import Segment, segment_model
from zqfp_compile.calibrate.sessions import open_model, run_session, widened
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.errors import ModelError
from zqfp_compile.work_folder import WorkFolder

Array = npt.NDArray[Any]
Progress = Callable[[int, int, str], None]

# Where in a run the sample rows come from: an extra input, fractions of the run's rows.
PICK = "zqfp_pick"


@dataclass(frozen=True)
class Measured:
    """One activation in one run.

    Attributes:
        peak: Largest magnitude.
        rows: Some rows, float32 [m, K].
        energy: Sum over all rows of the squares of every channel divided by the peak, float32 [K].
    """

    peak: float
    rows: npt.NDArray[np.float32]
    energy: npt.NDArray[np.float32]


class BlockRuns:
    """Runs of the blocks of a model; without blocks the whole model is one.

    Of every run of a block the measurements are kept, and what it hands on until the next block has run.

    Attributes:
        prefix: Of the names that they are kept under.
    """

    def __init__(
        self,
        model: ir.Model,
        names: Sequence[str],
        blocks: Sequence[Block],
        work: WorkFolder | None,
        what: str,
    ) -> None:
        """Take a model and what of it is measured.

        Args:
            model: The model; it is not changed.
            names: The values to measure.
            blocks: What it is cut into, if it is.
            work: Where finished runs are kept, and found again.
            what: What the measurements depend on besides ``work``'s key, the names and the blocks.
        """
        self._model = model
        self._blocks = blocks if len(blocks) > 1 else [Block(Segment((), (), ()), tuple(names), frozenset())]
        self._widens = uses_bfloat16(model)
        self._work = work or _Memory()
        cuts = [(block.measured, sorted(block.kept)) for block in self._blocks]
        self.prefix = f"calibration-{hashlib.sha256(repr((what, cuts)).encode()).hexdigest()[:16]}"

    def run(self, feeds: Sequence[Mapping[str, Array]], progress: Progress) -> dict[str, list[Measured]]:
        """Return the measurements of every run by name.

        Args:
            feeds: Inputs of each run, :data:`PICK` among them.
            progress: Called with (runs done, runs, text).

        Raises:
            ModelError: When an activation is NaN or infinite, or ONNX Runtime cannot run the model.
            MissingDependencyError: When the disk is full.
        """
        done = [self._finished(sample) for sample in range(len(feeds))]
        total = len(self._blocks) * len(feeds)
        for index, block in enumerate(self._blocks):
            session: Any = None
            for sample, feed in enumerate(feeds):
                progress(index * len(feeds) + sample, total, "calibration runs")
                if index < len(done[sample]):
                    continue
                inputs = {**feed, **self._values(index - 1, sample)}
                session = session or self._open(block, inputs)
                done[sample].append(self._run(session, index, sample, inputs))
            del session  # and with it what is mapped of its weights
        progress(total, total, "calibration runs")
        runs = [{name: one for block in blocks for name, one in block.items()} for blocks in done]
        return {name: [run[name] for run in runs] for name in runs[0]}

    def _run(self, session: Any, index: int, sample: int, inputs: Mapping[str, Array]) -> dict[str, Measured]:
        """Run a block on a sample, and keep what comes out."""
        block = self._blocks[index]
        wanted = [arg.name for arg in session.get_inputs()]
        # What the session does not know is not needed, what it misses it says.
        outputs = run_session(session, {name: inputs[name] for name in wanted if name in inputs})
        values = {**inputs, **dict(zip(block.segment.outputs, outputs, strict=False))}
        statistics = outputs[len(block.segment.outputs) :]
        measured = _measured(block, statistics)
        if block.kept:
            kept = [values[name] for name in sorted(block.kept)]
            self._work.keep(self._values_name(index, sample), kept)
        self._work.keep(f"{self.prefix}-{index}-{sample}", statistics)
        self._work.drop(self._values_name(index - 1, sample))
        return measured

    def _finished(self, sample: int) -> list[dict[str, Measured]]:
        """Return what is found of a sample, from the first block on, if it can go on from there."""
        found: list[dict[str, Measured]] = []
        for index, block in enumerate(self._blocks):
            statistics = self._work.find(f"{self.prefix}-{index}-{sample}")
            if statistics is None:
                # Values may be lost after a power cut.
                return found if found and self._values(index - 1, sample) else []
            found.append(_measured(block, statistics))
        return found

    def _values(self, index: int, sample: int) -> dict[str, Array]:
        """Return what a block and those before it hand on; nothing when it is not there."""
        arrays = self._work.find(self._values_name(index, sample))
        return {} if arrays is None else dict(zip(sorted(self._blocks[index].kept), arrays, strict=True))

    def _values_name(self, index: int, sample: int) -> str:
        return f"{self.prefix}-{index}-{sample}-values"

    @cached_property
    def _halves(self) -> frozenset[str | None]:
        return _float16_values(self._model)

    def _open(self, block: Block, inputs: Mapping[str, Array]) -> Any:
        if len(self._blocks) == 1:
            model = self._model.clone()
            model.graph.outputs.clear()
        else:
            arrays = {name: widened(inputs[name]) for name in block.segment.inputs if name in inputs}
            types = {name: (ir.DataType.from_numpy(a.dtype), a.ndim) for name, a in arrays.items()}
            model = segment_model(self._model, block.segment, types)
            _hand_on_float32(model.graph, self._halves)
        _add_measuring(model, block.measured)
        if self._widens:
            widen_bfloat16(model)
        # Blocks come and go: an arena would keep the room of the largest twice over.
        return open_model(model, arena=len(self._blocks) == 1)


def _measured(block: Block, statistics: Sequence[Array]) -> dict[str, Measured]:
    """Name what came out of a run.

    Raises:
        ModelError: When an activation is NaN or infinite.
    """
    triples = zip(block.measured, statistics[::3], statistics[1::3], statistics[2::3], strict=True)
    return {
        name: Measured(finite_range(float(peak), name), rows, energy) for name, peak, rows, energy in triples
    }


class _Memory:
    """Keeps what a :class:`WorkFolder` would, in memory."""

    def __init__(self) -> None:
        self._arrays: dict[str, Sequence[Array]] = {}

    def keep(self, name: str, arrays: Sequence[Array]) -> None:
        self._arrays[name] = arrays

    def find(self, name: str) -> Sequence[Array] | None:
        return self._arrays.get(name)

    def drop(self, name: str) -> None:
        self._arrays.pop(name, None)


def _float16_values(model: ir.Model) -> frozenset[str | None]:
    """Return the names of values that are float16, also of those that the exporter left without a type."""
    typed = model.clone()
    ShapeInferencePass()(typed)
    outputs = (value for node in typed.graph for value in node.outputs)
    return frozenset(value.name for value in outputs if value.dtype == ir.DataType.FLOAT16)


def _hand_on_float32(graph: ir.Graph, halves: Collection[str | None]) -> None:
    """Let float16 values come from and go to other blocks in float32.

    On a CPU ONNX Runtime computes in float32 and rounds only where a graph has a Cast of its own; so the cut
    would round where the whole graph does not.
    """
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT and value.name in halves:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            cast.outputs[0].name = f"{value.name}.zqfp_half"
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(graph.outputs):
        if value.name in halves:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            cast.outputs[0].name = f"{value.name}.zqfp_float"
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def _add_measuring(model: ir.Model, names: Sequence[str]) -> None:
    """Add outputs per activation: the largest magnitude, some rows and the energies; what none needs goes."""
    graph = model.graph
    values = {value.name: value for value in _all_values(graph)}
    missing = [name for name in names if name not in values]
    if missing:
        raise ModelError(
            f"the graph has no value {missing[0]!r} to calibrate; compile the original export again"
        )
    pick = ir.Value(name=PICK, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["zqfp_rows"]))
    graph.inputs.append(pick)
    for index, name in enumerate(names):
        for kind, value in zip(("max", "rows", "energy"), _measure(graph, values[name], pick), strict=True):
            value.name = f"zqfp_{kind}_{index}"
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(value)
    RemoveUnusedNodesPass()(model)


def _measure(graph: ir.Graph, x: ir.Value, pick: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    def add(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes or None)
        # Named here: what the graph would call it may be a name of a subgraph, such as torch's val_7.
        node.outputs[0].name = f"zqfp_measure_{len(graph)}"
        graph.append(node)
        return node.outputs[0]

    as_float = add("Cast", x, to=ir.DataType.FLOAT)
    peak = add("ReduceMax", add("Abs", as_float), keepdims=0)
    flat = add("Flatten", as_float, axis=-1)
    zero = add("Constant", value=ir.tensor(np.zeros(1, np.int64)))
    count = add("Cast", add("Gather", add("Shape", flat), zero), to=ir.DataType.FLOAT)
    rows = add("Cast", add("Mul", pick, count), to=ir.DataType.INT64)
    floor = add("Constant", value=ir.tensor(np.array(np.finfo(np.float32).tiny)))
    relative = add("Div", flat, add("Max", peak, floor))
    energy = add("ReduceSum", add("Mul", relative, relative), zero, keepdims=0)
    return peak, add("Gather", flat, rows), energy


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]


def finite_range(value: float, name: str) -> float:
    """Return an activation's range.

    Raises:
        ModelError: When it is NaN or infinite.
    """
    if not np.isfinite(value):
        raise ModelError(
            f"activation {name} reaches {value} on the calibration samples; "
            "the model overflows before quantisation: export it in float32 or bfloat16"
        )
    return value
