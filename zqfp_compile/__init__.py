"""zqfp-compile: LLMs in ONNX become W4A8 floating-point models and FP8 engines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "CompileResult",
    "Engine",
    "Recipe",
    "Sampling",
    "__version__",
    "compile_model",
    "create_pass",
    "from_graphsurgeon",
    "load_model",
    "save_model",
    "to_graphsurgeon",
]

if TYPE_CHECKING:
    from zqfp_compile.graphsurgeon import from_graphsurgeon, to_graphsurgeon
    from zqfp_compile.model_io import load_model, save_model
    from zqfp_compile.pipeline import CompileResult, compile_model
    from zqfp_compile.recipe import Recipe
    from zqfp_compile.registry import create_pass
    from zqfp_compile.runtime.engine import Engine
    from zqfp_compile.runtime.sampling import Sampling

# Where each public name is.
_HOMES = {
    "CompileResult": "pipeline",
    "Engine": "runtime.engine",
    "Recipe": "recipe",
    "Sampling": "runtime.sampling",
    "compile_model": "pipeline",
    "create_pass": "registry",
    "from_graphsurgeon": "graphsurgeon",
    "load_model": "model_io",
    "save_model": "model_io",
    "to_graphsurgeon": "graphsurgeon",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: ``import zqfp_compile`` alone must not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
