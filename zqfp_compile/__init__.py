"""zqfp-compile: LLMs in ONNX become W4A8 floating-point models and FP8 engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["CompileResult", "Recipe", "__version__", "compile_model"]

if TYPE_CHECKING:
    from zqfp_compile.pipeline import CompileResult, compile_model
    from zqfp_compile.recipe import Recipe


def __getattr__(name: str) -> Any:
    """Import the public names on first use: ``import zqfp_compile`` alone must not load torch."""
    if name in ("CompileResult", "compile_model"):
        from zqfp_compile import pipeline

        return getattr(pipeline, name)
    if name == "Recipe":
        from zqfp_compile.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
