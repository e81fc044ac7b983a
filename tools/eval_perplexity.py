"""Perplexity of a model on a text, as it is or compiled with given options.

    python tools/eval_perplexity.py MODEL.onnx --text ../shared/data/wikitext2-test.txt --wikitext
    python tools/eval_perplexity.py MODEL.onnx --text ... --wikitext --scale-constraint m2 --lorc-rank 0
    python tools/eval_perplexity.py OUT/onnxruntime.onnx --text ... --provider cuda    # needs onnxruntime-gpu

Without an option of the recipe the model itself is scored; with one, the model is compiled first (``--target
onnxruntime``, no report evaluation) and that is scored. Prints a line for people and a
line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from zqfp_compile.calibrate.causal_lm import CausalLm, find_vocab_size
from zqfp_compile.calibrate.samples import detokenize_wikitext, load_eval_tokens
from zqfp_compile.errors import UsageError, ZqfpError
from zqfp_compile.evaluate import Evaluation, evaluate
from zqfp_compile.model_io import load_model
from zqfp_compile.pipeline import compile_model
from zqfp_compile.progress import ConsoleReporter, StepTimer
from zqfp_compile.recipe import Recipe

# Shortcuts for the options the paper varies; --set reaches all others.
SHORTCUTS = (
    "weights",
    "fp4_format",
    "activations",
    "activation_scale",
    "group_size",
    "scale_constraint",
    "lorc_rank",
    "calibration",
    "calibration_samples",
    "calibration_length",
)
# ONNX Runtime's own form holds FP8 weights: same values as the artifact, a quarter of its memory to load.
FIXED = {"target": "onnxruntime", "evaluate": False}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's values; recipe options that were not given are ``None``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="ONNX model, with tokenizer.json beside it")
    parser.add_argument("--text", help="UTF-8 text; built-in text when left out")
    parser.add_argument("--wikitext", action="store_true", help="undo WikiText's tokenisation in the texts")
    parser.add_argument("--length", type=int, default=2048, help="tokens per window (default 2048)")
    parser.add_argument(
        "--provider",
        choices=("cpu", "cuda"),
        default="cpu",
        help="ONNX Runtime's, to score with (default cpu)",
    )
    parser.add_argument("--limit-tokens", type=int, help="score at most this many tokens")
    parser.add_argument("--output", type=Path, help="keep the compiled model in this folder")
    for name in SHORTCUTS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help="recipe option")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other recipe option, repeatable"
    )
    return parser.parse_args(arguments)


def recipe_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe options given on the command line, as YAML reads their values.

    Raises:
        UsageError: When a ``--set`` is not KEY=VALUE.
    """
    given = {name: getattr(arguments, name) for name in SHORTCUTS if getattr(arguments, name) is not None}
    for item in arguments.set:
        key, separator, value = item.partition("=")
        if not separator:
            raise UsageError(f"--set {item}: write KEY=VALUE, such as --set seed=1")
        given[key.replace("-", "_")] = value
    known = {field.name for field in dataclasses.fields(Recipe)}
    # 'none' and 'm2' are words to YAML, 64 is a number: the types a recipe file would give.
    return {key: yaml.safe_load(value) if key in known else value for key, value in given.items()}


def score(model: Path, arguments: argparse.Namespace, reporter: ConsoleReporter) -> Evaluation:
    """Return the evaluation of one ONNX file on the text.

    Raises:
        ZqfpError: When the model or the text cannot be used.
    """
    graph = load_model(model)
    tokenizer = arguments.model.parent / "tokenizer.json"
    text = load_eval_tokens(
        arguments.text,
        tokenizer_path=tokenizer if tokenizer.is_file() else None,
        interface=CausalLm.from_model(graph),
        max_tokens=arguments.limit_tokens,
        seed=0,
        vocab_size=find_vocab_size(graph),
        wikitext=arguments.wikitext,
    )
    for warning in text.warnings:
        reporter.warn(warning)
    with StepTimer(reporter).step("evaluate"):
        return evaluate(
            model,
            None,
            text.tokens,
            length=arguments.length,
            device=arguments.provider,
            progress=reporter.update,
        )


def compile_and_score(
    arguments: argparse.Namespace, options: dict[str, Any], reporter: ConsoleReporter
) -> Evaluation:
    """Compile into ``--output`` or a temporary folder and score the result.

    Raises:
        ZqfpError: When the compile or the evaluation fails.
    """
    with tempfile.TemporaryDirectory(prefix="zqfp-eval-") as scratch:
        text = options.get("calibration")
        if arguments.wikitext and text is not None and not text.endswith(".npz"):
            options = {**options, "calibration": str(detokenized_copy(Path(text), Path(scratch)))}
        recipe = Recipe.from_dict({**FIXED, **options})
        output = arguments.output or Path(scratch) / "model.zqfp"
        result = compile_model(arguments.model, recipe, output=output, reporter=reporter)
        return score(result.engine or result.artifact, arguments, reporter)


def detokenized_copy(text: Path, folder: Path) -> Path:
    """Write ``text`` without WikiText's tokenisation into ``folder`` and return the new file.

    Raises:
        UsageError: When the text cannot be read.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--calibration {text}: cannot be read; give a UTF-8 text file") from error
    copy = folder / text.name
    copy.write_text(detokenize_wikitext(content), encoding="utf-8")
    return copy


def main(arguments: list[str]) -> int:
    """Run the tool and return the exit code."""
    values = parse_arguments(arguments)
    console = Console(stderr=True)
    reporter = ConsoleReporter(console)
    try:
        options = recipe_options(values)
        result = (
            compile_and_score(values, options, reporter) if options else score(values.model, values, reporter)
        )
    except ZqfpError as error:
        reporter.stop()
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return error.exit_code
    print_result(values, options, result)
    return 0


def print_result(values: argparse.Namespace, options: dict[str, Any], result: Evaluation) -> None:
    """Print the human line and the JSON line."""
    label = " ".join(f"{key}={value}" for key, value in options.items()) or "as it is"
    print(
        f"{values.model} ({label}): perplexity {result.perplexity_original:.3f} "
        f"on {result.tokens_scored} tokens, {result.seconds:.0f} s"
    )
    record = {
        "model": str(values.model),
        "text": values.text,
        "wikitext": values.wikitext,
        "length": values.length,
        "provider": values.provider,
        "options": options,
        "tokens": result.tokens_scored,
        "perplexity": result.perplexity_original,
        "nll": result.nll_original,
        "seconds": result.seconds,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
