"""Pass ``remove-unused``: drop what nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedOpsetsPass

from passes._emit import subgraphs
from zqfp_compile.pass_base import Pass, PassResult


@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Remove nodes, initializers, functions and opset imports that no output depends on.

    Before::

        x -> QuantizeLinear -> x8 -> W4A8Linear -> y        x8 -> DequantizeLinear -> (nobody); W (nobody)

    After::

        x -> QuantizeLinear -> x8 -> W4A8Linear -> y

    Graph inputs (also those with a default initializer) and outputs stay. Empty positional inputs of the
    remaining nodes stay as well: a plugin counts them. No tensor is loaded.
    """

    name: ClassVar[str] = "remove-unused"

    def call(self, model: ir.Model) -> PassResult:
        """Clean ``model``."""
        removed = _remove_nodes(model.graph) + _remove_initializers(model.graph)
        for function in model.functions.values():
            removed += _remove_nodes(function.graph)
        functions = RemoveUnusedFunctionsPass()(model).modified  # type: ignore[no-untyped-call]
        opsets = RemoveUnusedOpsetsPass()(model).modified
        return PassResult(model, modified=bool(removed) or functions or opsets)


def _remove_nodes(graph: ir.Graph) -> int:
    """Remove dead nodes from the last to the first, so that a dead chain goes in one sweep."""
    count = 0
    for node in reversed(graph):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            for inner in subgraphs(node):
                count += _remove_nodes(inner) + _remove_initializers(inner)
        else:
            graph.remove(node, safe=True)
            count += 1
    return count


def _remove_initializers(graph: ir.Graph) -> int:
    unused = [
        name
        for name, value in graph.initializers.items()
        if not (value.uses() or value.is_graph_input() or value.is_graph_output())
    ]
    for name in unused:
        del graph.initializers[name]
    return len(unused)
