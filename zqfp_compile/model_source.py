"""Models that come as objects instead of files: they are written once, and compiled like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import onnx
import onnx_ir as ir

from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.graphsurgeon import from_graphsurgeon, is_graph
from zqfp_compile.model_io import load_proto, save_model
from zqfp_compile.output_folder import COMPANIONS

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# What compile_model takes.
AnyModel: TypeAlias = Union[str, Path, onnx.ModelProto, ir.Model, "gs.Graph"]


def describe(model: AnyModel) -> str:
    """Return what messages and the report call a model.

    Raises:
        UsageError: When ``model`` is nothing that can be compiled.
    """
    if isinstance(model, (str, Path)):
        return str(model)
    if isinstance(model, (onnx.ModelProto, ir.Model)):
        name, kind = model.graph.name, "onnx_ir.Model" if isinstance(model, ir.Model) else "onnx.ModelProto"
    elif is_graph(model):
        name, kind = model.name, "gs.Graph"
    else:
        raise UsageError(
            f"a {type(model).__name__} is no model; give a path, an onnx.ModelProto, an onnx_ir.Model or a "
            "gs.Graph"
        )
    return f"{name or 'unnamed'} ({kind})"


def output_path(model: AnyModel, output: str | Path | None) -> Path:
    """Return the output folder.

    Raises:
        UsageError: When none is given, and the model is no file that it could be named after.
    """
    if output is not None:
        return Path(output)
    if isinstance(model, (str, Path)):
        return Path(model).with_suffix(".zqfp")
    raise UsageError(
        f"{describe(model)}: is not a file, so there is no default for the output folder; give output="
    )


def write_model(model: AnyModel, target: Path, folder: str | Path | None) -> Path:
    """Write a model that is not a file, and the files that go with it, into the new folder ``target``.

    Args:
        model: The model; it is left as it was.
        target: The folder to make.
        folder: Where ``tokenizer.json`` and the like are, and external data that is not loaded.

    Returns:
        The path of the ``.onnx`` file.

    Raises:
        ModelError: When the model is unsafe or malformed.
        MissingDependencyError: When the disk is full.
    """
    target.mkdir()
    path = target / "model.onnx"
    save_model(_as_ir(model, folder), path)
    if folder is not None:
        for companion in (Path(folder, name) for name in COMPANIONS):
            if companion.is_file():
                shutil.copyfile(companion, target / companion.name)
    return path


def _as_ir(model: AnyModel, folder: str | Path | None) -> ir.Model:
    if isinstance(model, ir.Model):
        return model
    try:
        if isinstance(model, onnx.ModelProto):
            return load_proto(model, Path(folder or ".").absolute())
        return from_graphsurgeon(model, folder)
    except ModelError as error:
        raise ModelError(f"{describe(model)}: {error}") from error
