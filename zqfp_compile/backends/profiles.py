"""Optimisation profiles: the range of shapes an engine accepts, and the shape it is tuned for.

The role of each dynamic axis (batch, sequence, past, total = past + sequence) comes from the input's name,
then from the axis' symbolic name. Every input of a model follows from the value of each role, so naming one
or two inputs in ``--min/opt/max-shapes`` is enough for a model with sixty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zqfp_compile.errors import UsageError
from zqfp_compile.text_file import COMPANION_BYTES, UnreadableError, read_text

Dim = int | str | None
Shape = tuple[int, ...]
Range = tuple[int, int, int]
Points = tuple[Shape, Shape, Shape]

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"
_POINTS = ("min", "opt", "max")

# A context of 4096 tokens either way. Prefill takes a past as well, so a long prompt can come in chunks and a
# conversation can go on. Its largest shape, 8192 tokens, sets the engine's activation memory (SmolLM2-135M:
# about 1.5 GB, mostly attention scores), hence the smaller batch.
_PREFILL: dict[str, Range] = {BATCH: (1, 1, 4), SEQUENCE: (1, 512, 2048), PAST: (0, 0, 2048)}
_DECODE: dict[str, Range] = {BATCH: (1, 1, 8), SEQUENCE: (1, 1, 1), PAST: (0, 512, 4095)}
_OTHER: Range = (1, 8, 64)
# What config.json calls the number of positions a model knows.
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")

_TOKENS = {"input_ids", "inputs_embeds", "position_ids", "token_type_ids"}
_CACHE = re.compile(r"past|cache", re.IGNORECASE)
_SEQUENCE_SYMBOL = re.compile(r"(query_|input_)?seq(uence)?(_?len(gth)?)?")


@dataclass(frozen=True)
class Profile:
    """One optimisation profile.

    Attributes:
        name: ``prefill``, ``decode``, ``default`` or ``user``.
        shapes: (min, opt, max) dimensions of every input that has a dynamic axis.
    """

    name: str
    shapes: Mapping[str, Points] = field(default_factory=dict)


def default_profiles(
    inputs: Sequence[tuple[str, Sequence[Dim]]],
    *,
    min_shapes: Mapping[str, Sequence[int]] | None = None,
    opt_shapes: Mapping[str, Sequence[int]] | None = None,
    max_shapes: Mapping[str, Sequence[int]] | None = None,
    max_positions: int | None = None,
) -> tuple[Profile, ...]:
    """Make the profiles of a model.

    A causal LM with a KV cache gets ``prefill`` (batch 1..4, sequence 1..2048 tuned for 512, past 0..2048
    tuned for 0) and ``decode`` (batch 1..8, one token, past 0..4095 tuned for 512). A model without a cache
    gets one ``default`` profile; axes of unknown meaning range over 1..64, tuned for 8. Activation memory
    grows with the largest batch x sequence x context: lower the maximum when it does not fit.

    Any user shape replaces all of that by one ``user`` profile. An input left out follows from the roles of
    the ones given, then from the defaults. As in trtexec, an axis given only by ``opt_shapes`` is fixed.

    Args:
        inputs: (name, dims) per graph input; a dynamic axis is a symbolic name or ``None``.
        min_shapes: Smallest dimensions per input name.
        opt_shapes: Dimensions to tune for.
        max_shapes: Largest dimensions.
        max_positions: Longest context the model knows (:func:`position_limit`). The defaults keep past and
            sequence together within it: some exports hold a causal mask of that size and fail beyond.

    Raises:
        UsageError: Unknown input, wrong rank or static dimension, min > opt or opt > max, or inputs that
            contradict each other (attention_mask must be as long as past and sequence together).
    """
    given = tuple(
        {name: tuple(dims) for name, dims in (shapes or {}).items()}
        for shapes in (min_shapes, opt_shapes, max_shapes)
    )
    model = _Axes.of(inputs)
    prefill, decode = _within(max_positions, model.has_past)
    if any(given):
        return (_profile("user", inputs, model, _from_user(inputs, model, given, prefill)),)
    if not model.has_past:
        return (_profile("default", inputs, model, _complete({}, model, prefill)),)
    phases = {"prefill": prefill, "decode": decode}
    if SEQUENCE in model.static:  # exported for one phase only
        phases.pop("prefill" if model.static[SEQUENCE] == 1 else "decode")
    return tuple(
        _profile(name, inputs, model, _complete({}, model, values)) for name, values in phases.items()
    )


def position_limit(folder: Path) -> int | None:
    """Return how many positions the model in ``folder`` knows by its ``config.json``; ``None``: unknown."""
    try:
        config = json.loads(read_text(folder / "config.json", COMPANION_BYTES))
    except (UnreadableError, ValueError, RecursionError):
        return None
    found = [config.get(key) for key in _POSITION_KEYS] if isinstance(config, dict) else []
    return next((value for value in found if type(value) is int and value > 1), None)


def _within(limit: int | None, has_past: bool) -> tuple[dict[str, Range], dict[str, Range]]:
    """Return the default ranges of prefill and decode, cut to a context of ``limit`` tokens."""
    if limit is None:
        return _PREFILL, _DECODE
    past = limit // 2 if has_past else 0
    cuts = {SEQUENCE: limit - past, PAST: past}
    prefill = {role: _cut(values, cuts.get(role)) for role, values in _PREFILL.items()}
    return prefill, {**_DECODE, PAST: _cut(_DECODE[PAST], limit - 1)}


def _cut(values: Range, limit: int | None) -> Range:
    low, best, high = values
    return values if limit is None else (low, min(best, limit), min(high, limit))


@dataclass(frozen=True)
class _Axes:
    """Roles of a model's axes: the dynamic ones, and those the export fixed."""

    dynamic: frozenset[str]
    static: Mapping[str, int]

    @property
    def has_past(self) -> bool:
        return PAST in self.dynamic or PAST in self.static

    @classmethod
    def of(cls, inputs: Sequence[tuple[str, Sequence[Dim]]]) -> _Axes:
        dynamic, static = set(), {}
        for name, dims in inputs:
            for axis, dim in enumerate(dims):
                if not isinstance(dim, int):
                    dynamic.add(_role(name, dims, axis))
                elif name in _TOKENS and axis == 1 and len(dims) == 2:
                    static[SEQUENCE] = dim
                elif _CACHE.search(name) and axis == 2 and len(dims) == 4 and isinstance(dims[1], int):
                    static[PAST] = dim
        return cls(frozenset(dynamic), {role: dim for role, dim in static.items() if role not in dynamic})


def _role(name: str, dims: Sequence[Dim], axis: int) -> str:
    """Meaning of one dynamic axis; axes of unknown meaning are their own role."""
    rank, symbol = len(dims), dims[axis]
    if name == "attention_mask" and rank in (2, 4):
        return {0: BATCH, rank - 1: TOTAL}.get(axis, SEQUENCE)
    if isinstance(symbol, str) and (known := _symbol_role(symbol.lower())):
        return known
    if name in _TOKENS and axis < 2:
        return (BATCH, SEQUENCE)[axis]
    if _CACHE.search(name) and rank >= 3:
        return PAST if axis else BATCH
    return symbol if isinstance(symbol, str) else f"{name}[{axis}]"


def _symbol_role(symbol: str) -> str | None:
    if symbol.startswith("total") or ("past" in symbol and "+" in symbol):
        return TOTAL
    if "past" in symbol:
        return PAST
    if symbol in ("batch", "batch_size", "n_batch"):
        return BATCH
    return SEQUENCE if _SEQUENCE_SYMBOL.fullmatch(symbol) else None


def _complete(
    bound: Mapping[str, Sequence[int | None]], model: _Axes, defaults: Mapping[str, Range]
) -> dict[str, Range]:
    """Fill what ``bound`` leaves open from ``defaults`` and make total = past + sequence."""
    values = {
        role: _fill(bound.get(role, (None, None, None)), defaults.get(role, _OTHER))
        for role in sorted(model.dynamic | {SEQUENCE, PAST})
    }
    if not model.has_past:
        values[PAST] = (0, 0, 0)
    for role, dim in model.static.items():
        values[role] = (dim, dim, dim)
    low, best, high = (p + s for p, s in zip(values[PAST], values[SEQUENCE], strict=True))
    return {**values, TOTAL: (low, best, high)}


def _fill(given: Sequence[int | None], default: Range) -> Range:
    low, best, high = given
    if best is not None and low is None and high is None:
        return (best, best, best)
    ceiling = high if high is not None else max(default[2], best or 0, low or 0)
    floor = low if low is not None else min(default[0], ceiling if best is None else best)
    return (floor, best if best is not None else min(max(default[1], floor), ceiling), ceiling)


def _from_user(
    inputs: Sequence[tuple[str, Sequence[Dim]]],
    model: _Axes,
    given: tuple[dict[str, Shape], ...],
    defaults: Mapping[str, Range],
) -> dict[str, Range]:
    bound: dict[str, list[int | None]] = {}
    for point, shapes in enumerate(given):
        for role, value, text in _bindings(dict(inputs), shapes, _POINTS[point]):
            slot = bound.setdefault(role, [None, None, None])
            if slot[point] not in (None, value):
                raise UsageError(
                    f"{text}: another input says {role} is {slot[point]}, not {value}; make them agree"
                )
            slot[point] = value
    if TOTAL in bound:
        for point in range(3):
            _split_total(bound, model, point)
    return _complete(bound, model, defaults)


def _bindings(
    inputs: Mapping[str, Sequence[Dim]], shapes: Mapping[str, Shape], point: str
) -> Iterator[tuple[str, int, str]]:
    """Yield (role, value, text for messages) for every dynamic axis the user gave."""
    for name, shape in shapes.items():
        text = f"--{point}-shapes {name}:{_text(shape)}"
        if name not in inputs:
            raise UsageError(f"{text}: no input has that name; the inputs are {_some(list(inputs))}")
        dims = inputs[name]
        if len(shape) != len(dims):
            raise UsageError(
                f"{text}: input {name!r} has {len(dims)} dimensions ({_text(dims)}), not {len(shape)}"
            )
        for axis, (dim, value) in enumerate(zip(dims, shape, strict=True)):
            if isinstance(dim, int):
                if dim != value:
                    raise UsageError(f"{text}: dimension {axis} of {name!r} is fixed to {dim} in the model")
                continue
            role = _role(name, dims, axis)
            if value < (0 if role == PAST else 1):
                raise UsageError(f"{text}: dimension {axis} ({role}) is {value}; it must be at least 1")
            yield role, value, text


def _split_total(bound: dict[str, list[int | None]], model: _Axes, point: int) -> None:
    """Derive sequence and past at one point from the length of attention_mask."""
    total = bound[TOTAL][point]
    if total is None:
        return
    sequence = bound.setdefault(SEQUENCE, [None, None, None])
    past = bound.setdefault(PAST, [None, None, None])
    sequence[point] = model.static.get(SEQUENCE, sequence[point])
    past[point] = model.static.get(PAST, past[point])
    if sequence[point] is None:
        sequence[point] = total - (past[point] or 0)
    if past[point] is None:
        past[point] = total - (sequence[point] or 0)
    p, s = past[point] or 0, sequence[point] or 0
    if p + s != total or p < 0 or s < 1 or (p and not model.has_past):
        raise UsageError(
            f"--{_POINTS[point]}-shapes: attention_mask has length {total}, but past {p} and sequence {s} "
            f"make {p + s}; give it the length of both together"
        )


def _profile(
    name: str, inputs: Sequence[tuple[str, Sequence[Dim]]], model: _Axes, values: Mapping[str, Range]
) -> Profile:
    shapes = {}
    for tensor, dims in inputs:
        if all(isinstance(dim, int) for dim in dims):
            continue
        low, best, high = (
            tuple(
                dim if isinstance(dim, int) else values[_role(tensor, dims, axis)][point]
                for axis, dim in enumerate(dims)
            )
            for point in range(3)
        )
        if any(not a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise UsageError(
                f"--min/opt/max-shapes: input {tensor!r} has min {_text(low)}, opt {_text(best)}, "
                f"max {_text(high)}; each dimension needs min <= opt <= max"
            )
        shapes[tensor] = (low, best, high)
    return Profile(name, shapes)


def _text(dims: Sequence[Dim]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in dims) or "scalar"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
