"""``zqfp-compile``: argument handling, nothing else."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from zqfp_compile import __version__
from zqfp_compile.errors import ZqfpError
from zqfp_compile.progress import ConsoleReporter
from zqfp_compile.recipe import Recipe

EXIT_INTERRUPTED = 130
EPILOG = (
    "Exit codes: 0 done, 2 usage, 3 bad model, 4 accuracy gate failed, 5 builder failed, "
    "6 environment (missing library, no GPU, no space)."
)

app = typer.Typer(add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"zqfp-compile {__version__}")
        raise typer.Exit


def _group(title: str, help_text: str, *flags: str, **extra: Any) -> Any:
    return typer.Option(*flags, help=help_text, rich_help_panel=title, show_default=False, **extra)


QUANT, ENGINE, DATA, OUT = "Quantization", "Engine", "Calibration and evaluation", "Output"


@app.command(epilog=EPILOG)
def compile_command(
    model: Annotated[Path, typer.Argument(help="ONNX model; external data beside it is found by itself.")],
    output: Annotated[
        Path | None, _group(OUT, "Output folder (default: MODEL.zqfp beside the model).", "-o", "--output")
    ] = None,
    recipe: Annotated[
        Path | None, _group(OUT, "YAML file with any of these options; flags given here win.", "--recipe")
    ] = None,
    target: Annotated[
        str | None, _group(ENGINE, "auto (default), tensorrt, tensorrt-rtx, onnxruntime or none.", "--target")
    ] = None,
    weights: Annotated[str | None, _group(QUANT, "fp4 (default), int4, fp8 or none.", "--weights")] = None,
    fp4_format: Annotated[str | None, _group(QUANT, "e2m1 (default) or e3m0.", "--fp4-format")] = None,
    activations: Annotated[
        str | None, _group(QUANT, "fp8 (default), fp8-e5m2, int8 or none.", "--activations")
    ] = None,
    activation_scale: Annotated[
        str | None, _group(QUANT, "tensor (default, static) or token (dynamic).", "--activation-scale")
    ] = None,
    group_size: Annotated[
        int | None, _group(QUANT, "Weights along K per group scale (default 64).", "--group-size")
    ] = None,
    scale_constraint: Annotated[
        str | None, _group(QUANT, "e4m3 (default), m1, m2 or none.", "--scale-constraint")
    ] = None,
    lorc_rank: Annotated[
        int | None, _group(QUANT, "Rank of the error compensation (default 16; 0: off).", "--lorc-rank")
    ] = None,
    include: Annotated[
        list[str] | None,
        _group(QUANT, "Only layers whose name matches this regex (repeatable).", "--include"),
    ] = None,
    exclude: Annotated[
        list[str] | None, _group(QUANT, "Not the layers whose name matches (repeatable).", "--exclude")
    ] = None,
    quantize_lm_head: Annotated[
        bool | None,
        _group(QUANT, "Also rewrite the output projection.", "--quantize-lm-head/--no-quantize-lm-head"),
    ] = None,
    calibration: Annotated[
        str | None,
        _group(DATA, "Text file (with the model's tokenizer.json) or .npz of inputs.", "--calibration"),
    ] = None,
    calibration_samples: Annotated[
        int | None, _group(DATA, "Calibration windows (default 8).", "--calibration-samples")
    ] = None,
    calibration_length: Annotated[
        int | None, _group(DATA, "Tokens per calibration window (default 512).", "--calibration-length")
    ] = None,
    eval_text: Annotated[
        str | None, _group(DATA, "Text for the perplexity in the report.", "--eval-text")
    ] = None,
    eval_tokens: Annotated[
        int | None, _group(DATA, "Score at most this many tokens (default 20480).", "--eval-tokens")
    ] = None,
    eval_length: Annotated[
        int | None, _group(DATA, "Tokens per evaluation window (default 1024).", "--eval-length")
    ] = None,
    evaluate: Annotated[
        bool | None, _group(DATA, "Measure perplexity and logits (default: yes).", "--evaluate/--no-evaluate")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        _group(
            DATA,
            "Fail (exit 4) when perplexity rises by more than this percentage.",
            "--max-perplexity-increase",
        ),
    ] = None,
    weight_lowering: Annotated[
        str | None, _group(ENGINE, "auto (default), int4, fp8 or plugin.", "--weight-lowering")
    ] = None,
    compute_capability: Annotated[
        str | None, _group(ENGINE, "Architecture to build for, such as 89 or 120.", "--compute-capability")
    ] = None,
    min_shapes: Annotated[
        str | None, _group(ENGINE, "Profile minimum, NAME:1x1,OTHER:1x8.", "--min-shapes", "--minShapes")
    ] = None,
    opt_shapes: Annotated[
        str | None, _group(ENGINE, "Profile optimum, same form.", "--opt-shapes", "--optShapes")
    ] = None,
    max_shapes: Annotated[
        str | None, _group(ENGINE, "Profile maximum, same form.", "--max-shapes", "--maxShapes")
    ] = None,
    timing_cache: Annotated[
        str | None, _group(ENGINE, "File that keeps builder timings.", "--timing-cache", "--timingCacheFile")
    ] = None,
    builder_timeout: Annotated[
        int | None, _group(ENGINE, "Seconds the builder may take (default 3600).", "--builder-timeout")
    ] = None,
    builder_memory_gb: Annotated[
        float | None, _group(ENGINE, "Memory limit of the builder, GiB.", "--builder-memory-gb")
    ] = None,
    emit: Annotated[
        list[str] | None, _group(OUT, "Also write: fp4 (FLOAT4E2M1), engine-onnx (repeatable).", "--emit")
    ] = None,
    dump_after: Annotated[
        list[str] | None,
        _group(OUT, "Write the model after this pass into OUTPUT/dump (repeatable).", "--dump-after"),
    ] = None,
    explain: Annotated[
        bool, _group(OUT, "Say for each linear layer why it was or was not rewritten.", "--explain")
    ] = False,
    seed: Annotated[int | None, _group(DATA, "Seed of everything random (default 0).", "--seed")] = None,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="More detail.")] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile an LLM in ONNX into a W4A8 floating-point model, an engine and an accuracy report."""
    options = dict(locals())
    for name in ("model", "output", "recipe", "dump_after", "explain", "verbose", "quiet", "version"):
        options.pop(name)
    reporter = ConsoleReporter(Console(stderr=True), -1 if quiet else verbose)
    try:
        from zqfp_compile.pipeline import compile_model

        result = compile_model(
            model,
            _merge(recipe, options),
            output=output,
            reporter=reporter,
            dump_after=tuple(dump_after or ()),
            explain=explain,
        )
    finally:
        reporter.stop()
    if not quiet:
        for line in result.summary():
            typer.echo(line)


def _merge(recipe_file: Path | None, flags: dict[str, Any]) -> Recipe:
    """Flags given on the command line win over the recipe file."""
    values = Recipe.from_yaml(recipe_file).to_dict() if recipe_file else {}
    values.update({key: value for key, value in flags.items() if value is not None})
    return Recipe.from_dict(values)


def run(command: Callable[[], Any], program: str) -> None:
    """Run a typer app; turn every diagnosed error into one line and its exit code."""
    verbose = any(arg in ("-v", "-vv", "--verbose") for arg in sys.argv[1:])
    try:
        command()
    except ZqfpError as error:
        if verbose:
            traceback.print_exc()
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; nothing was written", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        detail = " ".join(str(error).split())[:300]
        print(
            f"{program}: internal error: {type(error).__name__}: {detail} "
            "(run with -v for the traceback and please report it)",
            file=sys.stderr,
        )
        sys.exit(1)


def main() -> None:
    """Entry point of ``zqfp-compile``."""
    run(app, "zqfp-compile")


if __name__ == "__main__":
    main()
