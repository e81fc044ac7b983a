"""The key of finished work: it changes with everything the quantised tensors depend on."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from zqfp_compile import __version__
from zqfp_compile.backends.ort import import_onnxruntime
from zqfp_compile.companions import companion_folder
from zqfp_compile.model_io import data_files
from zqfp_compile.output_folder import TOKENIZER
from zqfp_compile.recipe import Recipe

# Changes with the meaning of what is kept.
_VERSION = 1
# Options of what comes after: a run that failed there goes on from its tensors under others; and
# the choice of devices, of which the kind counts and the number changes no tensor.
_LATER = frozenset(
    {
        "device",
        "devices",
        "target",
        "weight_lowering",
        "emit",
        "eval_text",
        "eval_tokens",
        "eval_length",
        "min_shapes",
        "opt_shapes",
        "max_shapes",
        "compute_capability",
        "timing_cache",
        "max_perplexity_increase",
        "builder_timeout",
        "builder_memory_gb",
    }
)
_CHUNK = 1 << 22
_LIBRARIES = ("numpy", "torch", "onnx-ir")


def work_key(source: Path, model: ir.Model, recipe: Recipe, device: str) -> str:
    """Return a digest of the model, the options, the calibration text and the versions of who computes.

    The model counts by the bytes of its ``.onnx`` file and by size and time of modification of its external
    data, not by its path: reading tens of gigabytes would cost a resumed compile minutes, and whoever changes
    a file changes one of the two, as make and rsync rely on as well.

    Args:
        source: The ``.onnx`` file.
        model: Its content.
        recipe: Options; those that quantisation does not depend on are left out.
        device: ``cpu`` or ``cuda``, which round differently.
    """
    options = {name: value for name, value in recipe.to_dict().items() if name not in _LATER}
    versions = [__version__, import_onnxruntime().__version__, *(version(name) for name in _LIBRARIES)]
    versions.append(torch.backends.cpu.get_cpu_capability())  # other instructions round sums otherwise
    digest = hashlib.sha256(json.dumps([_VERSION, versions, device, options]).encode())
    texts = [companion_folder(source) / TOKENIZER]
    texts += [Path(recipe.calibration)] if recipe.calibration else []
    for path in (source, *texts):
        if path.is_file():
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        else:
            digest.update(b"none")
        digest.update(b"\0")
    for path in sorted(data_files(model)):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
