"""Sampling: the probabilities transformers draws with, and options that say what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zqfp_compile.errors import UsageError
from zqfp_compile.runtime.sampling import Sampling


def of_transformers(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = torch.from_numpy(logits.astype(np.float64))[None]
    ids = torch.zeros((1, 1), dtype=torch.int64)
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 300),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 320),
    top_p=st.floats(0.01, 1),
)
def test_probabilities_are_those_of_transformers(
    seed: int, size: int, temperature: float, top_k: int, top_p: float
) -> None:
    pytest.importorskip("transformers")
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    np.testing.assert_allclose(found, of_transformers(logits, temperature, top_k, top_p), rtol=0, atol=1e-9)
    assert abs(found.sum() - 1) < 1e-9


def test_the_edges_are_greedy() -> None:
    logits = np.array([0.5, 2.0, 1.99, -3.0], np.float16)
    for sampling in (Sampling(), Sampling(1, top_k=1), Sampling(1, top_p=1e-6), Sampling(1e-6)):
        pick = sampling.picker()
        assert {pick(logits) for _ in range(20)} == {1}


def test_logits_are_left_as_they_were() -> None:
    logits = np.random.default_rng(0).normal(size=50)
    before = logits.copy()
    Sampling(0.7, 5, 0.5, seed=0).picker()(logits)
    assert np.array_equal(logits, before)


def test_large_logits_do_not_overflow() -> None:
    shares = Sampling(1e-3).probabilities(np.array([6e4, 5.9e4, -6e4], np.float16))
    assert shares.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"temperature": 1, "top_k": -1}, "--top-k -1"),
        ({"temperature": 1, "top_p": 0}, "--top-p 0"),
        ({"temperature": 1, "top_p": 1.5}, "--top-p 1.5"),
        ({"temperature": 1, "seed": -1}, "--seed -1"),
        ({"top_k": 5}, "need --temperature above 0"),
        ({"top_p": 0.5}, "need --temperature above 0"),
        ({"seed": 0}, "need --temperature above 0"),
    ],
)
def test_options_that_make_no_sense(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**values)
    assert says in str(caught.value) and "\n" not in str(caught.value)
