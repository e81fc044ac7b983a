from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from zqfp_compile.calibrate.causal_lm import CausalLm, InputSpec
from zqfp_compile.calibrate.samples import (
    Samples,
    builtin_text,
    detokenize_wikitext,
    load_eval_tokens,
    load_samples,
    take_windows,
    tokenize,
)
from zqfp_compile.errors import UsageError

IDS = InputSpec("input_ids", ir.DataType.INT64, ("b", "s"))
MASK = InputSpec("attention_mask", ir.DataType.INT64, ("b", "t"))
LM = CausalLm.from_inputs([IDS, MASK], [InputSpec("logits", ir.DataType.FLOAT, ("b", "s", 320))])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level tokenizer that also asks for truncation, as some tokenizer.json files do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tool = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tool.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tool.decoder = decoders.ByteLevel()
    tool.enable_truncation(16)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tool.save(str(path))
    assert json.loads(path.read_text())["truncation"] is not None
    return path


def load(calibration: Path | str | None, tokenizer: Path | None, **changes) -> Samples:
    options = {"interface": LM, "inputs": [IDS, MASK], "samples": 4, "length": 10, "seed": 0, **changes}
    path = None if calibration is None else str(calibration)
    return load_samples(path, tokenizer_path=tokenizer, **options)


def test_text_becomes_even_windows(tmp_path: Path, tokenizer: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i % 90) for i in range(100)))
    samples = load(text, tokenizer)
    assert samples.tokens == 40 and not samples.warnings and "text.txt" in samples.description
    everything = tokenize(text.read_text(), tokenizer)
    assert everything.size == 100  # the file's truncation to 16 is ignored
    for feed, start in zip(samples.feeds, (0, 30, 60, 90), strict=True):
        np.testing.assert_array_equal(feed["input_ids"], everything[None, start : start + 10])
        assert feed["attention_mask"].all()


def test_short_text_warns_and_tiny_text_fails(tmp_path: Path, tokenizer: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 25)
    samples = load(text, tokenizer)
    assert [feed["input_ids"].shape for feed in samples.feeds] == [(1, 10), (1, 10)]
    assert "25 tokens" in samples.warnings[0]
    text.write_text("x")
    with pytest.raises(UsageError, match="1 tokens"):
        load(text, tokenizer)


def test_windows_do_not_overlap() -> None:
    windows = take_windows(np.arange(37), 5, 8)
    assert windows.shape == (4, 8)
    assert np.unique(windows).size == windows.size
    with pytest.raises(UsageError, match="are needed"):
        take_windows(np.arange(5), 1, 8, exact=True)


def test_builtin_parts_share_no_paragraph() -> None:
    parts = {part: builtin_text(part) for part in ("calibration", "evaluation")}
    sets = {name: set(re.split(r"\n\s*\n", text)) for name, text in parts.items()}
    assert not {p.strip() for p in sets["calibration"]} & {p.strip() for p in sets["evaluation"]}
    # 20,000 tokens for the evaluation: real tokenizers make about one token of four characters of this text.
    assert len(parts["evaluation"]) > 100_000 and len(parts["calibration"]) > 100_000


def test_no_text_takes_builtin(tokenizer: Path) -> None:
    samples = load(None, tokenizer)
    assert samples.tokens == 40 and "built-in" in samples.description and not samples.warnings
    evaluation = load_eval_tokens(None, tokenizer_path=tokenizer, interface=LM, max_tokens=1000, seed=0)
    assert evaluation.tokens.size == 1000
    np.testing.assert_array_equal(evaluation.tokens, tokenize(builtin_text("evaluation"), tokenizer)[:1000])


def test_no_tokenizer_means_loud_random_tokens() -> None:
    first, again, other = load(None, None), load(None, None), load(None, None, seed=1)
    assert "RANDOM" in first.warnings[0]
    ids = [np.concatenate([f["input_ids"] for f in s.feeds]) for s in (first, again, other)]
    np.testing.assert_array_equal(ids[0], ids[1])
    assert (ids[0] != ids[2]).any() and ids[0].max() < 320
    evaluation = load_eval_tokens(None, tokenizer_path=None, interface=LM, max_tokens=100, seed=0)
    assert "RANDOM" in evaluation.warnings[0] and evaluation.tokens.size == 100


def test_vocabulary_of_another_model(tokenizer: Path) -> None:
    small = CausalLm.from_inputs([IDS], [InputSpec("logits", ir.DataType.FLOAT, ("b", "s", 20))])
    with pytest.raises(UsageError, match="the model knows 20"):
        load(None, tokenizer, interface=small)


def test_npz_tokens_get_the_other_inputs(tmp_path: Path) -> None:
    path = tmp_path / "ids.npz"
    np.savez(path, input_ids=np.arange(50).reshape(5, 10))
    samples = load(path, None, samples=3)
    assert samples.tokens == 30
    assert [int(feed["input_ids"][0, 0]) for feed in samples.feeds] == [0, 20, 40]
    assert samples.feeds[0]["attention_mask"].shape == (1, 10)


def test_npz_for_any_model(tmp_path: Path) -> None:
    image = InputSpec("image", ir.DataType.FLOAT16, ("b", 3, 4, 4))
    path = tmp_path / "images.npz"
    np.savez(path, image=np.ones((6, 2, 3, 4, 4), np.float32))
    samples = load(path, None, interface=None, inputs=[image], samples=8)
    assert [feed["image"].shape for feed in samples.feeds] == [(2, 3, 4, 4)] * 6
    assert samples.feeds[0]["image"].dtype == np.float16


def test_npz_with_a_scalar_input(tmp_path: Path) -> None:
    flag = InputSpec("flag", ir.DataType.BOOL, ())
    path = tmp_path / "flags.npz"
    np.savez(path, flag=np.array([True, False]))
    samples = load(path, None, interface=None, inputs=[flag], samples=8)
    assert [type(feed["flag"]) for feed in samples.feeds] == [np.ndarray] * 2


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"tokens": np.zeros((1, 4), np.int64)}, "'tokens' is no input"),
        ({"input_ids": np.zeros((1, 4), np.float32)}, "is float32"),
        ({"input_ids": np.zeros(4, np.int64)}, "has shape"),
        (
            {"input_ids": np.zeros((2, 4), np.int64), "attention_mask": np.ones((3, 4), np.int64)},
            "equally many",
        ),
        ({"attention_mask": np.ones((3, 4), np.int64)}, "no array for input 'input_ids'"),
    ],
)
def test_wrong_npz(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=says):
        load(path, None)


def test_unreadable_files(tmp_path: Path, tokenizer: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(UsageError, match="cannot be read"):
        load(broken, None)
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "missing.txt", tokenizer)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 50)
    with pytest.raises(UsageError, match="not UTF-8"):
        load(latin, tokenizer)
    latin.write_text("plain")
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        load(latin, None)
    with pytest.raises(UsageError, match=r"not a tokenizer\.json"):
        tokenize("x", broken)


def test_other_models_need_npz() -> None:
    image = InputSpec("image", ir.DataType.FLOAT, ("b", 3))
    with pytest.raises(UsageError, match=r"inputs image.*FILE\.npz"):
        load(None, None, interface=None, inputs=[image])


def test_detokenize_wikitext() -> None:
    tokenised = (
        "a two @-@ part ( 10 @,@ 000 m ) tale , it did n't win 3 @.@ 5 % of Teddy 's votes ; \" no \" ."
    )
    assert detokenize_wikitext(tokenised) == (
        "a two-part (10,000 m) tale, it didn't win 3.5% of Teddy's votes; \" no \"."
    )
