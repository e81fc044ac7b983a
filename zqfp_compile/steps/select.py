"""Select what is rewritten: linears, attention, embeddings."""

from __future__ import annotations

from zqfp_compile.compilation import Compilation

_ACTIVATION_FORMATS = {"fp8": "e4m3", "fp8-e5m2": "e5m2", "int8": "int8", "none": "none"}


def select(run: Compilation) -> None:
    """Find the linears, the attentions and the embeddings to rewrite: the run's first plan."""
    recipe = run.recipe
    options = {
        "include": recipe.include,
        "exclude": recipe.exclude,
        "quantize_lm_head": recipe.quantize_lm_head,
    }
    plan = run.runner.run(run.model, "select-linears", "exported", **options).plan
    if plan is None:
        raise RuntimeError("select-linears returned no plan")
    weight_format = recipe.fp4_format if recipe.weights == "fp4" else recipe.weights
    run.plan = plan.replace(
        weight_format=weight_format,
        activation_format=_ACTIVATION_FORMATS[recipe.activations],
        per_token=recipe.activation_scale == "token",
        group_size=recipe.group_size,
        scale_constraint=recipe.scale_constraint,
        scale_rows=recipe.scale_rows,
        lorc_rank=recipe.lorc_rank,
        lorc_format="fp8" if recipe.lorc_format == "fp8" else "float",
    )
    _select_attention(run)
    _select_embedding(run)
    if run.explain:
        for site in plan.linears:
            run.reporter.info(f"rewritten  {site.name} [{site.n}x{site.k}]")
        for skipped in plan.skipped:
            run.reporter.info(f"left alone {skipped.name}: {skipped.reason}")


def _select_attention(run: Compilation) -> None:
    kv_cache, attention = run.recipe.kv_cache_dtype == "fp8", run.recipe.attention == "fp8"
    if not (kv_cache or attention):
        return
    options = {"plan": run.plan, "kv_cache": kv_cache, "attention": attention}
    result = run.runner.run(run.model, "select-attention", "exported", **options)
    if result.plan is None:
        raise RuntimeError("select-attention returned no plan")
    run.plan = result.plan
    run.warn([f"{item.place} stays as it is, not FP8: {item.reason}" for item in result.declined])


def _select_embedding(run: Compilation) -> None:
    if not run.recipe.quantize_embedding:
        return
    result = run.runner.run(run.model, "select-embedding", "exported", plan=run.plan)
    if result.plan is None:
        raise RuntimeError("select-embedding returned no plan")
    run.plan = result.plan
    if run.explain:
        for site in run.plan.embeddings:
            run.reporter.info(f"rewritten  {site.name} [{site.rows}x{site.width}], embedding")
    run.warn([f"embedding {item.place} stays as it is: {item.reason}" for item in result.declined])
