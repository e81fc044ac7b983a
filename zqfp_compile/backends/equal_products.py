"""Which nodes of an engine-ready model compute the same: an engine builder computes them once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

# Where a value comes from: the number of what its node computes and the index of the output, or itself.
_Origin = tuple[int, int] | ir.Value | None


def equal_products(path: Path, names: Iterable[str]) -> list[list[str]]:
    """Group the nodes called ``names`` by what they compute; one that computes something else is alone.

    Nodes compute the same when operator, attributes and inputs are equal; so are inputs that are one value or
    come from nodes that compute the same. An Identity is its input, as is a Cast to the type its input has.

    Args:
        path: The ONNX file; external data is not read, and every initializer is a value of its own.
        names: Names of nodes of its main graph.
    """
    wanted = set(names)
    groups: dict[int, list[str]] = {}
    numbers: dict[tuple[object, ...], int] = {}
    origins: dict[ir.Value | None, _Origin] = {}
    for node in ir.load(path).graph:
        inputs = tuple(origins.get(value, value) for value in node.inputs)
        if node.op_type == "Identity" or _casts_nothing(node):
            origins[node.outputs[0]] = inputs[0]
            continue
        attributes = sorted(
            ir.to_proto(item).SerializeToString(deterministic=True) for item in node.attributes.values()
        )
        number = numbers.setdefault((*node.op_identifier(), *attributes, inputs), len(numbers))
        origins.update((value, (number, index)) for index, value in enumerate(node.outputs))
        if node.name in wanted:
            groups.setdefault(number, []).append(node.name)
    return list(groups.values())


def _casts_nothing(node: ir.Node) -> bool:
    value = node.inputs[0] if node.op_type == "Cast" else None
    return value is not None and value.dtype is not None and value.dtype == node.attributes["to"].value
