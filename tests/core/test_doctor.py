"""zqfp-doctor in doctored environments: packages and a driver put in front of the real ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "zqfp_compile.cli_doctor"]


@pytest.fixture
def shadow(tmp_path: Path) -> Path:
    """A folder whose modules come before the installed ones."""
    folder = tmp_path / "shadow"
    folder.mkdir()
    return folder


def doctor(shadow: Path, *flags: str, **environment: str) -> str:
    """The doctor's output; it never fails, whatever it finds."""
    path = os.pathsep.join([str(shadow), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [*COMMAND, *flags],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=shadow,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout


def found(shadow: Path, **environment: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The whole report, its libraries and its targets by name."""
    report = json.loads(doctor(shadow, "--json", **environment))
    libraries = {library["name"]: library for library in report["libraries"]}
    return report, libraries, {target["target"]: target for target in report["targets"]}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def fake_driver(shadow: Path, major: int, minor: int) -> dict[str, str]:
    """A libcuda.so.1 that has one GPU; returns the environment that finds it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    source = write(
        shadow / "cuda.c",
        "int cuInit(int f) { return 0; }\n"
        "int cuDeviceGetCount(int *n) { *n = 1; return 0; }\n"
        "int cuDeviceGet(int *d, int i) { *d = i; return 0; }\n"
        f"int cuDeviceGetAttribute(int *v, int a, int d) {{ *v = a == 75 ? {major} : {minor}; return 0; }}\n",
    )
    library = shadow / "driver" / "libcuda.so.1"
    library.parent.mkdir()
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return {"LD_LIBRARY_PATH": str(library.parent)}


CUDA_TORCH = """
__version__ = "9.9+cu130"
class version: cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "Pretend GPU")
"""


def test_here_what_builds_and_runs_is_what_really_does(shadow: Path) -> None:
    """In the environment of the tests, as a person reads it."""
    pytest.importorskip("onnxruntime")
    lines = doctor(shadow).splitlines()
    where = lines.index("Targets")
    ort = next(index for index in range(where, len(lines)) if lines[index].split()[:1] == ["onnxruntime"])
    assert lines[ort].split() == ["onnxruntime", "builds", "here:", "yes"]
    assert lines[ort + 1].split() == ["runs", "here:", "yes"]
    assert any(line.startswith("  torch ") and "no:" not in line for line in lines)
    assert lines[-1].startswith("--target auto takes ")


def test_everything_is_broken(shadow: Path) -> None:
    """Each in its own way; one line for each says what to do."""
    write(shadow / "onnxruntime" / "__init__.py", "raise ImportError('libcudart.so.12: cannot open\\nit')")
    write(shadow / "tensorrt" / "__init__.py", "")
    write(shadow / "tensorrt_rtx.py", "import os\nos.abort()")
    write(shadow / "torch.py", "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    write(shadow / "onnx.py", "print('hello')\nraise SystemExit(3)")
    write(shadow / "numpy.py", "raise OSError('libopenblas.so: wrong ELF class')")
    report, libraries, targets = found(shadow, PATH="", CUDA_HOME="", ZQFP_KERNELS=str(shadow / "k"))
    says = {
        "onnxruntime": "does not load (libcudart.so.12: cannot open it); reinstall it: pip install",
        "tensorrt": "'tensorrt' package has no Builder (a stubs package?)",
        "tensorrt-rtx": "crashes when imported (SIGABRT); reinstall it",
        "torch": "not installed; run: pip install torch",
        "onnx": "does not load (",
        "numpy": "does not load (libopenblas.so: wrong ELF class); reinstall it: pip install 'numpy>=",
        "nvcc": "not on PATH nor in CUDA_HOME; only building our kernels needs it",
        "kernels": "does not load (",
    }
    for name, text in says.items():
        assert libraries[name]["version"] is None and text in libraries[name]["fix"], name
        assert "\n" not in libraries[name]["fix"]
    for target in targets.values():
        assert not target["builds"] and not target["runs"]
        assert target["build_fix"].startswith("every compile needs numpy: does not load")
    assert report["auto"].startswith("--target auto: no runtime is installed; run: pip install")


def test_a_machine_with_a_gpu_and_tensorrt(shadow: Path) -> None:
    """An H100: TensorRT builds and runs, TensorRT-RTX builds what this GPU cannot run."""
    pytest.importorskip("onnxruntime")
    for name in ("tensorrt", "tensorrt_rtx"):
        write(shadow / f"{name}.py", "__version__ = '11.2.0'\nclass Builder: pass")
    write(shadow / "torch.py", CUDA_TORCH)
    nvcc = write(
        shadow / "bin" / "nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n"
    )
    nvcc.chmod(0o755)
    write(shadow / "kernels" / "libzqfp.so", "")
    environment = {
        "PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}",
        "ZQFP_KERNELS": str(shadow / "kernels"),
    }
    report, libraries, targets = found(shadow, **environment, **fake_driver(shadow, 9, 0))
    assert report["gpus"] == ["90"]
    assert (libraries["nvcc"]["version"], libraries["nvcc"]["detail"]) == ("12.8", str(nvcc))
    assert libraries["torch"]["detail"] == "CUDA 13.0, Pretend GPU"
    assert libraries["kernels"]["detail"] == f"libzqfp.so in {shadow / 'kernels'}"
    assert libraries["tensorrt"]["version"] == "11.2.0"
    assert targets["tensorrt"]["builds"] and targets["tensorrt"]["runs"]
    assert targets["tensorrt-rtx"]["builds"] and not targets["tensorrt-rtx"]["runs"]
    assert "does not support SM90; use --target tensorrt" in targets["tensorrt-rtx"]["run_fix"]
    assert report["auto"] == "tensorrt: TensorRT is installed and a GPU (SM90) is here"


def test_a_gpu_that_torch_does_not_see(shadow: Path) -> None:
    pytest.importorskip("onnxruntime")
    write(shadow / "tensorrt_rtx.py", "__version__ = '1.7'\nclass Builder: pass")
    write(shadow / "torch.py", CUDA_TORCH.replace("lambda: True", "lambda: False").replace('"13.0"', "None"))
    _, libraries, targets = found(shadow, ZQFP_KERNELS=str(shadow / "k"), **fake_driver(shadow, 8, 9))
    assert libraries["kernels"]["fix"].startswith(
        f"none in {shadow / 'k'}; only --weight-lowering plugin needs"
    )
    assert libraries["torch"]["detail"] == "built without CUDA"
    assert targets["tensorrt-rtx"]["builds"]
    assert targets["tensorrt-rtx"]["run_fix"].endswith("install a CUDA build of torch")


def test_two_packages_of_onnxruntime(shadow: Path) -> None:
    """They overwrite each other's files, and pip does not mind."""
    for name in ("onnxruntime", "onnxruntime_gpu"):
        write(
            shadow / f"{name}-1.0.dist-info" / "METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        )
    _, libraries, targets = found(shadow)
    assert "pip uninstall onnxruntime onnxruntime-gpu, then install one" in libraries["onnxruntime"]["fix"]
    assert not targets["onnxruntime"]["runs"] and not targets["onnxruntime"]["builds"]


def test_help_fits_a_terminal_of_80_columns(shadow: Path) -> None:
    text = doctor(shadow, "--help", COLUMNS="80", TERM="dumb")
    assert max(map(len, text.splitlines())) <= 80 and "--json" in text
