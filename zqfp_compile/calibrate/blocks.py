"""Cuts a graph into blocks that are calibrated one after the other, each with its own weights only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from zqfp_compile.calibrate.segments import Partition, Segment, Step, partition, reads
from zqfp_compile.errors import ModelError
from zqfp_compile.plan import LinearSite


@dataclass(frozen=True)
class Block:
    """A part of a graph that is computed at once.

    Attributes:
        segment: Its nodes, the graph inputs and values of earlier blocks they read, and what it hands on.
        measured: The values to measure in it.
        kept: What later blocks read of it and of the blocks before it.
    """

    segment: Segment
    measured: tuple[str, ...]
    kept: frozenset[str]


def cut_into_blocks(
    model: ir.Model, sites: Sequence[LinearSite], names: Sequence[str], weight_bytes: int
) -> tuple[Block, ...]:
    """Cut ``model`` as a walk does, in front of the linears of one activation, but into larger pieces.

    A linear, its bias and what follows up to the next norm stay together: ONNX Runtime fuses them.

    Args:
        model: Nodes in topological order.
        sites: Planned linears in graph order.
        names: The values to measure.
        weight_bytes: A block ends when its planned linears have as many bytes of weights; those that read the
            wider half of all activations go with the ones before them.

    Returns:
        The blocks in order; none when the graph cannot be cut, or some name is not in it.
    """
    try:
        parts = partition(model.graph, sites)
    except ModelError:  # ONNX Runtime does not mind linears that the walk cannot visit in order
        return ()
    if not parts.steps:
        return ()
    cutter = _Cutter(model.graph, parts, names)
    blocks = tuple(cutter.cut(_borders(model.graph, parts.steps, weight_bytes)))
    return () if cutter.missing else blocks


def _borders(graph: ir.Graph, steps: Sequence[Step], weight_bytes: int) -> list[int]:
    """Return the index of the segment that each block ends with, where no wide activation is handed on."""
    widest = sorted(step.sites[0].k for step in steps)[len(steps) // 2]
    borders, size = [], 0
    for index, step in enumerate(steps[:-1]):
        if size >= weight_bytes and step.sites[0].k <= widest:
            borders.append(index)
            size = 0
        tensors = [graph.initializers[site.weight.initializer].const_value for site in step.sites]
        size += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return [*borders, len(steps) - 1]


class _Cutter:
    """Working state of :func:`cut_into_blocks`."""

    def __init__(self, graph: ir.Graph, parts: Partition, names: Sequence[str]) -> None:
        self.missing = list(names)
        self._parts = parts
        self._values = {str(value.name): value for node in graph for value in node.outputs}
        self._position = {node: index for index, node in enumerate(graph)}

    def cut(self, borders: Sequence[int]) -> Iterator[Block]:
        known: frozenset[str] = frozenset()
        begin = 0
        for border in borders:
            last = border == borders[-1]
            kept = frozenset() if last else self._kept(border)
            inputs = {step.activation for step in self._parts.steps[begin : border + 1]}
            wanted = [name for name in self.missing if last or name in inputs]
            nodes = self._between(known, [*(kept - known), *wanted])
            made = {str(value.name) for node in nodes for value in node.outputs}
            measured = tuple(name for name in self.missing if name in made)
            self.missing = [name for name in self.missing if name not in made]
            read = {str(value.name): value for node in nodes for value in reads(node)}
            outside = (name for name, value in read.items() if name not in made)
            feeds = tuple(name for name in outside if not read[name].is_initializer())
            yield Block(Segment(nodes, feeds, tuple(sorted(kept - known))), measured, kept)
            known, begin = kept, border + 1

    def _kept(self, border: int) -> frozenset[str]:
        """Return the values made before the end of a segment that a later one reads."""
        made = {name for segment in self._parts.segments[: border + 1] for name in segment.outputs}
        made |= {name for step in self._parts.steps[:border] for name in step.computed}
        return frozenset(name for name in made if self._parts.last_use[name] > border)

    def _between(self, known: Collection[str], targets: Collection[str]) -> tuple[ir.Node, ...]:
        """Return the nodes that lead from the known values to the targets, in graph order."""
        chosen: set[ir.Node] = set()
        unseen = [self._values[name] for name in targets if name in self._values]
        while unseen:
            value = unseen.pop()
            node = value.producer()
            if node is not None and node not in chosen and value.name not in known:
                chosen.add(node)
                unseen.extend(reads(node))
        return tuple(sorted(chosen, key=self._position.__getitem__))
