"""Shapes, constants, and moving elements around."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from zqfp_compile.torch_graph.call import Call, Function, Result
from zqfp_compile.torch_graph.dtypes import from_onnx, on_host

Tensor = torch.Tensor


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.reshape(-1).tolist()]


def _constant(call: Call) -> Tensor:
    for name, value in call.attributes.items():
        if name == "value":
            return from_onnx(value)
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=torch.float32)
    raise call.unsupported("a value that is no tensor of numbers")


def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.get("value")
    fill = torch.zeros(1) if value is None else from_onnx(value)
    return fill.reshape(()).repeat(_ints(shape)) if shape.numel() else fill.reshape(())


def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[call.get("start", 0) : call.get("end")], dtype=torch.int64)


def _size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = (value.reshape(()).item() for value in (start, limit, delta))
    count = max(math.ceil((last - first) / step), 0)
    return start.reshape(()) + torch.arange(count, dtype=start.dtype) * delta.reshape(())


def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """0 keeps a dimension unless ``allowzero``, -1 is what is left over."""
    sizes = _ints(shape)
    if not call.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = call.axes(axes)
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


def _unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Axes count in the result."""
    chosen = call.axes(axes) or []
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.get("perm") or list(range(x.ndim))[::-1])


def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, call.get("axis"))


def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> Result:
    """Given sizes, or equal parts, the last one smaller."""
    axis = call.get("axis", 0)
    given = call.get("split") if sizes is None else _ints(sizes)
    if given is not None:
        return torch.split(x, given, axis)
    parts, length = call.get("num_outputs", call.outputs), x.shape[axis]
    each = -(-length // parts)
    return torch.split(x, [max(min(each, length - index * each), 0) for index in range(parts)], axis)


def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Python's slices, which clamp as ONNX does; torch has no negative steps."""
    first = call.get("starts") if starts is None else _ints(starts)
    last = call.get("ends") if ends is None else _ints(ends)
    along = call.axes(axes) or range(len(first))
    step = [1] * len(first) if steps is None else _ints(steps)
    for axis, begin, end, stride in zip(along, first, last, step, strict=True):
        chosen = range(*slice(begin, end, stride).indices(x.shape[axis]))
        if stride == 1:
            x = x.narrow(axis, min(chosen.start, x.shape[axis]), len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64, device=x.device))
    return x


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Return indices from 0 on: negative ones count from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    if indices.ndim == 0 and on_host(indices):
        return x.select(axis, int(indices.item()))
    flat = _wrapped(indices, x.shape[axis]).reshape(-1)
    return x.index_select(axis, flat).reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    batch = call.get("batch_dims", 0)
    if batch == 0:
        return x[tuple(indices.to(torch.int64).unbind(-1))]
    rows = x.reshape(-1, *x.shape[batch:])
    picks = indices.to(torch.int64).reshape(len(rows), *indices.shape[batch:])
    found = torch.stack([row[tuple(pick.unbind(-1))] for row, pick in zip(rows, picks, strict=True)])
    return found.reshape(indices.shape[:batch] + found.shape[1:])


_REDUCTIONS = {"max": "amax", "min": "amin", "mul": "prod"}


def _scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    reduction = call.get("reduction", "none")
    where = tuple(indices.to(torch.int64).unbind(-1))
    if reduction == "none":
        return x.index_put(where, updates)
    if reduction == "add":
        return x.index_put(where, updates, accumulate=True)
    raise call.unsupported(f"reduction={reduction}")


def _scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = call.get("axis", 0), call.get("reduction", "none")
    where = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, where, updates)
    if reduction == "add":
        return x.scatter_add(axis, where, updates)
    return x.scatter_reduce(axis, where, updates, _REDUCTIONS[reduction])


def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast both ways: a 1 in ``shape`` keeps the dimension of x."""
    return x.expand(np.broadcast_shapes(x.shape, tuple(_ints(shape))))


def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(_ints(repeats))


def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k.reshape(()).item())
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


def _where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def _non_zero(call: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


def _one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    size, axis = int(depth.reshape(()).item()), call.get("axis", -1)
    axis = axis % (indices.ndim + 1)
    shape = [1] * (indices.ndim + 1)
    shape[axis] = size
    classes = torch.arange(size, device=indices.device).reshape(shape)
    return torch.where(_wrapped(indices, size).unsqueeze(axis) == classes, values[1], values[0])


def _pad(
    call: Call, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    if call.get("mode", "constant") != "constant":
        raise call.unsupported(f"mode={call.get('mode')}")
    given = _ints(pads)
    chosen = list(range(x.ndim)) if axes is None else _ints(axes)
    amounts = [0] * (2 * x.ndim)  # torch: the last axis first
    for index, axis in enumerate(chosen):
        place = 2 * (x.ndim - 1 - axis % x.ndim)
        amounts[place : place + 2] = given[index], given[index + len(chosen)]
    return F.pad(x, amounts, value=0 if value is None else value.reshape(()).item())


def _identity(call: Call, x: Tensor, *_: Tensor | None) -> Tensor:
    return x


def _dropout(call: Call, x: Tensor, *_: Tensor | None) -> Result:
    """In use, not in training: nothing is dropped."""
    return (x, torch.ones_like(x, dtype=torch.bool)) if call.outputs > 1 else x


OPS: dict[str, Function] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
