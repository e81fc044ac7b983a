"""Measured sensitivities on disk: minutes of model runs that depend on model, samples and formats only."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.model_io import data_files
from zqfp_compile.plan import QuantPlan
from zqfp_compile.precision.sensitivity import LayerErrors

# Changes with the meaning of what is stored.
VERSION = 1


def default_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/zqfp-compile``, by default ``~/.cache/zqfp-compile``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "zqfp-compile"


def cache_key(
    model: ir.Model, plan: QuantPlan, feeds: Sequence[Mapping[str, npt.NDArray[Any]]], *options: object
) -> str:
    """Return a digest of everything a measurement depends on: graph, weights, samples, formats, options."""
    digest = hashlib.sha256(repr((VERSION, _formats(plan), options)).encode())
    digest.update(ir.to_proto(model).SerializeToString(deterministic=True))
    for path in sorted(data_files(model)):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    for feed in feeds:
        for name, array in sorted(feed.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def _formats(plan: QuantPlan) -> tuple[object, ...]:
    names = tuple(site.name for site in plan.linears)
    formats = (plan.weight_format, plan.activation_format, plan.per_token, plan.lorc_format)
    return (*formats, plan.group_size, plan.scale_constraint, plan.scale_rows, names)


def load(folder: Path, key: str) -> tuple[LayerErrors, ...] | None:
    """Return what :func:`save` stored, or ``None`` when there is nothing usable."""
    try:
        rows = json.loads(_path(folder, key).read_text(encoding="utf-8"))
        return tuple(
            LayerErrors(
                tuple(row["layers"]),
                {int(rank): float(error) for rank, error in row["weight"].items()},
                float(row["fp8"]),
                float(row["activation"]),
                float(row["divergence"]),
            )
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # measured again and written anew


def save(folder: Path, key: str, layers: Sequence[LayerErrors]) -> None:
    """Store a measurement. A cache that cannot be written is no error: the next run measures again."""
    rows = [
        {
            "layers": item.layers,
            "weight": item.weight,
            "fp8": item.fp8,
            "activation": item.activation,
            "divergence": item.divergence,
        }
        for item in layers
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="sensitivity-", suffix=".tmp", dir=folder)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
        Path(name).replace(_path(folder, key))
    except OSError:
        return


def _path(folder: Path, key: str) -> Path:
    return folder / f"sensitivity-{key}.json"
