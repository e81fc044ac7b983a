"""Recognises KV-cache tensors and decomposed attentions, or says why one is left alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from passes._layer_names import layer_name
from passes._weight_chain import FLOATS, constant_tensor, constant_values
from zqfp_compile.pass_base import Declined
from zqfp_compile.plan import AttentionSite, CacheSite

# Operators that compute both products of an attention at once.
_FUSED = frozenset(
    {
        "Attention",
        "DecoderMaskedMultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "PagedAttention",
        "SparseAttention",
    }
)
# What stands between the product of queries and keys and its Softmax: scaling, masking, soft-capping.
_SCORE_OPS = frozenset(
    ("Add", "Cast", "Clip", "Div", "Identity", "Max", "Min", "Mul", "Reshape", "Sub", "Tanh", "Where")
)
# Operators that move numbers without changing one: the range after them is the range before.
_MOVES = frozenset(("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))


def find_caches(graph: ir.Graph) -> tuple[list[CacheSite], list[Declined]]:
    """Return the KV-cache inputs of ``graph`` that a Concat appends to, and the others with the reason."""
    sites, declined = [], []
    for value in graph.inputs:
        if not _looks_like_cache(value) or value.name in graph.initializers:
            continue
        found = _cache(graph, value)
        if isinstance(found, str):
            declined.append(Declined(str(value.name), found))
        else:
            sites.append(found)
    return sites, declined


def _looks_like_cache(value: ir.Value) -> bool:
    name = str(value.name).lower()
    # Scalars and vectors with such names are lengths and positions.
    return ("past" in name or "cache" in name) and value.shape is not None and len(value.shape) >= 3


def _cache(graph: ir.Graph, past: ir.Value) -> CacheSite | str:
    if past.dtype not in FLOATS:
        return f"it has type {past.dtype}; only FLOAT, FLOAT16 and BFLOAT16 caches become FP8"
    readers = [(node, index) for node, index in past.uses() if node.op_type != "Shape"]
    if not readers:
        return "nothing reads it"
    concat, index = readers[0]
    for node, _ in readers:
        if node.graph is not graph:
            return f"it is read inside a subgraph (by {node.op_type} {node.name!r}); export without branches"
        if node.domain != "" or node.op_type != "Concat":
            return f"it is read by {_label(node)}; only a Concat that appends the new tokens is known"
    new = concat.inputs[1] if len(concat.inputs) == 2 else None
    if len(readers) > 1 or index != 0 or new is None:
        return f"it is not appended to by one Concat(past, new), but by {_label(concat)}"
    present = concat.outputs[0]
    if not present.is_graph_output():
        return f"the result of {_label(concat)} is no graph output"
    return CacheSite(str(past.name), str(present.name), str(new.name), str(concat.name), past.dtype)


def find_attentions(
    graph: ir.Graph, caches: Collection[CacheSite]
) -> tuple[list[AttentionSite], list[Declined]]:
    """Return the attentions of ``graph`` made of MatMul, Softmax, MatMul, and the others with the reason."""
    sites, declined = [], []
    constant = constant_values(graph)
    appended = {cache.present: cache.new for cache in caches}
    for node in graph.all_nodes():
        if node.op_type in _FUSED and node.domain in ("", "com.microsoft"):
            reason = f"{node.op_type} holds both products in one operator; export with attention decomposed"
            declined.append(Declined(layer_name(node), reason))
        elif node.op_type == "Softmax" and node.domain == "":
            found = _attention(graph, node, constant, appended)
            if isinstance(found, str):
                declined.append(Declined(layer_name(node), found))
            else:
                sites.append(found)
    return sites, declined


def _attention(
    graph: ir.Graph, softmax: ir.Node, constant: Collection[ir.Value], appended: dict[str, str]
) -> AttentionSite | str:
    if softmax.graph is not graph:
        return "it is inside a subgraph; only the main graph is compiled"
    scores = [node for node in _scores(softmax) if not constant_operand(node, constant)]
    if len(scores) != 1:
        return f"{len(scores) or 'no'} products of two activations make the scores of its Softmax, not one"
    mix = _mix(softmax.outputs[0])
    if mix is None:
        return "no single MatMul multiplies its probabilities with values"
    q, k, v = scores[0].inputs[0], scores[0].inputs[1], mix.inputs[1]
    if q is None or k is None or v is None or constant_operand(mix, constant):
        return "an operand of its products is constant"
    dtype = float_type(q)
    if dtype is None:
        return "the type of its queries is unknown; run onnx.shape_inference on the model"
    names = [_range_of(value) for value in (q, k, v)]
    q_name, k_name, v_name = (appended.get(name, name) for name in names)
    return AttentionSite(
        layer_name(softmax), str(scores[0].name), str(mix.name), q_name, k_name, v_name, dtype
    )


def constant_operand(node: ir.Node, constant: Collection[ir.Value]) -> bool:
    """Whether an operand of ``node`` depends on no graph input, as a linear layer's weight does."""
    return any(value in constant for value in node.inputs)


def _scores(softmax: ir.Node) -> list[ir.Node]:
    """The MatMuls whose result becomes the Softmax' input, through elementwise operators."""
    found: list[ir.Node] = []
    pending = [softmax.inputs[0]]
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if value is None or node is None or value in seen:
            continue
        seen.add(value)
        if node.op_type == "MatMul" and node.domain == "":
            found.append(node)
        elif node.op_type in _SCORE_OPS:
            pending.extend(node.inputs[:1] if node.op_type == "Reshape" else node.inputs)
    return list(dict.fromkeys(found))


def _mix(probabilities: ir.Value) -> ir.Node | None:
    """The one MatMul that reads the probabilities on its left, through Cast and the like."""
    while True:
        uses = list(probabilities.uses())
        if len(uses) != 1 or probabilities.is_graph_output():
            return None
        node, index = uses[0]
        if node.op_type == "MatMul" and node.domain == "":
            return node if index == 0 else None
        if node.op_type not in ("Cast", "Dropout", "Identity", "Reshape") or index != 0:
            return None
        probabilities = node.outputs[0]


def _range_of(value: ir.Value) -> str:
    """Name of the first value with the numbers of ``value``: what can be measured once for all its forms."""
    while (node := value.producer()) is not None and node.domain == "" and node.op_type in _MOVES:
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return str(value.name)


def float_type(value: ir.Value) -> ir.DataType | None:
    """Return the type of ``value``, from the operators before it where the graph does not say it."""
    known = next((dtype for dtype in _type_chain(value) if dtype is not None), None)
    return known if known in FLOATS else None


def _type_chain(value: ir.Value | None) -> Iterator[ir.DataType | None]:
    while value is not None:
        yield value.dtype
        node = value.producer()
        if node is None:
            return
        if node.op_type == "Cast":
            yield ir.DataType(node.attributes["to"].as_int())
        if node.op_type == "Constant":
            tensor = constant_tensor(value)
            yield None if tensor is None else tensor.dtype
            return
        # A linear layer's weight has a type where its activation has none.
        last = node.inputs[-1] if node.inputs and node.op_type in ("Add", "MatMul", "Mul") else None
        yield None if last is None else last.dtype
        position = 1 if node.op_type in ("DequantizeLinear", "Where") else 0
        value = node.inputs[position] if len(node.inputs) > position else None


def _label(node: ir.Node) -> str:
    return f"{'::'.join(filter(None, (node.domain, node.op_type)))} {node.name!r}"
