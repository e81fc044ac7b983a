"""The files beside a model that whoever generates text needs as well: they go into the output with it."""

from __future__ import annotations

import os
from pathlib import Path

from zqfp_compile.disk import format_bytes
from zqfp_compile.errors import ModelError
from zqfp_compile.hub_cache import HubLinks, snapshot
from zqfp_compile.output_folder import COMPANIONS

_MAX_BYTES = 1 << 28  # the largest tokenizer.json known has 34 MB


def companion_folder(model: Path) -> Path:
    """Return the folder that the companions of a model are in: its own.

    Repositories of the Hugging Face Hub have models in folders such as ``onnx`` and the companions above: for
    a model in a snapshot without any beside it, this is the snapshot.
    """
    root = snapshot(model.parent)
    if root is None or any(os.path.lexists(model.parent / name) for name in COMPANIONS):
        return model.parent
    return root


def find_companions(folder: Path) -> tuple[Path, ...]:
    """Return the companions in the folder of a model.

    Raises:
        ModelError: When one is no regular file, larger than any real one, or a link to outside the folder and
            its Hugging Face cache, which would put somebody's private file into the output.
    """
    found = tuple(path for name in COMPANIONS if os.path.lexists(path := folder / name))
    links = HubLinks(folder)
    for path in found:
        inside = Path(os.path.realpath(path)).parent == Path(os.path.realpath(folder))
        if not inside and links.blob(path.name) is None:
            raise ModelError(
                f"{path}: is a symbolic link out of the model's folder; "
                "make a real copy of the folder (cp -rL) and compile that"
            )
        if not path.is_file():
            raise ModelError(f"{path}: is not a regular file; copy the model's own there")
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path}: is larger than {format_bytes(_MAX_BYTES)}; copy the model's own there")
    return found
