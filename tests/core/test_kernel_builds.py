"""The kernel's builds for finding faults, which nothing else compiles, still compile."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("option", "file", "sign"),
    [("DEBUG_WAIT", "gemm_64.o.log", b"barrier_wait"), ("TRACE", "gemm_64.o", b"zqfpReadTrace")],
)
def test_it_compiles(option: str, file: str, sign: bytes, repo_root: Path, tmp_path: Path) -> None:
    """One group size, about 5 s: the sign shows that the option was heard (a wait that is a function)."""
    command = ["make", "--silent", f"OUT={tmp_path}", f"{option}=1", f"{tmp_path}/gemm_64.o"]
    folder = repo_root / "zqfp_compile" / "kernels" / "cuda"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sign in (tmp_path / file).read_bytes()
