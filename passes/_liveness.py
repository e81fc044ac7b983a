"""Which nodes the outputs of a graph depend on."""

from __future__ import annotations

import onnx_ir as ir

from passes._emit import subgraphs

DEAD_REASON = "no output depends on it"


def live_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes of ``graph``, and of the subgraphs of live ones, that an output depends on.

    The others are what ``remove-unused`` removes.
    """
    live: set[ir.Node] = set()
    needed = set(graph.outputs)
    for node in reversed(graph):
        if needed.isdisjoint(node.outputs):
            continue
        live.add(node)
        needed.update(value for value in node.inputs if value is not None)
        for inner in subgraphs(node):
            inside = live_nodes(inner)
            live |= inside
            needed.update(inner.outputs)
            needed.update(value for nested in inside for value in nested.inputs if value is not None)
    return live
