"""The same model written another way: what is compiled from it must not differ."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper


def renamed(
    proto: onnx.ModelProto, values: Mapping[str, str], node_name: Callable[[onnx.NodeProto], str]
) -> onnx.ModelProto:
    """A copy with values of the graph and its subgraphs renamed, and all their nodes."""
    copy = _copy(proto)
    for graph in graphs(copy.graph):
        for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            item.name = values.get(item.name, item.name)
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [values.get(name, name) for name in names]
            node.name = node_name(node)
    return copy


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every subgraph."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def value_names(proto: onnx.ModelProto) -> list[str]:
    """Names of all values but the inputs a caller feeds and the outputs, in order."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    fixed = {item.name for item in proto.graph.input} - stored
    fixed |= {item.name for item in proto.graph.output}
    names: dict[str, None] = {}
    for graph in graphs(proto.graph):
        names |= dict.fromkeys(item.name for item in (*graph.input, *graph.initializer))
        names |= dict.fromkeys(name for node in graph.node for name in node.output)
    return [name for name in names if name and name not in fixed]


def other_names(proto: onnx.ModelProto, random: random.Random) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Every value and node is called something else, in no order; also returns the values' new names."""
    names = value_names(proto)
    fresh = [f"v{number}" for number in range(len(names))]
    random.shuffle(fresh)
    values = dict(zip(names, fresh, strict=True))
    return renamed(proto, values, lambda node: f"n{random.getrandbits(48)}"), values


def other_order(proto: onnx.ModelProto, random: random.Random) -> onnx.ModelProto:
    """Nodes in another order in which they can run; initializers in any."""
    copy = _copy(proto)
    waiting = list(copy.graph.node)
    made = {name for node in waiting for name in node.output}
    ordered: list[onnx.NodeProto] = []
    while waiting:
        ready = [node for node in waiting if made.isdisjoint(reads(node))]
        node = random.choice(ready)
        waiting.remove(node)
        made.difference_update(node.output)
        ordered.append(node)
    stored = list(copy.graph.initializer)
    random.shuffle(stored)
    _replace(copy.graph.node, ordered)
    _replace(copy.graph.initializer, stored)
    return copy


def reads(node: onnx.NodeProto) -> set[str]:
    """Names of the values that a node and its subgraphs read."""
    inner = [graph for attribute in node.attribute for graph in graphs(attribute.g)]
    return {*node.input, *(name for graph in inner for item in graph.node for name in item.input)}


def live_names(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> set[str]:
    """Names of ``outputs`` and of what they depend on; ``nodes`` are in order."""
    live = set(outputs)
    for node in reversed(nodes):
        if not live.isdisjoint(node.output):
            live |= reads(node)
    return live


def more_nodes(proto: onnx.ModelProto, random: random.Random) -> onnx.ModelProto:
    """An Identity in front of some operands, and nodes that nobody reads."""
    copy = _copy(proto)
    nodes = []
    for number, node in enumerate(copy.graph.node):
        for index, name in enumerate(node.input):
            # A table behind an Identity is the same table, and a linear's input another value.
            if name and random.random() < 0.15:
                nodes.append(helper.make_node("Identity", [name], [f"more_{number}_{index}"]))
                node.input[index] = f"more_{number}_{index}"
        nodes.append(node)
        if random.random() < 0.1 and node.output[0]:
            nodes.append(helper.make_node("Identity", [node.output[0]], [f"dead_{number}"]))
    _replace(copy.graph.node, nodes)
    return copy


def other_constants(proto: onnx.ModelProto, random: random.Random) -> onnx.ModelProto:
    """Some initializers become Constant nodes, some Constant nodes initializers."""
    copy = _copy(proto)
    inputs = {item.name for item in copy.graph.input}
    kept, nodes = [], []
    for tensor in copy.graph.initializer:
        if tensor.name in inputs or random.random() < 0.5:
            kept.append(tensor)
        else:
            nodes.append(helper.make_node("Constant", [], [tensor.name], value=tensor))
    for node in copy.graph.node:
        if node.op_type == "Constant" and random.random() < 0.5:
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            kept.append(tensor)
        else:
            nodes.append(node)
    _replace(copy.graph.node, nodes)
    _replace(copy.graph.initializer, kept)
    return copy


def _replace(field: Any, items: list[Any]) -> None:
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy
