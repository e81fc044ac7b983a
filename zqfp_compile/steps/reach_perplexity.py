"""Reach the perplexity that ``--auto`` asks for: measure on held-out text, adjust, quantise again."""

from __future__ import annotations

import math

import numpy as np

from zqfp_compile import engines
from zqfp_compile.calibrate.samples import Samples
from zqfp_compile.compilation import Compilation
from zqfp_compile.evaluate import evaluate
from zqfp_compile.steps.assign import choose
from zqfp_compile.steps.distill import distill
from zqfp_compile.steps.quantize import quantize
from zqfp_compile.steps.rewrite import rewrite


def reach_perplexity(run: Compilation) -> None:
    """Measure what the chosen precisions cost on text that was held out, and adjust them (``--auto``)."""
    chooser = run.chooser
    if chooser is None or chooser.search is None or run.held_out is None:
        return
    while True:
        loss = _held_out_loss(run, run.held_out)
        run.reporter.info(f"perplexity on held-out calibration text: {100 * math.expm1(loss):+.2f}%")
        if not chooser.adjust(loss):
            break
        choose(run, chooser)
        quantize(run)
        distill(run)
        rewrite(run)
    run.warn(chooser.warnings)


def _held_out_loss(run: Compilation, samples: Samples) -> float:
    """Return by how much the loss rises on held-out windows, nats per token."""
    windows = [feed["input_ids"][0].astype(np.int64) for feed in samples.feeds]
    runnable = engines.runnable_model(run.place, run.recipe, run.choice)
    with run.timer.step("measure"):
        result = evaluate(
            run.source,
            runnable,
            np.concatenate(windows),
            length=len(windows[0]),
            progress=run.reporter.update,
        )
    for path in (runnable, runnable.with_name(f"{runnable.name}.data")):
        if runnable != run.artifact:
            path.unlink(missing_ok=True)  # the evaluation makes it from the final artifact
    if result.nll_compiled is None:
        raise RuntimeError("two models were compared")
    return result.nll_compiled - result.nll_original
