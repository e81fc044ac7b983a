"""Is a model file sound? Decided on the bare protobuf, before any ONNX library follows what it says.

Covers the structure: versions, names, scopes, cycles, functions; ``tensor_checks`` covers the tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from zqfp_compile.errors import ModelError
from zqfp_compile.tensor_checks import TensorChecker, show

MIN_IR_VERSION, MAX_IR_VERSION = 4, 13
MIN_OPSET, MAX_OPSET = 13, 26
MAX_GRAPH_DEPTH = 16
MAX_CALL_DEPTH = 100
MAX_INLINED_NODES = 5_000_000

_ONNX_DOMAINS = ("", "ai.onnx")

FunctionId = tuple[str, str, str]


def check_model(model: onnx.ModelProto, folder: Path) -> bool:
    """Check a model that was parsed without its external data.

    Args:
        model: The proto.
        folder: The folder of the model file.

    Returns:
        Whether every graph and function lists its nodes in an order they can run in.

    Raises:
        ModelError: On the first thing wrong: one line with what, where and what to do.
    """
    _check_text(model)
    _check_versions(model)
    if not model.graph.node:
        raise ModelError("the graph has no nodes, so there is nothing to compile; export the model again")
    if not model.graph.output:
        raise ModelError("the graph has no outputs; export the model again")
    checker = _StructureChecker(TensorChecker(folder))
    checker.check(_graph_body(model.graph, "the graph", False), [])
    for function in model.functions:
        where = f"function {_show_id(_function_id(function))}"
        body = _Body(where, list(function.input), [], function.node, list(function.output), None, True)
        checker.check(body, [])
    _check_functions(model)
    _check_domains(model.graph.node, model.opset_import, "the model")
    for function in model.functions:
        _check_domains(function.node, function.opset_import, f"function {_show_id(_function_id(function))}")
    return checker.ordered


def _check_text(message: Any) -> None:
    """Check that names are text: protobuf hands out bytes where a file has no valid UTF-8."""
    if isinstance(message, onnx.TensorProto):
        # Listing all fields would copy the data.
        texts: list[Any] = [message.name, message.doc_string]
        messages: list[Any] = list(message.external_data)
    else:
        texts, messages = [], []
        for field, value in message.ListFields():
            values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
            if field.type == field.TYPE_STRING:
                texts.extend(values)
            elif field.type == field.TYPE_MESSAGE:
                messages.extend(values)
    for text in texts:
        if isinstance(text, bytes):
            raise ModelError(f"name {text[:40]!r} is not UTF-8 text; the file is damaged, export it again")
    for inner in messages:
        _check_text(inner)


def _check_versions(model: onnx.ModelProto) -> None:
    if not model.HasField("graph"):
        raise ModelError(
            "holds no graph: it is not an ONNX model or was cut off; export or download it again"
        )
    if not MIN_IR_VERSION <= model.ir_version <= MAX_IR_VERSION:
        raise ModelError(
            f"ONNX IR version {model.ir_version} is outside {MIN_IR_VERSION}..{MAX_IR_VERSION}; "
            "export the model again with another onnx version"
        )
    imports = [
        *model.opset_import,
        *(entry for function in model.functions for entry in function.opset_import),
    ]
    versions = [entry.version for entry in imports if entry.domain in _ONNX_DOMAINS]
    own = [entry.version for entry in model.opset_import if entry.domain in _ONNX_DOMAINS]
    if not own:
        raise ModelError(
            "declares no ONNX opset: the file was cut off or holds custom operators only; export it again"
        )
    if len(set(own)) > 1:
        raise ModelError(f"declares two opsets of ONNX, {own[0]} and {own[1]}; export the model again")
    for version in versions:
        if not MIN_OPSET <= version <= MAX_OPSET:
            raise ModelError(
                f"opset {version} is outside {MIN_OPSET}..{MAX_OPSET}; export the model again with "
                "opset_version=18, or convert it with onnx.version_converter"
            )


@dataclass(frozen=True)
class _Body:
    """A graph or a function: a scope of names and the nodes in it."""

    where: str
    inputs: Sequence[str]
    initializers: Sequence[str]
    nodes: Sequence[onnx.NodeProto]
    outputs: Sequence[str]
    graph: onnx.GraphProto | None
    in_function: bool


def _graph_body(graph: onnx.GraphProto, where: str, in_function: bool) -> _Body:
    return _Body(
        where,
        [value.name for value in graph.input],
        [tensor.name for tensor in graph.initializer],
        graph.node,
        [value.name for value in graph.output],
        graph,
        in_function,
    )


class _StructureChecker:
    """Walks scopes from the outside in, checking names, tensors and order."""

    def __init__(self, tensors: TensorChecker) -> None:
        self._tensors = tensors
        self.ordered = True

    def check(self, body: _Body, outer: list[set[str]]) -> set[str]:
        """Check one scope and those inside it; return the names it takes from ``outer`` scopes."""
        if len(outer) >= MAX_GRAPH_DEPTH:
            raise ModelError(
                f"{body.where} is nested {len(outer) + 1} levels deep, more than {MAX_GRAPH_DEPTH}; "
                "the file is damaged or hostile, export it again"
            )
        if body.graph is not None:
            self._check_graph_fields(body.graph, body.where, body.in_function)
        producers = _producers(body)
        own = {*body.inputs, *body.initializers, *producers}
        scopes = [*outer, own]
        needs = [self._needs(node, body, scopes) for node in body.nodes]
        _check_outputs(body, own)
        self._check_order(body, producers, needs)
        return set().union(*needs) - own

    def _check_graph_fields(self, graph: onnx.GraphProto, where: str, in_function: bool) -> None:
        for tensor in graph.initializer:
            self._tensors.check(tensor, where, external=not in_function)
        if graph.sparse_initializer:
            raise ModelError(f"{where} has sparse initializers, which are not supported; export it dense")
        for value in (*graph.input, *graph.output, *graph.value_info):
            if any(dim.dim_value < 0 for dim in value.type.tensor_type.shape.dim):
                raise ModelError(
                    f"value {show(value.name)} in {where} has a negative dimension; "
                    "give dynamic dimensions a name (dim_param) at export"
                )

    def _needs(self, node: onnx.NodeProto, body: _Body, scopes: list[set[str]]) -> set[str]:
        """Return the names a node reads, itself or in its subgraphs; check them and its attributes."""
        where = body.where
        needs = {name for name in node.input if name}
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise ModelError(
                    f"node {_show_node(node)} in {where} reads {show(name)}, which nothing defines; "
                    "the file is damaged, export it again"
                )
        if _is_constant(node) and [bool(name) for name in node.output] != [True]:
            raise ModelError(f"{_show_node(node)} in {where} has no single output; export the file again")
        for attribute in node.attribute:
            _check_attribute_value(node, attribute, body)
            self._check_attribute_tensors(attribute, f"node {_show_node(node)} in {where}", body.in_function)
        for graph in _subgraphs(node):
            inner = f"a subgraph of node {_show_node(node)}"
            needs |= self.check(_graph_body(graph, inner, body.in_function), scopes)
        return needs

    def _check_attribute_tensors(self, attribute: onnx.AttributeProto, where: str, in_function: bool) -> None:
        single = _single(attribute, "t")
        for tensor in (*single, *attribute.tensors):
            self._tensors.check(tensor, where, external=bool(single) and not in_function)
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise ModelError(f"{where} holds a sparse tensor, which is not supported; export it dense")

    def _check_order(self, body: _Body, producers: dict[str, int], needs: list[set[str]]) -> None:
        waits = [{producers[name] for name in names if name in producers} for names in needs]
        if all(index < position for position, indices in enumerate(waits) for index in indices):
            return
        self.ordered = False
        cycle = _find_cycle(waits)
        if cycle:
            names = [_show_node(body.nodes[index]) for index in cycle[:4]]
            more = " -> ..." if len(cycle) > 4 else ""
            raise ModelError(
                f"{body.where} has a cycle: {' -> '.join(names)}{more} -> {names[0]}, so it cannot run; "
                "the file is damaged, export it again"
            )


def _check_attribute_value(node: onnx.NodeProto, attribute: onnx.AttributeProto, body: _Body) -> None:
    """Check that an attribute has the value its type announces; readers take it for granted."""
    if attribute.ref_attr_name:
        if not body.in_function or attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise ModelError(
                f"attribute {show(attribute.name)} of node {_show_node(node)} in {body.where} refers to a "
                "function call's, which only plain attributes inside the function may; export the model again"
            )
        return
    field = {onnx.AttributeProto.TENSOR: "t", onnx.AttributeProto.GRAPH: "g"}.get(attribute.type)
    constant = _is_constant(node) and attribute.name == "value"
    if (
        attribute.type == onnx.AttributeProto.UNDEFINED
        or (field is not None and not attribute.HasField(field))
        or (constant and attribute.type != onnx.AttributeProto.TENSOR)
    ):
        raise ModelError(
            f"attribute {show(attribute.name)} of node {_show_node(node)} in {body.where} lacks its value; "
            "the file is damaged, export it again"
        )


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and _domain(node.domain) == ""


def _producers(body: _Body) -> dict[str, int]:
    """Return which node makes each name; every name has one definition (static single assignment)."""
    for kind, names in (("input", body.inputs), ("initializer", body.initializers)):
        for name, times in Counter(names).items():
            if not name or times > 1:
                fault = "has no name" if not name else "is defined twice"
                raise ModelError(f"{kind} {show(name)} of {body.where} {fault}; export the model again")
    taken = {*body.inputs, *body.initializers}
    producers: dict[str, int] = {}
    for index, node in enumerate(body.nodes):
        for name in node.output:
            if name in taken or name in producers:
                raise ModelError(
                    f"node {_show_node(node)} in {body.where} defines {show(name)}, which already exists; "
                    "export the model again"
                )
            if name:
                producers[name] = index
    return producers


def _check_outputs(body: _Body, own: set[str]) -> None:
    # An output straight from an outer scope is no output in ONNX: runtimes and the IR look no further.
    for name, times in Counter(body.outputs).items():
        if times > 1:
            raise ModelError(f"output {show(name)} of {body.where} is listed twice; export the model again")
        if name not in own:
            raise ModelError(
                f"output {show(name)} of {body.where} is not produced by any node; "
                "the file is damaged, export it again"
            )


def _find_cycle(waits: list[set[int]]) -> list[int]:
    """Return the nodes of one cycle in running order, or an empty list.

    Args:
        waits: For each node, the nodes whose results it needs.
    """
    users: list[list[int]] = [[] for _ in waits]
    missing = [len(indices) for indices in waits]
    for index, indices in enumerate(waits):
        for producer in indices:
            users[producer].append(index)
    ready = [index for index, count in enumerate(missing) if not count]
    while ready:
        for user in users[ready.pop()]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    stuck = next((index for index, count in enumerate(missing) if count), None)
    if stuck is None:
        return []
    # Every node left waits for another one left: walking back must come round.
    path: dict[int, None] = {}
    while stuck not in path:
        path[stuck] = None
        stuck = next(index for index in waits[stuck] if missing[index])
    steps = list(path)
    return steps[steps.index(stuck) :][::-1]


def _check_functions(model: onnx.ModelProto) -> None:
    """Check that inlining every function call ends, and ends soon."""
    bodies: dict[FunctionId, Sequence[onnx.NodeProto]] = {}
    for function in model.functions:
        name = _function_id(function)
        if name in bodies:
            raise ModelError(f"function {_show_id(name)} is defined twice; export the model again")
        bodies[name] = function.node
    calls = {name: Counter(_calls(nodes, bodies)) for name, nodes in bodies.items()}
    sizes: dict[FunctionId, int] = {}
    depths: dict[FunctionId, int] = {}
    for name in _callees_first(calls):
        own = sum(1 for _ in _all_nodes(bodies[name]))
        sizes[name] = own + sum(times * sizes[callee] for callee, times in calls[name].items())
        depths[name] = 1 + max((depths[callee] for callee in calls[name]), default=0)
        if depths[name] > MAX_CALL_DEPTH:
            raise ModelError(
                f"function {_show_id(name)} calls functions more than {MAX_CALL_DEPTH} levels deep; "
                "the file is hostile, or inline its functions first"
            )
    total = sum(1 for _ in _all_nodes(model.graph.node))
    total += sum(sizes[callee] for callee in _calls(model.graph.node, bodies))
    biggest = max(sizes, key=lambda name: sizes[name], default=None)
    if biggest is not None and max(total, sizes[biggest]) > MAX_INLINED_NODES:
        raise ModelError(
            f"function {_show_id(biggest)} and its callees expand to more than {MAX_INLINED_NODES} nodes; "
            "the file is damaged or hostile, export it again"
        )


def _check_domains(
    nodes: Iterable[onnx.NodeProto], imports: Iterable[onnx.OperatorSetIdProto], where: str
) -> None:
    """Check that the version of every operator is known."""
    known = {_domain(entry.domain) for entry in imports}
    for node in _all_nodes(nodes):
        if _domain(node.domain) not in known:
            raise ModelError(
                f"node {_show_node(node)} is of the domain {show(node.domain)}, of which {where} imports no "
                "opset; export the model again"
            )


def _callees_first(calls: dict[FunctionId, Counter[FunctionId]]) -> list[FunctionId]:
    """Order functions so that each comes after those it calls."""
    names = list(calls)
    index = {name: position for position, name in enumerate(names)}
    waits = [{index[callee] for callee in calls[name]} for name in names]
    cycle = _find_cycle(waits)
    if cycle:
        # A cycle lists callees before callers; a call chain reads the other way round.
        chain = [_show_id(names[position]) for position in reversed(cycle)]
        raise ModelError(
            f"function {chain[0]} calls itself ({' -> '.join([*chain[:4], chain[0]])}), "
            "which ONNX does not allow; the file is damaged or hostile, export it again"
        )
    order: dict[FunctionId, None] = {}
    for name in names:
        stack = [name]
        while stack:
            pending = [callee for callee in calls[stack[-1]] if callee not in order]
            if pending:
                stack.append(pending[0])
            else:
                order[stack.pop()] = None
    return list(order)


def _calls(
    nodes: Iterable[onnx.NodeProto], bodies: dict[FunctionId, Sequence[onnx.NodeProto]]
) -> list[FunctionId]:
    names = ((_domain(node.domain), node.op_type, node.overload) for node in _all_nodes(nodes))
    return [name for name in names if name in bodies]


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    # Protobuf refuses files nested deeper than 100 messages, so this recursion is shallow.
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _all_nodes(graph.node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from _single(attribute, "g")
        yield from attribute.graphs


def _single(attribute: onnx.AttributeProto, field: str) -> list[Any]:
    return [getattr(attribute, field)] if attribute.HasField(field) else []


def _domain(domain: str) -> str:
    return "" if domain in _ONNX_DOMAINS else domain


def _function_id(function: onnx.FunctionProto) -> FunctionId:
    return _domain(function.domain), function.name, function.overload


def _show_id(name: FunctionId) -> str:
    return show("::".join(part for part in name[:2] if part) + (f":{name[2]}" if name[2] else ""))


def _show_node(node: onnx.NodeProto) -> str:
    output = next((name for name in node.output if name), "")
    return f"{show(node.name or output)} ({show(node.op_type)[1:-1]})"
