"""Finds out which values become the logits."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from passes._weight_chain import constant_tensor

# What stands between the output projection and the graph output: bias, scaling, soft-capping, last-token
# slicing, type and shape changes.
_ELEMENTWISE = ("Add", "Cast", "Clip", "Div", "Identity", "LogSoftmax", "Mul", "Softmax", "Sub", "Tanh")
_SHAPE_ONLY = ("Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze")
_POST_PROCESSING = frozenset((*_ELEMENTWISE, *_SHAPE_ONLY))


def is_lm_head(output: ir.Value, n: int, vocabularies: frozenset[int]) -> bool:
    """Whether a linear's ``output`` [..., n] is the logits.

    It is when, through element-wise and shape operators only, it reaches a graph output that is called
    ``logits``, or any graph output while ``n`` is a vocabulary size.
    """
    seen: set[ir.Value] = set()
    pending = [output]
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.is_graph_output() and (value.name == "logits" or n in vocabularies):
            return True
        for node, index in value.uses():
            is_index = node.op_type == "Gather" and index == 1
            if node.domain == "" and node.op_type in _POST_PROCESSING and not is_index:
                pending.extend(node.outputs)
    return False


def vocabulary_sizes(graph: ir.Graph) -> frozenset[int]:
    """Rows of the embedding tables: constant matrices gathered along axis 0 by an integer graph input."""
    return frozenset(_table_rows(graph))


def _table_rows(graph: ir.Graph) -> Iterator[int]:
    inputs = {v for v in graph.inputs if v.dtype in (ir.DataType.INT64, ir.DataType.INT32)}
    for node in graph:
        if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
            continue
        table, index = node.inputs
        while index is not None and (step := index.producer()) is not None:
            if step.op_type not in ("Cast", "Identity", "Reshape"):
                break
            index = step.inputs[0]
        tensor = None if table is None else constant_tensor(_through_identity(table))
        if index in inputs and tensor is not None and len(tensor.shape) == 2:
            yield int(tensor.shape.numpy()[0])


def _through_identity(value: ir.Value) -> ir.Value:
    while (node := value.producer()) is not None and node.op_type in ("Identity", "Cast"):
        if node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value
