"""Damage to files: to their bytes, to JSON values, to protobuf messages. All from a ``random.Random``."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message

_BYTES = (b"\x00", b"\xff", b"\x80", b"\xff\xff\xff\xff\x0f", b"-1", b"99999999999", b'"', b"[{")
_NUMBERS = (0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63))
_TEXTS = ("", "a", "\n", "\x1b[31m", "x" * 300, "..", "/etc/passwd", "\ud800", "Ġ", "(", "a{9}")
_JSON: tuple[Any, ...] = (*_NUMBERS, *_TEXTS, 0.5, 1e308, 10**30, None, True, [], {}, [[]], {"type": "BPE"})


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Remove, repeat, overwrite or replace a few pieces."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) + 1)
        end = min(len(content), place + rng.randint(1, 16))
        piece = bytes(content[place:end])
        noise = bytes(rng.randrange(256) for _ in piece)
        content[place:end] = rng.choice((b"", piece * 2, noise, rng.choice(_BYTES)))
    return bytes(content)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change one or two values of a JSON text; any other text is changed as bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    if not isinstance(value, (dict, list)):
        value = [value]
    for _ in range(rng.randint(1, 2)):
        _change_container(rng.choice(list(_containers(value))), rng)
    return json.dumps(value).encode()


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _change_container(container: Any, rng: random.Random) -> None:
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    new = copy.deepcopy(rng.choice(_JSON))
    if not keys or rng.random() < 0.1:
        container.update({rng.choice(_TEXTS): new}) if isinstance(container, dict) else container.append(new)
        return
    key = rng.choice(keys)
    how = rng.randrange(3)
    if how == 0:
        container[key] = new
    elif how == 1:
        container[key] = copy.deepcopy(container[rng.choice(keys)])
    else:
        del container[key]


def mutate_model(data: bytes, rng: random.Random) -> bytes:
    """Change a few fields of an ONNX model; a file that is none is changed as bytes."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return mutate_bytes(data, rng)
    for _ in range(rng.randint(1, 3)):
        _change_message(rng.choice(list(_messages(model))), rng)
    changed: bytes = model.SerializeToString()
    return changed


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _messages(inner)


def _change_message(message: Message, rng: random.Random) -> None:
    """Clear, repeat or set one field; half of the time one that is set already."""
    present = [field for field, _ in message.ListFields()]
    field = rng.choice(present if present and rng.random() < 0.5 else message.DESCRIPTOR.fields)
    values = getattr(message, field.name)
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is not None and field.is_repeated:
        values.add().CopyFrom(rng.choice(values)) if values else values.add()
    elif field.message_type is not None:
        values.SetInParent()
    else:
        new = _scalar(field, rng)
        values.append(new) if field.is_repeated else setattr(message, field.name, new)


def _scalar(field: Any, rng: random.Random) -> Any:
    """A value that fits the field's type."""
    if field.enum_type is not None:
        return rng.choice(field.enum_type.values).number
    if field.cpp_type == field.CPPTYPE_STRING:
        text = rng.choice(_TEXTS).replace("\ud800", "x") if rng.random() < 0.5 else rng.choice("abxyw")
        return text.encode() if field.type == field.TYPE_BYTES else text
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, 1.0, float("nan"), float("inf")))
    number = rng.choice((rng.randrange(30), rng.choice(_NUMBERS)))
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return min(max(number, low), high)
