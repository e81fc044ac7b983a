"""Graphs of ONNX GraphSurgeon in and out; weights stay where they are and keep their types.

A ``gs.Graph`` has no place for some of what is in a model:

- Function overloads: the functions get names of their own, and their old ones on the way back.
- Metadata of nodes and of the model (torch's module paths, which name the layers): dictionaries
  ``metadata_props`` on its nodes and on the graph itself. ``gs.Graph.copy`` loses them, and overloads.
- Attributes that are types, sparse tensors or lists of tensors or graphs: refused.

Types of less than a byte can be read (``constant.values`` is an ml_dtypes array), but once read,
``gs.export_onnx`` cannot write them (0.6.1); :func:`from_graphsurgeon` can.

graphsurgeon is optional and imported only when a graph of it is there or asked for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from zqfp_compile.errors import MissingDependencyError, ModelError
from zqfp_compile.model_io import proto_to_ir
from zqfp_compile.tensor_checks import TensorChecker, show

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_IR_VERSION = 10  # of graphs that were not made from a model
# Names the tensor with a number where a model names the file of external data.
_PLACE = "zqfp tensor "
_KEPT_ATTRIBUTES = frozenset(
    getattr(onnx.AttributeProto, kind)
    for kind in ("FLOAT", "INT", "STRING", "TENSOR", "GRAPH", "FLOATS", "INTS", "STRINGS")
)

FunctionId = tuple[str, str, str]  # domain, name, overload


def is_graph(value: object) -> bool:
    """Return whether ``value`` is a ``gs.Graph``, without importing graphsurgeon."""
    module = sys.modules.get("onnx_graphsurgeon")
    return module is not None and isinstance(value, module.Graph)


def to_graphsurgeon(model: ir.Model) -> gs.Graph:
    """Return ``model`` as a ``gs.Graph``, which shares its weights; ``model`` is left as it was.

    Values are read when ``constant.values`` is asked for or graphsurgeon exports the graph. Initializers that
    nothing reads are left out.

    Raises:
        MissingDependencyError: When graphsurgeon is not installed.
        ModelError: When an attribute has a type that graphsurgeon drops.
    """
    gs = _graphsurgeon()
    copy = model.clone()
    tensors: list[ir.TensorProtocol] = []
    for graph in copy.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
                tensors.append(value.const_value)
                value.const_value = _placeholder(value.const_value, len(tensors) - 1)
    proto = ir.to_proto(copy)
    _refuse_lost_attributes(proto)
    overloads = _name_overloads(proto)
    result = gs.import_onnx(proto)
    for function in result.functions:
        function.overload_of = overloads.get((function.domain, function.name))
    for constant in _constants(result).values():
        index = _place(constant._values.tensor)
        if index is not None:
            constant.values = _lazy_values()(tensors[index])
            constant.data_location = None
    result.metadata_props = dict(model.metadata_props)
    for node, made_from in _node_pairs(result, proto.graph):
        node.metadata_props = {entry.key: entry.value for entry in made_from.metadata_props}
    return result


def from_graphsurgeon(graph: gs.Graph, folder: str | Path | None = None) -> ir.Model:
    """Return ``graph`` as an ``ir.Model``, which shares its weights; ``graph`` is left as it was.

    Values that were not read from their file stay unread.

    Args:
        graph: The graph, its nodes in an order they can run in (``graph.toposort(mode="nodes")``).
        folder: Where external data lies that graphsurgeon has not loaded (``onnx.load`` with
            ``load_external_data=False``); ``None`` is the current folder, as for graphsurgeon itself.

    Raises:
        ModelError: When the graph cannot be represented, or its external data is missing or unsafe.
    """
    gs = _graphsurgeon()
    folder = Path(folder or ".").absolute()
    checker = TensorChecker(folder)
    constants = _constants(graph)
    tensors = [_tensor(constant, folder, checker) for constant in constants.values()]
    with _placeholders(constants.values(), tensors):
        try:
            proto = gs.export_onnx(graph, do_type_check=False)
        except Exception as error:  # whatever the library raises becomes one line
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"graphsurgeon cannot export the graph ({reason}); correct it") from error
    if graph.ir_version is None:
        proto.ir_version = _IR_VERSION
    _drop_outer_initializers(proto.graph, frozenset())
    _restore_overloads(proto, graph.functions)
    for node, made_of_it in _node_pairs(graph, proto.graph):
        _add_metadata(made_of_it, node)
    _add_metadata(proto, graph)
    model = proto_to_ir(proto)
    _put_tensors(model, tensors)
    return model


def _graphsurgeon() -> Any:
    try:
        import onnx_graphsurgeon
    except ImportError as error:
        raise MissingDependencyError(
            "onnx-graphsurgeon is not installed; pip install 'zqfp-compile[graphsurgeon]'"
        ) from error
    return onnx_graphsurgeon


@functools.cache
def _lazy_values() -> Any:
    """The class of lazy values that read an onnx-ir tensor."""
    from onnx_graphsurgeon.ir.tensor import LazyValues

    class TensorValues(LazyValues):  # type: ignore[misc]
        """What graphsurgeon asks of lazy values; ``tensor`` and ``load`` read the data."""

        def __init__(self, source: ir.TensorProtocol) -> None:
            self.source = source
            self.shape = list(source.shape.numpy())
            self.dtype = source.dtype.numpy()
            self.nbytes = source.nbytes

        @property
        def tensor(self) -> onnx.TensorProto:
            return onnx.TensorProto(
                dims=self.shape, data_type=self.source.dtype.value, raw_data=self.source.tobytes()
            )

        def load(self) -> Any:
            return np.array(self.source.numpy())

    return TensorValues


def _constants(graph: gs.Graph) -> dict[int, Any]:
    """Return the constants of a graph, its subgraphs, functions and attributes, by their ``id``."""
    from onnx_graphsurgeon import Constant

    found = {}
    for root in (graph, *graph.functions):
        for scope in (root, *root.subgraphs(recursive=True)):
            attributes = (value for node in scope.nodes for value in node.attrs.values())
            for value in (*scope.tensors().values(), *attributes):
                if isinstance(value, Constant) and not _is_left_alone(value):
                    found[id(value)] = value
    return found


def _is_left_alone(constant: Any) -> bool:
    """Sparse values, which onnx-ir refuses, and text, whose length in bytes no shape tells."""
    values = constant._values
    proto = None if isinstance(values, (np.ndarray, _lazy_values())) else values.tensor
    return isinstance(proto, onnx.SparseTensorProto) or constant.dtype == np.dtype(object)


def _tensor(constant: Any, folder: Path, checker: TensorChecker) -> ir.TensorProtocol:
    values = constant._values
    if isinstance(values, _lazy_values()):
        source: ir.TensorProtocol = values.source
        return source
    if not isinstance(values, np.ndarray):
        checker.check(values.tensor, "the graph")
        return ir.serde.deserialize_tensor(values.tensor, folder)
    wanted = constant.export_dtype
    dtype = ir.DataType(wanted) if isinstance(wanted, int) else ir.DataType.from_numpy(np.dtype(wanted))
    return ir.Tensor(values.astype(dtype.numpy(), copy=False), dtype=dtype, name=constant.name)


def _placeholder(tensor: ir.TensorProtocol, index: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        f"{_PLACE}{index}",
        None,
        None,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
    )


def _place(proto: onnx.TensorProto) -> int | None:
    """Return the number of the tensor that a placeholder stands for; ``None`` for other tensors."""
    location = next((entry.value for entry in proto.external_data if entry.key == "location"), "")
    return int(location.removeprefix(_PLACE)) if location.startswith(_PLACE) else None


@contextmanager
def _placeholders(constants: Iterable[Any], tensors: Iterable[ir.TensorProtocol]) -> Iterator[None]:
    """Let ``constants`` hold placeholders for ``tensors`` meanwhile, so that exporting copies no weight."""
    from onnx_graphsurgeon.ir.tensor import LazyValues

    before = [(constant, constant._values) for constant in constants]
    try:
        for index, ((constant, _), tensor) in enumerate(zip(before, tensors, strict=True)):
            constant.values = LazyValues(ir.to_proto(_placeholder(tensor, index)))
        yield
    finally:
        for constant, values in before:
            constant.values = values


def _put_tensors(model: ir.Model, tensors: list[ir.TensorProtocol]) -> None:
    """Replace the placeholders, in initializers and attributes."""

    def real(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
        index = _place(ir.to_proto(tensor)) if isinstance(tensor, ir.ExternalTensor) else None
        return None if index is None else tensors[index]

    for graph in model.graphs():
        for value in graph.initializers.values():
            value.const_value = real(value.const_value) or value.const_value
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        for node in ir.traversal.RecursiveGraphIterator(scope):
            for name, attribute in list(node.attributes.items()):
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    tensor = real(attribute.as_tensor())
                    if tensor is not None:
                        node.attributes[name] = ir.AttrTensor(name, tensor)


def _drop_outer_initializers(graph: onnx.GraphProto, outer: frozenset[int]) -> None:
    """Remove from subgraphs the outer constants they read, which graphsurgeon exports once more in each."""
    kept = [tensor for tensor in graph.initializer if _place(tensor) not in outer]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    inner = outer | {index for tensor in kept if (index := _place(tensor)) is not None}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _drop_outer_initializers(attribute.g, inner)


def _node_pairs(graph: gs.Graph, proto: onnx.GraphProto) -> Iterator[tuple[Any, onnx.NodeProto]]:
    """Yield each node of a graph and its subgraphs with its proto."""
    for node, other in zip(graph.nodes, proto.node, strict=True):
        yield node, other
        for attribute in other.attribute:
            if attribute.HasField("g"):
                yield from _node_pairs(node.attrs[attribute.name], attribute.g)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        yield from _nodes(nodes)


def _refuse_lost_attributes(proto: onnx.ModelProto) -> None:
    for node in _all_nodes(proto):
        for attribute in node.attribute:
            if attribute.type not in _KEPT_ATTRIBUTES:
                kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
                place = f"node {show(node.name)} ({node.op_type})"
                raise ModelError(
                    f"{place}: attribute {show(attribute.name)} is of type {kind}, "
                    "which graphsurgeon drops; edit the onnx_ir.Model instead"
                )


def _name_overloads(proto: onnx.ModelProto) -> dict[tuple[str, str], FunctionId]:
    """Give overloads of functions names of their own; return what each was, by domain and new name."""
    taken = {(function.domain, function.name) for function in proto.functions}
    names: dict[FunctionId, str] = {}
    for function in proto.functions:
        if function.overload:
            name = f"{function.name}_{function.overload}"
            while (function.domain, name) in taken:
                name += "_"
            taken.add((function.domain, name))
            names[function.domain, function.name, function.overload] = name
    _rename(proto, {old: (name, "") for old, name in names.items()})
    return {(old[0], name): old for old, name in names.items()}


def _restore_overloads(proto: onnx.ModelProto, functions: Iterable[Any]) -> None:
    overloads = {}
    for function in functions:
        old: FunctionId | None = vars(function).get("overload_of")
        if old is not None:
            overloads[function.domain, function.name, ""] = old[1:]
    _rename(proto, overloads)


def _rename(proto: onnx.ModelProto, names: Mapping[FunctionId, tuple[str, str]]) -> None:
    """Give functions and the nodes that call them another name and overload."""
    for function in proto.functions:
        new = names.get((function.domain, function.name, function.overload))
        if new is not None:
            function.name, function.overload = new
    for node in _all_nodes(proto):
        new = names.get((node.domain, node.op_type, node.overload))
        if new is not None:
            node.op_type, node.overload = new


def _add_metadata(proto: onnx.NodeProto | onnx.ModelProto, holder: Any) -> None:
    # Not by getattr: a gs.Graph logs an error when it lacks an attribute.
    for key, value in vars(holder).get("metadata_props", {}).items():
        proto.metadata_props.add(key=key, value=value)
