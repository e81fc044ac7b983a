"""Hostile model files: no model, data outside the folder, tensors that lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
from hostile_case import HostileCase, raw_file
from hostile_protos import (
    WEIGHT,
    changed,
    external,
    linear,
    model_file,
    node,
    write_model,
)
from onnx import TensorProto

MODEL = "model.onnx"


def _weight(wrong: str, change: Callable[[onnx.TensorProto], object], *says: str) -> HostileCase:
    """The weight of the linear after ``change``."""
    model = changed(lambda it: change(it.graph.initializer[0]))
    return model_file("tensor", wrong, model, "tensor 'w' in the graph", *says)


def _external(wrong: str, model: onnx.ModelProto, *says: str) -> HostileCase:
    """The data file is there and right; a secret lies in the folder above the model's."""
    return HostileCase(
        "external data", wrong, lambda place: write_model(place, model), ("tensor 'w' in the graph", *says)
    )


def _special(group: str, wrong: str, make: Callable[[Path], object], *says: str) -> HostileCase:
    return HostileCase(group, wrong, make, says)


def _sparse_file(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


NO_MODEL = (
    raw_file("empty", b"", "is empty"),
    raw_file("a text", b"hello, this is\nnot a model\n", "is a text file"),
    raw_file(
        "a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"
    ),
    raw_file("a PyTorch checkpoint", b"PK\x03\x04" + bytes(64), "PyTorch checkpoint"),
    raw_file("a pickle", b"\x80\x02" + bytes(64), "is a Python pickle"),
    raw_file("gzip", b"\x1f\x8b" + bytes(64), "is gzip-compressed"),
    raw_file("GGUF", b"GGUF" + bytes(64), "is a GGUF file"),
    raw_file(
        "safetensors", b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32","shape":[1]}}', "is a safetensors file"
    ),
    raw_file("ONNX Runtime's format", b"\x18\0\0\0ORTM" + bytes(64), ".ort"),
    raw_file("noise", bytes(range(255, 0, -1)) * 4, "is not a readable ONNX model"),
    raw_file("zeros", bytes(1 << 20), "is not a readable ONNX model"),
    raw_file("another protobuf", b"\x08\x0a", "holds no graph"),
    raw_file("half a model", linear().SerializeToString()[:100], "is not a readable ONNX model"),
    raw_file("a length of 2^63", b"\x08\x0a\x3a" + b"\xff" * 8 + b"\x7f", "is not a readable ONNX model"),
    raw_file("groups without end", b"\x08\x0a" + b"\x3b" * 100_000, "is not a readable ONNX model"),
    _special("file", "a folder", lambda place: (place / MODEL).mkdir(), "is a folder", "give the .onnx file"),
    _special("file", "a pipe", lambda place: os.mkfifo(place / MODEL), "not a regular file"),
    _special("file", "a device", lambda place: (place / MODEL).symlink_to("/dev/zero"), "not a regular file"),
    _special("file", "a link to itself", lambda place: (place / MODEL).symlink_to(MODEL), "cannot be read"),
    _special("file", "not there", lambda place: None, "no such file"),
    _special(
        "file",
        "over 2 GiB",
        lambda place: _sparse_file(place / MODEL, 1 << 31),
        "2.0 GiB",
        "save_as_external_data",
    ),
)


def _behind(target: str, *, folder: bool = False) -> Callable[[Path], None]:
    """External data that is a link to ``target``, or in a folder that is one."""

    def make(place: Path) -> None:
        (place / "other").mkdir()
        (place / "other" / "w.data").write_bytes(WEIGHT.tobytes())
        write_model(place, external("sub/w.data" if folder else "w.data"), None)
        (place / ("sub" if folder else "w.data")).symlink_to(target)

    return make


def _hard_linked(place: Path) -> None:
    write_model(place, external())
    os.link(place / "w.data", place / "private.txt")


def _in_pipe(place: Path) -> None:
    write_model(place, external(), None)
    os.mkfifo(place / "w.data")


def _over_budget(place: Path) -> None:
    """Many tensors over one sparse file: each is legal, the sum is not."""
    model = external(dims=[1 << 36], length=1 << 38)
    for index in range(40):
        copy = model.graph.initializer.add()
        copy.CopyFrom(model.graph.initializer[0])
        copy.name = f"w{index}"
    write_model(place, model, None)
    _sparse_file(place / "w.data", 1 << 38)


def _overlapping() -> onnx.ModelProto:
    """A second tensor that starts in the middle of the first."""
    model = external()
    second = model.graph.initializer.add()
    second.CopyFrom(model.graph.initializer[0])
    second.name = "v"
    for entry in second.external_data:
        entry.value = {"offset": "64"}.get(entry.key, entry.value)
    model.graph.node.add().CopyFrom(node("MatMul", ["x", "v"], "z"))
    return model


def _repeated() -> onnx.ModelProto:
    model = external()
    model.graph.initializer[0].external_data.add(key="offset", value="64")
    return model


OUTSIDE = "inside the model's folder"

EXTERNAL = (
    _external("shorter than its shape", external(length=124), "124 bytes", "need 128"),
    _external("past the end", external(offset=4), "ends at byte 132", "has only 128", "truncated"),
    _external("past the end without length", external(offset=64, length=None), "ends at byte 192"),
    _external("at a huge offset", external(offset="9" * 18), "ends at byte", "truncated"),
    _external("at a negative offset", external(offset=-4), "offset '-4' is not a number"),
    _external("of a negative length", external(length=-128), "length '-128' is not a number"),
    _external("at an offset of 1000 digits", external(offset="9" * 1000), "is not a number"),
    _external("at a hexadecimal offset", external(offset="0x0"), "is not a number"),
    _external("at an absolute path", external("/etc/passwd"), "'/etc/passwd'", OUTSIDE),
    _external("in the parent folder", external("../w.data"), "'../w.data'", OUTSIDE),
    _external("in the parent, in the middle", external("a/../../w.data"), OUTSIDE),
    _external("without a location", external(""), "location ''"),
    _external("with a NUL in its location", external("w\0.data"), OUTSIDE),
    _external("with a line break in its location", external("w\nerror: x"), r"'w\nerror: x'"),
    _external("not there", external("other.data"), "other.data", "cannot be opened", "copy it"),
    _external("with an unknown entry", external(ofset=4), "unknown external data entry 'ofset'"),
    _external("with an entry twice", _repeated(), "repeated external data entry"),
    _external("of a name of 100000 characters", external("n" * 100_000), "cannot be opened"),
    _external("in a folder", external("."), "is not a regular file"),
    _external("of negative dimensions", external(dims=[-4, -8]), "[-4, -8]", "negative dimension"),
    _external("of overflowing dimensions", external(dims=[1 << 33, 1 << 33]), "is larger than"),
    _external("of huge dimensions and 0", external(dims=[1 << 62, 1 << 62, 0], length=0), "is larger than"),
    _external("of rank 1000", external(dims=[1] * 1000), "is larger than"),
    _special(
        "external data",
        "overlapping",
        lambda place: write_model(place, _overlapping(), WEIGHT.tobytes() * 2),
        "tensor 'v' in the graph",
        "bytes 64 to 192",
        "overlap another",
    ),
    _special(
        "external data",
        "cut off",
        lambda place: write_model(place, external(), WEIGHT.tobytes()[:-1]),
        "tensor 'w'",
        "has only 127",
        "copy it again",
    ),
    _special("external data", "a link out", _behind("/etc/passwd"), "tensor 'w'", "symbolic link", "cp -rL"),
    _special("external data", "a link within", _behind("other/w.data"), "symbolic link", "cp -rL"),
    _special("external data", "a dangling link", _behind("nowhere"), "symbolic link"),
    _special("external data", "a link to a device", _behind("/dev/zero"), "symbolic link"),
    _special("external data", "behind a linked folder", _behind("other", folder=True), "symbolic link"),
    _special("external data", "hard-linked", _hard_linked, "2 hard links", "real copy"),
    _special("external data", "a pipe", _in_pipe, "not a regular file"),
    _special("external data", "of 10 TiB", _over_budget, "brings the weights to", "TiB"),
)


def _retyped(data_type: int) -> Callable[[onnx.TensorProto], object]:
    return lambda tensor: setattr(tensor, "data_type", data_type)


def _typed(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 31)


def _as_text(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_type = TensorProto.STRING
    tensor.string_data.extend([b"\xff"] * 32)


TENSORS = (
    _weight("bytes missing", lambda t: setattr(t, "raw_data", b"1234"), "has 4 bytes", "FLOAT need 128"),
    _weight("bytes too many", lambda t: setattr(t, "raw_data", bytes(129)), "has 129 bytes", "need 128"),
    _weight("without data", lambda t: t.ClearField("raw_data"), "has 0 values of float_data", "need 32"),
    _weight("numbers missing", _typed, "has 31 values of float_data", "need 32"),
    _weight("of huge dimensions", lambda t: t.dims.append(1 << 50), "is larger than"),
    _weight("of a negative dimension", lambda t: t.dims.append(-1), "negative dimension"),
    _weight("of an unknown type", _retyped(99), "element type 99 is unknown"),
    _weight("of no type", _retyped(0), "element type 0 is unknown"),
    _weight("doubles that are floats", _retyped(TensorProto.DOUBLE), "DOUBLE need 256"),
    _weight("of text", _as_text, "holds text"),
    model_file(
        "tensor",
        "without a name",
        changed(lambda model: model.graph.initializer[0].ClearField("name")),
        "has no name",
    ),
)
