"""A compile that is killed goes on from what it had finished, to the same bytes; nothing foreign is used."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from zqfp_compile import Recipe, compile_model
from zqfp_compile.calibrate.walk import _Walk
from zqfp_compile.errors import AccuracyError, MissingDependencyError, ModelError, UsageError, notes
from zqfp_compile.progress import SilentReporter
from zqfp_compile.work_folder import WorkFolder

TinyModel = Callable[..., Path]

RTN = {"target": "none", "calibration_samples": 3, "calibration_length": 32, "evaluate": False}
GPTQ = {**RTN, "algorithm": "gptq", "lorc_format": "fp8", "devices": "cpu"}
GOES_ON, REMOVED = "going on from", "unfinished work of another model or other options is removed"


class _Told(SilentReporter):
    """Keeps the lines for the user."""

    def __init__(self) -> None:
        self.text = ""

    def info(self, text: str) -> None:
        self.text += text + "\n"


def _compile(model: Path, output: Path, options: dict[str, object], **how: object) -> str:
    """Compile to the end; return what the user is told."""
    told = _Told()
    compile_model(model, Recipe.from_dict(options), output=output, reporter=told, **how)
    assert not list(output.parent.glob(f".{output.name}*")), "work folders are cleaned at success"
    return told.text


def _bytes(output: Path) -> dict[str, str]:
    """Digests of the artifact's files."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("model.zqfp.onnx*")
    }


def _work(output: Path) -> Path:
    return output.parent / f".{output.name}.work"


def _kill(model: Path, output: Path, options: dict[str, object], when: Callable[[Path], bool]) -> None:
    """Start a compile and kill it as soon as its work folder is as wanted."""
    recipe = output.parent / "recipe.yaml"
    recipe.write_text(Recipe.from_dict(options).to_yaml())
    command = [sys.executable, "-m", "zqfp_compile", str(model), "-o", str(output), "--recipe", str(recipe)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet, start_new_session=True) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 120
        while process.poll() is None and not when(_work(output)) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)


def _items(work: Path) -> int:
    try:
        return (work / "tensors.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def whole(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Digests of compiles in one go."""
    folder = tmp_path_factory.mktemp("whole")
    result = {}
    for name, options in (("rtn", RTN), ("gptq", GPTQ)):
        _compile(tiny_model("llama"), folder / name, options)
        result[name] = _bytes(folder / name)
        assert len(result[name]) == 2
    return result


@pytest.fixture(scope="module")
def half(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a killed compile, to be copied."""
    output = tmp_path_factory.mktemp("half") / "out"
    _kill(tiny_model("llama"), output, RTN, lambda work: _items(work) >= 3)
    assert _items(_work(output)) >= 3
    return _work(output)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_killed_at_several_moments(
    tiny_model: TinyModel, tmp_path: Path, whole: dict[str, dict[str, str]], name: str
) -> None:
    """While calibrating and twice while quantising: the same files as in one go."""
    options, output = {"rtn": RTN, "gptq": GPTQ}[name], tmp_path / "out"
    moments: list[Callable[[Path], bool]] = [
        lambda work: any(work.glob("*.npz")),
        lambda work: _items(work) >= 2,
        lambda work: _items(work) >= 9,
    ]
    for when in moments if name == "rtn" else moments[1:]:
        _kill(tiny_model("llama"), output, options, when)
    assert GOES_ON in _compile(tiny_model("llama"), output, options)
    assert _bytes(output) == whole[name]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_walk_goes_on_where_it_was(
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: dict[str, dict[str, str]],
    restarted: bool,
) -> None:
    """Activations of both models are found again, but not after a restart: they were not flushed.

    And what one device began, three finish.
    """
    advance, measure = _Walk._advance, _Walk._measure
    advanced, measured = [], []

    def stop(walk: _Walk, index: int, visited: object) -> None:
        if index == 4:
            raise MissingDependencyError("the disk is full")
        advance(walk, index, visited)  # type: ignore[arg-type]

    def count_advance(walk: _Walk, index: int, visited: object) -> None:
        advanced.append(index)
        advance(walk, index, visited)  # type: ignore[arg-type]

    def count_measure(walk: _Walk, *arguments: object) -> object:
        measured.append(arguments)
        return measure(walk, *arguments)  # type: ignore[arg-type]

    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(MissingDependencyError):
        patch.setattr(_Walk, "_advance", stop)
        compile_model(tiny_model("llama"), Recipe.from_dict(GPTQ), output=output)
    monkeypatch.setattr(_Walk, "_advance", count_advance)
    monkeypatch.setattr(_Walk, "_measure", count_measure)
    if restarted:
        monkeypatch.setattr("zqfp_compile.calibrate.kept_walk._boot", lambda: "another")
    assert GOES_ON in _compile(tiny_model("llama"), output, {**GPTQ, "devices": "cpu,cpu,cpu"})
    assert advanced == list(range(0 if restarted else 4, 8)) and len(measured) == 4
    assert _bytes(output) == whole["gptq"]


def test_going_on_does_less(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, dict[str, str]]
) -> None:
    """Finished calibration runs, layers and verdicts are read, not made again; later options may change."""

    def fail(run: object) -> None:
        raise MissingDependencyError("the library is missing")

    output, kept = tmp_path / "out", []
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(MissingDependencyError) as caught:
            patch.setattr("zqfp_compile.pipeline.write_report", fail)
            compile_model(tiny_model("llama"), Recipe.from_dict(RTN), output=output)
        assert str(_work(output)) in notes(caught.value)[0]
        kept.append({path.name: path.stat().st_mtime_ns for path in _work(output).glob("*.npz")})
        kept[-1]["journal"] = (_work(output) / "tensors.jsonl").read_text()
    assert kept[0] == kept[1] and len(kept[0]) == 14 + 3 + 1 + 1 and _items(_work(output)) == 14
    assert GOES_ON in _compile(tiny_model("llama"), output, {**RTN, "builder_timeout": 99})
    assert _bytes(output) == whole["rtn"]


@pytest.mark.parametrize("change", ["option", "fresh", "model"])
def test_foreign_work_is_not_used(
    tiny_model: TinyModel, tmp_path: Path, half: Path, whole: dict[str, dict[str, str]], change: str
) -> None:
    """Another option that matters, another model, or the wish to start over."""
    output = tmp_path / "out"
    shutil.copytree(half, _work(output))
    model = tiny_model("qwen2" if change == "model" else "llama")
    options = {**RTN, "calibration_samples": 1} if change == "option" else RTN
    said = _compile(model, output, options, fresh=change == "fresh")
    assert GOES_ON not in said and REMOVED in said
    if change == "fresh":
        assert _bytes(output) == whole["rtn"]
    else:
        _compile(model, tmp_path / "other", options)
        assert _bytes(output) == _bytes(tmp_path / "other") != whole["rtn"]


def test_other_workers_go_on(
    tiny_model: TinyModel, tmp_path: Path, half: Path, whole: dict[str, dict[str, str]]
) -> None:
    """Who does the work, and where, is no part of the key; the bytes are the same."""
    output = tmp_path / "elsewhere"
    shutil.copytree(half, _work(output))
    assert GOES_ON in _compile(tiny_model("llama"), output, RTN, jobs=2)
    assert _bytes(output) == whole["rtn"]


def test_two_processes_give_the_bytes_of_one(
    tiny_model: TinyModel, tmp_path: Path, whole: dict[str, dict[str, str]]
) -> None:
    assert GOES_ON not in _compile(tiny_model("llama"), tmp_path / "out", RTN, jobs=2)
    assert _bytes(tmp_path / "out") == whole["rtn"]


# the folder alone


def test_kept_only_when_another_try_may_do_better(tmp_path: Path) -> None:
    path = tmp_path / ".out.work"
    for error, finished, kept in (
        (KeyboardInterrupt(), True, True),
        (MissingDependencyError("full"), True, True),
        (MissingDependencyError("full"), False, False),
        (ModelError("bad"), True, False),
        (UsageError("wrong"), True, True),
        (AccuracyError("too much"), True, True),
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


def test_a_kill_while_the_key_is_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "key").touch()
    with WorkFolder(tmp_path / ".out.work", "k") as work:
        assert not work.discarded and (work.path / "key").read_text() == "k"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ".out.work"
    path.mkdir()
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="move it away"), WorkFolder(path, "k", fresh=True):
        pytest.fail("must not start")
    assert (path / "thesis.tex").read_text() == "mine"
