"""Imports one library and says what it is, in a process of its own: a broken one may crash.

    python -m zqfp_compile.doctor_probe NAME

prints ``{"version": ..., "detail": ...}``, or ``{"error": ...}`` with one line that says what to do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from zqfp_compile.backends.trt_api import MODULES, import_runtime
from zqfp_compile.errors import MissingDependencyError

Facts = dict[str, str]


def _plain(name: str, package: str) -> Facts:
    module = _import(name, f"pip install '{package}'")
    return {"version": str(getattr(module, "__version__", "unknown")), "detail": ""}


def _onnxruntime() -> Facts:
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) > 1:
        raise MissingDependencyError(
            "two packages share one folder; run: pip uninstall onnxruntime onnxruntime-gpu, then install one"
        )
    module = _import("onnxruntime", "pip install 'zqfp-compile[cpu]' (or [gpu])")
    providers = [name.removesuffix("ExecutionProvider") for name in module.get_available_providers()]
    return {"version": module.__version__, "detail": f"providers: {', '.join(providers)}"}


def _torch() -> Facts:
    torch = _import("torch", "pip install torch")
    if torch.cuda.is_available():
        detail = f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
    else:
        detail = f"CUDA {torch.version.cuda} finds no GPU" if torch.version.cuda else "built without CUDA"
    return {"version": torch.__version__, "detail": detail}


def _runtime(target: str) -> Facts:
    return {"version": import_runtime(target).__version__, "detail": ""}


def _kernels() -> Facts:
    """Our own libraries, where they are looked for; whether they load is for those that load them."""
    from zqfp_compile.backends.host_libraries import HOSTS, KERNELS, libraries_folder

    folder = libraries_folder()
    names = sorted({KERNELS, *(name for name, _ in HOSTS.values())})
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise MissingDependencyError(
            f"none in {folder}; only --weight-lowering plugin needs them: make kernels hosts in a checkout"
        )
    return {"version": "built", "detail": f"{', '.join(found)} in {folder}"}


def _import(name: str, install: str) -> Any:
    """Import a module.

    Raises:
        MissingDependencyError: When it is not installed or does not load.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken install raises ImportError, OSError, RuntimeError, ...
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingDependencyError(f"not installed; run: {install}") from error
        reason = " ".join(str(error).split())
        raise MissingDependencyError(f"does not load ({reason}); reinstall it: {install}") from error


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


PROBES: dict[str, Callable[[], Facts]] = {
    "numpy": partial(_plain, "numpy", "numpy>=1.26"),
    "onnx": partial(_plain, "onnx", "onnx>=1.19,<1.24"),
    "onnx-ir": partial(_plain, "onnx_ir", "onnx-ir>=1.1,<1.2"),
    "tokenizers": partial(_plain, "tokenizers", "tokenizers>=0.21"),
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    **{target: partial(_runtime, target) for target in MODULES},
    "kernels": _kernels,
}


def main(name: str) -> None:
    """Print what there is to say about one library."""
    try:
        found = PROBES[name]()
    except MissingDependencyError as error:
        found = {"error": str(error)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
