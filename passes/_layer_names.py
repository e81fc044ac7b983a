"""Names of layers and nodes: what reports print, ``--exclude`` matches and a plan refers to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import onnx_ir as ir

from passes.strip_metadata import NAME_SCOPES


def name_nodes(graph: ir.Graph) -> bool:
    """Give every unnamed or duplicate node of ``graph`` and its subgraphs a unique name.

    An unnamed node takes the name of its first output; a duplicate gets a ``_2``, ``_3``... suffix, in graph
    order, so the same model always gets the same names.

    Returns:
        Whether a name changed.
    """
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    taken = {node.name for node in nodes if node.name}
    seen: set[str] = set()
    modified = False
    for node in nodes:
        if not node.name or node.name in seen:
            base = node.name or next((v.name for v in node.outputs if v.name), node.op_type)
            node.name = next(name for name in _candidates(base) if name not in taken)
            taken.add(node.name)
            modified = True
        seen.add(node.name)
    return modified


def layer_name(node: ir.Node) -> str:
    """The module path of ``node``, such as ``model.layers.0.self_attn.q_proj``.

    From torch's ``name_scopes`` (module paths, outermost first, then the operator), else from a node
    name such as ``/model/layers.0/self_attn/q_proj/MatMul``, else the node name itself.
    """
    scope = _module_path(node.metadata_props.get(NAME_SCOPES, ""))
    if scope:
        return scope
    parts = [part for part in str(node.name).split("/") if part]
    if len(parts) > 1 and re.fullmatch(rf"{re.escape(node.op_type)}(_\d+)?(_output_\d+)?", parts[-1]):
        parts.pop()
    return ".".join(parts) or str(node.name)


def _module_path(scopes: str) -> str:
    try:
        path = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(path, list) or len(path) < 2 or not isinstance(path[-2], str):
        return ""
    return path[-2]


class UniqueNames:
    """Hands out layer names, adding ``_2``, ``_3``... to one that is taken.

    Args:
        graph: Names of its nodes are taken as well: a layer's node is named after the layer, and plans refer
            to the others by name.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._taken: set[str] = set()
        self._nodes = {str(node.name) for node in ir.traversal.RecursiveGraphIterator(graph)}

    def claim(self, wanted: str, node: ir.Node | None = None) -> str:
        """Return ``wanted`` or the first free suffixed form; the name of ``node`` itself is free for it."""
        own = None if node is None else node.name
        name = next(
            name
            for name in _candidates(wanted)
            if name not in self._taken and (name == own or name not in self._nodes)
        )
        self._taken.add(name)
        return name


def _candidates(base: str) -> Iterator[str]:
    yield base
    number = 2
    while True:
        yield f"{base}_{number}"
        number += 1
