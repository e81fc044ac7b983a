"""Accuracy metrics, numpy only. All sums are float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


def sqnr_db(reference: Array, value: Array) -> float:
    """Signal-to-quantisation-noise ratio in dB: ``10 log10(sum reference^2 / sum (reference - value)^2)``.

    ``inf`` for equal arrays, ``-inf`` when the reference is zero and the value is not.

    Args:
        reference: Exact values, any shape.
        value: Approximation, same shape.

    Raises:
        ValueError: When the shapes differ.
    """
    exact, noise = _pair(reference, value)
    noise -= exact
    return ratio_db(energy(exact), energy(noise))


def energy(values: Float64) -> float:
    """Return the sum of squares."""
    return float(np.square(values).sum())


def ratio_db(signal: float, noise: float) -> float:
    """Return ``10 log10(signal / noise)`` of two energies, with the limits of :func:`sqnr_db`."""
    if noise == 0.0:
        return math.inf
    if signal == 0.0:
        return -math.inf
    # Not of the quotient: it is 0 where float16 overflowed and the noise is infinite.
    return 10.0 * (math.log10(signal) - math.log10(noise))


def cosine(reference: Array, value: Array) -> Float64:
    """Cosine of the angle between vectors along the last axis, float64 [...].

    Two zero vectors give 1, one gives 0.

    Raises:
        ValueError: When the shapes differ.
    """
    a, b = _pair(reference, value)
    norm_a, norm_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    product = norm_a * norm_b
    dot = np.einsum("...i,...i->...", a, b)
    both_zero = (norm_a == 0) & (norm_b == 0)
    safe = np.where(product == 0, 1.0, product)
    return np.asarray(np.where(both_zero, 1.0, np.clip(dot / safe, -1.0, 1.0)), dtype=np.float64)


def log_softmax(logits: Array) -> Float64:
    """Natural-log probabilities along the last axis, float64 [..., V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(reference: Array, value: Array) -> Float64:
    """Kullback-Leibler divergence ``KL(softmax(reference) || softmax(value))`` in nats, float64 [...].

    Args:
        reference: Logits [..., V].
        value: Logits [..., V].

    Raises:
        ValueError: When the shapes differ.
    """
    _check_shapes(reference, value)
    return kl_from_log_probabilities(log_softmax(reference), log_softmax(value))


def kl_from_log_probabilities(reference: Float64, value: Float64) -> Float64:
    """:func:`kl_divergence` of log probabilities [..., V], as :func:`log_softmax` returns them."""
    divergence = np.einsum("...i,...i->...", np.exp(reference), reference - value)
    return np.asarray(np.maximum(divergence, 0.0), dtype=np.float64)  # rounding can give -1e-17


def top1_agreement(reference: Array, value: Array) -> float:
    """Fraction (0..1) of positions whose largest logit has the same index.

    Args:
        reference: Logits [..., V].
        value: Logits [..., V].

    Raises:
        ValueError: When the shapes differ or there is no position.
    """
    _check_shapes(reference, value)
    if reference.size == 0:
        raise ValueError("top-1 agreement of no positions")
    return float(np.mean(reference.argmax(axis=-1) == value.argmax(axis=-1)))


def negative_log_likelihood(logits: Array, targets: npt.NDArray[np.integer[Any]]) -> Float64:
    """``-log p(target)`` in nats, float64 [...].

    Args:
        logits: [..., V].
        targets: Token numbers [...].
    """
    picked = np.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)
    return -picked[..., 0]


def perplexity(nll_sum: float, tokens: int) -> float:
    """``exp(nll_sum / tokens)``: the perplexity of ``tokens`` scored tokens; ``inf`` when it overflows.

    Args:
        nll_sum: Sum of the tokens' negative log likelihoods, nats.
        tokens: Number of scored tokens.

    Raises:
        ValueError: When no token was scored.
    """
    if tokens <= 0:
        raise ValueError("perplexity of no tokens")
    mean = nll_sum / tokens
    return math.exp(mean) if mean < 700.0 else (math.inf if mean == mean else math.nan)


def _pair(reference: Array, value: Array) -> tuple[Float64, Float64]:
    _check_shapes(reference, value)
    return np.asarray(reference, dtype=np.float64), np.array(value, dtype=np.float64)


def _check_shapes(reference: Array, value: Array) -> None:
    if reference.shape != value.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {value.shape}")
