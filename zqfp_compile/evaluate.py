"""Accuracy of a whole model on text, in ONNX Runtime: perplexity, and the distance between logits"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zqfp_compile.backends.model_session import open_model_session
from zqfp_compile.backends.ort import check_memory, is_large, run_session
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.device import CPU_PROVIDER, CUDA_PROVIDERS
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.model_io import load_model
from zqfp_compile.report.metrics import perplexity, ratio_db

Progress = Callable[[int, int, str], None]
Tokens = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

# Positions at once: 64 x 128k vocabulary is 32 MB of float32 logits.
_SLICE = 64


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation measured. The comparison fields are ``None`` when there was one model only.

    Attributes:
        perplexity_original: exp(mean nll) of the original.
        perplexity_compiled: The same of the compiled model, on the same tokens.
        nll_original: Mean negative log likelihood per scored token, nats.
        nll_compiled: The same of the compiled model.
        logits_sqnr_db: Signal to noise of the compiled logits over all positions, dB.
        cosine: Mean cosine between the two logit vectors of a position.
        kl: Mean KL(original || compiled) per position, nats.
        top1_agreement: Fraction of positions where both give the same token the largest logit.
        tokens_scored: Number of tokens the perplexity is over.
        seconds: Wall time including opening the models.
    """

    perplexity_original: float
    perplexity_compiled: float | None
    nll_original: float
    nll_compiled: float | None
    logits_sqnr_db: float | None
    cosine: float | None
    kl: float | None
    top1_agreement: float | None
    tokens_scored: int
    seconds: float


@dataclass
class _Totals:
    """Sums over scored positions."""

    tokens: int = 0
    nll_original: float = 0.0
    nll_compiled: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    cosine: float = 0.0
    kl: float = 0.0
    agree: int = 0

    def add_original(self, logits: Array, targets: Tokens) -> None:
        self.tokens += targets.size
        self.nll_original += _nll(torch.log_softmax(_to_torch(logits), dim=-1), targets)

    def add_pair(self, original: Array, compiled: Array, targets: Tokens) -> None:
        exact, other = _to_torch(original), _to_torch(compiled)
        log_p, log_q = torch.log_softmax(exact, dim=-1), torch.log_softmax(other, dim=-1)
        self.tokens += targets.size
        self.nll_original += _nll(log_p, targets)
        self.nll_compiled += _nll(log_q, targets)
        self.kl += _sum((log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0))
        self.cosine += _sum(torch.cosine_similarity(exact, other, dim=-1))
        self.agree += int((exact.argmax(dim=-1) == other.argmax(dim=-1)).sum())
        self.signal += _sum(exact.square().sum(dim=-1))
        self.noise += _sum((other - exact).square().sum(dim=-1))


class _Model:
    """A model opened for scoring."""

    def __init__(self, path: str | Path, device: str) -> None:
        self.path = Path(path)
        try:
            self.session = _open(self.path, device)
        except Exception as error:
            raise _ort_error(self.path, "open", error) from error
        self.interface = CausalLm.from_session(self.session)

    def logits(self, window: Tokens) -> Array:
        """Return logits [L, V] of one window [L]."""
        # A batch that the graph fixes is filled with copies; the first is scored.
        feed = self.interface.make_feed(np.tile(window, (self.interface.batch_size or 1, 1)))
        try:
            outputs = run_session(self.session, [self.interface.logits], feed)
        except Exception as error:
            raise _ort_error(self.path, "run", error) from error
        result: Array = outputs[0][0]
        return result


def evaluate(
    original: str | Path,
    compiled: str | Path | None,
    tokens: Tokens,
    *,
    length: int,
    device: str = "cpu",
    progress: Progress = lambda done, total, detail: None,
) -> Evaluation:
    """Score text with one model, or with two and compare their logits.

    The text is cut into windows of ``length`` tokens, each starting with an empty cache; every token but a
    window's first is scored (DESIGN section 8). Both models run on the same windows.

    Args:
        original: ONNX file of the reference.
        compiled: ONNX file of the other model, or ``None``.
        tokens: Text, int64 [T].
        length: Tokens per window (the graph's own sequence length wins when it is fixed).
        device: Where ONNX Runtime computes, ``cpu`` or ``cuda``.
        progress: Called with (tokens done, tokens, text).

    Raises:
        UsageError: When there is nothing to score, or a model is no causal language model.
        ModelError: When ONNX Runtime cannot run a model or a model's logits are NaN or infinite.
        MissingDependencyError: When ONNX Runtime has no CUDA provider here.
    """
    begin = time.perf_counter()
    first = _Model(original, device)
    second = None if compiled is None else _Model(compiled, device)
    fixed = first.interface.sequence_length
    windows = list(cut_windows(tokens, fixed or length, exact=fixed is not None))
    total = sum(window.size - 1 for window in windows)
    if total == 0:
        raise UsageError(f"{tokens.size} tokens are too few to score in windows of {fixed or length}")
    totals = _Totals()
    for window in windows:
        progress(totals.tokens, total, _running(totals))
        _score(first, second, window, totals)
    progress(total, total, _running(totals))
    return _result(totals, second is not None, time.perf_counter() - begin)


def cut_windows(tokens: Tokens, length: int, *, exact: bool = False) -> Iterator[Tokens]:
    """Yield consecutive windows of ``length`` tokens; a last shorter one of 2 or more unless ``exact``."""
    for start in range(0, tokens.size, length):
        window = tokens[start : start + length]
        if window.size == length or (window.size >= 2 and not exact):
            yield window


def _score(first: _Model, second: _Model | None, window: Tokens, totals: _Totals) -> None:
    original = first.logits(window)
    compiled = None if second is None else second.logits(window)
    if compiled is not None and compiled.shape != original.shape:
        raise UsageError(
            f"logits differ in shape: {original.shape} and {compiled.shape}; compare like with like"
        )
    for start in range(0, window.size - 1, _SLICE):
        stop = min(start + _SLICE, window.size - 1)
        targets = window[start + 1 : stop + 1]
        if compiled is None:
            totals.add_original(original[start:stop], targets)
        else:
            totals.add_pair(original[start:stop], compiled[start:stop], targets)
    if not math.isfinite(totals.nll_original):
        raise ModelError(f"{first.path.name}: its logits hold NaN or Inf; export it in float32 or bfloat16")
    if second is not None and not math.isfinite(totals.nll_compiled):
        raise ModelError(f"{second.path.name}: its logits hold NaN or Inf; compile a float32 export")


def _result(totals: _Totals, compared: bool, seconds: float) -> Evaluation:
    count = totals.tokens
    return Evaluation(
        perplexity_original=perplexity(totals.nll_original, count),
        perplexity_compiled=perplexity(totals.nll_compiled, count) if compared else None,
        nll_original=totals.nll_original / count,
        nll_compiled=totals.nll_compiled / count if compared else None,
        logits_sqnr_db=ratio_db(totals.signal, totals.noise) if compared else None,
        cosine=totals.cosine / count if compared else None,
        kl=totals.kl / count if compared else None,
        top1_agreement=totals.agree / count if compared else None,
        tokens_scored=count,
        seconds=seconds,
    )


def _running(totals: _Totals) -> str:
    """Text beside the progress bar: the perplexities so far."""
    if totals.tokens == 0:
        return ""
    text = f"perplexity {perplexity(totals.nll_original, totals.tokens):.2f}"
    if totals.nll_compiled:
        text += f" / {perplexity(totals.nll_compiled, totals.tokens):.2f}"
    return text


def _to_torch(logits: Array) -> torch.Tensor:
    # float32 and torch's threads: a billion logits in float64 numpy took longer than the models.
    return torch.from_numpy(logits).float()


def _nll(log_probabilities: torch.Tensor, targets: Tokens) -> float:
    return -_sum(log_probabilities[torch.arange(targets.size), torch.from_numpy(targets)])


def _sum(values: torch.Tensor) -> float:
    """Sum over positions in float64."""
    return float(values.sum(dtype=torch.float64))


def _open(path: Path, device: str) -> Any:
    model = load_model(path)
    providers = CUDA_PROVIDERS if device == "cuda" else (CPU_PROVIDER,)
    # Without the arena: two models are open at once. TF32 keeps 10 bits of the operands: enough to move a
    # perplexity in the third digit.
    options = {"arena": False, "low_memory": is_large(model), "tf32": False}
    return open_model_session(path, model, providers=providers, widen=True, **options)


def _ort_error(path: Path, action: str, error: Exception) -> Exception:
    """Turn ONNX Runtime's exceptions into one line; let everything else through."""
    if not type(error).__module__.startswith("onnxruntime"):
        return error
    check_memory(error)
    reason = " ".join(str(error).split())
    return ModelError(f"{path.name}: ONNX Runtime cannot {action} it ({reason}); check it with onnx.checker")
