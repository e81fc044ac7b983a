"""Drop what exporters leave behind for debugging; keep the module path, which names the layers."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from zqfp_compile.pass_base import Pass, PassResult

NAME_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class StripMetadata(Pass):
    """Remove metadata and doc strings of graphs, functions, nodes and values, but the module path of nodes.

    torch.onnx writes 2-4 MB of stack traces into a small LLM; they end up in the artifact and in every graph
    handed to a builder.

    Before::

        y = MatMul(x, w)  # doc_string: File "model.py", line 12 ...
          meta pkg.torch.onnx.name_scopes: ['', 'layers.0.q_proj', 'linear']
          meta pkg.torch.onnx.stack_trace: File "model.py", line 12 ...

    After::

        y = MatMul(x, w)
          meta pkg.torch.onnx.name_scopes: ['', 'layers.0.q_proj', 'linear']

    Not touched: ``metadata_props`` and ``doc_string`` of the model itself, which belong to its author.
    """

    name: ClassVar[str] = "strip-metadata"

    def call(self, model: ir.Model) -> PassResult:
        """Strip ``model`` in place; raises nothing."""
        modified = False
        for item, kept in _described(model):
            modified |= _strip(item, kept)
        return PassResult(model, modified)


def _described(
    model: ir.Model,
) -> Iterator[tuple[ir.Graph | ir.Function | ir.Node | ir.Value, frozenset[str]]]:
    """Everything that carries metadata, each with the keys to keep."""
    none: frozenset[str] = frozenset()
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for graph in (root, *root.subgraphs()):
            yield graph, none
            values = [*graph.inputs, *graph.outputs]
            if isinstance(graph, ir.Graph):
                values += graph.initializers.values()
            for value in values:
                yield value, none
            for node in graph:
                yield node, frozenset({NAME_SCOPES})
                for value in node.outputs:
                    yield value, none


def _strip(item: ir.Graph | ir.Function | ir.Node | ir.Value, kept: frozenset[str]) -> bool:
    metadata: MutableMapping[str, str] = item.metadata_props
    dropped = [key for key in metadata if key not in kept]
    for key in dropped:
        del metadata[key]
    documented = bool(item.doc_string)
    if documented:
        item.doc_string = None
    return documented or bool(dropped)
