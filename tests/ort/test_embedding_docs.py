"""docs/embedding.md: its C++ compiles against the runtimes' headers, its Python for ONNX Runtime runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from compiled_models import quick
from documents import snippets

from zqfp_compile import compile_model

pytest.importorskip("onnxruntime")


DOCUMENT = Path("docs", "embedding.md")


@pytest.mark.parametrize(
    ("header", "rule", "folder"),
    [
        ("onnxruntime_cxx_api.h", "onnxruntime-ops", "onnxruntime"),
        ("NvInferRuntime.h", "tensorrt-plugin", "tensorrt"),
    ],
)
def test_cpp(header, rule, folder, make, repo_root, tmp_path):
    make(rule)  # fetches the headers
    (code,) = [code for code in snippets(repo_root / DOCUMENT, "cpp") if header in code]
    source = tmp_path / "snippet.cpp"
    source.write_text(code)
    cuda = repo_root / "zqfp_compile" / "kernels" / "tensorrt" / "cuda_types"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-idirafter", str(cuda)]
    command += ["-isystem", str(repo_root / "build" / "headers" / folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_python(make, repo_root, tiny_model, tmp_path):
    make("onnxruntime-ops")
    codes = snippets(repo_root / DOCUMENT, "python")
    assert len(codes) == 3
    for number, code in enumerate(codes):
        compile(code, f"snippet {number}", "exec")
        if "import onnxruntime" not in code:
            continue
        options = {"weight_lowering": "plugin"} if "custom_ops" in code else {}
        folder = tmp_path / str(number)
        recipe = quick(target="onnxruntime", evaluate=False, **options)
        compile_model(tiny_model("llama", dtype="float16"), recipe, output=folder)
        names = {"folder": folder, "cuda": False}
        exec(code, names)
        assert names["session"].get_inputs()
