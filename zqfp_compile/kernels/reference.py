"""What the kernels compute, in numpy and float64 (DESIGN section 2): what their tests compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.kernels.packing import GATED_ROWS

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

_SMALLEST_RANGE = np.float32(1e-30)


def decode_weight(
    codes: npt.NDArray[np.int8], group_scales: FloatArray, group_size: int, k: int
) -> FloatArray:
    """Return w8 = E4M3(e2m1(c) * s).

    Args:
        codes: int8 [N, K padded to groups], -7..7.
        group_scales: float32 [N, ceil(K / g)], E4M3 numbers in [2^-5, 2^6].
        group_size: Weights g per scale.
        k: Columns to return.

    Returns:
        float32 [N, k], every value an E4M3 number.
    """
    values = E2M1.decode(codes)
    scales = np.repeat(group_scales, group_size, axis=1)[:, : values.shape[1]]
    return E4M3FN.round(values * scales)[:, :k]


def quantize_activation(x: FloatArray, scale: float | None) -> tuple[FloatArray, FloatArray]:
    """Return x8 = E4M3(x / a) and a.

    Args:
        x: float32 [M, K].
        scale: The static scale a, or ``None`` for one per token: ``max(max|x|, 1e-30) / 448``.

    Returns:
        float32 [M, K] of E4M3 numbers, and float32 [1] or [M].
    """
    if scale is not None:
        static = np.array([scale], dtype=np.float32)
        return E4M3FN.round(x / static), static
    largest = np.maximum(np.abs(x).max(axis=1), _SMALLEST_RANGE).astype(np.float32)
    scales: FloatArray = largest / np.float32(E4M3FN.max_value)
    return E4M3FN.round(x / scales[:, None]), scales


def silu_mul(gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> DoubleArray:
    """Return h = silu(gate) * up, unrounded: float64 [..., K] of two [..., K]."""
    wide = gate.astype(np.float64)
    h: DoubleArray = wide / (1 + np.exp(-wide)) * up.astype(np.float64)
    return h


def gated(y: npt.NDArray[Any]) -> DoubleArray:
    """Return h = silu(gate) * up of a gated layer, unrounded: float64 [M, N / 2].

    Args:
        y: [M, N], rounded to the layer's type: eight columns of gate, eight of up, and so on.
    """
    turns = y.reshape(len(y), -1, 2, GATED_ROWS)
    return silu_mul(turns[:, :, 0], turns[:, :, 1]).reshape(len(y), -1)


def rms_norm(
    x: npt.NDArray[Any], skip: npt.NDArray[Any] | None, gamma: npt.NDArray[Any], epsilon: float
) -> tuple[npt.NDArray[Any], DoubleArray]:
    """Return the sum s = x + skip and the norm h = s / sqrt(mean(s * s) + epsilon) * gamma.

    Args:
        x: [..., K].
        skip: [..., K] of the type of x, or ``None``: s is x.
        gamma: [K].
        epsilon: Added to the mean square, as float32.

    Returns:
        s rounded to the type of x, [..., K], and h, unrounded, float64 [..., K].
    """
    if skip is not None:
        x = (x.astype(np.float32) + skip.astype(np.float32)).astype(x.dtype)
    s = x.astype(np.float64)
    norm = np.sqrt((s * s).mean(axis=-1, keepdims=True) + np.float64(np.float32(epsilon)))
    return x, s / norm * gamma.astype(np.float64)


def linear(
    x8: FloatArray,
    a: FloatArray,
    w8: FloatArray,
    row_scales: FloatArray,
    *,
    xv: npt.NDArray[Any] | None = None,
    u: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
) -> DoubleArray:
    """Return y = a * R * (x8 @ w8^T) + xv @ u + bias, unrounded.

    Args:
        x8: float32 [M, K] of E4M3 numbers.
        a: float32 [1] or [M].
        w8: float32 [N, K] of E4M3 numbers.
        row_scales: float32 [N].
        xv: [M, r], already rounded to the type of y, or ``None``.
        u: [r, N], or ``None``.
        bias: [N], or ``None``.

    Returns:
        float64 [M, N].
    """
    y: DoubleArray = x8.astype(np.float64) @ w8.astype(np.float64).T
    y *= a.astype(np.float64).reshape(-1, 1) * row_scales.astype(np.float64)
    if xv is not None and u is not None:
        y += xv.astype(np.float64) @ u.astype(np.float64)
    if bias is not None:
        y += bias.astype(np.float64)
    return y
