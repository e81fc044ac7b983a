"""tools/embed_cpp: the program for TensorRT and TensorRT-RTX.

It links TensorRT-RTX's own library, which runs nothing here. Its loop runs over a stand-in for TensorRT that
computes in ONNX Runtime, and one for the driver: tested is which calls it makes, and that they give tokens.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path

import onnx
import pytest
from compiled_models import quick
from embed_programs import ROOT, build, check_error, headers, start, tokens_of

from zqfp_compile import Engine, compile_model

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

SUPPORT = ROOT / "tests" / "support"
# Said of TensorRT-RTX under TensorRT's headers, once the files have been compared with the manifest.
VERIFIED = " and tensorrt-rtx here is 1.7.1; compile it with the headers that come with it"


@pytest.fixture(scope="module")
def include(make: Callable[[str], Path]) -> Path:
    """TensorRT's headers."""
    make("build/headers/tensorrt/NvInferRuntime.h")
    return headers("TENSORRT_INCLUDE", "NvInferRuntime.h", "build/headers/tensorrt")


@pytest.fixture(scope="module")
def linked(include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program over the library of TensorRT-RTX's Python package."""
    package = pytest.importorskip("tensorrt_rtx_libs")
    library = Path(package.__file__).parent / "libtensorrt_rtx.so.1"
    folder = build(tmp_path_factory.mktemp("rtx"), tensorrt_include=include, tensorrt_library=library)
    return folder / "generate_tensorrt"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for the driver."""
    folder = tmp_path_factory.mktemp("host")
    shared(SUPPORT / "host_driver.cpp", folder / "libcuda.so.1")
    return folder


@pytest.fixture(scope="module")
def program(include: Path, make: Callable[[str], Path], host: Path) -> Path:
    """The program over the stand-in for TensorRT."""
    make("build/headers/onnxruntime/onnxruntime_cxx_api.h")
    ort = headers("ORT_INCLUDE", "onnxruntime_cxx_api.h", "build/headers/onnxruntime")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*"))
    (host / "libonnxruntime.so.1").symlink_to(library)
    types = ROOT / "zqfp_compile" / "kernels" / "tensorrt" / "cuda_types"
    shared(
        SUPPORT / "tensorrt_over_onnxruntime.cpp",
        host / "libnvinfer.so",
        *("-isystem", include, "-isystem", ort, "-idirafter", types),
        *(host / "libonnxruntime.so.1", f"-Wl,-rpath,{host}"),
    )
    build(host / "build", tensorrt_include=include, tensorrt_library=host / "libnvinfer.so")
    return host / "build" / "generate_tensorrt"


def shared(source: Path, library: Path, *options: object) -> None:
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source]
    done = subprocess.run(
        [*map(str, command), "-o", str(library), *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def folder_of(
    plan: bytes, folder: Path, target: str = "tensorrt", plugin: bytes | None = None, **versions: str
) -> Path:
    """Write a compiled folder with the parts the program reads."""
    content = {f"{target}.engine": plan} | ({} if plugin is None else {"libzqfp_tensorrt.so": plugin})
    files = {}
    for name, data in content.items():
        (folder / name).write_bytes(data)
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = {"tool": "zqfp-compile", "versions": {"numpy": "2.4.6", **versions}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return folder


@pytest.mark.parametrize(("family", "cache"), [("llama", "auto"), ("gpt2", "fp8")])
def test_the_tokens_of_python(
    program: Path, host: Path, tiny_model: Callable[..., Path], tmp_path: Path, family: str, cache: str
) -> None:
    recipe = quick(target="onnxruntime", evaluate=False, kv_cache_dtype=cache)
    compiled = compile_model(tiny_model(family, dtype="float16"), recipe, output=tmp_path / "out").folder
    folder = folder_of(str(compiled / "onnxruntime.onnx").encode(), tmp_path)
    environment = {"LD_LIBRARY_PATH": str(host), "HOST_TENSORRT_LOG": str(tmp_path / "log")}
    wanted = list(Engine.load(compiled, device="cpu").generate_tokens([0, 17, 200], max_new_tokens=60))

    assert tokens_of(program, folder, [0, 17, 200], 60, 1, **environment) == wanted
    # The profile for prompts, then that for single tokens. The stand-in checks that the cache is not moved.
    steps = ["engine", "0 3 0", *(f"1 1 {cached}" for cached in range(3, 2 + len(wanted)))]
    assert (tmp_path / "log").read_text().splitlines() == steps

    refused = start(program, folder, 4, 1, *range(2, 67), **environment)
    check_error(refused, 2, "no profile of the engine takes 65 tokens after 0; build it with other")


@pytest.mark.skipif(find_library("cuda") is not None, reason="there is a CUDA driver")
def test_without_a_driver(linked: Path, tmp_path: Path) -> None:
    done = start(linked, folder_of(b"a plan", tmp_path, "tensorrt-rtx"), 4, 1, 5)
    check_error(done, 6, "error: there is no CUDA driver here (libcuda.so.1): an engine needs an NVIDIA GPU")


def test_without_a_gpu(linked: Path, host: Path, tmp_path: Path) -> None:
    folder = folder_of(b"a plan", tmp_path, "tensorrt-rtx")
    no_gpu = start(linked, folder, 4, 1, 5, LD_LIBRARY_PATH=str(host), HOST_DRIVER_NO_GPU="1")
    check_error(no_gpu, 6, "error: CUDA cannot find a GPU: no CUDA-capable device is detected")


def test_the_headers_of_another_library(linked: Path, host: Path, tmp_path: Path) -> None:
    """TensorRT's headers do not fit TensorRT-RTX: its classes have other layouts."""
    folder = folder_of(b"a plan", tmp_path, "tensorrt-rtx")
    done = start(linked, folder, 4, 1, 5, LD_LIBRARY_PATH=str(host))
    check_error(done, 6, VERIFIED)


def test_an_engine_of_another_version(linked: Path, tmp_path: Path) -> None:
    versions = {"tensorrt": "10.14.1.48", "tensorrt-rtx-cu13": "1.6.1.120"}
    folder = folder_of(b"a plan", tmp_path, "tensorrt-rtx", **versions)
    done = start(linked, folder, 4, 1, 5)
    check_error(done, 3, "tensorrt-rtx.engine: was built by tensorrt-rtx 1.6.1.120, this is 1.7.1; compile")


def test_our_plugin_is_loaded_first(program: Path, host: Path, tmp_path: Path) -> None:
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, 7, [1, "s"]) for name in ("input_ids", "logits")]
    nodes = [helper.make_node("Identity", ["input_ids"], ["logits"])]
    graph = helper.make_graph(nodes, "copies", values[:1], values[1:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save(model, tmp_path / "model.onnx")
    folder = folder_of(str(tmp_path / "model.onnx").encode(), tmp_path, plugin=b"a library")
    environment = {"LD_LIBRARY_PATH": str(host), "HOST_TENSORRT_LOG": str(tmp_path / "log")}
    done = start(program, folder, 0, 1, 5, **environment)
    assert done.returncode == 0, done.stderr
    plugin = folder / "libzqfp_tensorrt.so"
    assert (tmp_path / "log").read_text().splitlines() == [f"plugin {plugin}", "engine"]

    folder_of(b"a plan", tmp_path, plugin=b"")
    check_error(
        start(program, folder, 4, 1, 5, **environment), 3, "libzqfp_tensorrt.so: does not load: it gives"
    )
    plugin.write_bytes(b"another library")
    check_error(start(program, folder, 4, 1, 5, **environment), 3, "libzqfp_tensorrt.so: has changed since")


def test_an_engine_that_does_not_load(program: Path, host: Path, tmp_path: Path) -> None:
    folder = folder_of(b"nowhere.onnx", tmp_path)
    environment = {"LD_LIBRARY_PATH": str(host), "HOST_TENSORRT_LOG": str(tmp_path / "log")}
    done = start(program, folder, 4, 1, 5, **environment)
    check_error(done, 3, " cannot load it: the plan names no model that loads; an engine runs on")


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, (1 << 20) - 1, 1 << 20, (1 << 20) + 56])
def test_sha256(linked: Path, host: Path, tmp_path: Path, size: int) -> None:
    folder = folder_of(bytes(number % 251 for number in range(size)), tmp_path, "tensorrt-rtx")
    check_error(start(linked, folder, 4, 1, 5, LD_LIBRARY_PATH=str(host)), 6, VERIFIED)
    with (folder / "tensorrt-rtx.engine").open("ab") as engine:
        engine.write(b"\0")
    check_error(start(linked, folder, 4, 1, 5), 3, "tensorrt-rtx.engine: has changed since the compile")


@pytest.mark.parametrize(
    ("manifest", "code", "says"),
    [
        ('{"files": {"tensorrt-rtx.engine": %s}}', 6, VERIFIED),
        (
            '\n{"a":[1,-2e3,[],{}, true],"files":{"tensorrt\\u002drtx.engin\\u0065":%s},"b":null} ',
            6,
            VERIFIED,
        ),
        ('{"files": {"tensorrt-rtx.engine": %s}', 3, "manifest.json: no JSON at byte "),
        ('[{"files": {"tensorrt-rtx.engine": %s}}]', 3, "manifest.json: no JSON at byte 0; copy the folder"),
        ('{"files": {"tensorrt-rtx.engine": %s}} x', 3, "manifest.json: no JSON at byte "),
        ('{"files": {"tensorrt-rtx.engine\\q": %s}}', 3, "manifest.json: no JSON at byte 32"),
        ('{"files": [{"tensorrt-rtx.engine": %s}]}', 3, "tensorrt-rtx.engine: not in manifest.json"),
        ('{"files": {"other": %s}}', 3, "tensorrt-rtx.engine: not in manifest.json; compile for this"),
        ('{"a": ' + 5000 * "[" + "%s", 3, "manifest.json: no JSON at byte "),
        ("", 3, "manifest.json: no JSON at byte 0"),
    ],
)
def test_manifests(linked: Path, host: Path, tmp_path: Path, manifest: str, code: int, says: str) -> None:
    digest = json.dumps({"sha256": hashlib.sha256(b"").hexdigest()})
    (tmp_path / "tensorrt-rtx.engine").write_bytes(b"")
    (tmp_path / "manifest.json").write_text(manifest.replace("%s", digest))
    check_error(start(linked, tmp_path, 4, 1, 5, LD_LIBRARY_PATH=str(host)), code, says)
