"""Recipes: what is accepted comes back equal, what is not is one line naming the option."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zqfp_compile.errors import UsageError
from zqfp_compile.recipe import GROUP_SIZES, MAX_LORC_RANK, Recipe

OTHERS: dict[str, Any] = {
    "target": "onnxruntime",
    "weights": "int4",
    "fp4_format": "e3m0",
    "activations": "fp8-e5m2",
    "activation_scale": "token",
    "kv_cache_dtype": "fp8",
    "attention": "fp8",
    "algorithm": "gptq",
    "device": "cpu",
    "devices": "cpu,cpu",
    "group_size": 128,
    "scale_constraint": "m2",
    "scale_rows": 16,
    "lorc_rank": 24,
    "lorc_budget": 0.25,
    "lorc_format": "fp8",
    "distill_tokens": 32768,
    "weight_lowering": "plugin",
    "emit": ("fp4", "engine-onnx"),
    "calibration": "text: with colon.txt",
    "calibration_samples": 3,
    "calibration_length": 7,
    "eval_text": "null",
    "eval_tokens": 99,
    "eval_length": 55,
    "include": (r"layers\.\d+\.mlp",),
    "exclude": ("lm_head", "'quoted'", "ünïcode"),
    "quantize_lm_head": True,
    "quantize_embedding": True,
    "min_shapes": {"input_ids": (1, 1)},
    "opt_shapes": {"onnx::x": (1, 128), "past": (1, 3, 0, 64)},
    "max_shapes": {"input_ids": (8, 4096)},
    "compute_capability": "89",
    "timing_cache": "cache.bin",
    "max_perplexity_increase": 7.5,
    "builder_timeout": 60,
    "builder_memory_gb": 4.5,
    "seed": 11,
}


def test_every_option_round_trips(tmp_path: Path) -> None:
    """Through the YAML file that is written to the output, with no option at its default."""
    assert {field.name for field in dataclasses.fields(Recipe)} == {*OTHERS, "evaluate", "auto"}
    recipe = Recipe(**OTHERS)
    for name, value in OTHERS.items():
        assert getattr(recipe, name) == value != getattr(Recipe(), name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    dashes = {name.replace("_", "-"): value for name, value in recipe.to_dict().items()}
    assert Recipe.from_dict(dashes) == recipe


def test_devices_are_listed() -> None:
    assert Recipe().listed_devices == ()
    assert Recipe(devices="cuda:0, cuda:11", device="cuda").listed_devices == ("cuda:0", "cuda:11")
    assert Recipe(devices="cuda").listed_devices == ("cuda:0",)


def test_a_group_may_be_a_whole_row() -> None:
    assert Recipe.from_dict({"group-size": "row"}) == Recipe(group_size=0)


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    """Issue 2: e4m3, groups of 64, LoRC rank 16, FP4 weights, FP8 activations."""
    recipe = Recipe()
    assert (recipe.weights, recipe.fp4_format, recipe.activations) == ("fp4", "e2m1", "fp8")
    assert (recipe.scale_constraint, recipe.group_size, recipe.lorc_rank) == ("e4m3", 64, 16)
    assert Recipe(auto="bits=4.5").lorc_rank == Recipe(lorc_budget=0.2).lorc_rank == 64  # the largest
    assert Recipe(auto="bits=4.5", lorc_rank=16).lorc_rank == 16
    gptq = Recipe(algorithm="gptq")
    assert (recipe.calibration_samples, recipe.calibration_length) == (8, 512)
    assert (gptq.calibration_samples, gptq.calibration_length) == (48, 1024)
    assert Recipe(algorithm="gptq", calibration_samples=3).calibration_samples == 3
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert Recipe.from_yaml(tmp_path / "empty.yaml") == recipe


@settings(max_examples=50, deadline=None)  # two shared cores: time says nothing
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "group_size": st.sampled_from(GROUP_SIZES),
            "lorc_rank": st.integers(0, MAX_LORC_RANK),
            "calibration": st.none() | st.text(),
            "exclude": st.lists(st.text("abc.*\\d[]", max_size=3)),
            "max_shapes": st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 1 << 40))),
            "max_perplexity_increase": st.none() | st.floats(0, allow_nan=False),
            "seed": st.integers(0, 1 << 62),
        },
    )
)
def test_any_accepted_recipe_round_trips(values: dict[str, Any]) -> None:
    try:
        recipe = Recipe.from_dict(values)
    except UsageError as error:
        assert "exclude" in str(error)  # random text is not always a regular expression
        return
    import yaml

    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"wieghts": "fp4"}, "unknown option 'wieghts'"),
        ({"weights": "fp3"}, "--weights: 'fp3' is not one of fp4, int4, fp8, none"),
        ({"weights": None}, "--weights: None is not one of"),
        ({"weights": ["fp4"]}, "--weights: ['fp4'] is not one of"),
        ({"emit": ["fp4", "fp5"]}, "--emit: 'fp5' is not one of"),
        ({"emit": 3}, "--emit: 3 is not a list"),
        ({"group_size": 48}, "--group-size: 48 is not one of 16, 32"),
        ({"group_size": "rows"}, "--group-size: 'rows' is not a whole number"),
        ({"group_size": -1}, "--group-size: -1 is not one of 16, 32, 64, 128, 256, row"),
        ({"scale_rows": 0}, "--scale-rows: 0 is below 1"),
        ({"scale_rows": 8}, "--scale-rows 8: rows share a scale only under --scale-constraint m2"),
        ({"group_size": "64"}, "--group-size: '64' is not a whole number"),
        ({"group_size": 64.0}, "--group-size: 64.0 is not a whole number"),
        ({"group_size": True}, "--group-size: True is not a whole number"),
        ({"auto": "bits"}, "--auto: 'bits' is not of the form bits=4.5 or perplexity=+2%"),
        ({"auto": 4.5}, "--auto: 4.5 is not text"),
        ({"auto": "bits=4.5", "lorc_budget": 0.1}, "--auto chooses LoRC ranks itself; drop --lorc-budget"),
        ({"auto": "bits=4.5", "weights": "fp8"}, "--auto chooses which layers get 4 bits; drop --weights"),
        ({"lorc_budget": 0.1, "weights": "none"}, "--lorc-budget has no error to compensate"),
        ({"lorc_budget": 0.1, "lorc_rank": 0}, "--lorc-budget with --lorc-rank 0 leaves no rank"),
        ({"lorc_budget": 0}, "--lorc-budget: 0.0 is below"),
        ({"distill_tokens": -1}, "--distill-tokens: -1 is below 0"),
        ({"distill_tokens": 8, "weights": "none"}, "--distill-tokens trains what belongs to quantised"),
        (
            {"distill_tokens": 8, "scale_constraint": "m1", "lorc_rank": 0},
            "--distill-tokens has nothing to train",
        ),
        ({"lorc_rank": -1}, "--lorc-rank: -1 is outside"),
        ({"lorc_rank": MAX_LORC_RANK + 1}, "--lorc-rank"),
        ({"evaluate": "yes"}, "--evaluate: 'yes' is not true or false"),
        ({"evaluate": 1}, "--evaluate: 1 is not true or false"),
        ({"calibration": 1.5}, "--calibration: 1.5 is not text"),
        ({"calibration_samples": 0}, "--calibration-samples: 0 is below 1"),
        ({"eval_length": 1}, "--eval-length: 1 is below 2"),
        ({"builder_timeout": 0}, "--builder-timeout: 0 is below 1"),
        ({"builder_memory_gb": 0}, "--builder-memory-gb: 0.0 is below"),
        ({"builder_memory_gb": True}, "--builder-memory-gb: True is not a number"),
        ({"max_perplexity_increase": -1}, "--max-perplexity-increase: -1.0 is below 0"),
        ({"max_perplexity_increase": math.nan}, "--max-perplexity-increase: nan"),
        ({"devices": "gpu0"}, "--devices: 'gpu0' is no device; write cpu, or GPUs as cuda:0,cuda:1"),
        ({"devices": "cuda:0,"}, "--devices: '' is no device"),
        ({"devices": "cpu,cuda:0"}, "--devices: CPU and GPU round differently"),
        ({"devices": "cuda,cuda:0"}, "--devices: cuda,cuda:0 lists a GPU twice"),
        ({"devices": "cuda:0", "device": "cpu"}, "--devices cuda:0 says where to compute; drop --device cpu"),
        ({"seed": -1}, "--seed: -1 is below 0"),
        ({"include": ["("]}, "--include: '(' is not a regular expression"),
        ({"exclude": ["a{99999999999999}"]}, "--exclude"),
        ({"exclude": [3.5]}, "--exclude: 3.5 is not text"),
        ({"min_shapes": ["input_ids"]}, "--min-shapes"),
        ({"min_shapes": {"x": "1x2"}}, "--min-shapes: dimensions of 'x'"),
        ({"min_shapes": {"x": [1, -2]}}, "--min-shapes: dimensions of 'x'"),
        ({"min_shapes": {"x": [True]}}, "--min-shapes: dimensions of 'x'"),
        ({"min-shapes": "x:1", "min_shapes": "x:2"}, "given twice"),
        ({"target": "tensorrt", "scale_constraint": "none"}, "--scale-constraint none is a reference"),
        ({"target": "tensorrt-rtx", "activations": "int8"}, "--activations int8"),
        ({"max_perplexity_increase": 5, "evaluate": False}, "--max-perplexity-increase needs"),
        ({"weights": "none", "activations": "none"}, "leaves nothing to do"),
    ],
)
def test_wrong_values(values: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict(values)
    message = str(caught.value)
    assert wanted in message and "\n" not in message and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "values",
    [
        {"target": "onnxruntime", "scale_constraint": "none"},
        {"target": "auto", "activations": "int8"},
        {"target": "tensorrt", "scale_constraint": "none", "weights": "fp8"},
        {"weights": "none", "activations": "fp8"},
        {"weights": "fp4", "activations": "none"},
    ],
)
def test_combinations_that_are_fine(values: dict[str, Any]) -> None:
    Recipe.from_dict(values)


def test_convenient_forms() -> None:
    assert Recipe(include="attn").include == ("attn",)  # type: ignore[arg-type]
    assert Recipe(calibration=Path("a/b.txt")).calibration == "a/b.txt"  # type: ignore[arg-type]
    assert Recipe.from_dict({"compute-capability": 89}).compute_capability == "89"
    assert Recipe(max_perplexity_increase=5).max_perplexity_increase == 5.0


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("input_ids:1x128", {"input_ids": (1, 128)}),
        ("a:1,b:2x0x3", {"a": (1,), "b": (2, 0, 3)}),
        ("onnx::Gather_0:4x4", {"onnx::Gather_0": (4, 4)}),
        ("", {}),
    ],
)
def test_shapes_as_on_the_command_line(text: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert Recipe.from_dict({"max_shapes": text}).max_shapes == shapes


@pytest.mark.parametrize("text", ["x", "x:", ":1x2", "x:1x", "x:ax2", "x:-1", "x:1X2", "x:1 x2", "x:1,x:2"])
def test_wrong_shapes_on_the_command_line(text: str) -> None:
    with pytest.raises(UsageError, match="--max-shapes"):
        Recipe.from_dict({"max_shapes": text})


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"- a\n- b\n", "holds a list"),
        (b"weights: [fp4\n", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"seed: 2024-13-45\n", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"!!python/object/apply:os.system ['true']\n", "cannot be read"),
        (b"weights: fp3\n", "--weights: 'fp3'"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, wanted: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(path)
    message = str(caught.value)
    assert wanted in message and str(path) in message and "\n" not in message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "none.yaml")
