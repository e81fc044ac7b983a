"""Distill (``--distill-tokens``): what needs to be known before, and the training."""

from __future__ import annotations

from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.compilation import Compilation
from zqfp_compile.distill.memory import check_memory
from zqfp_compile.distill.student import is_trainable
from zqfp_compile.distill.train import distill as train_student
from zqfp_compile.steps.calibrate import windows

# One window in so many is held out of distillation, to decide whether it helped.
_DISTILL_SHARE = 16


def prepare_distillation(run: Compilation) -> None:
    """Read its text, and refuse what does not fit into memory, before hours of work."""
    recipe = run.recipe
    if not recipe.distill_tokens:
        return
    interface = CausalLm.from_model(run.model)
    length = interface.sequence_length or recipe.calibration_length
    wanted = -(-recipe.distill_tokens // length)
    held_out = max(2, -(-wanted // _DISTILL_SHARE))
    samples = windows(run, interface, wanted + held_out)
    run.warn(samples.warnings)
    share = held_out / (wanted + held_out)  # the text may be short
    run.distill_samples = samples.hold_out(max(1, round(share * len(samples.feeds))))
    length = max(feed["input_ids"].size for feed in samples.feeds)
    check_memory(run.model, run.plan, interface, length, run.devices[0])


def distill(run: Compilation) -> None:
    """Train row scales and LoRC factors against the original's predictions."""
    if run.distill_samples is None:
        return
    if not is_trainable(run.plan):  # the precisions of --auto
        run.warn(["distillation is left out: no layer has LoRC factors or row scales of any value"])
        return
    train, held_out = run.distill_samples
    with run.timer.step("distill"):
        run.plan, run.distillation = train_student(
            run.model,
            run.plan,
            run.store,
            feeds=train.feeds,
            held_out=held_out.feeds,
            logits=CausalLm.from_model(run.model).logits,
            tokens=run.recipe.distill_tokens,
            device=run.devices[0],
            seed=run.recipe.seed,
            progress=run.reporter.update,
        )
    if not run.distillation.improved:
        run.warn(["distillation did not help on held-out text and is left out; give more --distill-tokens"])
