"""tools/slim_wheel.py on a library of two architectures."""

import ctypes
import shutil
import subprocess
import sys
import zipfile

import pytest

KERNEL = '__global__ void k(float* p) { p[threadIdx.x] *= 3.f; }\nextern "C" int answer() { return 42; }\n'


@pytest.fixture
def library(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    (tmp_path / "k.cu").write_text(KERNEL)
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    command = ["nvcc", *codes, "-shared", "-Xcompiler", "-fPIC", "k.cu", "-o", "libk.so"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "libk.so"


def test_other_architectures_are_gone_and_the_library_loads(library, repo_root, tmp_path):
    wheel, out = tmp_path / "k-1-py3-none-any.whl", tmp_path / "slim"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(library, "k/libk.so")
        file.writestr("k/tools/big.py", "x = 1\n" * 10000)
        file.writestr("k/__init__.py", "")
        file.writestr("k-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: k\nVersion: 1\n")
        file.writestr("k-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("k-1.dist-info/RECORD", "")
    command = [sys.executable, "tools/slim_wheel.py", str(wheel), "--sm", "90", "--output", str(out)]
    subprocess.run([*command, "--drop", "*/tools/*"], cwd=repo_root, check=True, capture_output=True)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(out / wheel.name)], check=True, capture_output=True)
    slim = site / "k" / "libk.so"
    assert not (site / "k" / "tools").exists()
    before, after = library.read_bytes(), slim.read_bytes()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert not any(changed) and 500 < len(changed) < 10000  # one of two cubins of some kilobytes
    assert ctypes.CDLL(str(slim)).answer() == 42
