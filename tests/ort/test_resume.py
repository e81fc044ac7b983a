"""A compile that is killed goes on from what it had finished, to the same bytes; nothing foreign is used."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")


from zqfp_compile.errors import MissingDependencyError, ModelError, UsageError, notes
from zqfp_compile.work_folder import WorkFolder

TinyModel = Callable[..., Path]

PROGRAM = [sys.executable, "-m", "zqfp_compile"]
FAST = ("--target", "none", "--calibration-samples", "3", "--calibration-length", "32", "--no-evaluate", "-v")
GOES_ON = "going on from"


def _compile(model: Path, output: Path, *options: str) -> str:
    """Compile to the end; return standard error."""
    command = [*PROGRAM, str(model), "-o", str(output), *FAST, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert not list(output.parent.glob(f".{output.name}*")), "work folders are cleaned at success"
    return result.stderr


def _bytes(output: Path) -> dict[str, str]:
    """Digests of the artifact's files."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("model.zqfp.onnx*")
    }


def _kill(model: Path, output: Path, *options: str, when: Callable[[Path], bool]) -> None:
    """Start a compile and kill it as soon as its work folder is as wanted; it may end before."""
    work = output.parent / f".{output.name}.work"
    with subprocess.Popen(
        [*PROGRAM, str(model), "-o", str(output), *FAST, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 90
        while process.poll() is None and not when(work) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)


def _items(work: Path) -> int:
    try:
        return (work / "tensors.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    "options", [(), ("--algorithm", "gptq", "--lorc-format", "fp8")], ids=["rtn", "gptq"]
)
def test_killed_at_several_moments(tiny_model: TinyModel, tmp_path: Path, options: tuple[str, ...]) -> None:
    """While calibrating, twice while quantising, and after: the same files as in one go."""
    model = tiny_model("llama")
    _compile(model, tmp_path / "whole", *options)
    output = tmp_path / "out"
    moments: list[Callable[[Path], bool]] = [
        lambda work: any(work.glob("*.npz")),
        lambda work: _items(work) >= 2,
        lambda work: _items(work) >= 8,
        lambda work: _items(work) >= 14,
    ]
    for when in moments if not options else moments[1:]:
        _kill(model, output, *options, when=when)
    said = _compile(model, output, *options) if not output.exists() else GOES_ON
    assert GOES_ON in said
    assert _bytes(output) == _bytes(tmp_path / "whole") and len(_bytes(output)) == 2


def test_going_on_does_less(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The finished layers are read, not made again: a wrong one that is well-formed would be taken over."""
    output = tmp_path / "out"
    _stop_after_quantising(tiny_model("llama"), output)
    journal = tmp_path / ".out.work" / "tensors.jsonl"
    before = journal.read_text()
    assert before.count("\n") == 14
    _stop_after_quantising(tiny_model("llama"), output)
    assert journal.read_text() == before


def _stop_after_quantising(model: Path, output: Path, *options: str) -> None:
    """Run out of address space for the builder: exit 5, with everything quantised."""
    pytest.importorskip("tensorrt_rtx")
    command = [*PROGRAM, str(model), "-o", str(output), *FAST[2:], "--target", "tensorrt-rtx", *options]
    command += ["--builder-memory-gb", "0.1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 5 and "finished work is kept in" in result.stderr, result.stderr


@pytest.mark.parametrize("change", ["--seed", "--fresh", "model"])
def test_foreign_work_is_not_used(tiny_model: TinyModel, tmp_path: Path, change: str) -> None:
    """Another option that matters, another model, or the wish to start over."""
    model = tmp_path / "model.onnx"
    model.write_bytes(tiny_model("llama").read_bytes())
    options = {"--seed": ("--seed", "7"), "--fresh": ("--fresh",), "model": ()}[change]
    output = tmp_path / "out"
    _kill(model, output, when=lambda work: _items(work) >= 3)
    assert _items(tmp_path / ".out.work") >= 3
    if change == "model":
        model.write_bytes(tiny_model("qwen2").read_bytes())
    said = _compile(model, output, *options)
    assert GOES_ON not in said and "unfinished work of another model or other options is removed" in said
    _compile(model, tmp_path / "whole", *options)
    assert _bytes(output) == _bytes(tmp_path / "whole")


def test_another_process_count_goes_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Who does the work is no part of the key."""
    output = tmp_path / "out"
    _kill(tiny_model("llama"), output, when=lambda work: _items(work) >= 3)
    said = _compile(tiny_model("llama"), output, "--jobs", "2")
    assert GOES_ON in said
    _compile(tiny_model("llama"), tmp_path / "whole")
    assert _bytes(output) == _bytes(tmp_path / "whole")


# the folder alone


def test_kept_only_when_another_try_may_do_better(tmp_path: Path) -> None:
    path = tmp_path / ".out.work"
    for error, finished, kept in (
        (KeyboardInterrupt(), True, True),
        (MissingDependencyError("full"), True, True),
        (MissingDependencyError("full"), False, False),
        (ModelError("bad"), True, False),
        (UsageError("wrong"), True, False),
    ):
        with pytest.raises(type(error)) as caught, WorkFolder(path, "k", fresh=True) as work:
            if finished:
                work.keep("a", [np.arange(3)])
            raise error
        assert path.exists() == kept
        assert bool(notes(caught.value)) == kept
        if kept:
            assert str(path) in notes(caught.value)[0]
    with WorkFolder(path, "k") as work:
        work.keep("a", [np.arange(3)])
    assert not path.exists()


def test_arrays_are_found_under_their_key_only(tmp_path: Path) -> None:
    path = tmp_path / ".out.work"
    arrays = [np.arange(3), np.zeros((0, 2), np.float16), np.array(2.5)]
    with pytest.raises(KeyboardInterrupt), WorkFolder(path, "k") as work:
        assert work.find("a") is None and not work.finished
        work.keep("a", arrays)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), WorkFolder(path, "k") as work:
        found = work.find("a")
        assert found is not None
        for array, wanted in zip(found, arrays, strict=True):
            assert array.dtype == wanted.dtype
            np.testing.assert_array_equal(array, wanted)
        content = (path / "a.npz").read_bytes()
        (path / "a.npz").write_bytes(content[: len(content) // 2])
        assert work.find("a") is None, "half a file"
        raise KeyboardInterrupt
    with WorkFolder(path, "other") as work:
        assert work.discarded and not work.finished and work.find("a") is None


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ".out.work"
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="move it away"), WorkFolder(path, "k", fresh=True):
        pytest.fail("must not start")
    assert (path / "thesis.tex").read_text() == "mine"


def test_recipe_of_later_steps_keeps_the_key(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A builder that ran out of memory is given more: the layers are still good."""
    output = tmp_path / "out"
    _stop_after_quantising(tiny_model("llama"), output)
    said = _compile(tiny_model("llama"), output)  # --target none
    assert GOES_ON in said
    report = json.loads((output / "report.json").read_text())
    assert report["certificate"]["mismatches"] == 0
