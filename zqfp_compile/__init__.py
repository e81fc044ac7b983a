"""zqfp-compile: LLMs in ONNX become W4A8 floating-point models and FP8 engines."""

from __future__ import annotations

__version__ = "0.1.0"
