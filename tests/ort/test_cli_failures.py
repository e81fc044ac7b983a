"""Every way to fail from the command line: one line, the right exit code, nothing left behind.

Nothing but finished work that the same command can use: then the line says where it is (``keeps_work``).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_runs import keeps_work, listing, only_error, start
from onnx import numpy_helper
from small_lm import WORDS

from zqfp_compile import cli

QUICK = ("--target", "none", "--calibration-samples", "1", "--calibration-length", "32")
FAST = (*QUICK, "--no-evaluate")
LAYER = "model.layers.0.self_attn.q_proj"

TinyModel = Callable[..., Path]
Refused = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModel) -> Path:
    """A folder with ``m/model.onnx``, ``m/tokenizer.json`` and ``text.txt``, as working directory."""
    shutil.copytree(tiny_model("llama").parent, tmp_path / "m")
    (tmp_path / "text.txt").write_text(WORDS * 20, encoding="utf-8")
    return tmp_path


@pytest.fixture
def refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signal_handlers: None
) -> Refused:
    """``refused(code, *arguments, says=(...))``: the error line of a run in ``place`` that must fail.

    It leaves nothing; with ``keeps`` the finished work, which is then removed.
    """
    monkeypatch.chdir(place)

    def run(code: int, *arguments: object, says: tuple[str, ...] = (), keeps: bool = False) -> str:
        before = listing(place)
        monkeypatch.setattr(sys, "argv", ["zqfp-compile", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capfd.readouterr()
        line = only_error(shown.err)
        assert ended.value.code == code, line
        assert shown.out == ""
        for text in says:
            assert text in line
        assert keeps_work(place, line) == keeps
        assert listing(place) == before
        return line

    return run


# usage: exit 2

USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no model": ((), ("Missing argument 'MODEL'", "--help")),
    "unknown flag": (("m/model.onnx", "--grop-size", "64"), ("--grop-size", "--group-size")),
    "no number": (("m/model.onnx", "--group-size", "big"), ("--group-size", "whole number")),
    "group size": (("m/model.onnx", "--group-size", "48"), ("--group-size", "48", "16, 32, 64")),
    "target": (("m/model.onnx", "--target", "cuda"), ("--target", "'cuda'", "tensorrt-rtx")),
    "devices": (("m/model.onnx", "--devices", "gpu0,gpu1"), ("--devices", "'gpu0'", "cuda:0,cuda:1")),
    "rank": (("m/model.onnx", "--lorc-rank", "-1"), ("--lorc-rank", "0..512")),
    "regex": (("m/model.onnx", "--exclude", "("), ("--exclude", "'('", "regular expression")),
    "shapes": (("m/model.onnx", "--max-shapes", "ids=1x2"), ("--max-shapes", "NAME:1x128")),
    "nothing to do": (("m/model.onnx", "--weights", "none", "--activations", "none"), ("nothing to do",)),
    "gate without evaluation": (
        ("m/model.onnx", "--no-evaluate", "--max-perplexity-increase", "1"),
        ("--max-perplexity-increase", "--no-evaluate"),
    ),
    "emit": (("m/model.onnx", "--emit", "fp4", "--weights", "int4"), ("--emit fp4", "--weights fp4")),
    "emit for Triton": (
        ("m/model.onnx", *FAST, "--emit", "triton-repository"),
        ("--emit triton-repository", "--target none", "--emit onnxruntime"),
    ),
    "dump": (("m/model.onnx", "--dump-after", "all"), ("--dump-after", "'all'", "select-linears")),
    "recipe missing": (("m/model.onnx", "--recipe", "no.yaml"), ("no.yaml", "No such file")),
    "recipe is a model": (("m/model.onnx", "--recipe", "m/model.onnx"), ("cannot be read",)),
    "exclude matches nothing": (
        ("m/model.onnx", *FAST, "--exclude", "layers.9.q"),
        ("--exclude 'layers.9.q'", "matches no layer", "model.layers."),
    ),
    "exclude matches all": (("m/model.onnx", *FAST, "--exclude", "."), ("no linear layer", "--exclude")),
    "no calibration file": (("m/model.onnx", *FAST, "--calibration", "no.txt"), ("no.txt", "No such file")),
    "no calibration npz": (("m/model.onnx", *FAST, "--calibration", "no.npz"), ("no.npz", "No such file")),
    "calibration npz": (
        ("m/model.onnx", *FAST, "--calibration", "wrong.npz"),
        ("'ids' is no input", "input_ids"),
    ),
    "calibration npz is text": (
        ("m/model.onnx", *FAST, "--calibration", "text.npz"),
        ("not an .npz archive", "numpy.savez"),
    ),
    "no evaluation text": (
        ("m/model.onnx", *QUICK, "--eval-text", "no.txt"),
        ("--eval-text no.txt", "No such"),
    ),
    "evaluation text too short": (
        ("m/model.onnx", *QUICK, "--eval-text", "short.txt"),
        ("short.txt", "longer"),
    ),
    "shapes of no input": (
        ("m/model.onnx", "--target", "tensorrt-rtx", "--max-shapes", "ids:1x8"),
        ("--max-shapes ids:1x8", "input_ids"),
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(refused: Refused, place: Path, case: str) -> None:
    """Wrong options and files: exit 2, before any layer is quantised."""
    if "tensorrt-rtx" in USAGE[case][0]:
        pytest.importorskip("tensorrt_rtx")
    np.savez(place / "wrong.npz", ids=np.zeros((1, 4), np.int64))
    (place / "text.npz").write_text(WORDS, encoding="utf-8")
    (place / "short.txt").write_text("a", encoding="utf-8")
    arguments, says = USAGE[case]
    refused(2, *arguments, says=says)


def test_recipe_file_and_option_are_named(refused: Refused, place: Path) -> None:
    (place / "r.yaml").write_text("wieghts: fp4\n", encoding="utf-8")
    refused(2, "m/model.onnx", "--recipe", "r.yaml", says=("r.yaml", "'wieghts'", "did you mean weights?"))
    (place / "r.yaml").write_text("group_size: big\n", encoding="utf-8")
    refused(2, "m/model.onnx", "--recipe", "r.yaml", says=("r.yaml", "--group-size", "'big'"))


def test_tokens_out_of_range(refused: Refused, place: Path) -> None:
    """The runtime's own log stays out of the way of the one line."""
    np.savez(place / "far.npz", input_ids=np.full((1, 4), 10**6, np.int64))
    refused(3, "m/model.onnx", *FAST, "--calibration", "far.npz", says=("idx=1000000",))


def test_text_without_tokenizer(refused: Refused, place: Path) -> None:
    (place / "m" / "tokenizer.json").unlink()
    for flag in ("--calibration", "--eval-text"):
        refused(2, "m/model.onnx", *QUICK, flag, "text.txt", says=(flag, "tokenizer.json beside the model"))


def test_broken_tokenizer(refused: Refused, place: Path) -> None:
    (place / "m" / "tokenizer.json").write_text("{", encoding="utf-8")
    refused(2, "m/model.onnx", *FAST, says=("m/tokenizer.json", "not a tokenizer.json"))


# models: exit 3


def test_model_that_is_none(refused: Refused, place: Path) -> None:
    refused(3, "text.txt", says=("text.txt: is a text file",))
    refused(3, "m", says=("is a folder", "m/model.onnx"))
    refused(3, "m/modle.onnx", says=("no such file", "did you mean m/model.onnx?"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weight_that_is_no_number(refused: Refused, place: Path, value: float) -> None:
    """The line names the layer and the tensor."""
    path = place / "m" / "model.onnx"
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 2 and "embed" not in t.name)
    array = numpy_helper.to_array(tensor).copy()
    array[1, 2] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, path)
    refused(3, "m/model.onnx", *FAST, says=(f"'{tensor.name}' of layer model.layers.", "NaN", "export"))
    unseen = ("--activation-scale", "token", "--lorc-rank", "0")  # no calibration runs into it
    refused(3, "m/model.onnx", *FAST, *unseen, says=("model.layers.", "NaN", "--exclude"))


# accuracy 4, builder 5, environment 6


def test_gate(refused: Refused) -> None:
    """One power of two for 256 weights costs more than a hundredth of a percent of perplexity."""
    coarse = (
        "--scale-constraint",
        "m1",
        "--group-size",
        "256",
        "--lorc-rank",
        "0",
        "--eval-text",
        "text.txt",
    )
    gate = ("--eval-length", "64", "--max-perplexity-increase", "0.01")
    says = ("perplexity rose by", "allows 0.01%", "--lorc-rank", "another limit")
    refused(4, "m/model.onnx", *QUICK, *coarse, *gate, says=says, keeps=True)


def _slow_builder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the builder's process start late: a fast machine builds a tiny engine in less than a second."""
    folder.mkdir()
    late = "import sys, time\nif 'zqfp_compile.backends' in ' '.join(sys.orig_argv):\n"
    (folder / "sitecustomize.py").write_text(
        late + "    print('late', flush=True)\n    time.sleep(60)\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(("flag", "value"), [("--builder-timeout", "3"), ("--builder-memory-gb", "0.1")])
def test_builder_limits(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str, value: str
) -> None:
    """The line names the flag to change and the log that tells more."""
    pytest.importorskip("tensorrt_rtx")
    if flag == "--builder-timeout":
        _slow_builder(tmp_path.parent / f"{tmp_path.name}-slow", monkeypatch)
    logs = tmp_path.parent / f"{tmp_path.name}-logs"
    logs.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(logs))
    line = refused(
        5, "m/model.onnx", *FAST[2:], "--target", "tensorrt-rtx", flag, value, says=(flag,), keeps=True
    )
    (log,) = logs.iterdir()
    assert str(log) in line and log.stat().st_size > 0


def test_compute_capability(refused: Refused) -> None:
    pytest.importorskip("tensorrt_rtx")
    arguments = ("m/model.onnx", *FAST[2:], "--target", "tensorrt-rtx", "--compute-capability", "90")
    refused(2, *arguments, says=("--compute-capability 90", "89", "120"))


def test_environment(refused: Refused, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ZQFP_KERNELS", str(tmp_path))  # where no library is
    refused(6, "m/model.onnx", "--weight-lowering", "plugin", says=("--weight-lowering plugin", "fp8"))
    refused(6, "m/model.onnx", "--devices", "cuda:9999", says=("--devices cuda:9999", "GPUs", "--device cpu"))
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        refused(6, "m/model.onnx", "--target", "tensorrt", says=("--target tensorrt", "pip install tensorrt"))


# where to write


def test_output_that_cannot_be(refused: Refused, place: Path) -> None:
    refused(2, "m/model.onnx", *FAST, "-o", "no/out", says=("does not exist", "--output"))
    refused(2, "m/model.onnx", *FAST, "-o", "text.txt", says=("is a file", "--output"))
    refused(2, "m/model.onnx", *FAST, "-o", "text.txt/out", says=("text.txt", "--output"))
    refused(2, "m/model.onnx", *FAST, "-o", "m", says=("did not write", "--output"))
    refused(6, "m/model.onnx", *FAST, "-o", "/proc/out", says=("/proc/out: cannot be written",))


def _mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``disk(options)``: an empty tmpfs; skips where this user may not mount one."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if not _mount(folder, options):
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_read_only_disk(refused: Refused, disk: Callable[[str], Path]) -> None:
    out = disk("size=1m,ro") / "out"
    refused(6, "m/model.onnx", *FAST, "-o", out, says=(f"{out}: cannot be written (Read-only file system)",))


def test_too_little_disk_is_said_before_the_work(refused: Refused, disk: Callable[[str], Path]) -> None:
    out = disk("size=300k") / "out"
    arguments = ("m/model.onnx", *FAST[2:], "--target", "onnxruntime", "-o", out)
    refused(6, *arguments, says=(f"{out}: ", " of disk are needed and ", " KiB are free", "--output"))


def test_too_little_memory_is_said_before_the_work(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zqfp_compile.steps.estimate.available_memory", lambda: 100 << 20)
    says = ("of memory are needed and 100.0 MiB are available", "m/model.onnx", "--jobs")
    refused(6, "m/model.onnx", *FAST, says=says)


@pytest.fixture
def filling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up during the run: at the start there seemed to be room."""
    monkeypatch.setattr("zqfp_compile.steps.estimate.ensure_free_space", lambda path, needed: None)


@pytest.mark.usefixtures("filling")
@pytest.mark.parametrize("kib", [8, 300, 800])
def test_full_disk(refused: Refused, disk: Callable[[str], Path], kib: int) -> None:
    """Full while quantising, while writing the artifact, and while writing what runs."""
    out = disk(f"size={kib}k") / "out"
    arguments = ("m/model.onnx", *FAST[2:], "--target", "onnxruntime", "-o", out)
    refused(6, *arguments, says=(f"{out}: the disk is full", "--output"), keeps=kib > 8)


@pytest.mark.usefixtures("filling")
def test_disk_full_of_engine(refused: Refused, disk: Callable[[str], Path]) -> None:
    """The engine is the first file of megabytes."""
    pytest.importorskip("tensorrt_rtx")
    arguments = ("m/model.onnx", *FAST[2:], "--target", "tensorrt-rtx", "-o", disk("size=3m") / "out")
    says = ("No space left on device while writing the engine", "--output")
    refused(6, *arguments, says=says, keeps=True)


# real processes: signals, pipes, rivals


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGINT, "✓ select-linears"), (signal.SIGTERM, "✓ certificate"), (signal.SIGHUP, "✓ load")],
)
def test_signals_clean_up(place: Path, number: int, after: str) -> None:
    """What is finished stays, and the line says so; early on that may be nothing."""
    before = listing(place)
    process = start(place, "-v", *FAST, "--calibration-samples", "400", "-o", "out")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(after):
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    line = only_error(rest)
    kept = keeps_work(place, line)
    nothing = f"zqfp-compile: error: stopped by {name}; what was unfinished is removed"
    assert line.startswith(f"zqfp-compile: error: stopped by {name}; ") and (line == nothing) == (not kept)
    assert kept or after != "✓ certificate"
    assert listing(place) == before


def test_signal_ends_the_builder(place: Path) -> None:
    """The builder is a process of its own: it ends too."""
    pytest.importorskip("tensorrt_rtx")
    process = start(place, "-v", *FAST[2:], "--target", "tensorrt-rtx", "-o", "out")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("✓ save onnxruntime.onnx"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 20
    while not (workers := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and workers
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert [path.name for path in place.glob(".out*")] == [".out.work"] and not (place / "out").exists()


def test_nohup_is_respected(place: Path) -> None:
    """A closed terminal does not end what was started to survive it."""
    process = start(
        place, *FAST, "-v", "-o", "out", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and (place / "out" / "manifest.json").exists()


def test_nobody_reads(place: Path) -> None:
    """Readers of both streams are gone: the compile still finishes, silently."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        process = start(place, *FAST, "-v", "-o", "out", stdout=closed, stderr=closed)
        assert process.wait(timeout=60) == 0
    assert (place / "out" / "manifest.json").exists()


def test_summary_on_a_full_disk(place: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        process = start(place, *FAST, "-o", "out", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "standard output" in only_error(err) and (place / "out" / "manifest.json").exists()


def test_two_compiles_into_one_folder(place: Path) -> None:
    """One wins, the other is told by whom."""
    runs = [start(place, *FAST, "--calibration-samples", "100", "-o", "out") for _ in range(2)]
    ends = [(run.communicate(timeout=90)[1], run.returncode, run.pid) for run in runs]
    (won,) = [end for end in ends if end[1] == 0]
    (lost,) = [end for end in ends if end[1] != 0]
    assert lost[1] == 2 and f"another compile (process {won[2]})" in only_error(lost[0])
    assert (place / "out" / "manifest.json").exists() and not list(place.glob(".out*"))
