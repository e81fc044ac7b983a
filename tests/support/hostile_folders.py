"""Hostile compiled folders, output folders and finished work: what others left where we read or write."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from hostile_case import COMPILE, GENERATE, VALIDATE, HostileCase, on_model
from hostile_companions import GENERATED
from hostile_protos import external, node, proto, write_model

ORT = "onnxruntime.onnx"


def _compiled(
    wrong: str,
    make: Callable[[Path], object],
    *says: str,
    code: int = 3,
    command: tuple[str, ...] = GENERATED,
) -> HostileCase:
    """``make`` gets the compiled folder, which is then opened."""
    return HostileCase(
        "compiled folder", wrong, lambda place: make(place / "m"), says, code, command, "compiled"
    )


def _manifest(wrong: str, content: str | bytes, *says: str) -> HostileCase:
    says = says or ("is no manifest",)
    return _compiled(f"manifest {wrong}", _rewritten(content), "m/manifest.json", *says)


def _report(wrong: str, make: Callable[[Path], object], *says: str) -> HostileCase:
    says = ("m/report.json", *(says or ("is no report",)))
    return _compiled(f"report {wrong}", make, *says, command=(COMPILE, "--compare", "m", "m"))


def _rewritten(content: str | bytes, name: str = "manifest.json") -> Callable[[Path], object]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(raw)


def _reported(content: str | bytes) -> Callable[[Path], object]:
    return _rewritten(content, "report.json")


def _files(value: Any) -> str:
    return json.dumps({"tool": "zqfp-compile", "files": value})


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in place of a file that the manifest lists."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _listed(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """The folder after ``change``, with a manifest of what is now in it."""

    def make(folder: Path) -> None:
        change(folder)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for path in sorted(folder.iterdir()):
            if path.name != "manifest.json":
                manifest["files"][path.name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    return make


def _outside(folder: Path) -> None:
    """The model reads its weights from the folder above."""
    model = onnx.load(folder / ORT, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../{entry.value}"
    (folder / ORT).write_bytes(model.SerializeToString())


def _cyclic(folder: Path) -> None:
    (folder / ORT).write_bytes(proto([node("Add", ["x", "y"], "y")]).SerializeToString())


def _flipped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


def _added(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"ftrt")


ENGINE_FOLDERS = (
    _manifest("text", "no json"),
    _manifest("empty", ""),
    _manifest("a list", "[]"),
    _manifest("without files", '{"tool": "zqfp-compile"}'),
    _manifest("of a list of files", _files([ORT])),
    _manifest("without digests", _files({ORT: {"bytes": 1}})),
    _manifest("of digests that are numbers", _files({ORT: {"sha256": 1}})),
    _manifest("of digests with line breaks", _files({ORT: {"sha256": "a\nerror: b"}})),
    _manifest("of 100000 brackets", "[" * 100_000),
    _manifest("of a number of 10000 digits", '{"files": ' + "9" * 10_000 + "}"),
    _manifest("no UTF-8", b"\xff\xfe", "not UTF-8 text"),
    _manifest("of 17 MiB", b" " * (17 << 20), "larger than"),
    _compiled("manifest of no files", _rewritten(_files({})), f"m/{ORT}", "not in manifest.json"),
    _compiled("manifest missing", lambda m: (m / "manifest.json").unlink(), "has no manifest.json"),
    _compiled(
        "manifest a pipe", _instead("manifest.json", os.mkfifo), "m/manifest.json", "not a regular file"
    ),
    _compiled(
        "manifest a folder", _instead("manifest.json", Path.mkdir), "m/manifest.json", "Is a directory"
    ),
    _report("text", _reported("no json")),
    _report("a list", _reported("[]")),
    _report("of 100000 brackets", _reported("[" * 100_000)),
    _report("of another version", _reported('{"schema_version": 99}'), "schema version '99'"),
    _report("of no layers", _reported('{"schema_version": 1, "layers": 1}'), "layers is not a list"),
    _report("of a layer that is text", _reported('{"schema_version": 1, "layers": ["a"]}'), "not an object"),
    _report("of NaN", _reported('{"schema_version": 1, "layers": [], "bits_per_weight": NaN}'), "a number"),
    _report("no UTF-8", _reported(b"\xff\xfe"), "not UTF-8 text"),
    _report("of 65 MiB", _reported(b" " * (65 << 20)), "larger than"),
    _compiled("model changed", _flipped(ORT), f"m/{ORT}", "has changed since the compile"),
    _compiled("weights changed", _flipped(f"{ORT}.data"), f"m/{ORT}.data", "has changed since the compile"),
    _compiled("tokenizer changed", _flipped("tokenizer.json"), "m/tokenizer.json", "has changed"),
    _compiled("model missing", lambda m: (m / ORT).unlink(), f"m/{ORT}", "cannot be read"),
    _compiled("model a pipe", _instead(ORT, os.mkfifo), f"m/{ORT}", "not a regular file"),
    _compiled(
        "weights endless",
        _instead(f"{ORT}.data", lambda path: path.symlink_to("/dev/zero")),
        "not a regular file",
    ),
    _compiled("model a folder", _instead(ORT, Path.mkdir), f"m/{ORT}", "not a regular file"),
    _compiled(
        "model a link to itself",
        _instead(ORT, lambda path: path.symlink_to(ORT)),
        f"m/{ORT}",
        "cannot be read",
    ),
    _compiled(
        "a file added", _added("generation_config.json"), "generation_config.json", "not in manifest.json"
    ),
    _compiled(
        "with a listed model that reads outside", _listed(_outside), f"m/{ORT}", "inside the model's folder"
    ),
    _compiled("with a listed model that is a cycle", _listed(_cyclic), f"m/{ORT}", "cycle"),
    _compiled("with a listed model that is none", _listed(_added(ORT)), f"m/{ORT}", "is a text file"),
    _compiled(
        "with an engine that is none",
        _listed(_added("tensorrt.engine")),
        "m/tensorrt.engine",
        "needs an NVIDIA GPU",
        code=6,
        command=(GENERATE, "m/tensorrt.engine", "-p", "the", "-q"),
    ),
    _compiled(
        "compared, a pipe",
        _instead("model.zqfp.onnx", os.mkfifo),
        "m: no model.zqfp.onnx in this folder",
        code=2,
        command=(VALIDATE, "m", "m"),
    ),
    HostileCase(
        "compared model",
        "behind a link",
        lambda place: (write_model(place, external(), None), (place / "w.data").symlink_to("/etc/passwd")),
        ("model.onnx", "symbolic link"),
        3,
        (VALIDATE, "model.onnx", "model.onnx"),
    ),
)


def _output(wrong: str, make: Callable[[Path], object], *says: str, code: int = 2) -> HostileCase:
    """``make`` gets ``out``, an empty folder, into which is then compiled."""

    def prepare(place: Path) -> None:
        (place / "out").mkdir()
        make(place / "out")

    return on_model("output folder", wrong, prepare, *says, code=code)


def _work(wrong: str, make: Callable[[Path], object], *says: str, code: int = 2) -> HostileCase:
    """``make`` gets the path of finished work, where nothing is."""
    return on_model("work folder", wrong, lambda place: make(place / ".out.work"), *says, code=code)


def _linked_work(work: Path) -> None:
    """Somebody's folder, which happens to hold a file named ``key``."""
    (work.parent / "private").mkdir()
    for name in ("key", "letter.txt"):
        (work.parent / "private" / name).write_text("mine", encoding="ascii")
    work.symlink_to("private")


FOREIGN = "which zqfp-compile did not write"

OUTPUT_FOLDERS = (
    _output(
        "with somebody's file", lambda out: (out / "thesis.txt").write_text("mine"), "'thesis.txt'", FOREIGN
    ),
    _output(
        "with a manifest of 100000 brackets",
        lambda out: (out / "manifest.json").write_text("[" * 100_000),
        FOREIGN,
    ),
    _output("with a manifest that is a number", lambda out: (out / "manifest.json").write_text("1"), FOREIGN),
    _output(
        "with a manifest of one number", lambda out: (out / "manifest.json").write_text(_files(1)), FOREIGN
    ),
    _output("with a manifest that is a pipe", lambda out: os.mkfifo(out / "manifest.json"), FOREIGN),
    _output(
        "with a manifest of 17 MiB",
        lambda out: (out / "manifest.json").write_bytes(b" " * (17 << 20)),
        FOREIGN,
    ),
    _output("with a link", lambda out: (out / "link").symlink_to("/etc"), "'link'", FOREIGN),
    _work("a file", lambda work: work.write_text("mine"), ".out.work", "move it away"),
    _work(
        "somebody's folder",
        lambda work: (work.mkdir(), (work / "letter.txt").write_text("mine")),
        "move it away",
    ),
    _work("a link to somebody's folder", _linked_work, ".out.work", "move it away"),
    _work("a dangling link", lambda work: work.symlink_to("nowhere"), ".out.work", "move it away"),
    _work("with a pipe for a key", lambda work: (work.mkdir(), os.mkfifo(work / "key")), "move it away"),
)

FOLDERS = (*ENGINE_FOLDERS, *OUTPUT_FOLDERS)
