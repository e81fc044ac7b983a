"""The same inputs for two models, each in its own terms (``zqfp-validate``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zqfp_compile.backends.runners import Runner
from zqfp_compile.calibrate.causal_lm import CausalLm, Feed
from zqfp_compile.calibrate.samples import load_eval_tokens, load_samples, take_windows
from zqfp_compile.companions import companion_folder
from zqfp_compile.errors import UsageError


@dataclass(frozen=True)
class Inputs:
    """What both models run on: ``feeds_a[i]`` and ``feeds_b[i]`` say the same in each model's own terms."""

    feeds_a: tuple[Feed, ...]
    feeds_b: tuple[Feed, ...]
    description: str
    warnings: tuple[str, ...]


def make_inputs(
    a: Runner, b: Runner, npz: Path | None, text: Path | None, samples: int, length: int, seed: int
) -> Inputs:
    """Make the inputs of both models.

    Args:
        a: The reference.
        b: The other model.
        npz: Arrays named as inputs; else token windows of ``text``.
        text: UTF-8 text; ``None`` takes built-in text.
        samples: Number of runs.
        length: Tokens per run.
        seed: Seed of the random tokens used when neither model has a tokenizer beside it.

    Raises:
        UsageError: When the inputs cannot be used with these models.
    """
    if npz is not None:
        if text is not None:
            raise UsageError("--inputs and --text exclude each other; give one of them")
        return _npz_inputs(a, b, npz, samples)
    return _token_inputs(a, b, text, samples, length, seed)


def _npz_inputs(a: Runner, b: Runner, npz: Path, samples: int) -> Inputs:
    if npz.suffix != ".npz":
        raise UsageError(f"--inputs {npz}: not an .npz file; write it with numpy.savez, an array per input")
    made = []
    for runner in (a, b):
        try:
            interface = CausalLm.from_inputs(runner.inputs, runner.outputs)
        except UsageError:
            interface = None
        try:
            made.append(
                load_samples(
                    str(npz),
                    tokenizer_path=None,
                    interface=interface,
                    inputs=runner.inputs,
                    samples=samples,
                    length=1,
                    seed=0,
                )
            )
        except UsageError as error:
            raise _in_our_terms(error, runner) from error
    return Inputs(made[0].feeds, made[1].feeds, made[0].description, made[0].warnings)


def _token_inputs(a: Runner, b: Runner, text: Path | None, samples: int, length: int, seed: int) -> Inputs:
    """Give each model the same tokens through its own interface; their other inputs may differ."""
    models = [_interface(runner) for runner in (a, b)]
    fixed = {model.sequence_length for model in models} - {None}
    if len(fixed) > 1:
        raise UsageError(f"{a.path} and {b.path} have fixed sequence lengths {fixed}; pass --inputs FILE.npz")
    exact = bool(fixed)
    length = fixed.pop() or length if fixed else length
    try:
        tokens = load_eval_tokens(
            None if text is None else str(text),
            tokenizer_path=_find_tokenizer(a, b),
            interface=models[0],
            max_tokens=samples * length,
            seed=seed,
            vocab_size=models[1].vocab_size or a.vocab_size or b.vocab_size,
        )
        windows = take_windows(tokens.tokens, samples, length, exact=exact)
    except UsageError as error:
        raise _in_our_terms(error, a) from error
    warnings = tokens.warnings
    if windows.shape != (samples, length):
        warnings += (f"only {windows.shape[0]} windows of {windows.shape[1]} tokens: the text has no more",)
    description = f"{windows.shape[0]} x {windows.shape[1]} tokens of {tokens.description}"
    feeds_a, feeds_b = (tuple(_feeds(model, windows)) for model in models)
    return Inputs(feeds_a, feeds_b, description, warnings)


def _feeds(model: CausalLm, windows: npt.NDArray[np.int64]) -> Iterator[Feed]:
    for row in windows:
        yield model.make_feed(np.repeat(row[None], model.batch_size or 1, axis=0))


def _interface(runner: Runner) -> CausalLm:
    try:
        return CausalLm.from_inputs(runner.inputs, runner.outputs)
    except UsageError as error:
        raise _in_our_terms(error, runner) from error


def _in_our_terms(error: UsageError, runner: Runner) -> UsageError:
    """Name this command's options in an error about the compiler's."""
    text = str(error).replace("--calibration FILE.npz", "--inputs FILE.npz").replace("--eval-text", "--text")
    return UsageError(f"{runner.path}: {text.replace('--calibration', '--inputs')}")


def _find_tokenizer(*runners: Runner) -> Path | None:
    places = [companion_folder(runner.path) / "tokenizer.json" for runner in runners]
    return next((place for place in places if place.is_file()), None)
