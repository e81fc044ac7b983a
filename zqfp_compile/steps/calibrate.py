"""Calibrate: the text that is read for it, and what the original model does with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from zqfp_compile.calibrate.causal_lm import CausalLm, find_vocab_size, graph_inputs
from zqfp_compile.calibrate.samples import Samples, load_samples
from zqfp_compile.calibrate.statistics import activation_scales, collect
from zqfp_compile.compilation import Compilation, Rows
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.plan import QuantPlan
from zqfp_compile.weights import find_nonfinite

_RANDOM_ROWS = 16
# Calibration windows kept for measuring a perplexity to reach.
_HELD_OUT = 4


def calibrate(run: Compilation) -> None:
    """Run text through the original: ranges and energies of activations, rows for the per-layer checks."""
    recipe = run.recipe
    activations = list(dict.fromkeys(site.activation for site in run.plan.linears))
    static = run.plan.static_scales
    lorc = recipe.lorc_rank > 0 and run.plan.weight_format != "none"
    attention = run.plan.attention_values
    if run.walks:
        activations = []  # measured while they are quantised
    elif not (static or lorc or attention or recipe.evaluate or recipe.mixed):
        run.rows = _random_rows(run.plan, recipe.seed)
        return
    with run.timer.step("calibrate"):
        run.samples = _load_samples(run)
        with naming_nonfinite(run):
            result = collect(
                run.model,
                [*activations, *attention],
                run.samples.feeds,
                sites=run.plan.rewritten,
                seed=recipe.seed,
                work=run.work,
                progress=run.reporter.update,
            )
    run.reporter.detail(f"calibrated on {run.samples.description}")
    run.warn(run.samples.warnings)
    _check_widths(run, result.rows)
    run.rows = result.rows
    run.energies = result.energies
    if static and not run.walks:
        set_activation_scales(run, {name: result.ranges[name] for name in activations})
    _set_attention_scales(run, result.ranges)


@contextlib.contextmanager
def naming_nonfinite(run: Compilation) -> Iterator[None]:
    """Name the tensor that is to blame when a weight's NaN or infinity spoils activations."""
    try:
        yield
    except ModelError as error:
        culprit = find_nonfinite(run.model, run.plan)
        if culprit is None:
            raise
        raise ModelError(f"{run.name}: {culprit} holds NaN or infinity; export the model again") from error


def set_activation_scales(run: Compilation, ranges: Mapping[str, float]) -> None:
    """Put static activation scales that cover these ranges into the plan."""
    scales, warnings = activation_scales(ranges, run.plan.activation_format)
    run.warn(warnings)
    run.plan = run.plan.replace(activation_scales=scales)


def _check_widths(run: Compilation, rows: Rows) -> None:
    """Check that layers fit their inputs: what was run ends before the layers."""
    for site in run.plan.linears:
        found = rows.get(site.activation)
        if found is not None and found.shape[-1] != site.k:
            raise ModelError(
                f"{run.source}: layer {site.name} takes {site.k} features, its input {site.activation!r} has "
                f"{found.shape[-1]}; the file is damaged, export it again"
            )


def _set_attention_scales(run: Compilation, ranges: Mapping[str, float]) -> None:
    wanted = {name: ranges[name] for name in run.plan.attention_values}
    scales, warnings = activation_scales(wanted, "e4m3")
    run.warn(warnings)
    run.plan = run.plan.replace(attention_scales=scales)


def _load_samples(run: Compilation) -> Samples:
    """Return the calibration samples; for a perplexity to reach, others are kept in ``run.held_out``."""
    recipe = run.recipe
    goal = recipe.goal
    measures = goal is not None and goal.kind == "perplexity"
    from_npz = recipe.calibration is not None and recipe.calibration.endswith(".npz")
    try:
        interface = CausalLm.from_model(run.model)
    except UsageError:
        if not from_npz:
            raise
        interface = None
    samples = windows(run, interface, recipe.calibration_samples + (_HELD_OUT if measures else 0))
    if measures:
        samples, run.held_out = samples.hold_out(_HELD_OUT)
    return samples


def windows(run: Compilation, interface: CausalLm | None, count: int) -> Samples:
    """Return about ``count`` windows of the calibration text, the user's or the built-in one."""
    return load_samples(
        run.recipe.calibration,
        tokenizer_path=run.tokenizer,
        interface=interface,
        inputs=graph_inputs(run.model),
        samples=count,
        length=run.recipe.calibration_length,
        seed=run.recipe.seed,
        vocab_size=find_vocab_size(run.model),
    )


def _random_rows(plan: QuantPlan, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    widths = {site.activation: site.k for site in plan.linears}
    return {name: random.standard_normal((_RANDOM_ROWS, k), dtype=np.float32) for name, k in widths.items()}
