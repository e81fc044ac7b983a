"""Build the engine."""

from __future__ import annotations

from zqfp_compile import engines
from zqfp_compile.calibrate.causal_lm import graph_inputs
from zqfp_compile.compilation import Compilation
from zqfp_compile.kernel_warnings import kernel_warnings


def build(run: Compilation) -> None:
    """Make the engine, or whatever else the target and ``--emit`` ask for."""
    run.engine = engines.build(run.place, run.recipe, run.choice, graph_inputs(run.model))
    if run.recipe.weight_lowering == "plugin":
        declined = run.runner.declined.get(engines.PLUGIN, [])
        run.warn(kernel_warnings(run.plan, declined, run.choice.target))
    run.warn([f"--dump-after {name}: these options do not run it" for name in run.runner.not_dumped])
