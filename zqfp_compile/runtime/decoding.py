"""Token after token out of a causal language model, its cache kept where the runtime has it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zqfp_compile.backends.session import Session
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.runtime.sampling import Logits, Picker

# Longer prompts go in pieces of so many tokens: attention's memory grows with the square of a piece.
PREFILL_TOKENS = 2048


def causal_lm(session: Session) -> CausalLm:
    """Recognise the interface of a model that can generate.

    Raises:
        UsageError: When it is no causal language model, or its shapes allow no growing text.
    """
    try:
        interface = CausalLm.from_inputs(session.inputs, session.outputs)
    except UsageError as error:
        reason = str(error).partition("; pass --calibration")[0]
        raise UsageError(f"{session.path}: cannot generate text: {reason}") from error
    if interface.sequence_length not in (None, 1):
        raise _fixed(session, f"{interface.sequence_length} tokens at a time")
    if interface.sequence_length == 1 and not interface.past:
        raise _fixed(session, "1 token and no cache")
    for item in interface.past:
        if isinstance(item.spec.dims[item.length_axis], int):
            raise _fixed(session, f"a cache {item.spec.name} of fixed length")
        if item.present is None:
            raise UsageError(f"{session.path}: cannot generate text: no output is the next {item.spec.name}")
    return interface


def _fixed(session: Session, what: str) -> UsageError:
    return UsageError(
        f"{session.path}: cannot generate text: it takes {what}; export the model with dynamic axes"
    )


def generate_tokens(
    session: Session, interface: CausalLm, prompt: Sequence[int], pick: Picker
) -> Iterator[int]:
    """Yield tokens that continue ``prompt``, without end.

    Args:
        session: The model.
        interface: Its interface, from :func:`causal_lm`.
        prompt: Token numbers, at least one.
        pick: From the logits [V] of the last position to the next token.

    Raises:
        ModelError: When the model fails or its logits are not numbers.
    """
    logits_spec = next(spec for spec in session.outputs if spec.name == interface.logits)
    rows = interface.batch_size or 1
    piece = _piece(session, interface)
    cache = {item.spec.name: session.take(item.spec, item.empty(rows)) for item in interface.past}
    names = [interface.logits, *(str(item.present) for item in interface.past)]
    text, done = list(prompt), 0  # the cache holds the first ``done`` tokens
    while True:
        end = min(len(text), done + piece)
        feed = interface.step_inputs(np.array([text[done:end]] * rows), done)
        outputs = session.execute(_values(session, feed) | cache, names)
        if interface.past:
            cache = {item.spec.name: outputs[str(item.present)] for item in interface.past}
            done = end
        if end == len(text):
            logits = session.to_numpy(logits_spec, outputs[interface.logits])[0, -1]
            text.append(pick(_checked(session, logits)))
            yield text[-1]


def _piece(session: Session, interface: CausalLm) -> int:
    """How many tokens go into one step; without a cache all of them must."""
    if not interface.past:
        return sys.maxsize
    limit = interface.sequence_length or session.largest(interface.input_ids, axis=1)
    return PREFILL_TOKENS if limit is None else min(PREFILL_TOKENS, limit)


def _values(session: Session, feed: dict[str, Any]) -> dict[str, Any]:
    specs = {spec.name: spec for spec in session.inputs}
    # A builder drops inputs that nothing reads.
    return {name: session.take(specs[name], array) for name, array in feed.items() if name in specs}


def _checked(session: Session, logits: Logits) -> Logits:
    if np.isnan(logits).any():
        raise ModelError(
            f"{session.path}: the logits are not numbers (NaN); compile it again, or from another export"
        )
    return logits
