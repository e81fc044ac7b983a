"""Rewrite the graph into the artifact and save it."""

from __future__ import annotations

import shutil

from zqfp_compile import __version__
from zqfp_compile.compilation import MARK, Compilation
from zqfp_compile.model_io import save_model
from zqfp_compile.specs import Phase


def rewrite(run: Compilation) -> None:
    """Make the artifact: rewrite a fresh copy, so that original weights stay readable for the checks."""
    model = run.model.clone()
    phase: Phase = "exported"
    if run.plan.activation_format != "none":
        run.runner.run(model, "quantize-activations", phase, plan=run.plan)
    if run.plan.quantizes_weights:
        phase = "quantized"
        run.runner.run(model, "quantize-weights", phase, plan=run.plan)
        if any(tensors.lorc_v is not None for tensors in run.plan.tensors.values()):
            run.runner.run(model, "add-lorc", phase, plan=run.plan)
    if run.plan.stored_embeddings:
        phase = "quantized"
        run.runner.run(model, "quantize-embedding", phase, plan=run.plan)
    for name in ("quantize-kv-cache", "quantize-attention"):
        if run.plan.caches if name == "quantize-kv-cache" else run.plan.attentions:
            run.runner.run(model, name, phase, plan=run.plan)
    run.runner.run(model, "remove-unused", phase)
    model.metadata_props[MARK] = __version__
    with run.timer.step("save"):
        save_model(model, run.artifact, progress=run.reporter.update)
        for companion in run.companions:
            shutil.copyfile(companion, run.folder.path / companion.name)
