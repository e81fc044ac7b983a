"""Calibration and evaluation tokens: from text, from ``.npz`` files, or built in."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zqfp_compile.calibrate.causal_lm import CausalLm, Feed, InputSpec
from zqfp_compile.disk import format_bytes
from zqfp_compile.errors import UsageError
from zqfp_compile.text_file import UnreadableError, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Part = Literal["calibration", "evaluation"]
Tokens = npt.NDArray[np.int64]

# More random tokens would cost minutes and say no more about the accuracy on text.
_RANDOM_EVALUATION_TOKENS = 2048
# Far above any real one: what is larger was not meant, and would fill the memory.
_MAX_TEXT_BYTES, _MAX_TOKENIZER_BYTES = 1 << 28, 1 << 28


@dataclass(frozen=True)
class Samples:
    """What the calibration runs on.

    Attributes:
        feeds: Inputs of each run, by name.
        description: One line for the report.
        warnings: Lines the user must not miss.
        tokens: Number of tokens over all feeds (0 when the model has no tokens).
    """

    feeds: tuple[Feed, ...]
    description: str
    warnings: tuple[str, ...]
    tokens: int

    def hold_out(self, count: int) -> tuple[Samples, Samples]:
        """Split off up to ``count`` runs spread over the others; at least one stays on either side.

        Returns:
            What is left, and what was taken.

        Raises:
            UsageError: When there are fewer than two runs, or they have no tokens.
        """
        if len(self.feeds) < 2 or any("input_ids" not in feed for feed in self.feeds):
            raise UsageError(
                f"{self.description}: too little to measure a perplexity on text that is held out; "
                "give a longer --calibration text"
            )
        count = min(count, len(self.feeds) // 2)
        step = len(self.feeds) / count
        taken = {int(step * (index + 0.5)) for index in range(count)}
        parts = [
            tuple(feed for index, feed in enumerate(self.feeds) if (index in taken) == held)
            for held in (False, True)
        ]
        rest, held_out = (
            Samples(
                feeds,
                f"{self.description} ({len(feeds)} {what})",
                self.warnings,
                sum(int(feed["input_ids"].size) for feed in feeds),
            )
            for feeds, what in zip(parts, ("used", "held out"), strict=True)
        )
        return rest, held_out


@dataclass(frozen=True)
class EvalTokens:
    """What the evaluation scores.

    Attributes:
        tokens: One long text, int64 [T].
        description: One line for the report.
        warnings: Lines the user must not miss.
    """

    tokens: Tokens
    description: str
    warnings: tuple[str, ...] = ()


def load_samples(
    calibration: str | None,
    *,
    tokenizer_path: Path | None,
    interface: CausalLm | None,
    inputs: Sequence[InputSpec],
    samples: int,
    length: int,
    seed: int,
    vocab_size: int | None = None,
) -> Samples:
    """Make the calibration inputs.

    Args:
        calibration: A text file, an ``.npz`` with arrays named as inputs, or ``None`` for built-in text.
        tokenizer_path: The model's ``tokenizer.json``, when it has one.
        interface: How to feed token windows; ``None`` when the model is no causal language model.
        inputs: The model's inputs.
        samples: Number of windows taken evenly over the text.
        length: Tokens per window (the graph's own sequence length wins when it is fixed).
        seed: Seed of the random tokens used when there is no tokenizer.
        vocab_size: Number of tokens random ones are drawn from.

    Raises:
        UsageError: When the file cannot be used with this model.
    """
    if calibration is not None and calibration.endswith(".npz"):
        return _npz_samples(Path(calibration), interface, inputs, samples)
    if interface is None:
        names = ", ".join(spec.name for spec in inputs)
        raise UsageError(
            f"calibration inputs cannot be made for a model with inputs {names}; "
            "pass --calibration FILE.npz with an array per input"
        )
    length = interface.sequence_length or length
    if calibration is None and tokenizer_path is None:
        size = _vocab_size(interface, vocab_size)
        rows = np.random.default_rng(seed).integers(0, size, (samples, length), dtype=np.int64)
        return _token_samples(rows, interface, "random tokens", (_random_warning("calibration"),))
    text, origin = _text(calibration, "calibration", "--calibration")
    tokens = tokenize(text, _need_tokenizer(tokenizer_path, "--calibration"))
    _check_vocabulary(tokens, interface.vocab_size or vocab_size, tokenizer_path)
    windows = take_windows(tokens, samples, length, exact=interface.sequence_length is not None)
    warnings: tuple[str, ...] = ()
    if windows.size < samples * length:
        warnings = (
            f"{origin} has {tokens.size} tokens: calibrating on {windows.shape[0]} windows of "
            f"{windows.shape[1]} tokens instead of {samples} of {length}",
        )
    return _token_samples(windows, interface, origin, warnings)


def load_eval_tokens(
    eval_text: str | None,
    *,
    tokenizer_path: Path | None,
    interface: CausalLm,
    max_tokens: int | None,
    seed: int,
    vocab_size: int | None = None,
    wikitext: bool = False,
) -> EvalTokens:
    """Return the tokens whose perplexity is measured.

    Args:
        eval_text: A text file, or ``None`` for built-in text that shares no paragraph with the calibration's.
        tokenizer_path: The model's ``tokenizer.json``; without it random tokens are used, with a warning.
        interface: The model's interface.
        max_tokens: At most this many tokens from the start; ``None`` for all.
        seed: Seed of the random tokens.
        vocab_size: Number of tokens random ones are drawn from.
        wikitext: Undo WikiText's tokenisation first (see :func:`detokenize_wikitext`).

    Raises:
        UsageError: When the text cannot be used.
    """
    if eval_text is None and tokenizer_path is None:
        size = _vocab_size(interface, vocab_size)
        count = min(max_tokens or _RANDOM_EVALUATION_TOKENS, _RANDOM_EVALUATION_TOKENS)
        random = np.random.default_rng(seed + 1).integers(0, size, count, dtype=np.int64)
        return EvalTokens(random, "random tokens", (_random_warning("evaluation"),))
    text, origin = _text(eval_text, "evaluation", "--eval-text")
    if wikitext:
        text = detokenize_wikitext(text)
    tokens = tokenize(text, _need_tokenizer(tokenizer_path, "--eval-text"))
    _check_vocabulary(tokens, interface.vocab_size or vocab_size, tokenizer_path)
    if tokens.size < 2:
        raise UsageError(
            f"{origin} has {tokens.size} tokens; evaluation needs at least 2: pass a longer text"
        )
    return EvalTokens(tokens[:max_tokens], origin)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        UsageError: When the file is no tokenizer.
    """
    import tokenizers

    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is not a regular file; put the model's tokenizer.json there")
    if path.exists() and path.stat().st_size > _MAX_TOKENIZER_BYTES:
        limit = format_bytes(_MAX_TOKENIZER_BYTES)
        raise UsageError(f"{path}: is larger than {limit}, so no tokenizer.json; export it again")
    with tokenizer_errors(path, "not a tokenizer.json"), _silent_panics():
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # Some tokenizer.json files cut at 512 tokens or pad to a fixed length.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def _silent_panics() -> Iterator[None]:
    """Keep what native code writes off standard error: Rust prints a panic before it is an exception."""
    stderr = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(sink)


@contextmanager
def tokenizer_errors(path: Path, what: str = "cannot read the text") -> Iterator[None]:
    """Diagnose whatever the tokenizers library does about the file ``path``.

    Raises:
        UsageError: In place of its exceptions.
    """
    try:
        yield
    except BaseException as error:
        # It raises bare Exception; a panic of its Rust code is a BaseException without a public name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path}: {what} ({reason}); export it again") from error


def tokenize(text: str, tokenizer_path: Path) -> Tokens:
    """Return the token numbers of ``text``, int64 [T].

    Special tokens are those the tokenizer adds around one text (a leading BOS for LLaMA, none for SmolLM2).

    Raises:
        UsageError: When the file is no tokenizer, or one that fails on the text.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    with tokenizer_errors(tokenizer_path):
        return np.asarray(tokenizer.encode(text).ids, dtype=np.int64)


def take_windows(tokens: Tokens, samples: int, length: int, *, exact: bool = False) -> Tokens:
    """Return up to ``samples`` windows that do not overlap, spread evenly over the text, int64 [M, L].

    A text shorter than ``length`` gives one shorter window.

    Raises:
        UsageError: When there are fewer than 2 tokens, or fewer than ``length`` and the length is ``exact``.
    """
    needed = length if exact else 2
    if tokens.size < needed:
        raise UsageError(
            f"the calibration text has {tokens.size} tokens, {needed} are needed: pass a longer text"
        )
    length = min(length, tokens.size)
    count = min(samples, tokens.size // length)
    starts = np.linspace(0, tokens.size - length, count).astype(np.int64)
    return np.stack([tokens[start : start + length] for start in starts])


@functools.cache
def builtin_text(part: Part) -> str:
    """Return real English text every Python has: the help topics of ``pydoc_data.topics``.

    Topics in alphabetical order go to the two parts in turn. Topics quote each other, so a paragraph that the
    calibration part holds is left out of the evaluation part.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    calibration = _paragraphs(topics[name] for name in names[::2])
    if part == "calibration":
        return "\n\n".join(calibration)
    seen = set(calibration)
    return "\n\n".join(text for text in _paragraphs(topics[name] for name in names[1::2]) if text not in seen)


def detokenize_wikitext(text: str) -> str:
    """Turn WikiText's space-separated tokens back into written English (DESIGN section 8)."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = re.sub(r" ([.,;:!?)\]'%])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    return re.sub(r" (n't|'s)\b", r"\1", text)


def _paragraphs(texts: Any) -> list[str]:
    """Split texts at empty lines; each paragraph once, spaces at its ends removed."""
    found = (part.strip() for text in texts for part in re.split(r"\n\s*\n", text))
    return [part for part in dict.fromkeys(found) if part]


def _text(path: str | None, part: Part, flag: str) -> tuple[str, str]:
    if path is None:
        return builtin_text(part), f"built-in text (Python help topics, {part} part)"
    try:
        return read_text(Path(path), _MAX_TEXT_BYTES, regular=False), Path(path).name
    except UnreadableError as error:
        raise UsageError(f"{flag} {path}: cannot be read ({error}); give a UTF-8 text file") from error


def _need_tokenizer(tokenizer_path: Path | None, flag: str) -> Path:
    if tokenizer_path is None:
        raise UsageError(
            f"{flag}: text needs the model's tokenizer; put its tokenizer.json beside the model"
            + (", or give an .npz of inputs" if flag == "--calibration" else "")
        )
    return tokenizer_path


def _check_vocabulary(tokens: Tokens, vocab_size: int | None, tokenizer_path: Path | None) -> None:
    if vocab_size is not None and tokens.size and int(tokens.max()) >= vocab_size:
        raise UsageError(
            f"{tokenizer_path}: makes token {int(tokens.max())}, the model knows {vocab_size}; "
            "use the tokenizer.json that belongs to the model"
        )


def _vocab_size(interface: CausalLm, vocab_size: int | None) -> int:
    size = interface.vocab_size or vocab_size
    if size is None:
        raise UsageError(
            "the model's vocabulary size is unknown, so random tokens cannot be drawn; "
            "put its tokenizer.json beside the model, or pass --calibration FILE.npz"
        )
    return size


def _random_warning(use: str) -> str:
    return (
        f"no tokenizer.json beside the model: {use} uses RANDOM tokens, which say little about real text; "
        "put the model's tokenizer.json beside it"
    )


def _token_samples(windows: Tokens, interface: CausalLm, origin: str, warnings: tuple[str, ...]) -> Samples:
    batch = interface.batch_size or 1
    feeds = tuple(interface.make_feed(np.repeat(row[None], batch, axis=0)) for row in windows)
    description = f"{windows.shape[0]} x {windows.shape[1]} tokens of {origin}"
    return Samples(feeds, description, warnings, int(windows.size))


def _npz_samples(
    path: Path, interface: CausalLm | None, inputs: Sequence[InputSpec], samples: int
) -> Samples:
    arrays = _read_npz(path)
    specs = {spec.name: spec for spec in inputs}
    unknown = [name for name in arrays if name not in specs]
    if unknown:
        raise UsageError(f"--calibration {path}: {unknown[0]!r} is no input; inputs are {', '.join(specs)}")
    rows = {name: _split_samples(path, specs[name], array) for name, array in arrays.items()}
    counts = {name: len(parts) for name, parts in rows.items()}
    if not counts or min(counts.values()) == 0 or len(set(counts.values())) > 1:
        raise UsageError(
            f"--calibration {path}: samples per array are {counts}; give every input equally many"
        )
    chosen = np.unique(np.linspace(0, min(counts.values()) - 1, samples).astype(int))
    feeds = tuple(
        _complete({name: parts[i] for name, parts in rows.items()}, interface, specs, path) for i in chosen
    )
    tokens = sum(int(feed["input_ids"].size) for feed in feeds if "input_ids" in feed)
    return Samples(feeds, f"{len(feeds)} samples of {path.name}", (), tokens)


def _read_npz(path: Path) -> Feed:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise TypeError("a member is no array")
    except Exception as error:  # numpy, zipfile and its decompressors raise a dozen kinds
        # numpy takes whatever it does not know for a pickle.
        reason = (error.strerror if isinstance(error, OSError) else None) or "not an .npz archive of numbers"
        if isinstance(error, MemoryError):
            reason = "an array is larger than the memory"
        raise UsageError(
            f"--calibration {path}: cannot be read ({reason}); write it with numpy.savez"
        ) from error
    return arrays


def _split_samples(path: Path, spec: InputSpec, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Cut one array into runs: an extra leading axis counts samples, else a varying batch axis does."""
    dtype = spec.dtype.numpy()
    wanted = dtype.kind if dtype.kind in "biu" else "f"
    if array.dtype.kind != wanted:
        raise UsageError(f"--calibration {path}: {spec.name} is {array.dtype}, the model takes {dtype}")
    array = array.astype(dtype)
    rank = len(spec.dims)
    if array.ndim == rank + 1:
        parts = [np.asarray(part) for part in array]  # a scalar's would be no arrays
    elif array.ndim == rank and rank and not isinstance(spec.dims[0], int):
        parts = [array[i : i + 1] for i in range(array.shape[0])]
    else:
        parts = [array]
    for part in parts:
        fits = part.ndim == rank and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(spec.dims, part.shape, strict=True)
        )
        if not fits:
            raise UsageError(
                f"--calibration {path}: {spec.name} has shape {list(array.shape)}, the model takes "
                f"{list(spec.dims)}, with a leading axis for several samples"
            )
    return parts


def _complete(feed: Feed, interface: CausalLm | None, specs: dict[str, InputSpec], path: Path) -> Feed:
    """Add what a causal language model's other inputs must be; anything else must be in the file."""
    if interface is not None and "input_ids" in feed:
        feed = {**interface.make_feed(feed["input_ids"]), **feed}
    missing = [name for name in specs if name not in feed]
    if missing:
        raise UsageError(f"--calibration {path}: has no array for input {missing[0]!r}; add it")
    return feed
