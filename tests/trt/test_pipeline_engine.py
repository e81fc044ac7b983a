"""Engines through compile_model, built by the real TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from compiled_models import LINEARS, quick

from zqfp_compile import compile_model, engines
from zqfp_compile.backends.plan_lint import parse_layers
from zqfp_compile.backends.target import resolve_target
from zqfp_compile.backends.tensorrt import EngineResult, build_engine
from zqfp_compile.errors import BuilderError, UsageError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")

# SM89 merges q/k/v and gate/up, which leaves four FP8 GEMM layers in each of two decoder layers.
MERGED = 8


def _build(source: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Compile without evaluation and return report.json, its engine section checked for consistency."""
    values = {"target": "tensorrt-rtx", "compute_capability": "89", "evaluate": False, **options}
    result = compile_model(source, quick(**values), output=folder)
    report = json.loads((folder / "report.json").read_text())
    engine = report["engine"]
    assert (engine["target"], engine["path"]) == ("tensorrt-rtx", "tensorrt-rtx.engine")
    assert result.engine is not None and result.engine.stat().st_size == engine["bytes"] > 100_000
    assert engine["lint"] == {"ok": True, "problems": []}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "tensorrt-rtx.engine" in manifest["files"]
    assert {"engine", "certificate"} <= set(report["seconds"])
    return report


def _check_fp8(report: dict[str, Any], linears: int, gemms: int) -> None:
    """Every rewritten linear runs in an FP8 GEMM, in the prefill and in the decode profile."""
    engine = report["engine"]
    assert sum(layer["rewritten"] for layer in report["layers"]) == linears
    assert [profile["name"] for profile in engine["profiles"]] == ["prefill", "decode"]
    for section in (engine, *engine["profiles"]):
        assert (section["fp8_linears"], section["fp8_gemms"]) == (linears, gemms)


@pytest.mark.parametrize(("arch", "gemms"), [("89", MERGED), ("120", 14)])
@pytest.mark.parametrize("lowering", ["fp8", "int4"])
def test_lowerings_and_architectures(lowering: str, arch: str, gemms: int, tiny_model, tmp_path) -> None:
    report = _build(
        tiny_model("llama", dtype="float16"),
        tmp_path / "out",
        weight_lowering=lowering,
        compute_capability=arch,
    )
    _check_fp8(report, 14, gemms)


@pytest.mark.parametrize(
    ("family", "exporter", "dtype"),
    [
        ("llama", "torch", "float32"),
        ("llama", "torch", "bfloat16"),
        ("qwen2", "optimum", "float16"),
        ("opt", "torch", "float32"),
        ("gpt2", "optimum", "float32"),  # holds a causal mask of 256 positions: no profile may go beyond
    ],
)
def test_models(family: str, exporter: str, dtype: str, tiny_model, tmp_path: Path) -> None:
    report = _build(tiny_model(family, exporter, dtype), tmp_path / "out")
    _check_fp8(report, LINEARS[family], MERGED)
    longest = [profile["shapes"]["attention_mask"][2][1] for profile in report["engine"]["profiles"]]
    assert longest == [256, 256]


def test_per_token_scales_and_lm_head(tiny_model, tmp_path: Path) -> None:
    options = {"activation_scale": "token", "quantize_lm_head": True, "scale_constraint": "m2"}
    report = _build(tiny_model("llama", dtype="float16"), tmp_path / "out", **options)
    _check_fp8(report, 15, MERGED + 1)


def test_weights_only_models_build_without_fp8(tiny_model, tmp_path: Path) -> None:
    report = _build(tiny_model("opt", dtype="float16"), tmp_path / "out", activations="none")
    assert report["certificate"]["layers_checked"] == 12 and report["engine"]["fp8_linears"] == 0


def test_user_shapes_become_the_profile(tiny_model, tmp_path: Path) -> None:
    source = tiny_model("llama", dtype="float16")
    shapes = {
        "min_shapes": "input_ids:1x1,attention_mask:1x1",
        "opt_shapes": "input_ids:1x16,attention_mask:1x16",
        "max_shapes": "input_ids:2x64,attention_mask:2x128",
    }
    report = _build(source, tmp_path / "out", lorc_rank=0, **shapes)
    (profile,) = report["engine"]["profiles"]
    assert profile["name"] == "user" and profile["fp8_linears"] == 14
    assert profile["shapes"]["input_ids"] == [[1, 1], [1, 16], [2, 64]]
    assert profile["shapes"]["attention_mask"] == [[1, 1], [1, 16], [2, 128]]
    assert profile["shapes"]["past_key_values.1.value"] == [[1, 2, 0, 18], [1, 2, 0, 18], [2, 2, 64, 18]]
    with pytest.raises(UsageError, match="no input has that name"):
        _build(source, tmp_path / "new", max_shapes="tokens:1x8")
    assert not (tmp_path / "new").exists()


def test_auto_says_why_and_the_timing_cache_is_not_silently_ignored(tiny_model, tmp_path: Path) -> None:
    if resolve_target("auto").target != "tensorrt-rtx":
        pytest.skip("--target auto takes TensorRT on this machine")
    cache = tmp_path / "timings.bin"
    options = {"target": "auto", "timing_cache": str(cache), "lorc_rank": 0}
    report = _build(tiny_model("gpt2", dtype="float16"), tmp_path / "first", **options)
    assert any("--timing-cache has no effect" in warning for warning in report["warnings"])
    assert not cache.exists()
    assert report["engine"]["reason"] not in ("", "asked for")


@pytest.mark.parametrize("options", [{"scale_constraint": "none"}, {"activations": "int8"}])
def test_auto_refuses_what_the_chosen_engine_cannot_hold(options, tiny_model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--target onnxruntime"):
        _build(tiny_model("gpt2"), tmp_path / "out", target="auto", **options)
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_said_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--compute-capability 90: TensorRT-RTX .*builds for .*89"):
        _build(tmp_path / "missing.onnx", tmp_path / "out", compute_capability="90")


def test_a_refused_engine_leaves_its_log(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is asked for one linear more than the model has, so the lint refuses a sound engine."""

    def ask_for_more(*paths: Path, linears: list[str], **options: Any) -> EngineResult:
        return build_engine(*paths, linears=[*linears, "no/such/MatMul"], **options)

    monkeypatch.setattr(engines, "build_engine", ask_for_more)
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))
    with pytest.raises(BuilderError, match="'no/such/MatMul' is not an FP8 GEMM") as refused:
        _build(tiny_model("gpt2", dtype="float16"), tmp_path / "out", lorc_rank=0)
    (log,) = logs.iterdir()
    assert str(refused.value).endswith(f"; the plan lint refuses this engine (log: {log})")
    assert all(parse_layers(log.read_text(errors="replace"), 2))  # the plan of both profiles
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "logs"]
