from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from zqfp_compile.calibrate.causal_lm import CausalLm, InputSpec, find_vocab_size
from zqfp_compile.errors import UsageError

I64, F16 = ir.DataType.INT64, ir.DataType.FLOAT16
TOKENS = np.arange(6, dtype=np.int64).reshape(2, 3)
LOGITS = InputSpec("logits", F16, ("b", "s", 320))


def spec(name: str, *dims: int | str | None, dtype: ir.DataType = I64) -> InputSpec:
    return InputSpec(name, dtype, dims)


def cache(style: str, layers: int = 2) -> list[InputSpec]:
    names = [style.format(n=n, kind=kind) for n in range(layers) for kind in ("key", "value")]
    return [spec(name, "b", 4, "p", 16, dtype=F16) for name in names]


STYLES = {
    "torch": ("past_key_values.{n}.{kind}", "present.{n}.{kind}"),
    "flat": ("past_{kind}_{n}", "present_{kind}_{n}"),
    "legacy": ("past_key_values_{n}_{kind}", "present_key_values_{n}_{kind}"),
}


@pytest.mark.parametrize("style", STYLES)
def test_recognises_cache_names_of_every_exporter(style: str) -> None:
    past_style, present_style = STYLES[style]
    inputs = [spec("input_ids", "b", "s"), spec("attention_mask", "b", "t"), *cache(past_style)]
    presents = cache(present_style)[::-1]  # order must not matter where names tell
    model = CausalLm.from_inputs(inputs, [*presents, LOGITS])
    assert (model.logits, model.vocab_size) == ("logits", 320)
    for item in model.past:
        assert (item.batch_axis, item.length_axis) == (0, 2)
        number = [c for c in item.spec.name if c.isdigit()]
        kind = "key" if "key" in item.spec.name.replace("key_values", "") else "value"
        assert item.present is not None
        assert number[0] in item.present and kind in item.present.replace("key_values", "")


def test_first_feed_has_empty_cache_and_nothing_masked() -> None:
    inputs = [
        spec("input_ids", "b", "s", dtype=ir.DataType.INT32),
        spec("attention_mask", "b", "t"),
        spec("position_ids", "b", "s"),
        spec("cache_position", "s"),
        spec("token_type_ids", "b", "s"),
        spec("use_cache_branch", 1, dtype=ir.DataType.BOOL),
        *cache("past_key_values.{n}.{kind}"),
    ]
    model = CausalLm.from_inputs(inputs, [LOGITS, *cache("present.{n}.{kind}")])
    feed = model.make_feed(TOKENS)
    assert list(feed) == ["input_ids", *(s.name for s in inputs[1:])]
    assert feed["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(feed["attention_mask"], np.ones((2, 3)))
    np.testing.assert_array_equal(feed["position_ids"], [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(feed["cache_position"], [0, 1, 2])
    assert feed["use_cache_branch"].tolist() == [False]
    assert feed["past_key_values.1.value"].shape == (2, 4, 0, 16)
    assert feed["past_key_values.1.value"].dtype == np.float16


def test_feed_with_past_continues_positions_and_mask() -> None:
    inputs = [
        spec("input_ids", "b", "s"),
        spec("attention_mask", "b", "t"),
        spec("position_ids", "b", "s"),
        spec("use_cache_branch", 1, dtype=ir.DataType.BOOL),
        *cache("past_key_values.{n}.{kind}"),
    ]
    model = CausalLm.from_inputs(inputs, [LOGITS, *cache("present.{n}.{kind}")])
    outputs = {f"present.{n}.{k}": np.full((2, 4, 5, 16), n) for n in (0, 1) for k in ("key", "value")}
    past = model.next_past(outputs)
    feed = model.make_feed_with_past(TOKENS, past)
    assert feed["attention_mask"].shape == (2, 8) and feed["attention_mask"].all()
    np.testing.assert_array_equal(feed["position_ids"], [[5, 6, 7]] * 2)
    assert feed["use_cache_branch"].tolist() == [True]
    assert (feed["past_key_values.1.key"] == 1).all()


def test_fixed_cache_length_is_masked_out() -> None:
    past = [spec(f"past_key_values.0.{kind}", 1, 4, 7, 16, dtype=F16) for kind in ("key", "value")]
    model = CausalLm.from_inputs([spec("input_ids", 1, 3), spec("attention_mask", 1, 10), *past], [LOGITS])
    feed = model.make_feed(TOKENS[:1])
    np.testing.assert_array_equal(feed["attention_mask"], [[0] * 7 + [1] * 3])
    assert feed["past_key_values.0.key"].shape == (1, 4, 7, 16)
    assert (model.batch_size, model.sequence_length) == (1, 3)


def test_stacked_key_value_cache() -> None:
    past = spec("past_0", 2, "b", 4, "p", 16, dtype=F16)
    present = spec("present_0", 2, "b", 4, "t", 16, dtype=F16)
    model = CausalLm.from_inputs([spec("input_ids", "b", "s"), past], [LOGITS, present])
    assert (model.past[0].batch_axis, model.past[0].length_axis) == (1, 3)
    assert model.past[0].present == "present_0"
    assert model.make_feed(TOKENS)["past_0"].shape == (2, 2, 4, 0, 16)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([spec("pixel_values", "b", 3, 224, 224)], "no input_ids"),
        ([spec("input_ids", "b", "s"), spec("encoder_hidden_states", "b", "t", 64)], "encoder_hidden_states"),
        (
            [spec("input_ids", "b", "s"), spec("attention_mask", "b", 1, "s", "t")],
            "attention_mask has 4 axes",
        ),
        ([spec("input_ids", "b", "s"), spec("past_key_values.0.key", "b", "h", "p", "d")], "heads"),
    ],
)
def test_other_models_are_told_to_bring_inputs(inputs: list[InputSpec], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        CausalLm.from_inputs(inputs, [LOGITS])
    text = str(caught.value)
    assert "--calibration FILE.npz" in text and "\n" not in text
    assert all(item.name in text for item in inputs)


def test_vocabulary_is_the_embedding_behind_the_tokens() -> None:
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        g (int64[b, s] input_ids) => (float[b, s, d] y)
        <float[5, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int64[1] other = {0}> {
            z = Gather(other, other)
            ids = Cast<to = 7>(input_ids)
            y = Gather(table, ids)
        }
        """
    )
    assert find_vocab_size(model) == 5


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_exported_models(family: str, tiny_model) -> None:
    model = ir.load(tiny_model(family))
    interface = CausalLm.from_model(model)
    assert len(interface.past) == 4 and all(item.present for item in interface.past)
    assert interface.vocab_size == find_vocab_size(model) == 320
