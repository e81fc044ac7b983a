"""Pass ``quantize-embedding``: the token embedding reads an FP8 table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._emit import Emitter, Names, insert_after
from passes._tensors import TensorSharer
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import EmbeddingSite, QuantPlan

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class QuantizeEmbedding(Pass):
    """Let each planned embedding gather from a dequantised FP8 table.

    Before::

        h = Gather(table, ids)

    After, codes FLOAT8E4M3FN [V, D] and row_scales FLOAT [V]::

        codes -> DequantizeLinear(row_scales, axis 0) -> Gather(ids) -> [Cast] -> h

    h keeps its name and type. The table is dequantised in front of the Gather because nothing else runs: ONNX
    has no Gather of FP8 (ONNX Runtime and TensorRT-RTX refuse it), and TensorRT-RTX keeps codes that are
    gathered as UINT8 as four bytes each and takes none as INT8. This form it fuses into one kernel that reads
    only the rows asked for, from 8-bit codes, which the FP8 GEMM of a tied lm_head shares. ONNX Runtime's
    optimiser folds it after ``qdq-to-casts``.

    A linear with the same tensors shares their initializers. The float table is left for remove-unused. An
    embedding that is rewritten already, or whose table a linear keeps in float (``plan.precisions``), is left
    alone. No tensor is loaded.

    Attributes:
        plan: Embeddings and their quantised tensors.
    """

    name: ClassVar[str] = "quantize-embedding"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a planned embedding or its tensors are missing, or the opset is below 21.
        """
        names = Names(model.graph)
        sharer = TensorSharer(model.graph, names)
        nodes = {node.name: node for node in model.graph}
        modified = False
        for site in self.plan.stored_embeddings:
            node = nodes.get(site.node)
            if node is None or node.op_type != "Gather" or node.inputs[0] is None:
                raise PassError(
                    f"embedding {site.name!r}: its node {site.node!r} is not in the graph; "
                    "use this model's plan"
                )
            made = node.inputs[0].producer()
            if made is not None and made.op_type == "DequantizeLinear":
                continue
            if model.graph.opset_imports.get("", 0) < 21:
                raise PassError("quantize-embedding: the model's opset is below 21; run raise-opset first")
            self._replace(model.graph, names, sharer, site, node)
            modified = True
        return PassResult(model, modified)

    def _replace(
        self, graph: ir.Graph, names: Names, sharer: TensorSharer, site: EmbeddingSite, node: ir.Node
    ) -> None:
        tensors = self.plan.embedding_tensors.get(site.name)
        if tensors is None:
            raise PassError(
                f"embedding {site.name!r}: the plan has no quantised table; run the quantize step first"
            )
        codes = sharer.value(f"{site.name}.codes", tensors.codes)
        rows = sharer.value(f"{site.name}.row_scales", tensors.row_scales)
        emit = Emitter(graph, names, f"{site.name}/", node.metadata_props)
        table = emit.op("DequantizeLinear", [codes, rows], "table", _FLOAT, axis=0)
        table.shape = ir.Shape([site.rows, site.width])
        graph.insert_before(node, emit.nodes)
        node.replace_input_with(0, table)
        if site.dtype != _FLOAT:
            _cast_back(graph, names, site, node)


def _cast_back(graph: ir.Graph, names: Names, site: EmbeddingSite, node: ir.Node) -> None:
    """Let a Cast of the gathered rows take over the Gather's output, its name and its type."""
    old = node.outputs[0]
    emit = Emitter(graph, names, f"{site.name}/", node.metadata_props)
    rows = emit.value_name("rows")
    h = emit.op("Cast", [old], "h", site.dtype, to=int(site.dtype))
    h.shape = old.shape
    h.metadata_props.update(old.metadata_props)
    insert_after(graph, old, emit.nodes)
    for user, index in tuple(old.uses()):
        if user is not emit.nodes[0]:
            user.replace_input_with(index, h)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = h
    h.name, old.name, old.dtype = old.name, rows, _FLOAT
