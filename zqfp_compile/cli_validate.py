"""``zqfp-validate``: two models on the same inputs; argument handling and one table."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from zqfp_compile import json_file
from zqfp_compile.cli import EPILOG, run
from zqfp_compile.compare import Comparison, Gates, OutputComparison, compare_models
from zqfp_compile.errors import AccuracyError
from zqfp_compile.progress import ConsoleReporter, PatientConsole, printable

app = typer.Typer(add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

INPUTS, GATES, OUT = "Inputs", "Gates (exit 4 when one does not hold)", "Output"


@app.command(epilog=EPILOG)
def validate_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference: .onnx, compiled folder or .engine.")],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="The other one, likewise. Load only your own engines.")
    ],
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", help=".npz with an array per input.", rich_help_panel=INPUTS),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="UTF-8 text (default: built-in text).", rich_help_panel=INPUTS),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Runs of each model.", rich_help_panel=INPUTS)
    ] = 4,
    length: Annotated[
        int, typer.Option("--length", min=2, help="Tokens per run.", rich_help_panel=INPUTS)
    ] = 128,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, help="Of random tokens, without a tokenizer.", rich_help_panel=INPUTS),
    ] = 0,
    min_sqnr: Annotated[
        float | None,
        typer.Option("--min-sqnr", help="dB, of the logits (else of every output).", rich_help_panel=GATES),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            min=0,
            max=100,
            help="Top-1 agreement of the logits, percent.",
            rich_help_panel=GATES,
        ),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option("--atol", min=0, help="Every |b - a| <= atol + rtol |a|.", rich_help_panel=GATES),
    ] = None,
    rtol: Annotated[
        float | None, typer.Option("--rtol", min=0, help="Relative part of the same.", rich_help_panel=GATES)
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the result here.", rich_help_panel=OUT)
    ] = None,
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, metavar="", show_default=False, help="More detail.")
    ] = 0,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", metavar="", help="Only warnings and errors.")
    ] = False,
) -> None:
    """Compare two models, or a model and an engine, on the same inputs."""
    json_file.check_folder(json_path)
    reporter = ConsoleReporter(PatientConsole(stderr=True), -1 if quiet else verbose)
    try:
        result = compare_models(
            a,
            b,
            inputs=inputs,
            text=text,
            samples=samples,
            length=length,
            seed=seed,
            gates=Gates(min_sqnr, min_top1, atol, rtol),
            reporter=reporter,
        )
    finally:
        reporter.stop()
    for warning in result.warnings:
        reporter.warn(warning)
    if not quiet:
        _print(result, every_output=verbose > 0)
    json_file.write(result.to_dict(), json_path)
    if result.failures:
        more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
        raise AccuracyError(result.failures[0] + more)


def _print(result: Comparison, every_output: bool) -> None:
    console = PatientConsole()
    console.print(f"A  {result.a}\nB  {result.b}\non {result.inputs}", highlight=False, markup=False)
    table = Table(
        "Output", *(_right(name) for name in ("max |B-A|", "SQNR dB", "cosine", "KL nats", "top-1"))
    )
    tolerance = any(row.beyond_tolerance is not None for row in result.outputs)
    if tolerance:
        table.add_column("beyond", justify="right", no_wrap=True)
    rows = list(result.outputs) if every_output else _grouped(result.outputs)
    for row in rows:
        cells = [
            escape(printable(row.name)),
            f"{row.max_abs_error:.3g}",
            _sqnr(row),
            _optional(row.cosine, ".6f"),
        ]
        cells += [_optional(row.kl, ".3g"), _percent(row.top1_agreement)]
        table.add_row(*cells, *([f"{row.beyond_tolerance:,}"] if tolerance else []))
    console.print(table)
    if len(rows) < len(result.outputs):
        console.print("With *: the worst of all in each column; -v shows them one by one.", style="dim")


def _grouped(outputs: Sequence[OutputComparison]) -> list[OutputComparison]:
    """Put outputs whose names differ in a number, the caches of every layer, into one row of the worst."""
    groups: dict[str, list[OutputComparison]] = {}
    for output in outputs:
        groups.setdefault(re.sub(r"\d+", "*", output.name), []).append(output)
    return [rows[0] if len(rows) == 1 else _worst(name, rows) for name, rows in groups.items()]


def _worst(name: str, rows: Sequence[OutputComparison]) -> OutputComparison:
    beyond = [row.beyond_tolerance for row in rows if row.beyond_tolerance is not None]
    return dataclasses.replace(
        rows[0],
        name=f"{name} x{len(rows)}",
        max_abs_error=max(row.max_abs_error for row in rows),
        sqnr_db=min(row.sqnr_db for row in rows),
        cosine=min(row.cosine for row in rows),
        nonfinite=sum(row.nonfinite for row in rows),
        beyond_tolerance=sum(beyond) if beyond else None,
    )


def _right(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def _sqnr(row: OutputComparison) -> str:
    return "equal" if row.equal else _optional(row.sqnr_db, ".1f")


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def main() -> None:
    """Entry point of ``zqfp-validate``."""
    run(app, "zqfp-validate")


if __name__ == "__main__":
    main()
