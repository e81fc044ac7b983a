"""Build the engine."""

from __future__ import annotations

from zqfp_compile import engines
from zqfp_compile.calibrate.causal_lm import graph_inputs
from zqfp_compile.compilation import Compilation


def build(run: Compilation) -> None:
    """Make the engine, or whatever else the target and ``--emit`` ask for."""
    run.engine = engines.build(run.place, run.recipe, run.choice, graph_inputs(run.model))
    run.warn(engines.outside_kernel(run.place))
    run.warn(engines.missing_kernels(run.recipe, run.choice))
    run.warn([f"--dump-after {name}: these options do not run it" for name in run.runner.not_dumped])
