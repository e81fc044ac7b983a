"""Make an exported model ready: refuse a compiled one, strip metadata, raise the opset."""

from __future__ import annotations

from zqfp_compile import engines
from zqfp_compile.compilation import MARK, Compilation
from zqfp_compile.errors import ModelError
from zqfp_compile.report.assemble import tool_versions

DOMAIN = "zqfp"


def prepare(run: Compilation) -> None:
    """Refuse what cannot be compiled, then strip metadata and raise the opset."""
    # Lowered forms have no node of ours any more, but the mark.
    if MARK in run.model.metadata_props or any(node.domain == DOMAIN for node in run.model.graph):
        raise ModelError(f"{run.name}: was compiled by zqfp-compile already; give the original model")
    run.reporter.info(f"target {run.choice.target}: {run.choice.reason}")
    run.reporter.detail(", ".join(f"{name} {version}" for name, version in tool_versions().items()))
    run.warn(engines.check_model_options(run.recipe, run.choice, run.model, run.source))
    run.runner.run(run.model, "strip-metadata", "exported")
    run.runner.run(run.model, "raise-opset", "exported")
