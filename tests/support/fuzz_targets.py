"""Readers of untrusted files as functions of bytes, for atheris (``tools/fuzz_readers.py``) and a test."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from fuzz_mutators import mutate_bytes, mutate_json, mutate_model
from hostile_cases import CASES
from hostile_protos import branching, calling, external, function, linear, node, proto
from small_lm import WORDS, write_model_folder

from zqfp_compile.backends.profiles import position_limit
from zqfp_compile.calibrate.causal_lm import InputSpec
from zqfp_compile.calibrate.samples import load_samples, tokenize
from zqfp_compile.errors import ZqfpError
from zqfp_compile.model_io import load_model
from zqfp_compile.recipe import Recipe
from zqfp_compile.report.run_comparison import compare_runs
from zqfp_compile.runtime.folder import ModelFolder

# Larger seeds slow libFuzzer down and teach it nothing.
_MAX_SEED_BYTES = 1 << 14
_LONGEST_LINE = 2000


@dataclass(frozen=True)
class FuzzTarget:
    """One reader.

    Attributes:
        name: What the tool calls it.
        file: Where hostile cases have such a file.
        read: Reads the file at a path in a folder where nothing else is but ``w.data``.
        good: Makes files that it takes.
        mutate: Damages a file in a way that suits its form.
    """

    name: str
    file: str
    read: Callable[[Path], object]
    good: Callable[[], tuple[bytes, ...]]
    mutate: Callable[[bytes, random.Random], bytes] = mutate_bytes

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
        return list(dict.fromkeys((*self.good(), *_hostile_files()[self.file])))

    def mutations(self, count: int) -> Iterator[bytes]:
        """Yield damaged seeds, the same ones every time: half of them of their form, half as bytes."""
        rng = random.Random(0)
        good, seeds = self.good(), self.seeds()
        for _ in range(count):
            mutate = rng.choice((self.mutate, mutate_bytes))
            yield mutate(rng.choice(rng.choice((good, seeds))), rng)


@functools.cache
def _hostile_files() -> dict[str, list[bytes]]:
    """Return the files of all hostile cases, by where the targets have theirs."""
    found: dict[str, list[bytes]] = {target.file: [] for target in TARGETS}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            if case.base:
                write_model_folder(place / "m")
            # A compiled folder is not there: cases that damage its files are not of these kinds.
            with contextlib.suppress(OSError):
                case.make(place)
            for name, contents in found.items():
                path = place / name
                if path.is_file() and not path.is_symlink() and path.stat().st_size <= _MAX_SEED_BYTES:
                    contents.append(path.read_bytes())
    return found


def _read_recipe(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.from_yaml(path)
    assert again == recipe, f"{recipe} is written as {again}"


def _read_manifest(path: Path) -> None:
    (path.parent / "onnxruntime.onnx").write_bytes(b"")
    ModelFolder.of(path.parent).onnx_model()


def _read_report(path: Path) -> None:
    compare_runs(path.parent, path.parent)


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
_REPORT = (
    b'{"schema_version": 1, "recipe": {"group_size": 64, "include": ["q"]}, "seconds": {"load": 1.5}, '
    b'"layers": [{"name": "q", "rewritten": true, "weight_format": "e2m1", "lorc_rank": 16, '
    b'"sqnr_db": 21.5}], "bits_per_weight": 4.2, "size": {"compiled_bytes": 9}, '
    b'"perplexity": {"original": 2.0, "compiled": 2.5}}'
)
_CONFIG = b'{"max_position_embeddings": 256, "eos_token_id": [1, 2], "rope_scaling": null}'
_RECIPE = b"auto: bits=4.5\nmax_shapes: {input_ids: [1, 8]}\nexclude: [lm_head]\nseed: 3\n"


TARGETS = (
    FuzzTarget("model", "model.onnx", load_model, _good_models, mutate_model),
    FuzzTarget("recipe", "recipe.yaml", _read_recipe, lambda: (Recipe().to_yaml().encode(), _RECIPE)),
    FuzzTarget(
        "manifest", "m/manifest.json", _read_manifest, lambda: (_MANIFEST % _EMPTY_SHA256,), mutate_json
    ),
    FuzzTarget("report", "m/report.json", _read_report, lambda: (_REPORT,), mutate_json),
    FuzzTarget("config", "m/config.json", _read_config, lambda: (_CONFIG,), mutate_json),
    FuzzTarget("tokenizer", "m/tokenizer.json", _read_tokenizer, _good_tokenizer, mutate_json),
    FuzzTarget("npz", "a.npz", _read_npz, _good_npz),
)
