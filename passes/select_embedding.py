"""Pass ``select-embedding``: find the token embedding that can be stored in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._layer_names import UniqueNames, layer_name, name_nodes
from passes._liveness import DEAD_REASON, live_nodes
from passes._weight_chain import constant_values, find_root, lift_constant
from zqfp_compile.errors import UsageError
from zqfp_compile.pass_base import Declined, Pass, PassResult
from zqfp_compile.plan import EmbeddingSite, QuantPlan, SitePrecision, WeightSource

_TOKENS = "input_ids"


@dataclass(frozen=True)
class SelectEmbedding(Pass):
    """Write the token embedding into a plan.

    Matched, ids the graph input ``input_ids`` through Cast, Identity and Reshape, table a float matrix
    through Cast and Identity::

        h = Gather(table, ids)                  axis 0

    A table that is also the weight of linears (a tied lm_head) is taken only when all of them are in the plan
    and multiply with the table as it is: both then read one FP8 tensor, so those linears get the precision
    ``fp8`` without LoRC. Left alone, with a reason: a table that something else reads as well, which would
    keep its float copy; one that is no plain initializer; rows that no output depends on.

    The graph changes only to be unambiguous: nodes without a name or with a duplicate one get a unique name,
    and a Constant node that holds the table becomes an initializer of the same name.

    Attributes:
        plan: The linears; the result extends it.
    """

    name: ClassVar[str] = "select-embedding"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Fill ``embeddings`` of ``PassResult.plan``, and ``precisions`` of linears with a shared table.

        Raises:
            UsageError: When the model has no token embedding.
        """
        modified = name_nodes(model.graph)
        nodes = list(_lookups(model.graph))
        if not nodes:
            raise UsageError(
                f"--quantize-embedding: no Gather reads a table by {_TOKENS!r}; leave the option out"
            )
        names = UniqueNames(model.graph)
        linears = {node.name: node for node in model.graph}
        for linear in self.plan.linears:
            names.claim(linear.name, linears.get(linear.node))
        embeddings: list[EmbeddingSite] = []
        declined: list[Declined] = []
        for node in nodes:
            name = names.claim(layer_name(node), node)
            found = self._site(model.graph, node, name)
            if isinstance(found, str):
                declined.append(Declined(name, found))
                continue
            embeddings.append(found)
            modified |= lift_constant(model.graph, _root_value(model.graph, node))
        shared = {layer: SitePrecision("fp8", 0) for site in embeddings for layer in site.linears}
        plan = self.plan.replace(embeddings=tuple(embeddings), precisions={**self.plan.precisions, **shared})
        return PassResult(model, modified, tuple(declined), plan)

    def _site(self, graph: ir.Graph, node: ir.Node, name: str) -> EmbeddingSite | str:
        """Return the embedding that ``node`` is, or the reason why it is left alone."""
        table, output = node.inputs[0], node.outputs[0]
        if node not in live_nodes(graph):
            return DEAD_REASON
        if table not in constant_values(graph) or table is None:
            return "its table is no constant"
        root = find_root(table)
        if isinstance(root, str):
            return root.replace("the weight", "the table")
        if len(root.shape) != 2 or root.flipped:
            return "its table is no matrix with one row per token"
        source = WeightSource(str(root.value.name), transposed=False, casts=root.casts)
        linears: list[str] = []
        for reader in _readers(root.value):
            if reader is node:
                continue
            reason, layer = self._shared(reader, source)
            if layer is None:
                return reason
            linears.append(layer)
        return EmbeddingSite(
            name=name,
            node=str(node.name),
            output=str(output.name),
            source=source,
            rows=root.shape[0],
            width=root.shape[1],
            dtype=root.dtype,
            linears=tuple(dict.fromkeys(linears)),
        )

    def _shared(self, reader: ir.Node | None, source: WeightSource) -> tuple[str, str | None]:
        """Return the planned linear that ``reader`` is, or why the table cannot be shared with it."""
        if reader is None:
            return "its table is a graph output", None
        linear = next((site for site in self.plan.linears if site.node == reader.name), None)
        place = layer_name(reader)
        if linear is None or self.plan.weight_format == "none":
            return (
                f"its table is also read by {place!r}, which stays in float: FP8 next to it would be a "
                "second copy; see --quantize-lm-head"
            ), None
        if linear.weight != source:
            return f"its table is also the weight of {place!r}, which scales or rounds it differently", None
        return "", linear.name


def _lookups(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the Gather nodes that read rows by token, in graph order."""
    for node in graph:
        if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
            continue
        index = node.inputs[1]
        while index is not None and (step := index.producer()) is not None:
            if step.op_type not in ("Cast", "Identity", "Reshape"):
                break
            index = step.inputs[0]
        table = node.inputs[0]
        # What quantize-embedding wrote is no candidate any more.
        rewritten = table is not None and (made := table.producer()) and made.op_type == "DequantizeLinear"
        if index is not None and index.is_graph_input() and index.name == _TOKENS and not rewritten:
            yield node


def _root_value(graph: ir.Graph, node: ir.Node) -> ir.Value:
    table = node.inputs[0]
    assert table is not None  # _site() saw it
    root = find_root(table)
    assert not isinstance(root, str)
    return root.value


def _readers(value: ir.Value) -> Iterator[ir.Node | None]:
    """Yield what reads a table, through operators that only pass it on; ``None`` for a graph output."""
    if value.is_graph_output():
        yield None
    for node, _ in value.uses():
        if node.domain == "" and node.op_type in ("Cast", "Identity", "Transpose"):
            yield from _readers(node.outputs[0])
        else:
            yield node
