"""Fake quantisation of activations in torch: what QuantizeLinear followed by DequantizeLinear computes."""

from __future__ import annotations

import torch

from zqfp_compile.formats.minifloat import MINI_FLOATS
from zqfp_compile.quantize.rounding import round_minifloat

# The magnitude that a scale maps the largest activation to.
ACTIVATION_MAX = {**{name: spec.max_value for name, spec in MINI_FLOATS.items()}, "int8": 127.0}


def token_scales(x: torch.Tensor, activation_format: str) -> torch.Tensor:
    """Return a = max|x| / (format's maximum) over the last axis: [..., K] -> [..., 1]; zeros get 1."""
    largest = x.to(torch.float32).abs().amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, largest / ACTIVATION_MAX[activation_format], 1.0)


def quantize_activation(
    x: torch.Tensor, activation_format: str, scale: torch.Tensor | float | None = None
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return ``(x8, a)``: ``round(x / a)`` in float32 and the scale, of :func:`fake_quantize_activation`."""
    if activation_format not in ACTIVATION_MAX:
        raise ValueError(f"unknown activation format {activation_format!r}")
    if scale is None:
        scale = token_scales(x, activation_format)
    scaled = x.to(torch.float32) / scale
    if activation_format == "int8":
        return scaled.round_().clamp_(-128, 127), scale
    return round_minifloat(scaled, MINI_FLOATS[activation_format]), scale


def fake_quantize_activation(
    x: torch.Tensor, activation_format: str, scale: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Return ``a * round(x / a)`` in float32.

    Args:
        x: [..., K], any float dtype.
        activation_format: ``e4m3``, ``e5m2`` or ``int8`` (symmetric, -128..127 as in ONNX).
        scale: a, positive, broadcastable to x; ``None`` computes one per token (:func:`token_scales`).

    Raises:
        ValueError: On an unknown format.
    """
    x8, a = quantize_activation(x, activation_format, scale)
    return x8 * a
