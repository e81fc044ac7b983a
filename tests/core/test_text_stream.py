"""Streaming text: whatever the tokens, the pieces are the text, and no piece ends inside a character."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zqfp_compile.runtime.text import decode_stream

tokenizers = pytest.importorskip("tokenizers")


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: a token is some bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """LLaMA-2's kind: a token is some text with a mark for spaces, or one byte; the first space is cut."""
    words = ["<unk>", "▁", "▁the", "▁sea", "s", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
TEXTS = st.text(max_size=30) | st.sampled_from(["🍎🍎", "naïve café", "日本語", "👩‍👩‍👧", "\u0000 x", "�"])


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_characters_come_whole(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text).ids
    pieces = list(decode_stream(BYTE_LEVEL, tokens))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
@example([*BYTE_LEVEL.encode("é").ids[:1], *BYTE_LEVEL.encode("a").ids])
def test_any_bytes(tokens: list[int]) -> None:
    """Also those that are no UTF-8, and special tokens between the bytes of a character."""
    assert "".join(decode_stream(BYTE_LEVEL, tokens)) == BYTE_LEVEL.decode(tokens, skip_special_tokens=True)


WORDS = st.sampled_from([1, 2, 3, 4, 5, 262]).map(lambda token: [token])
BYTES = TEXTS.filter(lambda text: "\ufffd" not in text).map(lambda text: [6 + byte for byte in text.encode()])


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS | BYTES, max_size=10))
def test_a_decoder_that_joins_tokens(parts: list[list[int]]) -> None:
    tokens = [token for part in parts for token in part]
    pieces = list(decode_stream(BYTE_FALLBACK, tokens))
    assert "".join(pieces) == BYTE_FALLBACK.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_come_as_soon_as_they_can() -> None:
    """One token is taken per piece, not the whole stream."""
    taken = []

    def tokens():
        for token in BYTE_LEVEL.encode("héy").ids:
            taken.append(token)
            yield token

    stream = decode_stream(BYTE_LEVEL, tokens())
    assert [(piece, len(taken)) for piece in stream] == [("h", 1), ("é", 3), ("y", 4)]
