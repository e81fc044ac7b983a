"""Optimisation profiles from input names, symbolic axes and user shapes."""

from __future__ import annotations

import pytest

from zqfp_compile.backends.profiles import default_profiles, position_limit
from zqfp_compile.errors import UsageError

# As torch.onnx writes it: the mask's axis has a name of its own.
TORCH = [
    ("input_ids", ("batch", "sequence")),
    ("attention_mask", ("batch", "s53")),
    ("position_ids", ("batch", "sequence")),
    ("past_key_values.0.key", ("batch", 3, "past_sequence", 64)),
    ("past_key_values.0.value", ("batch", 3, "past_sequence", 64)),
]
OPTIMUM = [
    ("input_ids", ("batch_size", "sequence_length")),
    ("attention_mask", ("batch_size", "past_sequence_length + sequence_length")),
    ("past_key_values.0.key", ("batch_size", 4, "past_sequence_length", 16)),
]
ANONYMOUS = [
    ("input_ids", (None, None)),
    ("attention_mask", (None, None)),
    ("past_key_values.0.key", (None, 4, None, 16)),
]


def user(inputs, **shapes):
    (profile,) = default_profiles(inputs, **shapes)
    assert profile.name == "user"
    return profile.shapes


def test_a_cached_lm_gets_prefill_and_decode() -> None:
    prefill, decode = default_profiles(TORCH)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 512), (4, 2048))
    assert prefill.shapes["past_key_values.0.key"] == ((1, 3, 0, 64), (1, 3, 0, 64), (4, 3, 2048, 64))
    assert decode.shapes["position_ids"] == ((1, 1), (1, 1), (8, 1))
    assert decode.shapes["attention_mask"] == ((1, 1), (1, 513), (8, 4096))


@pytest.mark.parametrize("inputs", [TORCH, OPTIMUM, ANONYMOUS])
def test_mask_is_past_and_sequence_together_in_every_form(inputs) -> None:
    for profile in default_profiles(inputs):
        for point in range(3):
            sequence = profile.shapes["input_ids"][point][1]
            past = profile.shapes["past_key_values.0.key"][point][2]
            assert profile.shapes["attention_mask"][point][1] == past + sequence


def test_models_without_a_cache_get_one_profile() -> None:
    (profile,) = default_profiles([("input_ids", ("batch", "seq")), ("attention_mask", ("batch", "seq"))])
    assert profile.name == "default"
    assert profile.shapes["input_ids"] == profile.shapes["attention_mask"] == ((1, 1), (1, 512), (4, 2048))
    (profile,) = default_profiles([("x", ("n", 3, "height"))])
    assert profile.shapes == {"x": ((1, 3, 1), (8, 3, 8), (64, 3, 64))}


def test_static_inputs_are_left_out() -> None:
    (profile,) = default_profiles([("x", (1, 3)), ("n", ())])
    assert profile.shapes == {}


def test_a_decode_only_export_gets_decode_only() -> None:
    inputs = [("input_ids", ("batch", 1)), *TORCH[3:], ("attention_mask", ("batch", "total_length"))]
    (profile,) = default_profiles(inputs)
    assert profile.name == "decode"
    assert profile.shapes["input_ids"] == ((1, 1), (1, 1), (8, 1))
    assert profile.shapes["attention_mask"][2] == (8, 4096)


def test_user_shapes_of_two_inputs_settle_all() -> None:
    shapes = user(
        TORCH,
        min_shapes={"input_ids": (1, 1)},
        opt_shapes={"input_ids": (1, 16), "past_key_values.0.key": (1, 3, 4, 64)},
        max_shapes={"input_ids": (2, 32), "past_key_values.0.key": (2, 3, 96, 64)},
    )
    assert shapes["position_ids"] == ((1, 1), (1, 16), (2, 32))
    assert shapes["past_key_values.0.value"] == ((1, 3, 0, 64), (1, 3, 4, 64), (2, 3, 96, 64))
    assert shapes["attention_mask"] == ((1, 1), (1, 20), (2, 128))


def test_only_opt_fixes_an_axis_as_in_trtexec() -> None:
    shapes = user(TORCH, opt_shapes={"input_ids": (4, 7)})
    assert shapes["input_ids"] == ((4, 7),) * 3
    assert shapes["attention_mask"] == ((4, 7), (4, 7), (4, 7 + 2048))


def test_only_max_keeps_the_rest_below_it() -> None:
    assert user(TORCH, max_shapes={"input_ids": (2, 64)})["input_ids"] == ((1, 1), (1, 64), (2, 64))


def test_mask_length_settles_the_past() -> None:
    shapes = user(TORCH, max_shapes={"input_ids": (1, 1), "attention_mask": (1, 100)})
    assert shapes["past_key_values.0.key"][2] == (1, 3, 99, 64)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"max_shapes": {"input_idz": (1, 2)}}, "no input has that name; the inputs are input_ids"),
        ({"max_shapes": {"input_ids": (1, 2, 3)}}, "has 2 dimensions"),
        ({"opt_shapes": {"past_key_values.0.key": (1, 4, 9, 64)}}, "dimension 1 .* is fixed to 3"),
        ({"opt_shapes": {"input_ids": (0, 4)}}, "must be at least 1"),
        ({"min_shapes": {"input_ids": (1, 9)}, "max_shapes": {"input_ids": (1, 4)}}, "min <= opt <= max"),
        (
            {"opt_shapes": {"input_ids": (1, 4), "position_ids": (1, 5)}},
            "another input says sequence is 4, not 5",
        ),
        (
            {"opt_shapes": {"input_ids": (1, 4), "attention_mask": (1, 3)}},
            "attention_mask has length 3, but past -1 and sequence 4",
        ),
    ],
)
def test_wrong_shapes_are_usage_errors(shapes, message) -> None:
    with pytest.raises(UsageError, match=message):
        default_profiles(TORCH, **shapes)


def test_defaults_stay_within_the_positions_a_model_knows() -> None:
    """GPT-2 as optimum exports it holds a causal mask of that size, and no engine builds beyond it."""
    prefill, decode = default_profiles(TORCH, max_positions=257)
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 129), (4, 129))
    assert prefill.shapes["attention_mask"] == ((1, 1), (1, 129), (4, 257))
    assert decode.shapes["attention_mask"] == ((1, 1), (1, 257), (8, 257))
    assert default_profiles(TORCH, max_positions=8192) == default_profiles(TORCH)
    (plain,) = default_profiles(TORCH[:2], max_positions=257)
    assert plain.shapes["input_ids"] == ((1, 1), (1, 257), (4, 257))
    longer = user(TORCH, max_shapes={"attention_mask": (1, 600)}, max_positions=257)
    assert longer["attention_mask"][2] == (1, 600)  # the user knows best


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ('{"max_position_embeddings": 256}', 256),
        ('{"n_positions": 1024, "n_ctx": 5}', 1024),
        ('{"max_position_embeddings": null}', None),
        ('{"max_position_embeddings": "many"}', None),
        ("[1]", None),
        ("{", None),
        ("[" * 100_000, None),
        (None, None),
    ],
)
def test_position_limit_comes_from_config_json(text: str | None, limit: int | None, tmp_path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert position_limit(tmp_path) == limit
