"""tools/embed_cpp: the C++ program builds without warnings and prints the tokens that Python makes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from compiled_models import quick

from zqfp_compile import Engine, compile_model

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

PLACES = ("build/headers/onnxruntime", "/usr/include/onnxruntime", "/usr/include/onnxruntime/core/session")


@pytest.fixture(scope="module")
def program(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program; skips where CMake, a compiler or ONNX Runtime's headers are missing."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler")
    named = os.environ.get("ORT_INCLUDE")
    folders = [repo_root / place for place in ([named] if named else PLACES)]
    headers = next((folder for folder in folders if (folder / "onnxruntime_cxx_api.h").is_file()), None)
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*"), None)
    if headers is None or library is None:
        pytest.skip("no onnxruntime_cxx_api.h: install libonnxruntime-dev or set ORT_INCLUDE to its folder")
    build = tmp_path_factory.mktemp("embed")
    options = [
        f"-DONNXRUNTIME_INCLUDE={headers}",
        f"-DONNXRUNTIME_LIBRARY={library}",
        "-DCMAKE_CXX_FLAGS=-Werror",
    ]
    for command in (
        ["cmake", "-S", str(repo_root / "tools" / "embed_cpp"), "-B", str(build), *options],
        ["cmake", "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "generate_onnxruntime"


def tokens_of(program: Path, folder: Path, prompt: list[int], count: int, end: int) -> list[int]:
    command = [str(program), str(folder), str(count), str(end), *map(str, prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_the_tokens_of_python(
    program: Path, tiny_model: Callable[..., Path], tmp_path: Path, family: str, cache: str
) -> None:
    recipe = quick(target="onnxruntime", evaluate=False, kv_cache_dtype=cache)
    model = tiny_model(family, dtype="float16")
    folder = compile_model(model, recipe, output=tmp_path / "out").folder
    engine = Engine.load(folder, device="cpu")
    for prompt in ([5], [0, 17, 200], engine.encode("the engine in the")):
        wanted = list(engine.generate_tokens(prompt, max_new_tokens=40))
        assert tokens_of(program, folder, prompt, 40, 1) == wanted
    assert tokens_of(program, folder, prompt, 40, wanted[3]) == wanted[: wanted.index(wanted[3]) + 1]


def test_smollm2(program: Path, smollm2: Path, tmp_path: Path) -> None:
    folder = compile_model(
        smollm2, quick(target="onnxruntime", evaluate=False), output=tmp_path / "out"
    ).folder
    engine = Engine.load(folder, device="cpu")
    prompt = engine.encode("The sea is")
    wanted = list(engine.generate_tokens(prompt, max_new_tokens=64))
    assert tokens_of(program, folder, prompt, 64, 2) == wanted


def test_errors_are_one_line(program: Path, tmp_path: Path) -> None:
    for arguments, code, says in (
        ([], 2, "usage: generate_onnxruntime FOLDER"),
        ([str(tmp_path), "4", "1", "5"], 3, f"error: {tmp_path}/onnxruntime.onnx: "),
    ):
        done = subprocess.run(
            [str(program), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code and done.stdout == ""
        assert says in done.stderr and len(done.stderr.splitlines()) == 1
