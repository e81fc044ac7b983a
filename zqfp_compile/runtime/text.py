"""Text to tokens and back, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What the decoder puts where bytes are no UTF-8 (yet).
_INCOMPLETE = "\ufffd"


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of ``tokens`` in pieces that together equal the text of all of them.

    A character whose bytes span tokens comes in one piece. Special tokens have no text. A decoder with byte
    fallback (LLaMA 2's) may judge bytes that are no UTF-8 by what follows; a piece that came before stays.
    """
    pending: list[int] = []  # since the last piece, after the tokens that piece ended with
    shown = 0  # of these, already in pieces; they stay because a decoder may join them with what follows
    for token in tokens:
        pending.append(token)
        text = _decode(tokenizer, pending)
        done = _decode(tokenizer, pending[:shown])
        if len(text) > len(done) and not text.endswith(_INCOMPLETE):
            yield text[len(done) :]
            pending = pending[shown:]
            shown = len(pending)
    rest = _decode(tokenizer, pending)[len(_decode(tokenizer, pending[:shown])) :]
    if rest:
        yield rest


def _decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text
