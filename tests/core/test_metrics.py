from __future__ import annotations

import math

import numpy as np
import pytest

from zqfp_compile.report.metrics import (
    cosine,
    kl_divergence,
    negative_log_likelihood,
    perplexity,
    sqnr_db,
    top1_agreement,
)

RNG = np.random.default_rng(0)


def test_sqnr_of_known_noise() -> None:
    signal = np.array([3.0, -4.0])
    assert sqnr_db(signal, signal + np.array([0.0, 0.5])) == pytest.approx(20.0, abs=1e-12)  # 25 / 0.25
    assert sqnr_db(signal, -signal) == pytest.approx(-10 * math.log10(4), abs=1e-12)


def test_sqnr_limits() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert sqnr_db(one, one) == math.inf
    assert sqnr_db(zero, zero) == math.inf
    assert sqnr_db(zero, one) == -math.inf
    assert sqnr_db(one, np.array([1.0, 1.0, math.inf])) == -math.inf  # an overflow


def test_sqnr_does_not_overflow_half_precision() -> None:
    value = np.full(1000, 60000, np.float16)
    assert sqnr_db(value, (value * np.float16(0.5))) == pytest.approx(10 * math.log10(4), abs=1e-9)


def test_cosine() -> None:
    a = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    b = np.array([[0.0, 2.0], [3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine(a, b), [0, 1, 1, 0], atol=1e-15)


def test_kl_against_the_definition() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.1, 0.2, 0.7])
    expected = float(np.sum(p * np.log(p / q)))
    # Logits are log probabilities up to a constant.
    assert kl_divergence(np.log(p) + 7, np.log(q) - 3) == pytest.approx(expected, abs=1e-14)


def test_kl_is_stable_and_not_negative() -> None:
    logits = (RNG.standard_normal((20, 500)) * 1000).astype(np.float32)
    assert (kl_divergence(logits, logits) == 0).all()
    other = kl_divergence(logits, logits[:, ::-1])
    assert np.isfinite(other).all() and (other > 0).all()


def test_top1() -> None:
    a = np.array([[0, 1], [1, 0], [0, 1], [0, 1]])
    b = np.array([[0, 2], [2, 0], [1, 0], [3, 4]])
    assert top1_agreement(a, b) == 0.75
    with pytest.raises(ValueError, match="no positions"):
        top1_agreement(a[:0], b[:0])


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    nll = negative_log_likelihood(np.zeros((10, 320), np.float16), RNG.integers(0, 320, 10))
    assert perplexity(float(nll.sum()), 10) == pytest.approx(320, rel=1e-12)
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 1))
    with pytest.raises(ValueError, match="no tokens"):
        perplexity(0.0, 0)


def test_shapes_must_agree() -> None:
    for metric in (sqnr_db, cosine, kl_divergence, top1_agreement):
        with pytest.raises(ValueError, match="shapes differ"):
            metric(np.zeros((2, 3)), np.zeros((1, 3)))
