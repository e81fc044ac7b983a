"""Which engine is built, and what is said when it cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zqfp_compile.backends.target import decide
from zqfp_compile.errors import MissingDependencyError, UsageError

NO_TENSORRT = {"tensorrt": MissingDependencyError("TensorRT is not installed; run: pip install tensorrt")}
NO_RTX = {"tensorrt-rtx": MissingDependencyError("TensorRT-RTX is not installed; run: pip install x")}


def choose(requested, missing=None, gpus=(), has_onnxruntime=True):
    return decide(requested, missing=missing or {}, gpus=gpus, has_onnxruntime=has_onnxruntime)


@pytest.mark.parametrize(
    ("missing", "gpus", "target", "reason"),
    [
        ({}, ("90",), "tensorrt", "SM90"),
        ({}, (), "tensorrt-rtx", "no GPU"),
        (NO_TENSORRT, ("89",), "tensorrt-rtx", "TensorRT cannot be used"),
        ({**NO_TENSORRT, **NO_RTX}, ("89",), "onnxruntime", "TensorRT-RTX cannot be used"),
        (NO_RTX, (), "onnxruntime", "no GPU"),
    ],
)
def test_auto_takes_the_best_that_works_and_says_why(missing, gpus, target, reason) -> None:
    choice = choose("auto", missing, gpus)
    assert choice.target == target
    assert reason in choice.reason


def test_auto_without_any_runtime_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match=r"zqfp-compile\[cpu\].*--target none"):
        choose("auto", {**NO_TENSORRT, **NO_RTX}, has_onnxruntime=False)


@pytest.mark.parametrize(
    ("requested", "missing", "gpus", "message"),
    [
        ("tensorrt", NO_TENSORRT, ("90",), "pip install tensorrt"),
        ("tensorrt", {}, (), "use --target tensorrt-rtx"),
        ("tensorrt-rtx", NO_RTX, (), "not installed"),
    ],
)
def test_explicit_target_that_cannot_work_is_an_error_with_the_fix(requested, missing, gpus, message) -> None:
    with pytest.raises(MissingDependencyError, match=message):
        choose(requested, missing, gpus)


def test_explicit_targets_that_work() -> None:
    assert choose("tensorrt", gpus=("90",)).target == "tensorrt"
    assert choose("tensorrt-rtx").target == "tensorrt-rtx"
    assert choose("onnxruntime").target == "onnxruntime"
    assert choose("none", has_onnxruntime=False).target == "none"
    with pytest.raises(MissingDependencyError, match="onnxruntime"):
        choose("onnxruntime", has_onnxruntime=False)
    with pytest.raises(UsageError, match="not one of auto"):
        choose("cuda")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tensorrt/py.typed": ""}, "has no Builder"),
        (
            {"tensorrt/__init__.py": "raise OSError('libcudart.so.12: cannot open')"},
            "does not load (libcudart",
        ),
        ({"tensorrt/__init__.py": "import nothing_like_this"}, "does not load (No module named"),
        ({}, "TensorRT is not installed"),
    ],
)
def test_stubs_and_broken_installs_do_not_count_as_tensorrt(tmp_path, files, message) -> None:
    """In a process of its own: an import is not undone."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from zqfp_compile.backends.target import resolve_target\n"
        "from zqfp_compile.errors import MissingDependencyError\n"
        "try: print(resolve_target('tensorrt'))\n"
        "except MissingDependencyError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    if not files and "not installed" not in done.stdout:
        pytest.skip("TensorRT itself is installed here")
    assert done.stdout.startswith("refused: --target tensorrt:"), done.stdout
    assert message in done.stdout
