"""The estimate before a compile agrees with what the compile then takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from zqfp_compile import Recipe, compile_model
from zqfp_compile.estimate import Estimate, estimate
from zqfp_compile.memory import MemoryUse, available_memory, memory_use
from zqfp_compile.model_io import load_model
from zqfp_compile.registry import create_pass

QUICK = {"calibration_samples": 2, "calibration_length": 32, "evaluate": False}


@pytest.mark.parametrize(
    "options",
    [
        {"target": "none"},
        {"target": "none", "weights": "fp8", "lorc_rank": 0},
        {"target": "none", "emit": ("onnxruntime",)},
        {"target": "onnxruntime", "emit": ("triton-repository",)},
        {"target": "onnxruntime", "emit": ("fp4",)},
        {"target": "onnxruntime", "lorc_format": "fp8"},
        {"target": "none", "algorithm": "gptq", "exclude": ["down_proj"]},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_disk_is_what_is_needed(
    tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, object]
) -> None:
    """Never less than what is there when the report is written, and not twice as much."""
    recipe = Recipe(**{**QUICK, **options})  # type: ignore[arg-type]
    compile_model(tiny_model("llama"), recipe, output=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "report.json").read_text())["resources"]
    assert found["disk_bytes"] > 1 << 18
    # The graphs, the configuration and kept calibration runs are not counted: a megabyte.
    assert found["disk_bytes"] - (1 << 20) < found["estimated"]["disk_bytes"] < 2 * found["disk_bytes"]
    assert found["estimated"]["seconds"] > 0 and found["seconds"] > 0
    assert found["estimated"]["memory_bytes"] > 100 << 20


def test_gpus_take_activations_and_time(tiny_model: Callable[..., Path]) -> None:
    model = load_model(tiny_model("llama"))
    plan = create_pass("select-linears").call(model).plan
    assert plan is not None
    recipe = Recipe(algorithm="gptq", target="none", evaluate=False)

    def needs(*room: int) -> Estimate:
        return estimate(model, plan, recipe, builds=False, processes=2, cores=2, activation_room=room)

    alone, one, two, roomy = needs(), needs(1 << 20), needs(1 << 20, 1 << 20), needs(1 << 40)
    assert alone.disk_bytes - one.disk_bytes == one.disk_bytes - two.disk_bytes == 1 << 20
    assert 0 < roomy.disk_bytes < two.disk_bytes
    assert alone.seconds > one.seconds > two.seconds > 0


def test_memory_is_counted() -> None:
    before = memory_use()
    if before == MemoryUse():
        pytest.skip("needs /proc")
    block = bytearray(b"x" * (64 << 20))
    after = memory_use()
    assert after.anonymous - before.anonymous > 48 << 20 and after.resident >= after.anonymous
    available = available_memory()
    assert available is not None and available > 0 and block
