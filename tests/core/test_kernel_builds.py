"""Builds of the kernels for finding faults and for trials compile; slow machine code fails them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

# A product's sums are used while it is under way, in a branch of some threads, or by all before the wait.
SERIALISED = """
#include "../cuda/multiply.cuh"

__global__ void kernel(float* y, const uint32_t* weights, uint64_t tokens) {
  float sums[4] = {};
  zqfp::ptx::wgmma_fence();
  if (CONDITION) zqfp::Wgmma<8>::e4m3(sums, weights, tokens);
  zqfp::ptx::wgmma_commit();
  for (float sum : sums) *y++ = sum;
  zqfp::ptx::wgmma_wait<0>();
}
"""


def build(repo_root: Path, folder: Path, file: str, *variables: str) -> subprocess.CompletedProcess[str]:
    """Make a file of the kernels' Makefile in a folder, where sources may lie that are not the kernels'."""
    command = ["make", "--silent", f"OUT={folder}", f"VPATH={folder}", *variables, f"{folder}/{file}"]
    cuda = repo_root / "zqfp_compile" / "kernels" / "cuda"
    return subprocess.run(command, cwd=cuda, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("option", "file", "sign"),
    [
        ("DEBUG_WAIT", "gemm_64.o.log", b"barrier_wait"),
        ("TRACE", "gemm_64.o", b"zqfpReadTrace"),
        ("VARIANTS", "gemm_64.o", b"t2w4g3q"),
    ],
)
def test_it_compiles(option: str, file: str, sign: bytes, repo_root: Path, tmp_path: Path) -> None:
    """One group size, 5 to 15 s: the sign shows that the option was heard (a wait that is a function)."""
    done = build(repo_root, tmp_path, "gemm_64.o", f"{option}=1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sign in (tmp_path / file).read_bytes()


@pytest.mark.parametrize(
    ("condition", "reason"),
    [("threadIdx.x < *weights", "serialized"), ("true", "warpgroup.wait is injected")],
)
def test_serialised_wgmma_fails_the_build(
    condition: str, reason: str, repo_root: Path, tmp_path: Path
) -> None:
    """What the compiler says of it depends on why; it is no error or warning of its own."""
    (tmp_path / "serialised.cu").write_text(SERIALISED.replace("CONDITION", condition))
    done = build(repo_root, tmp_path, "serialised.o")
    assert done.returncode != 0 and reason in done.stderr, done.stderr[-4000:]
    assert not (tmp_path / "serialised.o").exists()
