"""Hostile files beside a model or named by an option: recipes, tokenizers, configurations, arrays, texts."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_case import COMPILE, GENERATE, QUICK, VALIDATE, HostileCase, on_model

GENERATED = (GENERATE, "m", "-p", "the", "--max-new-tokens", "3", "--device", "cpu", "-q")


def _recipe(wrong: str, content: str | bytes, *says: str) -> HostileCase:
    raw = content if isinstance(content, bytes) else content.encode()
    flags = ("--recipe", "recipe.yaml")
    return on_model(
        "recipe",
        wrong,
        lambda place: (place / "recipe.yaml").write_bytes(raw),
        "recipe.yaml",
        *says,
        code=2,
        flags=flags,
    )


def _bomb(last: str) -> str:
    """A billion laughs: nine levels of ten references each."""
    levels = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    return "\n".join([*levels, last])


def _merge_bomb() -> str:
    levels = [
        "a0: &a0 {x: 1}",
        *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)),
    ]
    return "\n".join(levels)


RECIPES = (
    _recipe("a billion laughs", _bomb("weights: *a9"), "aliases"),
    _recipe("a billion laughs by merging", _merge_bomb(), "aliases"),
    _recipe("a list that holds itself", "weights: &a [*a]", "aliases"),
    _recipe("60000 brackets", "[" * 60_000, "cannot be read"),
    _recipe("15000 open mappings", "{a: " * 15_000, "cannot be read"),
    _recipe("a Python object", "weights: !!python/object/apply:os.system ['true']", "cannot be read"),
    _recipe("no UTF-8", b"weights: \xff\xfe", "cannot be read"),
    _recipe("a NUL", b"weights: fp4\0", "cannot be read"),
    _recipe("a list", "- weights\n- fp4", "holds a list"),
    _recipe("not YAML", "weights: [fp4", "cannot be read"),
    _recipe("an unknown option", "wieghts: fp4", "did you mean weights?"),
    _recipe("an unknown option of 60000 letters", "? " + "w" * 60_000 + "\n: fp4", "unknown option 'www"),
    _recipe("an unknown option with a line break", '"we\\nerror: x": fp4', r"'we\nerror: x'"),
    _recipe("a number for a name", f"? 0x{'f' * 10_000}\n: 1", "is no option"),
    _recipe("a value of 60000 letters", "weights: " + "w" * 60_000, "--weights: 'www"),
    _recipe("a list of 20000 values", f"group_size: [{'1, ' * 20_000}]", "--group-size: [1, 1"),
    _recipe("a number of 10000 digits", "seed: " + "9" * 10_000, "cannot be read"),
    _recipe(
        "a hexadecimal number of 10000 digits", f"group_size: 0x{'f' * 10_000}", "--group-size: a number"
    ),
    _recipe("a seed above 64 bits", "seed: 99999999999999999999", "--seed: 99999999999999999999"),
    _recipe("endless calibration", f"calibration_samples: {10**30}", "--calibration-samples"),
    _recipe("endless memory", "builder_memory_gb: .inf", "--builder-memory-gb: inf"),
    _recipe("no number for a gate", "max_perplexity_increase: .nan", "--max-perplexity-increase: nan"),
    _recipe("an impossible date", "seed: 2024-13-45", "cannot be read"),
    _recipe(
        "a regular expression that is none", "exclude: '('", "--exclude: '(' is not a regular expression"
    ),
    _recipe("100 MiB", b"#" * (100 << 20), "larger than"),
    _recipe("a shape of 1000 digits", f"max_shapes: {{input_ids: [{'9' * 1000}]}}", "--max-shapes"),
)


def _tokenizer(wrong: str, content: Any, *says: str, code: int = 2) -> HostileCase:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return on_model(
        "tokenizer",
        wrong,
        lambda place: (place / "m" / "tokenizer.json").write_bytes(raw),
        "m/tokenizer.json",
        *says,
        code=code,
    )


def _bpe(vocabulary: dict[str, int], **more: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], **more.pop("model", {})}
    return {"version": "1.0", "added_tokens": [], "model": model, **more}


_LETTERS = {chr(97 + index): index for index in range(26)}
# Found by tools/fuzz_readers.py: a slice past the end of a token.
_PANICS = _bpe({"a": 0, "b": 1, "ab": 2}, model={"merges": ["a b"], "continuing_subword_prefix": "longer"})
_NO_UNKNOWN = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}
_UNIGRAM = {"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}}


def _write(name: str, content: Any) -> Callable[[Path], object]:
    return lambda place: (place / name).write_text(json.dumps(content), encoding="utf-8")


def _pipe(name: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        (place / "m" / name).unlink(missing_ok=True)
        os.mkfifo(place / "m" / name)

    return make


def _folder(name: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        (place / "m" / name).unlink(missing_ok=True)
        (place / "m" / name).mkdir()

    return make


def _link_out(name: str, target: str = "/etc/passwd") -> Callable[[Path], None]:
    """A private file that the output would hold."""

    def make(place: Path) -> None:
        (place / "m" / name).unlink()
        (place / "m" / name).symlink_to(target)

    return make


def _huge(name: str, size: int) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        with (place / "m" / name).open("wb") as file:
            file.truncate(size)

    return make


TOKENIZERS = (
    _tokenizer("empty", b"", "not a tokenizer.json"),
    _tokenizer("cut off", b"{", "not a tokenizer.json"),
    _tokenizer("100000 brackets", b"[" * 100_000, "not a tokenizer.json"),
    _tokenizer("no UTF-8", b"\xff\xfe{}", "not a tokenizer.json"),
    _tokenizer("null", None, "not a tokenizer.json"),
    _tokenizer("of an unknown model", {"version": "1.0", "model": {"type": "Magic"}}, "not a tokenizer.json"),
    _tokenizer("with merges of nothing", _bpe(_LETTERS, model={"merges": ["x yz"]}), "not a tokenizer.json"),
    _tokenizer("that panics", _PANICS, "not a tokenizer.json"),
    _tokenizer("with a negative number", _bpe({"a": -1}), "not a tokenizer.json"),
    _tokenizer("with a number of 5 billion", _bpe({"a": 5 * 10**9}), "not a tokenizer.json"),
    _tokenizer("of another model", _bpe(dict.fromkeys(_LETTERS, 10**6)), "makes token 1000000"),
    on_model(
        "tokenizer", "that makes no tokens", _write("m/tokenizer.json", _bpe({})), "text has 0 tokens", code=2
    ),
    _tokenizer("without the unknown token", _NO_UNKNOWN, "cannot read the text"),
    _tokenizer("without the unknown piece", _UNIGRAM, "cannot read the text"),
    _tokenizer(
        "with a bad regular expression",
        _bpe(_LETTERS, normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
        "not a tokenizer.json",
    ),
    on_model("tokenizer", "of 10 GiB", _huge("tokenizer.json", 10 << 30), "m/tokenizer.json", "larger than"),
    on_model("tokenizer", "a pipe", _pipe("tokenizer.json"), "m/tokenizer.json", "not a regular file"),
    on_model("tokenizer", "a folder", _folder("tokenizer.json"), "m/tokenizer.json", "not a regular file"),
    on_model(
        "config", "a link out", _link_out("config.json"), "m/config.json", "symbolic link out", "cp -rL"
    ),
    on_model(
        "config", "a dangling link", _link_out("config.json", "../no"), "m/config.json", "symbolic link out"
    ),
)


def _beside(
    wrong: str, name: str, content: bytes, *says: str, code: int = 3, more: tuple[str, ...] = ()
) -> HostileCase:
    """A companion of a plain model from which text is generated."""
    return HostileCase(
        name.replace(".", " "),
        wrong,
        lambda place: (place / "m" / name).write_bytes(content),
        says,
        code,
        (*GENERATED, *more),
        "model",
    )


def _template(wrong: str, text: str, *says: str) -> HostileCase:
    return _beside(
        wrong, "chat_template.jinja", text.encode(), "chat template fails", *says, more=("--chat",)
    )


CONFIGURATIONS = (
    _beside("100000 brackets", "config.json", b"[" * 100_000, "config.json: is no JSON"),
    _beside("a list", "config.json", b"[]", "config.json: holds no JSON object"),
    _beside(
        "a number of 10000 digits", "config.json", b'{"a": ' + b"9" * 10_000 + b"}", "config.json: is no JSON"
    ),
    _beside("no UTF-8", "config.json", b"\xff", "config.json: cannot be read (not UTF-8 text)"),
    _beside("cut off", "generation_config.json", b'{"eos', "generation_config.json: is no JSON"),
    HostileCase(
        "config json", "a pipe", _pipe("config.json"), ("config.json", "regular file"), 3, GENERATED, "model"
    ),
    HostileCase(
        "config json",
        "of 10 GiB",
        _huge("config.json", 10 << 30),
        ("config.json", "larger than"),
        3,
        GENERATED,
        "model",
    ),
    _beside(
        "no object",
        "tokenizer_config.json",
        b"null",
        "tokenizer_config.json: holds no JSON object",
        more=("--chat",),
    ),
    _template("that breaks out", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    _template("that imports", "{% import 'os' as os %}", "leave --chat out"),
    _template("without an end", "{% for m in messages %}", "Unexpected end of template"),
    _template("that calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    _template("of 10^10 rounds", "{% for i in range(10 ** 10) %}{% endfor %}", "Range too big"),
    _template("that raises two lines", "{{ raise_exception('a\\nerror: b') }}", "a error: b"),
)


def _array(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _member(content: bytes, **changes: int) -> bytes:
    """An archive with ``input_ids.npy`` and fields of its headers changed: compression, flags."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("input_ids.npy", content)
    raw = bytearray(made.getvalue())
    central = raw.index(b"PK\x01\x02")
    for field, value in changes.items():
        offset = {"flags": 6, "method": 8}[field]
        raw[offset : offset + 2] = struct.pack("<H", value)
        raw[central + offset + 2 : central + offset + 4] = struct.pack("<H", value)
    return bytes(raw)


def _npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _deflated_wrong() -> bytes:
    """Compressed data that is none."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("input_ids.npy", bytes(10_000))
    raw = bytearray(made.getvalue())
    start = 30 + len("input_ids.npy")
    raw[start : start + 8] = b"\xff" * 8
    return bytes(raw)


def _npz(wrong: str, content: bytes, *says: str, code: int = 2) -> HostileCase:
    return on_model(
        "npz",
        wrong,
        lambda place: (place / "a.npz").write_bytes(content),
        *(says if code != 2 else ("--calibration a.npz", *says)),
        code=code,
        flags=("--calibration", "a.npz"),
    )


_IDS = np.ones((1, 4), np.int64)
UNREADABLE = "cannot be read"

ARRAYS = (
    _npz("text", b"no archive", UNREADABLE),
    _npz("empty", b"", UNREADABLE),
    _npz("cut off", _array(input_ids=_IDS)[:-30], UNREADABLE),
    _npz("a pickle", _array(input_ids=np.array([{}], object)), UNREADABLE),
    _npz("of damaged compression", _deflated_wrong(), UNREADABLE),
    _npz("of unknown compression", _member(b"x", method=99), UNREADABLE),
    _npz("encrypted", _member(b"x", flags=1), UNREADABLE),
    _npz("with an array of text", _member(b"no array"), UNREADABLE),
    _npz(
        "of 10^15 values",
        _member(_npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({10**15},)}}")),
        UNREADABLE,
    ),
    _npz(
        "of negative dimensions",
        _member(_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-4,)}")),
        UNREADABLE,
    ),
    _npz("with a program for a header", _member(_npy("__import__('os').system('true')")), UNREADABLE),
    _npz("of texts", _array(input_ids=np.array([["a"]])), "the model takes int64"),
    _npz("of records", _array(input_ids=np.zeros(3, [("a", np.int64)])), "the model takes int64"),
    _npz("without arrays", _array(), "samples per array"),
    _npz("of no samples", _array(input_ids=np.ones((0, 4), np.int64)), "samples per array"),
    _npz("of no tokens", _array(input_ids=np.ones((1, 0), np.int64)), "ONNX Runtime cannot run", code=3),
    _npz("of tokens out of range", _array(input_ids=np.full((1, 4), 10**6)), "idx=1000000", code=3),
    _npz("of another name", _array(ids=_IDS), "'ids' is no input"),
    HostileCase(
        "inputs",
        "of 10^15 values",
        lambda place: (place / "a.npz").write_bytes(
            _member(_npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({10**15},)}}"))
        ),
        ("--inputs a.npz", UNREADABLE),
        2,
        (VALIDATE, "m/model.onnx", "m/model.onnx", "--inputs", "a.npz"),
        "model",
    ),
)


def _text(wrong: str, make: Callable[[Path], object], *says: str) -> HostileCase:
    command = (COMPILE, "m/model.onnx", *QUICK, "--calibration", "text", "-o", "out")
    return HostileCase("text", wrong, make, says, 2, command, "model")


TEXTS = (
    _text(
        "no UTF-8",
        lambda place: (place / "text").write_bytes(b"\xff"),
        "--calibration text",
        "not UTF-8 text",
    ),
    _text("empty", lambda place: (place / "text").write_bytes(b""), "text has 0 tokens"),
    _text("a folder", lambda place: (place / "text").mkdir(), "--calibration text", "Is a directory"),
    _text(
        "endless", lambda place: (place / "text").symlink_to("/dev/zero"), "--calibration text", "larger than"
    ),
)

COMPANIONS = (*RECIPES, *TOKENIZERS, *CONFIGURATIONS, *ARRAYS, *TEXTS)
