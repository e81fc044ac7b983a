"""Cuts a graph at its planned linears: steps (linears of one activation) and the segments between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from zqfp_compile.errors import ModelError
from zqfp_compile.plan import LinearSite

# What costs time: values behind one of these are computed once and kept, the others again when needed.
_EXPENSIVE = frozenset({"Attention", "Conv", "Einsum", "Gemm", "If", "Loop", "MatMul", "Scan"})
# So are values that would differ the second time.
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
# A node that reads a weight of so many values (an embedding) is kept out of all but its own segment.
_LARGE_WEIGHT = 1 << 16


@dataclass(frozen=True)
class Step:
    """The planned linears that read one activation; they are quantised together.

    Attributes:
        activation: Name of the value [..., K] they read.
        sites: The linears, in graph order.
        computed: Names of those of their outputs that anything later needs.
    """

    activation: str
    sites: tuple[LinearSite, ...]
    computed: frozenset[str]


@dataclass(frozen=True)
class Segment:
    """Everything that can be computed once the steps before it are done, without any planned linear.

    Attributes:
        nodes: In graph order.
        inputs: Names of graph inputs, kept values and linears' outputs that the nodes read.
        outputs: Names of the values that a step or a later segment reads.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """``segments[0], steps[0], segments[1], steps[1], ...``: the order in which a graph is walked.

    Attributes:
        steps: Every planned linear is in exactly one.
        segments: As many as steps; ``segments[i]`` ends with the activation of ``steps[i]`` known.
        last_use: For every value that has to be kept, the index of the last segment that reads it. The
            activation of ``steps[i]`` counts as read by ``segments[i + 1]``: the outputs of its linears are
            computed right before that.
    """

    steps: tuple[Step, ...]
    segments: tuple[Segment, ...]
    last_use: Mapping[str, int]


def partition(graph: ir.Graph, sites: Sequence[LinearSite]) -> Partition:
    """Cut ``graph`` at ``sites``.

    Steps come in the order of their first linear. Values that only cheap operators separate from the
    graph's inputs (masks, rotary tables, shapes) belong to no segment: each computes those it reads. Every
    other value is computed once, in the first segment that can; what no planned linear needs is left out.

    Args:
        graph: Nodes in topological order.
        sites: Planned linears in graph order.

    Raises:
        ModelError: When a linear is not in the graph, or reads a value that no earlier step leads to.
    """
    return _Partitioner(graph, sites).cut()


def segment_model(
    model: ir.Model, segment: Segment, types: Mapping[str, tuple[ir.DataType, int]]
) -> ir.Model:
    """Return ``segment`` as a model of its own that shares the weights it needs.

    Args:
        model: The model that was cut.
        segment: One of its segments.
        types: Element type and rank of every input, as they will be fed.
    """
    inside = {output for node in segment.nodes for output in node.outputs}
    outside = {value.name: value for node in segment.nodes for value in reads(node) if value not in inside}
    inputs = [outside[name] for name in segment.inputs]
    weights = [value for name, value in outside.items() if name not in types]
    named = {value.name: value for value in inside}
    view = ir.GraphView(
        inputs,
        [named[name] for name in segment.outputs],
        nodes=segment.nodes,
        initializers=weights,
        opset_imports=model.graph.opset_imports,
        name="segment",
    )
    graph = view.clone()
    for value in graph.inputs:
        dtype, rank = types[str(value.name)]
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape([None] * rank)
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values a node reads, those of the enclosing graph that its subgraphs use included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield from _captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from _captured(graph)


def _captured(graph: ir.Graph) -> Iterator[ir.Value]:
    own = {*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)}
    for node in graph:
        yield from (value for value in reads(node) if value not in own)
    yield from (value for value in graph.outputs if value not in own)


class _Partitioner:
    """Working state of :func:`partition`."""

    def __init__(self, graph: ir.Graph, sites: Sequence[LinearSite]) -> None:
        self.graph = graph
        self.groups: dict[str, list[LinearSite]] = {}
        for site in sites:
            self.groups.setdefault(site.activation, []).append(site)
        self.order = {activation: index for index, activation in enumerate(self.groups)}
        self.sites = {site.node: site for site in sites}
        self.position = {node: index for index, node in enumerate(graph)}
        self.constant: set[ir.Value] = set(graph.initializers.values())
        # The segment that first knows a value, and that computes a node; what is cheap or constant has none.
        self.level: dict[ir.Value, int] = {}
        self.nodes: list[list[ir.Node]] = [[] for _ in range(len(self.groups) + 1)]
        self.last_use = {activation: index + 1 for activation, index in self.order.items()}

    def cut(self) -> Partition:
        self._find_levels()
        for node in self._needed():
            self._place(node)
        steps = (
            Step(name, tuple(group), frozenset(site.output for site in group if site.output in self.last_use))
            for name, group in self.groups.items()
        )
        segments = tuple(self._segment(index) for index in range(len(self.groups)))
        return Partition(tuple(steps), segments, self.last_use)

    def _find_levels(self) -> None:
        found = set()
        for node in self.graph:
            inputs = list(reads(node))
            known = [self.level[value] for value in inputs if value in self.level]
            site = self.sites.get(str(node.name))
            if site is not None:
                found.add(site.node)
                self._check_reached(site, node)
                self.level[node.outputs[0]] = self.order[site.activation] + 1
            elif known or self._expensive(node, inputs):
                self.level.update(dict.fromkeys(node.outputs, max(known, default=0)))
            elif self.constant.issuperset(inputs):
                self.constant.update(node.outputs)
        missing = [site for site in self.sites.values() if site.node not in found]
        if missing:
            raise ModelError(
                f"layer {missing[0].name!r}: its node {missing[0].node!r} is not in the graph; "
                "compile the original export again"
            )

    def _check_reached(self, site: LinearSite, node: ir.Node) -> None:
        activation = node.inputs[0]
        if activation is None or activation.name != site.activation:
            raise ModelError(
                f"layer {site.name!r} does not read {site.activation!r}; compile the original export again"
            )
        if self.level.get(activation, 0) > self.order[site.activation]:
            raise ModelError(
                f"layer {site.name!r}: its input {site.activation!r} depends on a layer that comes after it; "
                "export the model again, its nodes in order"
            )

    def _expensive(self, node: ir.Node, inputs: Sequence[ir.Value]) -> bool:
        """Whether to compute a node that depends on no planned linear once, and not whenever it is read."""
        if any(output.name in self.order for output in node.outputs) or node.op_type in _RANDOM:
            return True
        weights = [value.const_value for value in inputs if value in self.constant]
        if len(weights) == len(inputs):
            return False
        large = any(tensor is not None and tensor.size >= _LARGE_WEIGHT for tensor in weights)
        return large or node.op_type in _EXPENSIVE or node.domain not in ("", "ai.onnx")

    def _needed(self) -> list[ir.Node]:
        """Return the nodes that some step's activation depends on, planned linears left out, in order."""
        wanted = {value for value in self.level if value.name in self.groups}
        needed = []
        for node in reversed(self.graph):
            if not wanted.isdisjoint(node.outputs) and str(node.name) not in self.sites:
                needed.append(node)
                wanted.update(reads(node))
        return needed[::-1]

    def _place(self, node: ir.Node) -> None:
        """Put a needed node into its segment, and note what that reads from before it."""
        index = max((self.level[value] for value in node.outputs if value in self.level), default=None)
        if index is None:
            return
        self.nodes[index].append(node)
        for value in reads(node):
            producer = value.producer()
            planned = producer is not None and str(producer.name) in self.sites
            if planned or self.level.get(value, index) < index:
                self.last_use[str(value.name)] = max(index, self.last_use.get(str(value.name), 0))

    def _segment(self, index: int) -> Segment:
        own = self.nodes[index]
        nodes = self._with_cheap(own)
        inside = {value for node in nodes for value in node.outputs}
        # A dict keeps the order.
        outside = {value: None for node in nodes for value in reads(node) if value not in inside}
        inputs = tuple(str(value.name) for value in outside if not value.is_initializer())
        made = [str(value.name) for node in own for value in node.outputs]
        return Segment(nodes, inputs, tuple(name for name in made if self.last_use.get(name, 0) > index))

    def _with_cheap(self, own: Sequence[ir.Node]) -> tuple[ir.Node, ...]:
        """Add the nodes that make the cheap and the constant values which ``own`` reads, in graph order."""
        chosen = set(own)
        unseen = [value for node in own for value in reads(node)]
        while unseen:
            value = unseen.pop()
            node = value.producer()
            if node is not None and value not in self.level and node not in chosen:
                chosen.add(node)
                unseen.extend(reads(node))
        return tuple(sorted(chosen, key=self.position.__getitem__))
