"""Assign a precision to every layer (``--auto``, ``--lorc-budget``)."""

from __future__ import annotations

from functools import partial

from zqfp_compile.calibrate.statistics import activation_scales, collect
from zqfp_compile.compilation import Compilation
from zqfp_compile.precision.auto import Chooser, sensitivities
from zqfp_compile.precision.sensitivity import Statistics
from zqfp_compile.steps.calibrate import naming_nonfinite


def assign(run: Compilation) -> None:
    """Choose the format and the rank of every layer (``--auto``, ``--lorc-budget``)."""
    recipe = run.recipe
    if not recipe.mixed:
        return
    if run.samples is None:
        raise RuntimeError("the assignment needs calibration samples")
    with run.timer.step("assign"):
        layers = sensitivities(
            run.model,
            run.plan,
            run.samples.feeds,
            partial(_statistics, run),
            max_rank=recipe.lorc_rank,
            gptq=run.walks,
            seed=recipe.seed,
            device=run.devices[0],
            progress=run.reporter.update,
        )
    run.chooser = Chooser(run.plan, layers, recipe.goal, recipe.lorc_budget)
    choose(run, run.chooser)


def choose(run: Compilation, chooser: Chooser) -> None:
    """Take the chooser's precisions; tensors of earlier ones are void."""
    choice = chooser.choose()
    run.plan = run.plan.replace(precisions=choice.precisions, tensors={})
    run.reporter.info(choice.summary)


def _statistics(run: Compilation) -> Statistics:
    """What calibration measured; the walk measures later than the assignment needs it."""
    activations = list(dict.fromkeys(site.activation for site in run.plan.linears))
    if run.samples is None or all(name in run.energies for name in activations):
        return Statistics(run.energies, run.rows, run.plan.activation_scales)
    with naming_nonfinite(run):
        result = collect(
            run.model,
            activations,
            run.samples.feeds,
            sites=run.plan.rewritten,
            seed=run.recipe.seed,
            work=run.work,
            progress=run.reporter.update,
        )
    static = run.plan.static_scales
    scales = activation_scales(result.ranges, run.plan.activation_format)[0] if static else {}
    return Statistics(result.energies, result.rows, scales)


def explain_embeddings(run: Compilation) -> None:
    """Say which embeddings mixed precision leaves in float, now that it has decided."""
    stored = run.plan.stored_embeddings
    kept = [site for site in run.plan.embeddings if site not in stored]
    run.warn(
        [f"embedding {site.name} stays as it is: --auto keeps {site.linears[0]} in float" for site in kept]
    )
