"""What is legal in the graph after each phase, checked between passes.

A violation is a bug of ours, not of the model: source models are checked by ``model_io`` before any pass
runs. Each rule yields one sentence per violation, naming the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import onnx_ir as ir

from zqfp_compile.errors import ModelError

Phase = Literal["exported", "quantized", "engine", "onnxruntime"]
Rule: TypeAlias = Callable[[ir.Model], Iterator[str]]

FP8 = frozenset({ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2})
_NARROW = FP8 | {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1}
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_DOMAIN = "zqfp"
_OP = "W4A8Linear"
_OP_INPUTS = 11
# Operators that runtimes get from our libraries -> how many inputs they may have.
_HOSTED = {
    "PackedW4A8Linear": range(5, 9),
    "QuantizeActivation": (2, 3),
    "QuantizeTokens": (1, 2),
    "QuantizeSiluMul": range(2, 5),
    "QuantizeRmsNorm": range(2, 6),
    "QuantizedW4A8Linear": range(4, 11),
}
# Operators that pass a dequantised tensor on to the MatMul without a new quantisation.
_TRANSPARENT = frozenset({"Cast", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


class SpecError(ModelError):
    """A pass left a graph that is not legal in its phase. An internal error, never the user's."""


def check(model: ir.Model, phase: Phase, *, after: str | None = None) -> None:
    """Check that ``model`` is legal in ``phase``.

    Args:
        model: The model after a pass.
        phase: ``exported``: the prepared source. ``quantized``: may hold ``zqfp::W4A8Linear`` nodes and their
            functions, and Q/DQ. ``engine``: nothing left to inline, and free of what TensorRT gets wrong.
            ``onnxruntime``: nothing left to inline, and free of what its optimiser gets wrong.
        after: Name of the pass that ran last, for the message.

    Raises:
        SpecError: On the first violation.
    """
    for rule in _RULES[phase]:
        for violation in rule(model):
            culprit = f"after pass {after}" if after else f"in the {phase} graph"
            raise SpecError(
                f"internal error {culprit}: {violation}; please report it with the output of --dump-after"
            )


def _place(node: ir.Node) -> str:
    return f"{'::'.join(filter(None, (node.domain, node.op_type)))} node {node.name!r}"


# Structure, in every phase


def _order(model: ir.Model) -> Iterator[str]:
    """Every value is named once and produced before it is used."""
    yield from _scope_order(model.graph, set(), set())
    for function in model.functions.values():
        yield from _scope_order(function.graph, set(), set())


def _scope_order(graph: ir.Graph, outer: set[ir.Value], outer_names: set[str]) -> Iterator[str]:
    known, names = set(outer), set(outer_names)
    for value in dict.fromkeys((*graph.inputs, *graph.initializers.values())):
        yield from _define(value, f"graph {graph.name!r}", known, names)
    for node in graph:
        for operand in node.inputs:
            if operand is not None and operand not in known:
                yield f"{_place(node)} uses {operand.name!r}, which nothing before it produces"
        for attr in node.attributes.values():
            for inner in attribute_graphs(attr):
                yield from _scope_order(inner, known, names)
        for value in node.outputs:
            yield from _define(value, _place(node), known, names)
    for value in graph.outputs:
        if value not in known:
            yield f"output {value.name!r} of graph {graph.name!r} is never produced"


def _define(value: ir.Value, place: str, known: set[ir.Value], names: set[str]) -> Iterator[str]:
    known.add(value)
    if not value.name:
        if value.uses():
            yield f"{place} has a nameless output that is used"
    elif value.name in names:
        yield f"{place} defines the value {value.name!r} a second time"
    else:
        names.add(value.name)


def attribute_graphs(attr: ir.Attr) -> tuple[ir.Graph, ...]:
    """Return the graphs an attribute holds, such as the branches of an If."""
    if attr.is_ref():
        return ()
    if attr.type == ir.AttributeType.GRAPH:
        return (attr.as_graph(),)
    return tuple(attr.as_graphs()) if attr.type == ir.AttributeType.GRAPHS else ()


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _opsets(model: ir.Model) -> Iterator[str]:
    """The domain of every node is imported where the node is."""
    yield from _missing_imports(_all_nodes(model), model.graph.opset_imports)
    for function in model.functions.values():
        nodes = iter(ir.traversal.RecursiveGraphIterator(function.graph))
        yield from _missing_imports(nodes, function.opset_imports)


def _missing_imports(nodes: Iterator[ir.Node], imports: dict[str, int]) -> Iterator[str]:
    for node in nodes:
        imported = node.domain in imports or (node.domain == "" and "ai.onnx" in imports)
        if not imported:
            yield f"{_place(node)} is of the domain {node.domain!r}, which has no opset import"


# From the quantized phase on


def _node_names(model: ir.Model) -> Iterator[str]:
    """Node names are unique: TensorRT fails on a duplicate, and reports refer to layers by them."""
    seen: set[str] = set()
    for node in _all_nodes(model):
        if not node.name:
            yield f"a {node.op_type} node has no name"
        elif node.name in seen:
            yield f"two nodes are named {node.name!r}"
        seen.add(node.name or "")


def _quantize_scales(model: ir.Model) -> Iterator[str]:
    """QuantizeLinear and DequantizeLinear have a scale, and it is floating point."""
    for node in _all_nodes(model):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain != "":
            continue
        scale = node.inputs[1] if len(node.inputs) > 1 else None
        if scale is None:
            yield f"{_place(node)} has no scale"
        elif scale.dtype is not None and scale.dtype not in _FLOATS:
            yield f"{_place(node)} has a scale of type {scale.dtype}"


def _w4a8_nodes(model: ir.Model) -> Iterator[str]:
    """``zqfp`` nodes are W4A8Linear with inputs of the types in docs/architecture.md."""
    for node in _all_nodes(model):
        if node.domain != _DOMAIN:
            continue
        if node.op_type != _OP:
            yield f"{_place(node)} is no {_OP}"
        elif not 5 <= len(node.inputs) <= _OP_INPUTS or len(node.outputs) != 1:
            yield f"{_place(node)} has {len(node.inputs)} inputs and {len(node.outputs)} outputs"
        else:
            yield from (f"{_place(node)}: {problem}" for problem in _w4a8_inputs(node))


def _w4a8_inputs(node: ir.Node) -> Iterator[str]:
    inputs = [*node.inputs, *[None] * (_OP_INPUTS - len(node.inputs))]
    x8, a, codes, group_scales, row_scales, bias, x, v, u, v_scale, u_scale = inputs
    y = node.outputs[0]
    if x8 is None or codes is None or row_scales is None:
        yield "x8, codes or row_scales is missing"
        return
    quantized = x8.dtype in (*FP8, ir.DataType.INT8)
    if x8.dtype is not None and quantized != (a is not None):
        yield f"x8 has type {x8.dtype} and a is {'missing' if a is None else 'given'}"
    if codes.dtype != ir.DataType.FLOAT8E4M3FN and group_scales is None:
        yield "group_scales is missing"
    own = {y.dtype} if y.dtype else _FLOATS
    factor = own if v_scale is None else {ir.DataType.FLOAT8E4M3FN}
    for name, value, allowed in (
        ("a", a, {ir.DataType.FLOAT}),
        ("codes", codes, {ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN}),
        ("group_scales", group_scales, {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT}),
        ("row_scales", row_scales, {ir.DataType.FLOAT}),
        ("bias", bias, own),
        ("x", x, own),
        ("lorc_v", v, factor),
        ("lorc_u", u, factor),
        ("lorc_v_scale", v_scale, {ir.DataType.FLOAT}),
        ("lorc_u_scale", u_scale, {ir.DataType.FLOAT}),
    ):
        if value is not None and value.dtype is not None and value.dtype not in allowed:
            yield f"{name} has type {value.dtype}, not {' or '.join(str(dtype) for dtype in allowed)}"
    if len({value is None for value in (x, v, u)}) > 1:
        yield "x, lorc_v and lorc_u are not given together"
    if (v_scale is None) != (u_scale is None) or (v is None and v_scale is not None):
        yield "lorc_v_scale and lorc_u_scale are not given together, with the factors"
    yield from _w4a8_shapes(codes, group_scales, row_scales)
    yield from _lorc_shapes(row_scales, v, u, v_scale, u_scale)


def _w4a8_shapes(
    codes: ir.Value,
    group_scales: ir.Value | None,
    row_scales: ir.Value,
) -> Iterator[str]:
    code_dims, row_dims = _dims(codes), _dims(row_scales)
    if code_dims is None or row_dims is None:
        return
    if len(code_dims) != 2 or row_dims != code_dims[:1]:
        yield f"codes have shape {code_dims}, row_scales {row_dims}"
        return
    groups = None if group_scales is None else _dims(group_scales)
    if groups is not None and (len(groups) != 2 or groups[0] != code_dims[0] or code_dims[1] % groups[1]):
        yield f"codes have shape {code_dims}, group_scales {groups}"


def _lorc_shapes(
    row_scales: ir.Value,
    v: ir.Value | None,
    u: ir.Value | None,
    v_scale: ir.Value | None,
    u_scale: ir.Value | None,
) -> Iterator[str]:
    row_dims = _dims(row_scales)
    v_dims, u_dims = (None if value is None else _dims(value) for value in (v, u))
    if row_dims is None or v_dims is None or u_dims is None:
        return
    if v_dims[1:] != u_dims[:1] or u_dims[1:] != row_dims:
        yield f"lorc_v has shape {v_dims}, lorc_u {u_dims} for {row_dims[0]} outputs"
    for name, scale in (("lorc_v_scale", v_scale), ("lorc_u_scale", u_scale)):
        dims = None if scale is None else _dims(scale)
        if dims is not None and dims != u_dims[:1]:
            yield f"{name} has shape {dims} for rank {u_dims[0]}"


def _dims(value: ir.Value) -> tuple[int, ...] | None:
    """The value's shape, when it is known and static."""
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def _w4a8_functions(model: ir.Model) -> Iterator[str]:
    """Every ``zqfp`` node has its function, so that any runtime can run it."""
    for node in _all_nodes(model):
        if node.domain == _DOMAIN and node.op_identifier() not in model.functions:
            yield f"{_place(node)} has no function for its overload {node.overload!r}"


# Engine phase: DESIGN section 5


def _lowered(model: ir.Model) -> Iterator[str]:
    """Only standard operators are left, and those of our kernel's hosts, no input of which is empty."""
    for node in _all_nodes(model):
        if node.domain != _DOMAIN:
            continue
        if node.op_type not in _HOSTED:
            yield f"{_place(node)} is not lowered to standard operators"
        elif len(node.inputs) not in _HOSTED[node.op_type] or None in node.inputs:
            yield f"{_place(node)} has {len(node.inputs)} inputs, or empty ones"


def _no_calls(model: ir.Model) -> Iterator[str]:
    """The parser fails on the second call of a function with Q/DQ; uncalled definitions do no harm."""
    for node in _all_nodes(model):
        if node.domain != _DOMAIN and node.op_identifier() in model.functions:
            yield f"{_place(node)} calls a function, which is not inlined"


def _narrow_types(model: ir.Model) -> Iterator[str]:
    """4-bit and FP8 values are stored or made by QuantizeLinear, and read by DequantizeLinear or a plugin."""
    for interface in (*model.graph.inputs, *model.graph.outputs):
        # An FP8 KV cache: both builders take E4M3 network inputs and outputs.
        if interface.dtype in _NARROW - {ir.DataType.FLOAT8E4M3FN}:
            yield f"graph input or output {interface.name!r} has type {interface.dtype}"
    for node in _all_nodes(model):
        if node.domain == _DOMAIN:
            continue
        for index, operand in enumerate(node.inputs):
            if operand is None or operand.dtype not in _NARROW:
                continue
            zero_point = node.op_type == "QuantizeLinear" and index == 2
            if node.op_type != "DequantizeLinear" and not zero_point:
                yield f"{_place(node)} reads {operand.name!r} ({operand.dtype}); only DequantizeLinear may"
        for value in node.outputs:
            if value.dtype in _NARROW and node.op_type not in ("QuantizeLinear", "Constant"):
                yield f"{_place(node)} makes {value.name!r} ({value.dtype}); only QuantizeLinear may"


def _sources(value: ir.Value | None) -> list[ir.Node]:
    """The DequantizeLinear nodes behind ``value``, through operators that keep the numbers' quantisation."""
    found: list[ir.Node] = []
    pending = [value]
    seen: set[ir.Node] = set()
    while pending:
        current = pending.pop()
        node = None if current is None else current.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "DequantizeLinear":
            found.append(node)
        elif node.op_type in _TRANSPARENT:
            pending.extend(node.inputs if node.op_type == "Mul" else node.inputs[:1])
    return found


def _is_blocked(node: ir.Node) -> bool:
    """Whether a DequantizeLinear has block scales; FLOAT4E2M1 is exempt, as only FP4 hardware takes it."""
    stored = node.inputs[0]
    native_fp4 = stored is not None and stored.dtype == ir.DataType.FLOAT4E2M1
    return bool(node.attributes.get_int("block_size", 0)) and not native_fp4


def _blocked_weights(model: ir.Model) -> Iterator[str]:
    """TensorRT-RTX builds a silently wrong plan from a block-scaled weight times a dequantised activation."""
    for node in _all_nodes(model):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        left, right = _sources(node.inputs[0]), _sources(node.inputs[1])
        if left and any(_is_blocked(source) for source in right):
            yield f"{_place(node)} multiplies a dequantised activation by a block-scaled weight"


def _blocked_requantize(model: ir.Model) -> Iterator[str]:
    """TensorRT-RTX crashes on blocked DequantizeLinear -> per-tensor QuantizeLinear -> DequantizeLinear."""
    for node in _all_nodes(model):
        if node.op_type != "QuantizeLinear" or node.inputs[1] is None:
            continue
        scale = _dims(node.inputs[1])
        if scale == () and any(_is_blocked(source) for source in _sources(node.inputs[0])):
            yield f"{_place(node)} requantises a block-scaled weight with one scale; use a vector of ones"


def _half_row_scales(model: ir.Model) -> Iterator[str]:
    """An FP8 product with half-precision row scales stores its unscaled accumulator in half and overflows."""
    for node in _all_nodes(model):
        if node.op_type not in ("MatMul", "Gemm") or not _sources(node.inputs[0]):
            continue
        for source in _sources(node.inputs[1]):
            weight, scale = source.inputs[0], source.inputs[1]
            if weight is None or scale is None or weight.dtype not in FP8:
                continue
            if _dims(scale) != () and scale.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
                yield f"{_place(node)} has an FP8 weight with row scales of type {scale.dtype}; use FLOAT"


# ONNX Runtime's phase


def _no_fp8_qdq(model: ir.Model) -> Iterator[str]:
    """The default optimiser refuses FP8 Q/DQ or computes something else."""
    for node in _all_nodes(model):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for value in (*node.inputs, *node.outputs):
                if value is not None and value.dtype in FP8:
                    yield f"{_place(node)} has the FP8 value {value.name!r}; write it as a Cast"


_ALWAYS: tuple[Rule, ...] = (_order, _opsets)
_RULES: dict[Phase, tuple[Rule, ...]] = {
    "exported": _ALWAYS,
    "quantized": (*_ALWAYS, _node_names, _quantize_scales, _w4a8_nodes, _w4a8_functions),
    "engine": (
        *_ALWAYS,
        _node_names,
        _quantize_scales,
        _lowered,
        _no_calls,
        _narrow_types,
        _blocked_weights,
        _blocked_requantize,
        _half_row_scales,
    ),
    "onnxruntime": (*_ALWAYS, _node_names, _quantize_scales, _lowered, _no_calls, _no_fp8_qdq),
}
