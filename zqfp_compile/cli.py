"""``zqfp-compile``: argument handling, nothing else."""

from __future__ import annotations

import io
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, cast, get_args

import typer

from zqfp_compile import __version__
from zqfp_compile import recipe as recipes
from zqfp_compile.errors import MissingDependencyError, UsageError, ZqfpError, notes
from zqfp_compile.progress import ConsoleReporter, PatientConsole, printable, silence
from zqfp_compile.recipe import Recipe

EPILOG = (
    "Exit codes: 0 done, 2 usage, 3 bad model, 4 accuracy gate failed, 5 builder failed, "
    "6 environment (missing library, no GPU, no space)."
)
# People press Ctrl-C twice: the second one must not interrupt the clean-up.
_SAME_SIGNAL_SECONDS = 2.0
# The base of typer's complaints about arguments; newer versions have no public name for it.
_ArgumentError = cast(type[Exception], typer.BadParameter.__bases__[0])

app = typer.Typer(add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


class _Stopped(BaseException):
    """A signal asked the process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signal = signal.Signals(signum)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"zqfp-compile {__version__}")
        raise typer.Exit


def _group(title: str, help_text: str, *flags: str, **extra: Any) -> Any:
    return typer.Option(*flags, help=help_text, rich_help_panel=title, show_default=False, **extra)


def _choice(title: str, choices: Any, flag: str, note: str = "") -> Any:
    """An option with the values of a ``Literal`` of the recipe, which checks it."""
    values = [str(value) for value in get_args(choices)]
    default = getattr(Recipe(), flag.lstrip("-").replace("-", "_"))
    named = [f"{value} (default)" if value == default else value for value in values]
    text = f"{note}{', '.join(named[:-1])} or {named[-1]}."
    return _group(title, text, flag, metavar="NAME", autocompletion=lambda: values)


def _group_size(text: str) -> int | str:
    """A number as such; the recipe checks the rest."""
    return int(text) if text.isdecimal() else text


def _pass_names() -> list[str]:
    from zqfp_compile.registry import PASSES

    return list(PASSES)


QUANT, ENGINE, OUT, WORK = "Quantization", "Engine", "Output", "Work"
CALIBRATION, EVALUATION, COMPARE = "Calibration", "Evaluation", "Comparison"
_OF_EVERY_RUN = ("verbose", "quiet", "version")
_NOT_IN_THE_RECIPE = (
    *("model", "output", "recipe", "dump_after", "explain", *_OF_EVERY_RUN),
    *("jobs", "cluster", "fresh", "compare", "json_path"),
)


@app.command(epilog=EPILOG)
def compile_command(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="ONNX model; external data beside it is found by itself.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _group(OUT, "Output folder (default: MODEL.zqfp beside it).", "-o", "--output", metavar="FOLDER"),
    ] = None,
    recipe: Annotated[
        Path | None,
        _group(OUT, "YAML file of these options; flags given here win.", "--recipe", metavar="FILE"),
    ] = None,
    weights: Annotated[str | None, _choice(QUANT, recipes.Weights, "--weights")] = None,
    fp4_format: Annotated[str | None, _choice(QUANT, recipes.Fp4Format, "--fp4-format")] = None,
    algorithm: Annotated[
        str | None, _choice(QUANT, recipes.Algorithm, "--algorithm", "Rounding of the weights: ")
    ] = None,
    activations: Annotated[str | None, _choice(QUANT, recipes.Activations, "--activations")] = None,
    activation_scale: Annotated[
        str | None,
        _choice(
            QUANT, recipes.ActivationScale, "--activation-scale", "One static per tensor, or per token: "
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        _choice(
            QUANT,
            recipes.KvCacheDtype,
            "--kv-cache-dtype",
            "KV cache in the model's own type, or half of it: ",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        _choice(QUANT, recipes.Attention, "--attention", "Operands of attention's matrix products: "),
    ] = None,
    group_size: Annotated[
        Any,
        _group(
            QUANT,
            "Weights along K per group scale (default 64), or row.",
            "--group-size",
            metavar="N",
            parser=_group_size,
        ),
    ] = None,
    scale_constraint: Annotated[
        str | None, _choice(QUANT, recipes.ScaleConstraint, "--scale-constraint")
    ] = None,
    scale_rows: Annotated[
        int | None,
        _group(QUANT, "Rows that share one scale under m2 (default 1).", "--scale-rows", metavar="N"),
    ] = None,
    lorc_rank: Annotated[
        int | None,
        _group(QUANT, "Rank of the error compensation (default 16; 0: off).", "--lorc-rank", metavar="N"),
    ] = None,
    lorc_budget: Annotated[
        float | None,
        _group(
            QUANT,
            "Choose ranks per layer for this many bits per weight (rank: at most --lorc-rank, default 64).",
            "--lorc-budget",
            metavar="BITS",
        ),
    ] = None,
    auto: Annotated[
        str | None,
        _group(
            QUANT,
            "Choose formats and ranks per layer: bits=4.5 or perplexity=+2%.",
            "--auto",
            metavar="GOAL",
            autocompletion=lambda: ["bits=4.5", "perplexity=+2%"],
        ),
    ] = None,
    lorc_format: Annotated[
        str | None,
        _choice(
            QUANT, recipes.LorcFormat, "--lorc-format", "Its factors in the layer's float type, or fp8: "
        ),
    ] = None,
    distill_tokens: Annotated[
        int | None,
        _group(
            QUANT,
            "Train row scales and LoRC end to end on this many tokens of calibration text (default 0: off).",
            "--distill-tokens",
            metavar="N",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        _group(QUANT, "Only layers whose name matches a regex (repeatable).", "--include", metavar="RE"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        _group(QUANT, "Not the layers whose name matches the regex (repeatable).", "--exclude", metavar="RE"),
    ] = None,
    quantize_lm_head: Annotated[
        bool | None,
        _group(
            QUANT,
            "Also rewrite the output projection (default: no).",
            "--quantize-lm-head/--no-quantize-lm-head",
            metavar="",
        ),
    ] = None,
    quantize_embedding: Annotated[
        bool | None,
        _group(
            QUANT,
            "Also store the token embedding in FP8 (default: no).",
            "--quantize-embedding/--float-embedding",
            metavar="",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        _group(
            CALIBRATION,
            "Text (with the model's tokenizer.json) or .npz of inputs (default: built-in text).",
            "--calibration",
            metavar="FILE",
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None,
        _group(
            CALIBRATION, "Calibration windows (default 8, gptq 48).", "--calibration-samples", metavar="N"
        ),
    ] = None,
    calibration_length: Annotated[
        int | None,
        _group(
            CALIBRATION,
            "Tokens per calibration window (default 512, gptq 1024).",
            "--calibration-length",
            metavar="N",
        ),
    ] = None,
    device: Annotated[
        str | None, _choice(CALIBRATION, recipes.Device, "--device", "Where gptq and distillation compute: ")
    ] = None,
    devices: Annotated[
        str | None,
        _group(
            CALIBRATION,
            "Several GPUs for gptq, such as cuda:0,cuda:1 (instead of --device).",
            "--devices",
            metavar="LIST",
        ),
    ] = None,
    seed: Annotated[
        int | None, _group(CALIBRATION, "Seed of everything random (default 0).", "--seed", metavar="N")
    ] = None,
    eval_text: Annotated[
        str | None,
        _group(
            EVALUATION, "Text for the perplexity (default: built-in text).", "--eval-text", metavar="FILE"
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        _group(EVALUATION, "Score at most this many tokens (default 20480).", "--eval-tokens", metavar="N"),
    ] = None,
    eval_length: Annotated[
        int | None,
        _group(EVALUATION, "Tokens per evaluation window (default 1024).", "--eval-length", metavar="N"),
    ] = None,
    evaluate: Annotated[
        bool | None,
        _group(
            EVALUATION,
            "Measure perplexity and logits (default: yes).",
            "--evaluate/--no-evaluate",
            metavar="",
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        _group(
            EVALUATION,
            "Fail (exit 4) when perplexity rises by more percent.",
            "--max-perplexity-increase",
            metavar="X",
        ),
    ] = None,
    target: Annotated[str | None, _choice(ENGINE, recipes.Target, "--target")] = None,
    weight_lowering: Annotated[
        str | None, _choice(ENGINE, recipes.WeightLowering, "--weight-lowering", "Weights in the engine: ")
    ] = None,
    compute_capability: Annotated[
        str | None,
        _group(ENGINE, "Architecture to build for, such as 89 or 120.", "--compute-capability", metavar="CC"),
    ] = None,
    min_shapes: Annotated[
        str | None,
        _group(ENGINE, "Profile minimum, NAME:1x1,OTHER:1x8.", "--min-shapes", "--minShapes", metavar="DIMS"),
    ] = None,
    opt_shapes: Annotated[
        str | None,
        _group(ENGINE, "Profile optimum, same form.", "--opt-shapes", "--optShapes", metavar="DIMS"),
    ] = None,
    max_shapes: Annotated[
        str | None,
        _group(ENGINE, "Profile maximum, same form.", "--max-shapes", "--maxShapes", metavar="DIMS"),
    ] = None,
    timing_cache: Annotated[
        str | None,
        _group(
            ENGINE,
            "File that keeps builder timings.",
            "--timing-cache",
            metavar="FILE",
        ),
    ] = None,
    builder_timeout: Annotated[
        int | None,
        _group(ENGINE, "Seconds the builder may take (default 3600).", "--builder-timeout", metavar="N"),
    ] = None,
    builder_memory_gb: Annotated[
        float | None,
        _group(ENGINE, "Memory limit of the builder, GiB.", "--builder-memory-gb", metavar="X"),
    ] = None,
    emit: Annotated[
        list[str] | None,
        _group(
            OUT,
            "Also write fp4 (FLOAT4E2M1), engine-onnx, onnxruntime or triton-repository (repeatable).",
            "--emit",
            metavar="NAME",
            autocompletion=lambda: list(get_args(recipes.Emit)),
        ),
    ] = None,
    dump_after: Annotated[
        list[str] | None,
        _group(
            OUT,
            "Write the model after this pass into FOLDER/dump (repeatable).",
            "--dump-after",
            metavar="PASS",
            autocompletion=_pass_names,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        _group(
            WORK,
            "Processes that round weights (default: one per core for large models).",
            "--jobs",
            metavar="N",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        _group(WORK, "Round weights on this Ray cluster, such as auto.", "--cluster", metavar="ADDRESS"),
    ] = None,
    fresh: Annotated[
        bool,
        _group(WORK, "Do not go on from the work of a compile that was killed.", "--fresh", metavar=""),
    ] = False,
    explain: Annotated[
        bool,
        _group(OUT, "Say for each linear layer why it was or was not rewritten.", "--explain", metavar=""),
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        _group(
            COMPARE,
            "Instead of a compile: what differs between two compiled folders.",
            "--compare",
            metavar="RUN1 RUN2",
        ),
    ] = None,
    json_path: Annotated[
        Path | None, _group(COMPARE, "Also write the comparison here.", "--json", metavar="FILE")
    ] = None,
    verbose: Annotated[
        int,
        typer.Option(
            "-v",
            "--verbose",
            count=True,
            metavar="",
            show_default=False,
            help="More; twice: tracebacks.",
        ),
    ] = 0,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", metavar="", help="Only warnings and errors.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, metavar="", help="Print the version."
        ),
    ] = False,
) -> None:
    """Compile an LLM in ONNX into a W4A8 floating-point model, an engine and an accuracy report."""
    options = dict(locals())
    if compare is not None:
        _compare(compare, json_path, options)
        return
    if json_path is not None:
        raise UsageError("--json goes with --compare; a compile writes report.json into its folder")
    if model is None:
        raise UsageError("Missing argument 'MODEL'; see zqfp-compile --help")
    for name in _NOT_IN_THE_RECIPE:
        options.pop(name)
    merged = _merge(recipe, options)  # before the slow imports
    reporter = ConsoleReporter(PatientConsole(stderr=True), -1 if quiet else verbose)
    try:
        from zqfp_compile.pipeline import compile_model

        result = compile_model(
            model,
            merged,
            output=output,
            reporter=reporter,
            dump_after=tuple(dump_after or ()),
            explain=explain,
            jobs=jobs,
            cluster=cluster,
            fresh=fresh,
        )
    finally:
        reporter.stop()
    if not quiet:
        _print_summary(result.summary(), result.folder)


def _compare(runs: tuple[Path, Path], json_path: Path | None, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None and value is not False]
    foreign = [name for name in given if name not in ("compare", "json_path", *_OF_EVERY_RUN)]
    if foreign:
        what = "MODEL" if foreign[0] == "model" else f"--{foreign[0].replace('_', '-')}"
        raise UsageError(f"--compare takes two compiled folders and no {what}; leave it out")
    from zqfp_compile.cli_compare import compare

    compare(*runs, json_path=json_path, every_layer=options["verbose"] > 0, quiet=options["quiet"])


def _print_summary(lines: list[str], folder: Path) -> None:
    try:
        print("\n".join(map(printable, lines)), flush=True)
    except BrokenPipeError:  # nobody reads any more
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        raise MissingDependencyError(
            f"standard output: the summary cannot be written ({error.strerror}); {folder} is complete, "
            "its report.json holds the same"
        ) from error


def _merge(recipe_file: Path | None, flags: dict[str, Any]) -> Recipe:
    """Flags given on the command line win over the recipe file."""
    values = Recipe.from_yaml(recipe_file).to_dict() if recipe_file else {}
    values.update({key: value for key, value in flags.items() if value is not None})
    return Recipe.from_dict(values)


def _catch_signals() -> None:
    """Ctrl-C, a polite kill and a closed terminal raise :class:`_Stopped`: everything is cleaned up."""
    last = -_SAME_SIGNAL_SECONDS

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _SAME_SIGNAL_SECONDS:
            raise _Stopped(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup, a shell's background job
            signal.signal(signum, stop)


def _stopped_text(stopped: _Stopped) -> str:
    name = "Ctrl-C" if stopped.signal == signal.SIGINT else stopped.signal.name
    return "; ".join([f"stopped by {name}", *(notes(stopped) or ["what was unfinished is removed"])])


def _signal_before(error: BaseException | None) -> _Stopped | None:
    """Return the signal that a library turned into ``error``: it may come in the middle of anything."""
    while error is not None and not isinstance(error, _Stopped):
        error = error.__cause__ or error.__context__
    return error


def _let_go_of_signals() -> None:
    """The work is done or undone: Python must end without another exception from :func:`_catch_signals`."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            # People press Ctrl-C twice; whoever sends another signal means it.
            signal.signal(signum, signal.SIG_IGN if signum == signal.SIGINT else signal.SIG_DFL)


def run(command: Callable[..., Any], program: str) -> None:
    """Run a typer app to its exit code; every diagnosed error becomes one line."""
    flags = sys.argv[1:]
    verbosity = flags.count("-v") + flags.count("--verbose") + 2 * flags.count("-vv")
    try:
        _catch_signals()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that has no such character
        # Typer's own mode prints a box of several lines for an error and nothing for an interrupt.
        code = command(standalone_mode=False, prog_name=program)
        sys.exit(code if isinstance(code, int) else 0)
    except ZqfpError as error:
        _fail(program, "; ".join([str(error), *notes(error)]), error.exit_code, verbosity > 1)
    except _ArgumentError as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        _fail(program, f"{text.rstrip('.')}; see {program} --help", UsageError.exit_code)
    except _Stopped as stopped:
        _fail(program, _stopped_text(stopped), 128 + stopped.signal)
    except MemoryError as error:
        text = "memory ran out; close other programs, or lower --calibration-length, --eval-length or --jobs"
        _fail(program, "; ".join([text, *notes(error)]), MissingDependencyError.exit_code, verbosity > 1)
    except ImportError as error:
        detail = " ".join(str(error).split())[:300]
        text = f"a library cannot be loaded ({detail}); run zqfp-doctor, or install zqfp-compile again"
        _fail(program, text, MissingDependencyError.exit_code, verbosity > 0)
    except Exception as error:
        before = _signal_before(error)
        if before is not None:
            _fail(program, _stopped_text(before), 128 + before.signal)
        detail = " ".join(str(error).split())[:300]
        _fail(
            program,
            f"internal error: {type(error).__name__}: {detail} (run with -v for the traceback and please "
            "report it)",
            1,
            verbosity > 0,
        )
    finally:
        _let_go_of_signals()


def _fail(program: str, text: str, code: int, show_traceback: bool = False) -> NoReturn:
    try:
        if show_traceback:
            traceback.print_exc()
        print(f"{program}: error: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
    sys.exit(code)


def main() -> None:
    """Entry point of ``zqfp-compile``."""
    run(app, "zqfp-compile")


if __name__ == "__main__":
    main()
