"""Certify the artifact: every rewritten linear against numpy."""

from __future__ import annotations

from zqfp_compile.certificate import certify as certify_layers
from zqfp_compile.compilation import Compilation
from zqfp_compile.errors import AccuracyError
from zqfp_compile.model_io import load_model
from zqfp_compile.weights import read_bias, read_weight


def certify(run: Compilation) -> None:
    """Compare every rewritten linear, read back from disk, with the numpy reference."""
    with run.timer.step("certificate"):
        artifact = load_model(run.artifact)
        run.certificate = certify_layers(
            artifact,
            run.plan,
            run.rows,
            original_weight=lambda site: read_weight(run.model, site.weight),
            original_bias=lambda site: read_bias(run.model, site),
            original_table=lambda site: read_weight(run.model, site.source),
            threads=run.workers.processes([site.k * site.n for site in run.plan.linears]),
            work=run.work,
            progress=run.reporter.update,
        )
    if run.certificate.mismatches:
        bad = [layer.name for layer in run.certificate.layers if not layer.ok]
        raise AccuracyError(
            f"certificate: {len(bad)} of {run.certificate.layers_checked} layers differ from the reference, "
            f"first {bad[0]}; this is a bug in zqfp-compile or the runtime, please report it"
        )
