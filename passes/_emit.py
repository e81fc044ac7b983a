"""Recording of new nodes with readable, unique names; shared by the rewrite passes."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import onnx_ir as ir


class Names:
    """The value and node names a graph uses (subgraphs included, because they see the outer names)."""

    def __init__(self, graph: ir.Graph) -> None:
        self._values = {value.name for value in (*graph.inputs, *graph.initializers.values())}
        self._nodes: dict[str, ir.Node] = {}
        for node in graph.all_nodes():
            self._values.update(value.name for value in node.outputs)
            for inner in subgraphs(node):
                self._values.update(value.name for value in (*inner.inputs, *inner.initializers.values()))
            if node.name:
                self._nodes[node.name] = node

    def value(self, wanted: str) -> str:
        """Return ``wanted`` or the first free ``wanted_2``, ``wanted_3``..., and mark it used."""
        name = _free(wanted, self._values)
        self._values.add(name)
        return name

    def name_node(self, node: ir.Node, wanted: str) -> None:
        """Name ``node`` ``wanted``, or the first free variation of it: plans refer to nodes by name."""
        node.name = _free(wanted, self._nodes)
        self._nodes[node.name] = node

    def claim_node(self, node: ir.Node, wanted: str) -> None:
        """Name ``node`` exactly ``wanted``; another node that holds the name gets a free one.

        Only for a layer's own names: no plan may refer to the other node.
        """
        holder = self._nodes.get(wanted)
        if holder is not None and holder is not node and holder.graph is not None:
            holder.name = _free(wanted, self._nodes)
            self._nodes[holder.name] = holder
        node.name = wanted
        self._nodes[wanted] = node


def _free(wanted: str, taken: Container[str | None]) -> str:
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs in the attributes of ``node``, such as the branches of an If."""
    graphs: list[ir.Graph] = []
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            graphs.append(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS:
            graphs.extend(attr.as_graphs())
    return graphs


class Emitter:
    """Collects the nodes of one rewrite.

    In a graph, names get a prefix and are made unique, and constants become initializers named
    ``zqfp.<name>`` that every layer shares (``graph`` and ``names`` are given together). In a function body
    (``graph=None``) names are taken as they are and constants are ``Constant`` nodes.

    Attributes:
        nodes: What was recorded, in order.
    """

    def __init__(
        self,
        graph: ir.Graph | None = None,
        names: Names | None = None,
        prefix: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph
        self._names = names
        self._prefix = prefix
        self._metadata = dict(metadata or {})
        self._constants: dict[str, ir.Value] = {}

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None = None,
        **attributes: int | Sequence[int],
    ) -> ir.Value:
        """Record one single-output node; ``name`` names it and its output."""
        attrs = [int_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs, metadata_props=dict(self._metadata))
        output = node.outputs[0]
        if dtype is not None:
            output.dtype = dtype
        wanted = self._prefix + name
        node.name, output.name = wanted, self.value_name(name)
        if self._names is not None:
            self._names.name_node(node, wanted)
        self.nodes.append(node)
        return output

    def value_name(self, name: str) -> str:
        """Return the name a new value called ``name`` gets here, and mark it used."""
        wanted = self._prefix + name
        return wanted if self._names is None else self._names.value(wanted)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return the constant ``array``; one value per ``name``, which must determine the content."""
        if self._graph is not None and self._names is not None:
            return shared_initializer(self._graph, self._names, f"zqfp.{name}", ir.tensor(array))
        if name not in self._constants:
            attr = ir.AttrTensor("value", ir.tensor(array))
            node = ir.Node("", "Constant", [], [attr], name=name)
            node.outputs[0].name = name
            node.outputs[0].dtype = ir.DataType.from_numpy(array.dtype)
            self.nodes.append(node)
            self._constants[name] = node.outputs[0]
        return self._constants[name]


def int_attribute(key: str, value: int | Sequence[int]) -> ir.Attr:
    """Return an attribute of one integer or of several."""
    return ir.AttrInt64(key, int(value)) if isinstance(value, int) else ir.AttrInt64s(key, list(value))


def shared_initializer(graph: ir.Graph, names: Names, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Return the initializer ``name``, made from ``tensor`` on the first call.

    Where the model has something else of that name, the initializer gets a free one.
    """
    known = graph.initializers.get(name)
    if known is not None and not known.is_graph_input() and _holds(known, tensor):
        return known
    value = initializer_value(names.value(name), tensor)
    graph.register_initializer(value)
    return value


def _holds(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    stored = value.const_value
    alike = stored is not None and (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)
    return alike and stored is not None and stored.tobytes() == tensor.tobytes()


def initializer_value(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Return a value that holds ``tensor`` (not loaded), ready to be registered as an initializer."""
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )


def insert_after(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Insert ``nodes`` right after the producer of ``value``, or at the graph's start."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(graph[0], nodes)


def replace_node(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node], output: ir.Value) -> None:
    """Put ``new`` in the place of ``old``; ``output`` takes over the name and type of its only output."""
    replace_nodes(graph, old, [old], new, [old.outputs[0]], [output])


def replace_nodes(
    graph: ir.Graph,
    place: ir.Node,
    old: Sequence[ir.Node],
    new: Sequence[ir.Node],
    replaced: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> None:
    """Put ``new``, behind ``place``, for ``old``; ``outputs`` take over all that ``replaced`` have."""
    for before, after in zip(replaced, outputs, strict=True):
        after.metadata_props.update(before.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, place, old, new, replaced, outputs)
