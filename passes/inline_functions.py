"""Pass ``inline-functions``: the engine-ready form with 4-bit weights."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import PassError as IrPassError
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import InlinePass

from passes._emit import Names
from passes._sites import is_w4a8
from passes._w4a8_function import DOMAIN
from zqfp_compile.pass_base import Pass, PassError, PassResult

_CALL = "zqfp.call"
_OURS = "zqfp.ours"
_BODY_NODE = "zqfp.body_node"


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace every call of a model-local function by the function's body.

    Before::

        W4A8Linear "layer" (x8, a, ...) -> y            and its function

    After::

        x8 -> DequantizeLinear(a) -> MatMul "layer/MatMul" -> ... -> y
        codes -> DequantizeLinear -> ... -> w_hat -----+

    Engine parsers inline as well, but fail on the second call of a function with Q/DQ. Inlined nodes and
    values are named ``<call>/<node in the body>``. Equal nodes of our bodies (constants, the DequantizeLinear
    that q, k and v share, the decoding of a shared weight) are merged, MatMuls never. Overloads and nested
    calls are resolved; no initializer is loaded. Unused functions go too. Nothing happens in a model without
    functions.

    Attributes:
        keep_ours: Leave ``W4A8Linear`` nodes and their functions, for a lowering that replaces them.
    """

    name: ClassVar[str] = "inline-functions"
    keep_ours: bool = False

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When functions are recursive or cannot be inlined.
        """
        kept = {key: body for key, body in model.functions.items() if self.keep_ours and key[0] == DOMAIN}
        if len(kept) == len(model.functions):
            return PassResult(model, modified=False)
        for key in kept:
            del model.functions[key]
        outputs = _mark(model)
        try:
            InlinePass()(model)
        except (IrPassError, PreconditionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise PassError(f"functions cannot be inlined ({reason}); export without them") from error
        model.functions.clear()
        _merge(model.graph, _rename(model.graph, outputs))
        model.functions.update(kept)
        return PassResult(model, modified=True)


def _mark(model: ir.Model) -> set[str | None]:
    """Leave on each node where it comes from (the inliner copies metadata); return the calls' outputs."""
    outputs: set[str | None] = set()
    for number, node in enumerate(model.graph.all_nodes()):
        if node.op_identifier() in model.functions:
            node.metadata_props[_CALL] = node.name or f"{node.op_type}_{number}"
            outputs.update(value.name for value in node.outputs)
            if is_w4a8(node):
                node.metadata_props[_OURS] = ""
    for function in model.functions.values():
        for node in function.all_nodes():
            node.metadata_props[_BODY_NODE] = node.name or node.op_type
    return outputs


def _rename(graph: ir.Graph, outputs: set[str | None]) -> list[ir.Node]:
    """Name inlined nodes and values after call and body node, but not calls' outputs; return our nodes."""
    names = Names(graph)
    ours = []
    for node in graph.all_nodes():
        call = node.metadata_props.pop(_CALL, None)
        body_node = node.metadata_props.pop(_BODY_NODE, None)
        if node.metadata_props.pop(_OURS, None) is not None:
            ours.append(node)
        if call is None or body_node is None:
            continue
        names.name_node(node, f"{call}/{body_node}")
        for value in node.outputs:
            if value.name not in outputs:
                value.name = names.value(f"{call}/{body_node}")
    return ours


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Let equal nodes share the first one's output; ``nodes`` are in graph order, so users come later."""
    known: dict[Hashable, ir.Value] = {}
    for node in nodes:
        value = node.outputs[0]
        if node.op_type == "MatMul" or value.is_graph_output():
            continue
        attributes = tuple((name, _content(attr)) for name, attr in sorted(node.attributes.items()))
        first = known.setdefault((node.op_type, *map(id, node.inputs), attributes), value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.remove(node, safe=True)


def _content(attr: ir.Attr) -> Hashable:
    """Return what makes two attributes equal; the tensors of our function bodies are a few numbers each."""
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return tensor.dtype, tuple(tensor.shape), tensor.tobytes()
    value = attr.value
    return tuple(value) if isinstance(value, (list, tuple)) else value
