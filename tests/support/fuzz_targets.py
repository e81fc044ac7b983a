"""Readers of untrusted files as functions of bytes, for atheris (``tools/fuzz_readers.py``) and a test."""

from __future__ import annotations

import contextlib
import io
import os
import random
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from hostile_cases import CASES
from hostile_protos import branching, calling, external, function, linear, node, proto
from small_lm import WORDS, write_model_folder

from zqfp_compile.backends.profiles import position_limit
from zqfp_compile.calibrate.causal_lm import InputSpec
from zqfp_compile.calibrate.samples import load_samples, tokenize
from zqfp_compile.errors import ZqfpError
from zqfp_compile.model_io import load_model
from zqfp_compile.recipe import Recipe
from zqfp_compile.runtime.folder import ModelFolder

# Larger seeds slow libFuzzer down and teach it nothing.
_MAX_SEED_BYTES = 1 << 14
_LONGEST_LINE = 2000
_INTERESTING = (b"\x00", b"\xff", b"\x80", b"\xff\xff\xff\xff\x0f", b"-1", b"99999999999", b'"', b"[{")


@dataclass(frozen=True)
class FuzzTarget:
    """One reader.

    Attributes:
        name: What the tool calls it.
        file: Where hostile cases have such a file.
        read: Reads the file at a path in a folder where nothing else is but ``w.data``.
        good: Makes files that it takes.
    """

    name: str
    file: str
    read: Callable[[Path], object]
    good: Callable[[], tuple[bytes, ...]]

    def check(self, data: bytes, folder: Path) -> bool:
        """Give the reader ``data``; return whether it took it.

        Raises:
            Exception: Anything but a diagnosed error of one line is a finding.
        """
        path = folder / Path(self.file).name
        path.write_bytes(data)
        try:
            self.read(path)
        except ZqfpError as error:
            message = str(error)
            assert "\n" not in message and len(message) < _LONGEST_LINE, message[:3000]
            return False
        return True

    def seeds(self) -> list[bytes]:
        """Return what to start from: good files and the hostile ones of this kind."""
        found = list(self.good())
        with tempfile.TemporaryDirectory() as folder:
            for index, case in enumerate(CASES):
                place = Path(folder) / str(index)
                place.mkdir()
                if case.base:
                    write_model_folder(place / "m")
                # A compiled folder is not there: cases that damage its files are not of this kind.
                with contextlib.suppress(OSError):
                    case.make(place)
                    found.extend(_small_file(place / self.file))
        return list(dict.fromkeys(found))


def _small_file(path: Path) -> Iterator[bytes]:
    if not os.path.lexists(path):
        return
    status = path.lstat()
    if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_SEED_BYTES:
        yield path.read_bytes()


def mutations(seeds: list[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield damaged seeds, the same ones every time."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            end = min(len(data), place + rng.randint(1, 16))
            piece = bytes(data[place:end])
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[place:end] = rng.choice(
                (
                    b"",
                    piece * 2,
                    bytes(rng.randrange(256) for _ in piece),
                    rng.choice(_INTERESTING),
                    other[start : start + 32],
                )
            )
        yield bytes(data)


def _read_recipe(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.from_yaml(path)
    assert again == recipe, f"{recipe} is written as {again}"


def _read_manifest(path: Path) -> None:
    (path.parent / "onnxruntime.onnx").write_bytes(b"")
    ModelFolder.of(path.parent).onnx_model()


def _read_config(path: Path) -> None:
    position_limit(path.parent)
    ModelFolder(path.parent, None, None).read_json(path.name)


def _read_tokenizer(path: Path) -> None:
    tokenize(WORDS, path)


def _read_npz(path: Path) -> None:
    inputs = (InputSpec("input_ids", ir.DataType.INT64, (None, None)),)
    load_samples(str(path), tokenizer_path=None, interface=None, inputs=inputs, samples=2, length=4, seed=0)


def _good_models() -> tuple[bytes, ...]:
    models = (
        linear(),
        external(),
        calling("F", [function("F", ["G", "Relu"]), function("G", ["Relu"])]),
        proto(branching([node("Relu", ["x"], "b")], "b")),
    )
    return tuple(model.SerializeToString() for model in models)


def _good_tokenizer() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder) / "m")
        return ((Path(folder) / "m" / "tokenizer.json").read_bytes(),)


def _good_npz() -> tuple[bytes, ...]:
    content = io.BytesIO()
    np.savez(content, input_ids=np.ones((2, 8), np.int64))
    return (content.getvalue(),)


_MANIFEST = b'{"tool": "zqfp-compile", "files": {"onnxruntime.onnx": {"sha256": "%s", "bytes": 0}}}'
_EMPTY_SHA256 = b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_CONFIG = b'{"max_position_embeddings": 256, "eos_token_id": [1, 2], "rope_scaling": null}'
_RECIPE = b"auto: bits=4.5\nmax_shapes: {input_ids: [1, 8]}\nexclude: [lm_head]\nseed: 3\n"


TARGETS = (
    FuzzTarget("model", "model.onnx", load_model, _good_models),
    FuzzTarget("recipe", "recipe.yaml", _read_recipe, lambda: (Recipe().to_yaml().encode(), _RECIPE)),
    FuzzTarget("manifest", "m/manifest.json", _read_manifest, lambda: (_MANIFEST % _EMPTY_SHA256,)),
    FuzzTarget("config", "m/config.json", _read_config, lambda: (_CONFIG,)),
    FuzzTarget("tokenizer", "m/tokenizer.json", _read_tokenizer, _good_tokenizer),
    FuzzTarget("npz", "a.npz", _read_npz, _good_npz),
)
