"""Linear layers for random graphs: every form that is rewritten, and those that must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto
from random_graphs import BF16, F16, F32, NUMPY, VOCABULARY, WIDTHS, Maker, Value

OUTPUTS = (1, 2, 3, 8, 16, 17, 24, 32, 40, 48, 80)


def linear(g: Maker, x: Value, n: int | None = None) -> Value:
    """A linear that is rewritten, in any accepted form; ``n`` outputs, or any number."""
    if g.chance(0.1):  # computed in another type, as exporters do for an lm_head
        dtype = g.random.choice((F32, F16))
        if dtype == g.dtype == F16:  # ONNX Runtime rounds at such a Cast or not, by the order of nodes
            return _linear(g, x, n)
        wide = g.op("Cast", [x], x.shape, dtype, to=dtype)
        y = _linear(g, wide, n)
        return g.op("Cast", [y], y.shape, to=g.dtype)
    return _linear(g, x, n)


def _linear(g: Maker, x: Value, n: int | None) -> Value:
    y = _gemm(g, x, n) if len(x.shape) == 2 and g.chance(0.6) else _matmul(g, x, n)
    if g.chance(0.3):
        bias = g.const(g.floats(y.width, dtype=x.dtype))
        y = g.op("Add", g.random.sample([y, bias], 2), y.shape, x.dtype)
    return y


def _matmul(g: Maker, x: Value, n: int | None) -> Value:
    w = weight(g, x.width, n, flipped=False, dtype=x.dtype)
    y = g.op("MatMul", [x, w], (*x.shape[:-1], w.width), x.dtype)
    g.graph.rewritten.add(y.name)
    return y


def _gemm(g: Maker, x: Value, n: int | None) -> Value:
    flipped = g.chance(0.6)
    w = weight(g, x.width, n, flipped=flipped, dtype=x.dtype)
    n = int(w.shape[0]) if flipped else w.width
    attributes: dict[str, Any] = {"transB": 1} if flipped else {"transB": 0} if g.chance(0.3) else {}
    if g.chance(0.3):
        attributes["alpha"] = g.random.choice((0.5, 2.0, -1.0, 0.1, 0.0))
    inputs = [x, w]
    if g.chance(0.6):
        shape = g.random.choice(((n,), (1, n), (1,), (), (1, 1)))
        c = g.const(g.floats(*shape, dtype=x.dtype), overridable=False)
        inputs.append(g.op("Identity", [c], shape, x.dtype) if g.chance(0.2) else c)
        if g.chance(0.3):
            attributes["beta"] = g.random.choice((0.25, -1.0, 0.0, 3.0))
    y = g.op("Gemm", inputs, (*x.shape[:-1], n), x.dtype, **attributes)
    g.graph.rewritten.add(y.name)
    return y


def weight(g: Maker, k: int, n: int | None, *, flipped: bool, dtype: int) -> Value:
    """The operand [k, n], or [n, k] when ``flipped``: a stored tensor, perhaps shared, behind a chain."""
    stored = _shared(g, k, n) if g.chance(0.3) else None
    if stored is None:
        n = n or g.random.choice(OUTPUTS)
        shape = (n, k) if g.chance(0.5) else (k, n)
        kind = dtype if g.chance(0.85) else g.random.choice((F32, F16, BF16))
        stored = g.const(weight_array(g, shape, kind), overridable=False)
        g.weights.append(stored)
    rows = stored.shape[0] if n is None else n
    # A square weight may be read either way round.
    is_flipped = stored.shape != (k, rows) if n is not None else stored.width == k
    steps = ["Transpose"] * (is_flipped != flipped)
    steps += ["Transpose", "Transpose"] * g.chance(0.05)
    steps += ["Keep"] * g.chance(0.05)
    steps += ["Identity"] * g.chance(0.15) + ["Cast"] * (stored.dtype != dtype or g.chance(0.05))
    g.random.shuffle(steps)
    return _chain(g, stored, steps, dtype)


def _shared(g: Maker, k: int, n: int | None) -> Value | None:
    found = [w for w in g.weights if w.shape[0] == k or w.width == k]
    if n is None:  # what has as many outputs as there are tokens may be an lm_head
        found = [w for w in found if VOCABULARY not in w.shape]
    else:
        found = [w for w in found if w.shape in ((k, n), (n, k))]
    return g.random.choice(found) if found else None


def _chain(g: Maker, value: Value, steps: list[str], dtype: int) -> Value:
    for step in steps:
        if step == "Transpose":
            perm: dict[str, Any] = {} if g.chance(0.5) else {"perm": [1, 0]}
            value = g.op("Transpose", [value], value.shape[::-1], value.dtype, **perm)
        elif step == "Keep":
            value = g.op("Transpose", [value], value.shape, value.dtype, perm=[0, 1])
        elif step == "Cast":
            value = g.op("Cast", [value], value.shape, dtype, to=dtype)
        else:
            value = g.op("Identity", [value], value.shape, value.dtype)
    return value


def weight_array(g: Maker, shape: tuple[int, int], dtype: int) -> np.ndarray:
    """Numbers of a weight: mostly normal, at times what rounding and scales may stumble over."""
    array = g.numbers.standard_normal(shape) / np.sqrt(max(shape))
    odd = ("zero", "zero row", "outlier", "constant", "codes", "tiny", "large")
    kind = g.random.choice(("normal",) * 5 + odd)
    if kind == "zero":
        array[:] = 0
    elif kind == "zero row":
        array[0] = 0
        array[:, 0] = 0
    elif kind == "outlier":
        array[g.random.randrange(shape[0]), g.random.randrange(shape[1])] = 30
    elif kind == "constant":
        array[:] = 0.3
    elif kind == "codes":
        array = g.numbers.choice([0, 0.5, -1, 1.5, -2, 3, 4, -6], shape) / 8
    elif kind == "tiny":
        array *= g.random.choice((1e-3, 1e-6, 1e-20, 1e-38))
    elif kind == "large" and dtype != F16:
        array *= 1e3
    rounded: np.ndarray = array.astype(np.float32).astype(NUMPY[dtype])
    return rounded


def declined(g: Maker, x: Value) -> Value:
    """A product with a constant that must be left alone."""
    forms = list(_ANY_RANK) + list(_MATRIX if len(x.shape) == 2 else _BATCHED)
    return g.random.choice(forms)(g, x)


def _plain(g: Maker, *shape: int, dtype: int | None = None) -> Value:
    return g.const(g.floats(*shape, dtype=dtype), overridable=False)


def _leave(g: Maker, reason: str, value: Value) -> Value:
    g.graph.declined.append((value.name, reason))
    return value


def _overridable(g: Maker, x: Value) -> Value:
    w = g.const(g.floats(x.width, 8), overridable=False)
    if all(tensor.name != w.name for tensor in g.initializers):  # a Constant node cannot be overridden
        return x
    g.overridable.add(w.name)
    return _leave(g, "also a graph input", g.op("MatMul", [x, w], (*x.shape[:-1], 8)))


def _computed(g: Maker, x: Value) -> Value:
    w = g.op("Mul", [_plain(g, x.width, 8), _plain(g, 8)], (x.width, 8))
    return _leave(g, "computed in the graph", g.op("MatMul", [x, w], (*x.shape[:-1], 8)))


def _left(g: Maker, x: Value) -> Value:
    rank = len(x.shape)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    flipped = g.op("Transpose", [x], (*x.shape[:-2], x.width, x.shape[-2]), perm=perm)
    y = g.op("MatMul", [_plain(g, 8, x.width), flipped], (*x.shape[:-2], 8, x.shape[-2]))
    _leave(g, "left operand", y)
    return g.op("Transpose", [y], (*x.shape[:-1], 8), perm=perm)


def _both(g: Maker, x: Value) -> Value:
    row = g.op("MatMul", [_plain(g, 1, 8), _plain(g, 8, x.width)], (1, x.width))
    _leave(g, "both operands are constant", row)
    return g.op("Add", [x, row], x.shape)


def _double(g: Maker, x: Value) -> Value:
    wide = g.op("Cast", [x], x.shape, TensorProto.DOUBLE, to=TensorProto.DOUBLE)
    w = _plain(g, x.width, 8, dtype=TensorProto.DOUBLE)
    y = g.op("MatMul", [wide, w], (*x.shape[:-1], 8), TensorProto.DOUBLE)
    _leave(g, "has type DOUBLE", y)
    return g.op("Cast", [y], y.shape, to=g.dtype)


def _quantised(g: Maker, x: Value) -> Value:
    codes = g.const(g.numbers.integers(-128, 128, (x.width, 8)).astype(np.int8), overridable=False)
    w = g.op("DequantizeLinear", [codes, _plain(g, dtype=F32)], (x.width, 8), F32)
    wide = g.op("Cast", [x], x.shape, F32, to=F32)
    y = g.op("MatMul", [wide, w], (*x.shape[:-1], 8), F32)
    _leave(g, "already quantised", y)
    return g.op("Cast", [y], y.shape, to=g.dtype)


def _trans_a(g: Maker, x: Value) -> Value:
    flipped = g.op("Transpose", [x], x.shape[::-1], perm=[1, 0])
    y = g.op("Gemm", [flipped, _plain(g, x.width, 8)], (x.shape[0], 8), transA=1)
    return _leave(g, "transA=1", y)


def _moving_c(g: Maker, x: Value) -> Value:
    y = g.op("Gemm", [x, _plain(g, x.width, x.width), x], x.shape)
    return _leave(g, "C is an activation", y)


def _batched(g: Maker, x: Value) -> Value:
    y = g.op("MatMul", [x, _plain(g, 1, x.width, 8)], (*x.shape[:-1], 8))
    return _leave(g, "rank 3", y)


DECLINED_REASONS = (
    "also a graph input",
    "computed in the graph",
    "left operand",
    "both operands are constant",
    "has type DOUBLE",
    "already quantised",
    "transA=1",
    "C is an activation",
    "rank 3",
)
Form = Callable[[Maker, Value], Value]
_ANY_RANK: tuple[Form, ...] = (_overridable, _computed, _left, _both, _double, _quantised)
_MATRIX: tuple[Form, ...] = (_trans_a, _moving_c)
_BATCHED: tuple[Form, ...] = (_batched,)


def embedding(g: Maker, ids: Value) -> Value:
    """Rows of a table by token; an lm_head may share it."""
    width = g.random.choice(WIDTHS[2:])
    table = g.const(weight_array(g, (VOCABULARY, width), g.dtype), overridable=False)
    if g.chance(0.3):
        g.weights.append(table)
    rows = g.op("Gather", [table, ids], (*ids.shape, width))
    g.graph.features["embedding"] = rows.name
    return rows
