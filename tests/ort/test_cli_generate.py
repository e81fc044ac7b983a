"""zqfp-generate: the text and nothing else, as it is made; every way to fail is one line."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compiled_models import quick

from zqfp_compile import Engine, Sampling, cli_generate, compile_model

pytest.importorskip("onnxruntime")

PROGRAM = [sys.executable, "-m", "zqfp_compile.cli_generate"]
TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA for ONNX Runtime, moved to where nothing of its source is; treat it as read-only."""
    folder = tmp_path_factory.mktemp("generate")
    recipe = quick(target="onnxruntime", evaluate=False)
    made = compile_model(tiny_model("llama"), recipe, output=folder / "made.zqfp").folder
    return made.rename(folder / "moved")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def test_help_fits_a_terminal_of_80_columns() -> None:
    text = run("--help", COLUMNS="80", TERM="dumb").stdout.decode()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "an option's name is cut"
    assert "Exit codes: 0 done, 2 usage" in text


def test_it_prints_what_the_engine_generates(compiled: Path) -> None:
    """Byte for byte on standard output, with one line end more; -v says how fast on standard error."""
    wanted = "".join(Engine.load(compiled, device="cpu").generate("the engine", max_new_tokens=40))
    result = run(compiled, "--prompt", "the engine", "--max-new-tokens", "40", "-q", "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == f"{wanted}\n"
    options = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "5"]
    drawn = run(compiled, "-p", "the engine", "--max-new-tokens", "40", *options, "-v", "--device", "cpu")
    engine, sampling = Engine.load(compiled, device="cpu"), Sampling(0.9, 50, 0.95, 5)
    assert drawn.stdout.decode() == "".join(
        [*engine.generate("the engine", max_new_tokens=40, sampling=sampling), "\n"]
    )
    assert drawn.stdout != result.stdout
    assert b"onnxruntime.onnx on cpu, prompt of " in drawn.stderr and b" tokens in " in drawn.stderr


def test_it_streams_and_a_reader_may_leave(tiny_model: TinyModel) -> None:
    """Text is there before the last token is; a closed pipe ends it without a word."""
    command = [*PROGRAM, str(tiny_model("llama").parent), "-p", "the", "-q", "--device", "cpu"]
    options = ["--temperature", "3", "--seed", "1", "--max-new-tokens", "100000"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_a_terminal_is_not_steered_by_the_model(tiny_model: TinyModel) -> None:
    """The same draw, with control characters in a file, without them on a terminal."""
    arguments = [str(tiny_model("gpt2").parent), "-p", "the", "-q", "--device", "cpu"]
    arguments += ["--temperature", "9", "--seed", "2", "--max-new-tokens", "200"]
    controls = {code for code in range(32) if chr(code) not in "\n\t"} | {127}
    raw = run(*arguments).stdout
    assert controls & set(raw), "this draw shows nothing"
    ours, theirs = pty.openpty()
    with subprocess.Popen([*PROGRAM, *arguments], stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # how Linux says that nobody holds the other end
                break
        assert process.wait(60) == 0
    os.close(ours)
    assert not controls & set(shown.replace(b"\r\n", b"\n"))
    kept = "".join(
        character for character in raw.decode() if ord(character) not in {*controls, *range(127, 160)}
    )
    assert shown.replace(b"\r\n", b"\n").decode() == kept


def test_the_portable_model_says_that_there_is_a_faster_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = compile_model(
        tiny_model("opt"), quick(target="none", evaluate=False), output=tmp_path / "o"
    ).folder
    result = run(made, "-p", "the", "--max-new-tokens", "3", "--device", "cpu")
    assert result.returncode == 0 and b"compile with --target onnxruntime" in result.stderr


# failures


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModel, compiled: Path) -> Path:
    """A plain model in ``m``, a compiled one in ``c``, an empty folder ``e``; the working directory."""
    shutil.copytree(tiny_model("llama").parent, tmp_path / "m")
    shutil.copytree(compiled, tmp_path / "c")
    (tmp_path / "e").mkdir()
    return tmp_path


@pytest.fixture
def refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signal_handlers: None
) -> Callable[..., str]:
    """``refused(code, *arguments)``: the one line of a run in ``place`` that must fail with this code."""
    monkeypatch.chdir(place)

    def run_in_place(code: int, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["zqfp-generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli_generate.main()
        shown = capfd.readouterr()
        lines = [line for line in shown.err.splitlines() if "✓" not in line]
        assert ended.value.code == code and shown.out == "", shown.err
        assert len(lines) == 1 and lines[0].startswith("zqfp-generate: error: "), shown.err
        return lines[0]

    return run_in_place


SAY = ("-p", "the")
FAILURES: dict[str, tuple[int, tuple[str, ...], str]] = {
    "nothing there": (2, ("no", *SAY), "no: no such file or folder"),
    "no model": (2, ("e", *SAY), "e: has no .onnx file; give a compiled folder"),
    "no prompt": (2, ("m",), "Missing option"),
    "device": (2, ("m", *SAY, "--device", "tpu"), "--device tpu: is not one of auto, cpu, cuda"),
    "temperature": (2, ("m", *SAY, "--temperature", "-1"), "--temperature -1"),
    "greedy and top-p": (2, ("m", *SAY, "--top-p", "0.9"), "need --temperature above 0"),
    "no tokens": (2, ("m", "-p", ""), "the prompt has 0 tokens"),
    "too many": (2, ("m", "-p", "the " * 300), "give 1 to 255"),
    "max-new-tokens": (2, ("m", *SAY, "--max-new-tokens", "0"), "--max-new-tokens"),
    "no chat template": (2, ("m", *SAY, "--chat"), "no chat template"),
    "broken tokenizer": (2, ("broken", *SAY), "not a tokenizer.json"),
    "no tokenizer": (2, ("bare", *SAY), "put the model's tokenizer.json beside it"),
    "a changed file": (3, ("changed", *SAY), "changed/onnxruntime.onnx: has changed since the compile"),
    "no onnx": (3, ("m/tokenizer.onnx", *SAY), "m/tokenizer.onnx: "),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures(refused: Callable[..., str], place: Path, case: str) -> None:
    shutil.copy(place / "m" / "tokenizer.json", place / "m" / "tokenizer.onnx")
    if case == "broken tokenizer":
        (place / "m").rename(place / "broken")
        (place / "broken" / "tokenizer.json").write_text("{", encoding="utf-8")
        (place / "broken" / "tokenizer.onnx").unlink()
    elif case == "no tokenizer":
        (place / "m").rename(place / "bare")
        (place / "bare" / "tokenizer.json").unlink()
    elif case == "a changed file":
        with (place / "c").rename(place / "changed").joinpath("onnxruntime.onnx").open("ab") as file:
            file.write(b"\0")
    code, arguments, says = FAILURES[case]
    line = refused(code, *arguments)
    assert says in line and "Traceback" not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["tensorrt.engine", "tensorrt-rtx.engine"])
def test_an_engine_without_a_gpu_is_exit_6(refused: Callable[..., str], place: Path, name: str) -> None:
    import hashlib

    (place / "c" / name).write_bytes(b"ftrt")
    manifest = json.loads((place / "c" / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"sha256": hashlib.sha256(b"ftrt").hexdigest(), "bytes": 4}
    (place / "c" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert f"c/{name}: running an engine needs an NVIDIA GPU" in refused(6, f"c/{name}", *SAY)
    assert f"c/{name}: running an engine needs an NVIDIA GPU" in refused(6, "c", *SAY, "--device", "cuda")
    assert "finds no GPU" in refused(6, "m", *SAY, "--device", "cuda")
