"""Where the libraries are that host our kernel: ONNX Runtime's custom ops, TensorRT's plugin.

They are built from this project's sources (``make hosts``, ``make kernels``) and looked for in the folder
that ``ZQFP_KERNELS`` names (or of the file it names), else in ``build/kernels`` of the checkout. A library
that lies beside a model is never loaded: opening a model must not run code that came with it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir

import zqfp_compile
from zqfp_compile.errors import MissingDependencyError

FOLDER_VARIABLE = "ZQFP_KERNELS"
KERNELS = "libzqfp.so"
HOSTS = {
    "onnxruntime": ("libzqfp_onnxruntime.so", "onnxruntime-ops"),
    "tensorrt": ("libzqfp_tensorrt.so", "tensorrt-plugin"),
    "tensorrt-rtx": ("libzqfp_tensorrt.so", "tensorrt-plugin"),
}
_DOMAIN = "zqfp"


def libraries_folder() -> Path:
    """Return the folder our libraries are looked for in."""
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        return Path(zqfp_compile.__path__[0]).parent / "build" / "kernels"
    return Path(named).parent if Path(named).is_file() else Path(named)


def host_library(target: str) -> Path:
    """Return the library that hosts our kernel in the runtime ``target``.

    Raises:
        MissingDependencyError: When it is not built.
    """
    name, rule = HOSTS[target]
    path = libraries_folder() / name
    if not path.is_file():
        raise MissingDependencyError(
            f"{name}, our kernel's host in {target}, is not in {path.parent}; run `make {rule}` in a "
            f"checkout, or name its folder in {FOLDER_VARIABLE}"
        )
    return path.resolve()


def kernel_library() -> Path | None:
    """Return ``libzqfp.so``, the CUDA kernels, or ``None`` when they are not built."""
    path = libraries_folder() / KERNELS
    return path.resolve() if path.is_file() else None


def copy_libraries(target: str, folder: Path) -> tuple[Path, ...]:
    """Put what a model for ``target`` needs into ``folder``: its host library, and the kernels if built.

    Raises:
        MissingDependencyError: When the host is not built.
    """
    kernels = kernel_library()
    needed = [host_library(target), *([] if kernels is None else [kernels])]
    return tuple(Path(shutil.copy2(path, folder / path.name)) for path in needed)


def needs_host(model: ir.Model) -> bool:
    """Return whether ``model`` has nodes of our domain that no function of it defines."""
    return any(node.domain == _DOMAIN and node.op_identifier() not in model.functions for node in model.graph)
