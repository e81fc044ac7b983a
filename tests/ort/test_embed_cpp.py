"""tools/embed_cpp: the program for ONNX Runtime builds without warnings and prints the tokens of Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from compiled_models import quick
from embed_programs import build, check_error, headers, start, tokens_of

from zqfp_compile import Engine, compile_model

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

PLACES = ("build/headers/onnxruntime", "/usr/include/onnxruntime", "/usr/include/onnxruntime/core/session")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program; skips where ONNX Runtime's headers are missing."""
    include = headers("ORT_INCLUDE", "onnxruntime_cxx_api.h", *PLACES)
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*"))
    folder = build(tmp_path_factory.mktemp("embed"), onnxruntime_include=include, onnxruntime_library=library)
    return folder / "generate_onnxruntime"


def compiled(model: Path, folder: Path, **options: str) -> Path:
    return compile_model(model, quick(target="onnxruntime", evaluate=False, **options), output=folder).folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_the_tokens_of_python(
    program: Path, tiny_model: Callable[..., Path], tmp_path: Path, family: str, cache: str
) -> None:
    folder = compiled(tiny_model(family, dtype="float16"), tmp_path / "out", kv_cache_dtype=cache)
    engine = Engine.load(folder, device="cpu")
    for prompt in ([5], [0, 17, 200], engine.encode("the engine in the")):
        wanted = list(engine.generate_tokens(prompt, max_new_tokens=40))
        assert tokens_of(program, folder, prompt, 40, 1) == wanted
    assert tokens_of(program, folder, prompt, 40, wanted[3]) == wanted[: wanted.index(wanted[3]) + 1]


def test_our_custom_ops(
    program: Path, make: Callable[[str], Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    make("onnxruntime-ops")
    folder = compiled(tiny_model("llama", dtype="float16"), tmp_path / "out", weight_lowering="plugin")
    wanted = list(Engine.load(folder, device="cpu").generate_tokens([0, 17, 200], max_new_tokens=20))
    assert tokens_of(program, folder, [0, 17, 200], 20, 1) == wanted


def test_smollm2(program: Path, smollm2: Path, tmp_path: Path) -> None:
    folder = compiled(smollm2, tmp_path / "out")
    engine = Engine.load(folder, device="cpu")
    prompt = engine.encode("The sea is")
    wanted = list(engine.generate_tokens(prompt, max_new_tokens=64))
    assert tokens_of(program, folder, prompt, 64, 2) == wanted


def test_errors_are_one_line(program: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    check_error(start(program), 2, "usage: generate_onnxruntime FOLDER")
    check_error(start(program, tmp_path, 4, 1, "five"), 2, "error: five: is not a whole number")
    check_error(start(program, tmp_path, 4, 1, 5), 3, f"error: {tmp_path}/manifest.json: No such file")
    folder = compiled(tiny_model("llama", dtype="float16"), tmp_path / "out")
    (folder / "onnxruntime.onnx.data").write_bytes(b"others")
    check_error(start(program, folder, 4, 1, 5), 3, "onnxruntime.onnx.data: has changed since the compile")
