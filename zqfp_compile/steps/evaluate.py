"""Evaluate: the text for it, the perplexities and the accuracy gate."""

from __future__ import annotations

from zqfp_compile import engines
from zqfp_compile.calibrate.causal_lm import CausalLm, find_vocab_size
from zqfp_compile.calibrate.samples import load_eval_tokens
from zqfp_compile.compilation import Compilation
from zqfp_compile.errors import AccuracyError, UsageError
from zqfp_compile.evaluate import Evaluation
from zqfp_compile.evaluate import evaluate as evaluate_models
from zqfp_compile.recipe import Recipe


def load_eval_text(run: Compilation) -> None:
    """Read the text now: a wrong file must not show after hours of work."""
    recipe = run.recipe
    if not recipe.evaluate:
        return
    try:
        interface = CausalLm.from_model(run.model)
    except UsageError as error:
        run.warn([f"perplexity is not measured: {error}"])
        return
    run.eval_text = load_eval_tokens(
        recipe.eval_text,
        tokenizer_path=run.tokenizer,
        interface=interface,
        max_tokens=recipe.eval_tokens,
        seed=recipe.seed,
        vocab_size=find_vocab_size(run.model),
    )
    run.warn(run.eval_text.warnings)


def evaluate(run: Compilation) -> None:
    """Measure the perplexity of the original and of the compiled model, and check the gate."""
    recipe, text = run.recipe, run.eval_text
    if text is None:
        return
    runnable = engines.runnable_model(run.place, run.recipe, run.choice)
    with run.timer.step("evaluate"):
        run.evaluation = evaluate_models(
            run.source,
            runnable,
            text.tokens,
            length=recipe.eval_length,
            progress=run.reporter.update,
        )
    _check_gate(run.evaluation, recipe)


def _check_gate(evaluation: Evaluation, recipe: Recipe) -> None:
    before, after = evaluation.perplexity_original, evaluation.perplexity_compiled
    if recipe.max_perplexity_increase is None or after is None:
        return
    increase = 100.0 * (after / before - 1.0)
    if not increase <= recipe.max_perplexity_increase:
        raise AccuracyError(
            f"perplexity rose by {increase:.2f}% ({before:.3f} -> {after:.3f}), the gate allows "
            f"{recipe.max_perplexity_increase:g}%; try --algorithm gptq, --lorc-rank 32, "
            "--activation-scale token or --exclude"
        )
