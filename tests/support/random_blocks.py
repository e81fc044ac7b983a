"""What stands between the linears of random graphs, and the graphs themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from random_graphs import (
    F16,
    F32,
    LOCAL,
    RAISED,
    SIZES,
    VOCABULARY,
    WIDTHS,
    Maker,
    RandomGraph,
    Value,
    build,
    drop_dead,
    loose_info,
)
from random_linears import declined, embedding, linear, weight
from random_names import give_names

Block = Callable[[Maker], None]
BLOCK_LIMIT = 9


def random_graph(seed: int, blocks: int = BLOCK_LIMIT) -> RandomGraph:
    """The graph of ``seed``; fewer ``blocks`` than it has give its beginning: so failures shrink."""
    g = Maker(seed)
    _inputs(g)
    # Graphs without a linear are refused as they should be; a few are enough.
    if g.chance(0.97):
        _linear(g)
    kinds, weights = zip(*BLOCKS.items(), strict=True)
    for _ in range(min(blocks, g.random.randint(1, BLOCK_LIMIT))):
        g.random.choices(kinds, weights)[0](g)
    if "embedding" in g.graph.features and g.chance(0.5):
        _lm_head(g)
    if g.graph.rewritten and g.chance(0.9):
        g.outputs.append(g.made[g.random.choice(sorted(g.graph.rewritten))])
    _outputs(g)
    drop_dead(g)
    g.graph.proto, names = give_names(build(g, exported_shapes=g.chance(0.6)), g.random)
    g.graph.rewritten = {names.get(name, name) for name in g.graph.rewritten}
    g.graph.heads = {names.get(name, name) for name in g.graph.heads}
    return g.graph


def _inputs(g: Maker) -> None:
    width = g.random.choice(WIDTHS)
    kind = g.random.choice(("matrix", "tokens", "batched", "batched", "heads"))
    if kind == "tokens":
        ids = g.input("input_ids", ("batch", "sequence"), TensorProto.INT64)
        g.live.append(embedding(g, ids))
    elif kind == "heads":
        g.live.append(g.input("x", ("batch", 2, "sequence", width)))
    else:
        g.live.append(g.input("x", ("batch", "sequence", width)[kind == "matrix" :]))


def _outputs(g: Maker) -> None:
    """The last value, and others whether anything reads them or not; the rest are dead ends."""
    for value in (g.live[-1], *(value for value in g.live if g.chance(0.25))):
        known = {value.name for value in (*g.graph.inputs, *g.outputs)}
        # A graph output must be the output of a node.
        if value.name not in known:
            g.outputs.append(value)
    if not g.outputs:
        g.outputs.append(g.op("Identity", [g.live[-1]], g.live[-1].shape))


def _linear(g: Maker) -> None:
    x = g.pick()
    assert x is not None
    g.live.append(linear(g, x))


def _siblings(g: Maker) -> None:
    """Linears of one input, and something else that reads it."""
    x = g.pick()
    assert x is not None
    g.live += [linear(g, x) for _ in range(g.random.randint(2, 3))]
    if g.chance(0.5):
        g.live.append(g.op("Tanh", [x], x.shape))


def _declined(g: Maker) -> None:
    x = g.pick()
    assert x is not None
    y = declined(g, x)
    if y is not x:
        g.live.append(y)


def _elementwise(g: Maker) -> None:
    x = g.pick()
    assert x is not None
    kinds = ("Relu", "Sigmoid", "Tanh", "Neg", "Identity", "scale", "gelu", "clip", "where", "cast")
    kind = g.random.choice(kinds)
    if kind == "scale":
        shape = g.random.choice(((), (1,), (x.width,)))
        op = g.random.choice(("Mul", "Add", "Sub"))
        y = g.op(op, g.random.sample([x, g.const(g.floats(*shape))], 2), x.shape)
    elif kind == "gelu":
        y = _gelu(g, x)
    elif kind == "clip":
        y = g.op("Clip", [x, g.scalar(-2), g.scalar(2)], x.shape)
    elif kind == "where":  # leaky Relu, which is continuous
        positive = g.op("Greater", [x, g.scalar(0)], x.shape, TensorProto.BOOL)
        y = g.op("Where", [positive, x, g.op("Mul", [x, g.scalar(0.125)], x.shape)], x.shape)
    elif kind == "cast":
        other = F16 if g.dtype == F32 else F32
        y = g.op("Cast", [g.op("Cast", [x], x.shape, other, to=other)], x.shape, to=g.dtype)
    else:
        y = g.op(kind, [x], x.shape)
    g.live.append(y)


def _gelu(g: Maker, x: Value) -> Value:
    erf = g.op("Erf", [g.op("Mul", [x, g.scalar(math.sqrt(0.5))], x.shape)], x.shape)
    half = g.op("Mul", [x, g.scalar(0.5)], x.shape)
    return g.op("Mul", [half, g.op("Add", [erf, g.scalar(1)], x.shape)], x.shape)


def _binary(g: Maker) -> None:
    """A residual or a gate: two live values of one shape, or one with itself."""
    x = g.pick()
    assert x is not None
    y = g.pick(lambda value: value.shape == x.shape)
    assert y is not None
    g.live.append(g.op(g.random.choice(("Add", "Mul", "Sub")), [x, y], x.shape))


def _norm(g: Maker) -> None:
    x = g.pick()
    assert x is not None
    if g.opset >= 17 and g.chance(0.4):
        scale, bias = g.const(g.floats(x.width)), g.const(g.floats(x.width))
        inputs = [x, scale, bias] if g.chance(0.5) else [x, scale]
        g.live.append(g.op("LayerNormalization", inputs, x.shape, axis=-1, epsilon=1e-2))
        return
    # RMSNorm as exporters write it out, in float32.
    wide = g.op("Cast", [x], x.shape, F32, to=F32)
    square = g.op("Mul", [wide, wide], x.shape, F32)
    shape = (*x.shape[:-1], 1)
    axes: dict[str, Any] = {"axes": [-1]} if g.opset < 18 else {}
    inputs = [square] if g.opset < 18 else [square, g.ints(-1)]
    mean = g.op("ReduceMean", inputs, shape, F32, keepdims=1, **axes)
    epsilon = g.const(np.array(1e-2, np.float32))
    root = g.op("Sqrt", [g.op("Add", [mean, epsilon], shape, F32)], shape, F32)
    normal = g.op("Div", [wide, root], x.shape, F32)
    back = g.op("Cast", [normal], x.shape, to=g.dtype)
    g.live.append(g.op("Mul", [g.const(g.floats(x.width)), back], x.shape))


def _softmax(g: Maker) -> None:
    x = g.pick()
    assert x is not None
    g.live.append(g.op("Softmax", [x], x.shape, axis=-1))


def _split(g: Maker) -> None:
    """Split along the last axis, and perhaps concatenate in another order."""
    x = g.pick(lambda value: value.width % 2 == 0)
    if x is None:
        return
    shape = (*x.shape[:-1], x.width // 2)
    attributes: dict[str, Any] = {"num_outputs": 2} if g.opset >= 18 and g.chance(0.5) else {}
    inputs: list[Value] = [x]
    if g.opset >= 18 and not attributes:
        inputs.append(g.ints(x.width // 2, x.width // 2))
    parts = g.split("Split", inputs, [shape, shape], axis=-1, **attributes)
    if g.chance(0.5):
        g.live.append(g.op("Concat", parts[::-1], x.shape, axis=-1))
    else:
        g.live += parts


def _slice(g: Maker) -> None:
    x = g.pick(lambda value: value.width > 2)
    if x is None:
        return
    stop = g.random.choice([n for n in range(1, x.width) if n != VOCABULARY])
    shape = (*x.shape[:-1], stop)
    if g.chance(0.5):
        g.live.append(g.op("Slice", [x, g.ints(0), g.ints(stop), g.ints(-1)], shape))
    else:
        g.live.append(g.op("Gather", [x, g.ints(*range(stop))], shape, axis=-1))


def _reshape(g: Maker) -> None:
    """To a matrix, to one more axis, or heads in and out."""
    x = g.pick()
    assert x is not None
    if len(x.shape) == 2 and x.width % 2 == 0 and g.chance(0.5):
        g.live.append(g.op("Reshape", [x, g.ints(0, 2, -1)], (x.shape[0], 2, x.width // 2)))
    elif len(x.shape) == 2:
        g.live.append(g.op("Unsqueeze", [x, g.ints(0)], (1, *x.shape)))
    elif len(x.shape) == 4:
        moved = g.op("Transpose", [x], (x.shape[0], x.shape[2], x.shape[1], x.width), perm=[0, 2, 1, 3])
        heads = x.shape[1]
        if isinstance(heads, int):
            g.live.append(g.op("Reshape", [moved, g.ints(0, 0, -1)], (*moved.shape[:2], heads * x.width)))
        else:
            g.live.append(moved)
    else:
        rows = "x".join(map(str, x.shape[:-1]))
        dims = x.shape[:-1]
        size: int | str = math.prod(dims) if all(isinstance(dim, int) for dim in dims) else rows
        g.live.append(g.op("Reshape", [x, g.ints(-1, x.width)], (size, x.width)))


def _vector(g: Maker) -> None:
    """A linear of the last row, without a batch: declined where shape inference knows that it is a vector."""
    x = g.pick()
    assert x is not None
    flat = g.op("Reshape", [x, g.ints(-1, x.width)], ("rows", x.width))
    row = g.op("Gather", [flat, g.const(np.array(0, np.int64))], (x.width,), axis=0)
    g.live.append(g.op("Add", [x, row], x.shape))


def _attention(g: Maker) -> None:
    sequence = SIZES["sequence"] if g.fixed else "sequence"
    x = g.pick(lambda value: len(value.shape) == 3 and value.width % 2 == 0 and value.shape[1] == sequence)
    if x is None:
        return
    batch = x.shape[0]
    head = g.random.choice((4, 8))
    q, k, v = (_heads(g, linear(g, x, 2 * head)) for _ in range(3))
    total: int | str = sequence
    if "cache" not in g.graph.features and g.chance(0.6):
        total = f"{sequence}+past" if isinstance(sequence, str) else sequence + 2
        k, v = (_cached(g, value, kind, total) for value, kind in ((k, "key"), (v, "value")))
        g.graph.features["cache"] = k.name
    keys = g.op("Transpose", [k], (batch, 2, head, total), perm=[0, 1, 3, 2])
    scores = g.op("MatMul", [q, keys], (batch, 2, sequence, total))
    scaled = g.op("Mul", [scores, g.scalar(head**-0.5)], scores.shape)
    p = g.op("Softmax", [scaled], scores.shape, axis=-1)
    mix = g.op("MatMul", [p, v], (batch, 2, sequence, head))
    moved = g.op("Transpose", [mix], (batch, sequence, 2, head), perm=[0, 2, 1, 3])
    merged = g.op("Reshape", [moved, g.ints(0, 0, -1)], (batch, sequence, 2 * head))
    g.live.append(linear(g, merged, x.width))
    g.graph.features["attention"] = mix.name


def _heads(g: Maker, x: Value) -> Value:
    head = x.width // 2
    split = g.op("Reshape", [x, g.ints(0, 0, 2, head)], (*x.shape[:2], 2, head))
    return g.op("Transpose", [split], (x.shape[0], 2, x.shape[1], head), perm=[0, 2, 1, 3])


def _cached(g: Maker, new: Value, kind: str, total: int | str) -> Value:
    past = g.input(f"past_key_values.0.{kind}", (new.shape[0], 2, "past", new.width))
    present = g.op("Concat", [past, new], (new.shape[0], 2, total, new.width), axis=2)
    g.outputs.append(present)
    return present


def _lm_head(g: Maker) -> None:
    h = g.pick()
    assert h is not None
    before = set(g.graph.rewritten)
    logits = linear(g, h, VOCABULARY)
    g.outputs.append(logits)
    g.graph.features["lm_head"] = logits.name
    g.graph.heads = g.graph.rewritten - before
    g.graph.rewritten = before


def _captured(g: Maker, x: Value) -> Value:
    """What a branch may read: ONNX Runtime 1.31 loses a value that two Casts in a row compute."""
    maker = next((node for node in g.nodes if x.name in node.output), None)
    return g.op("Neg", [x], x.shape) if maker is not None and maker.op_type == "Cast" else x


def _if(g: Maker) -> None:
    x = g.pick()
    assert x is not None
    x = _captured(g, x)
    n = g.random.choice((0, x.width, 8))
    branches = {f"{side}_branch": _branch(g, x, n, side) for side in ("then", "else")}
    y = g.op("If", [_condition(g, x)], (*x.shape[:-1], n or x.width), **branches)
    g.graph.declined += [(y.name, "inside If")] * (2 if n else 0)
    g.live.append(y)


def _condition(g: Maker, x: Value) -> Value:
    if g.chance(0.4):
        return g.const(np.array(g.chance(0.5)))
    if g.chance(0.5):
        return g.input(g.name("flag"), (), TensorProto.BOOL)
    shape = g.op("Shape", [x], (len(x.shape),), TensorProto.INT64)
    first = g.op("Gather", [shape, g.const(np.array(0, np.int64))], (), TensorProto.INT64, axis=0)
    return g.op("Greater", [first, g.const(np.array(2, np.int64))], (), TensorProto.BOOL)


def _branch(g: Maker, x: Value, n: int, side: str) -> onnx.GraphProto:
    """A branch of an If: a linear with ``n`` outputs, or what keeps the shape."""
    with g.inside() as (nodes, initializers):
        if n:
            y = _inner_linear(g, x, n)
        else:
            moved = g.op(g.random.choice(("Relu", "Tanh", "Identity")), [x], x.shape)
            y = g.op("Mul", [moved, g.scalar(0.5)], x.shape)
    return helper.make_graph(nodes, g.name(side), [], [loose_info(y)], initializers)


def _inner_linear(g: Maker, x: Value, n: int) -> Value:
    """``x @ W``, the weight inside or one that the main graph has, perhaps for a linear of its own."""
    shared = [w for w in g.weights if w.shape == (x.width, n) and w.dtype == x.dtype]
    inside = g.const(g.floats(x.width, n), overridable=False)
    w = g.random.choice(shared) if shared and g.chance(0.7) else inside
    return g.op("MatMul", [x, w], (*x.shape[:-1], n))


def _loop(g: Maker) -> None:
    """``v = tanh(v [@ W] + captured)``, twice."""
    x = g.pick()
    assert x is not None
    captured = g.pick(lambda value: value.shape == x.shape)
    assert captured is not None
    captured = _captured(g, captured)
    count = Value(g.name("iteration"), (), TensorProto.INT64)
    going = Value(g.name("going"), (), TensorProto.BOOL)
    carried = Value(g.name("carried"), x.shape, x.dtype)
    multiplies = g.chance(0.5)
    with g.inside() as (nodes, initializers):
        y = _inner_linear(g, carried, x.width) if multiplies else carried
        y = g.op("Tanh", [g.op("Add", [y, captured], x.shape)], x.shape)
        on = g.op("Identity", [going], (), TensorProto.BOOL)
    inputs = [loose_info(value) for value in (count, going, carried)]
    body = helper.make_graph(nodes, g.name("body"), inputs, [loose_info(on), loose_info(y)], initializers)
    trips, start = g.const(np.array(2, np.int64)), g.const(np.array(True))
    y = g.op("Loop", [trips, start, x], x.shape, body=body)
    g.graph.declined += [(y.name, "inside Loop")] * multiplies
    g.live.append(y)


def _function(g: Maker) -> None:
    """Two calls of a function: a gate, one with an attribute, or one that multiplies by its argument."""
    x = g.pick()
    assert x is not None
    kind = g.random.choice(("Gate", "Leak", "Project"))
    if all(function.name != kind for function in g.functions):
        g.functions.append(_definition(g, kind))
    for _ in range(2):
        if kind == "Project":
            w = weight(g, x.width, x.width, flipped=False, dtype=x.dtype)
            y = g.op(kind, [x, w], x.shape, domain=LOCAL)
            g.graph.inlined |= {y.name} if g.opset < RAISED else set()
        else:
            attributes: dict[str, Any] = {"alpha": 0.25} if kind == "Leak" else {}
            y = g.op(kind, [x], x.shape, domain=LOCAL, **attributes)
        g.live.append(y)


def _definition(g: Maker, kind: str) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", g.opset)]
    if kind == "Gate":
        nodes = [helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["a", "s"], ["b"])]
        return helper.make_function(LOCAL, kind, ["a"], ["b"], nodes, imports)
    if kind == "Leak":
        leaky = helper.make_node("LeakyRelu", ["a"], ["b"])
        alpha = onnx.AttributeProto(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="alpha")
        leaky.attribute.append(alpha)
        return helper.make_function(LOCAL, kind, ["a"], ["b"], [leaky], imports, ["alpha"])
    if g.opset >= RAISED:
        g.graph.declined.append(("", "inside the function"))
    product = helper.make_node("MatMul", ["a", "w"], ["b"])
    return helper.make_function(LOCAL, kind, ["a", "w"], ["b"], [product], imports)


BLOCKS: dict[Block, int] = {
    _linear: 5,
    _siblings: 3,
    _declined: 3,
    _elementwise: 5,
    _binary: 3,
    _norm: 3,
    _softmax: 1,
    _split: 1,
    _slice: 1,
    _reshape: 3,
    _attention: 2,
    _vector: 1,
    _if: 2,
    _loop: 1,
    _function: 2,
}
