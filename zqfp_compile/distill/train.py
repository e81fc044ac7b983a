"""Training of row scales and LoRC factors against the original model's predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.distill.divergence import divergence
from zqfp_compile.distill.student import Student, build_student, store_student
from zqfp_compile.errors import ModelError
from zqfp_compile.plan import QuantPlan
from zqfp_compile.quantize.products import short_products
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.torch_graph import TorchGraph

Feed = Mapping[str, npt.NDArray[Any]]

# Tokens per step of the optimiser; fewer when there would be too few steps.
STEP_TOKENS = 8192
LEAST_STEPS = 16
# Learning rates: of the logarithm of row scales, and of LoRC factors as a share of their root mean square.
SCALE_RATE = 3e-3
FACTOR_RATE = 6e-3
BETAS = (0.9, 0.95)
# Times that the held-out text is looked at, evenly spread over the steps.
LOOKS = 4


@dataclass(frozen=True)
class Distillation:
    """What distillation did.

    Attributes:
        tokens: Tokens trained on.
        steps: Steps of the optimiser.
        kl_before: Mean KL(original || quantised) per token of the held-out windows, nats.
        kl_after: The same with the tensors that were kept.
        seconds: Wall time.
    """

    tokens: int
    steps: int
    kl_before: float
    kl_after: float
    seconds: float

    @property
    def improved(self) -> bool:
        """Whether trained tensors were kept."""
        return self.kl_after < self.kl_before


def distill(
    model: ir.Model,
    plan: QuantPlan,
    store: TensorStore,
    *,
    feeds: Sequence[Feed],
    held_out: Sequence[Feed],
    logits: str,
    tokens: int,
    device: str,
    seed: int,
    progress: Callable[[int, int, str], None],
) -> tuple[QuantPlan, Distillation]:
    """Train what codes do not depend on, so that the quantised model predicts what the original does.

    The loss is the mean KL(original || quantised) per token. Rounding is straight-through: activations, with
    the plan's scales, and LoRC factors are rounded forward and not backward, so what was measured is what is
    stored. A row scale is trained by its logarithm. Codes, group scales (but for the constraint ``none``,
    which has no row scales), biases and everything outside the planned layers stay. So do ``m1`` row scales,
    which are powers of two.

    Args:
        model: The original.
        plan: The quantised model, with its tensors and activation scales.
        store: Where trained tensors go.
        feeds: Windows to train on, as graph inputs; repeated in another order when ``tokens`` asks for more.
        held_out: Windows that decide which state is kept.
        logits: Name of the logits output.
        tokens: Tokens to train on, rounded up to a whole window.
        device: ``cpu`` or ``cuda``.
        seed: Of the order of the windows.
        progress: Called with (done, total, text).

    Returns:
        The plan with trained tensors, or as it was when the held-out windows gained nothing; and what
        happened.

    Raises:
        ModelError: When an operator is not supported in torch, or the model's logits are NaN or infinite.
    """
    begin = time.perf_counter()
    student = build_student(model, plan, device)
    trainer = _Trainer(TorchGraph(model, outputs=[logits], device=device), student, logits)
    steps = _schedule([int(feed["input_ids"].size) for feed in feeds], tokens, seed)
    with short_products():
        before = after = trainer.mean_divergence(held_out)
        if not math.isfinite(before):
            raise ModelError("the model's logits hold NaN or Inf; export it in float32 or bfloat16")
        best = student.state()
        looks = {math.ceil(len(steps) * (look + 1) / LOOKS) for look in range(LOOKS)}
        for index, windows in enumerate(steps):
            progress(index, len(steps), f"KL {before:.4f} -> {after:.4f}")
            trainer.step([feeds[window] for window in windows], index / len(steps))
            if index + 1 in looks:
                found = trainer.mean_divergence(held_out)
                if found < after:  # not when it is NaN
                    after, best = found, student.state()
    progress(len(steps), len(steps), "")
    trained = sum(int(feeds[window]["input_ids"].size) for windows in steps for window in windows)
    result = Distillation(trained, len(steps), before, after, time.perf_counter() - begin)
    if result.improved:
        student.load(best)
        plan = store_student(plan, student, store)
    return plan, result


def _schedule(sizes: Sequence[int], tokens: int, seed: int) -> list[list[int]]:
    """Return the windows of each step: every window once in random order, then again in another."""
    per_step = min(STEP_TOKENS, tokens // LEAST_STEPS)
    steps: list[list[int]] = []
    seen, room = 0, 0
    for window in _endless(len(sizes), seed):
        if seen >= tokens:
            break
        if not steps or room < sizes[window]:
            steps.append([])
            room = per_step
        steps[-1].append(window)
        seen += sizes[window]
        room -= sizes[window]
    return steps


def _endless(count: int, seed: int) -> Iterator[int]:
    random = np.random.default_rng(seed)
    while True:
        yield from random.permutation(count).tolist()


class _Trainer:
    """The original and the student, one graph with and without overrides."""

    def __init__(self, graph: TorchGraph, student: Student, logits: str) -> None:
        self._graph = graph
        self._student = student
        self._logits = logits
        self._rates: list[float] = []
        groups = []
        for parameter, rate in student.parameters(SCALE_RATE, FACTOR_RATE):
            groups.append({"params": [parameter], "lr": rate})
            self._rates.append(rate)
        self._optimizer = torch.optim.Adam(groups, lr=SCALE_RATE, betas=BETAS)

    def step(self, feeds: Sequence[Feed], done: float) -> None:
        """Move once by the gradient over ``feeds``; ``done`` is the share of the training behind."""
        tokens = sum(int(feed["input_ids"].size) for feed in feeds)
        self._optimizer.zero_grad()
        for feed in feeds:
            original, student = self._run(feed)
            divergence(original, student, gradient=True)
            torch.autograd.backward(student, original.div_(tokens))
            self._student.forget_activations()
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        self._optimizer.step()

    def mean_divergence(self, feeds: Sequence[Feed]) -> float:
        """Return the mean KL(original || student) per token, nats."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for feed in feeds:
                original, student = self._run(feed)
                self._student.forget_activations()
                total += divergence(original, student)
                tokens += int(feed["input_ids"].size)
        return total / tokens

    def _run(self, feed: Feed) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            original = self._graph.run(feed)[self._logits].contiguous()
        return original, self._graph.run(feed, overrides=self._student.overrides)[self._logits]
