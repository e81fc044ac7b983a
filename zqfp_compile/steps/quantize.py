"""Quantise: to nearest, or by GPTQ while walking through the layers."""

from __future__ import annotations

from zqfp_compile.compilation import Compilation
from zqfp_compile.quantize_model import quantize_embeddings, quantize_model, quantize_while_walking
from zqfp_compile.steps.calibrate import naming_nonfinite, set_activation_scales


def quantize(run: Compilation) -> None:
    """Quantise embeddings and weights into the tensor store, one weight in memory."""
    if run.plan.embeddings and not run.plan.embedding_tensors:
        with run.timer.step("quantize"):
            run.plan = quantize_embeddings(run.model, run.plan, run.store)
    if run.walks:
        _walk(run)
        return
    if not run.plan.quantizes_weights:
        return
    sizes = [site.k * site.n for site in run.plan.linears]
    with run.timer.step("quantize"), run.workers.executor(sizes) as executor:
        run.plan = quantize_model(
            run.model,
            run.plan,
            run.store,
            energies=run.energies,
            seed=run.recipe.seed,
            executor=executor,
            progress=run.reporter.update,
        )


def _walk(run: Compilation) -> None:
    """Calibrate and quantise layer by layer, each seeing its predecessors quantised."""
    if run.samples is None:
        raise RuntimeError("the walk needs calibration samples")
    with run.timer.step("quantize"), naming_nonfinite(run):
        run.plan, result = quantize_while_walking(
            run.model,
            run.plan,
            run.store,
            run.samples.feeds,
            scratch=run.folder.scratch,
            work=run.work,
            devices=run.devices,
            seed=run.recipe.seed,
            progress=run.reporter.update,
        )
    run.rows = result.rows
    if run.plan.static_scales:
        set_activation_scales(run, result.ranges)
