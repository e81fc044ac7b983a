"""``zqfp-generate``: text out of a compiled folder; argument handling and printing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from zqfp_compile.cli import EPILOG, run
from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.output_folder import ARTIFACT
from zqfp_compile.progress import ConsoleReporter, PatientConsole, StepTimer, silence

app = typer.Typer(add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

SAMPLING = "Sampling (greedy by default)"
# A terminal obeys these, and the text is the model's.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@app.command(epilog=EPILOG)
def generate_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Compiled folder, or an ONNX model with its tokenizer.json beside it."
        ),
    ],
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", metavar="TEXT", help="What to continue.", show_default=False)
    ],
    chat: Annotated[
        bool,
        typer.Option("--chat", metavar="", help="Answer: put the prompt into the model's chat template."),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Stop after this many tokens.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            metavar="X",
            help="0 is greedy; 0.7 varies a little, 1 as the model was trained.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k", metavar="N", help="Among the N likeliest tokens; 0: all.", rich_help_panel=SAMPLING
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="X",
            help="Among the likeliest tokens that make up this share.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Repeat a run.", rich_help_panel=SAMPLING),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME",
            help="auto, cpu or cuda.",
            autocompletion=lambda: ["auto", "cpu", "cuda"],
        ),
    ] = "auto",
    verbose: Annotated[
        int,
        typer.Option("-v", "--verbose", count=True, metavar="", show_default=False, help="File and speed."),
    ] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", metavar="", help="Only the text.")] = False,
) -> None:
    """Print what a compiled model writes, as it writes it."""
    from zqfp_compile.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)  # before the slow imports
    reporter = ConsoleReporter(PatientConsole(stderr=True), -1 if quiet else verbose)
    try:
        from zqfp_compile.runtime.engine import Engine
        from zqfp_compile.runtime.text import decode_stream

        with StepTimer(reporter).step("load"):
            engine = Engine.load(folder, device=device)
            tokens = engine.encode(prompt, chat=chat)
    finally:
        reporter.stop()
    reporter.detail(f"{engine.path} on {engine.device}, prompt of {len(tokens)} tokens")
    if engine.path.name == ARTIFACT:
        reporter.info(f"{ARTIFACT} is slow to open; compile with --target onnxruntime to run on the CPU")
    made = _Counted(engine.generate_tokens(tokens, max_new_tokens=max_new_tokens, sampling=sampling))
    begin = time.perf_counter()
    _print(decode_stream(engine.tokenizer, made))
    seconds = time.perf_counter() - begin
    reporter.detail(f"{made.count} tokens in {seconds:.1f} s, {made.count / seconds:.1f} per second")


class _Counted:
    """Passes tokens on and counts them."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = tokens
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            self.count += 1
            yield token


def _print(pieces: Iterable[str]) -> None:
    """Write the pieces as they come, and end the line."""
    shown = sys.stdout.isatty()
    try:
        for piece in pieces:
            sys.stdout.write(piece.translate(_CONTROLS) if shown else piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any more
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        raise MissingDependencyError(f"standard output: cannot be written ({error.strerror})") from error


def main() -> None:
    """Entry point of ``zqfp-generate``."""
    run(app, "zqfp-generate")


if __name__ == "__main__":
    main()
