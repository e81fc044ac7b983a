"""Threads of the emulated kernels race for nothing: ThreadSanitizer over tests of test_kernel_emulated.py.

The ones that are marked for it have blocks that wait for each other: tiles that are cut, and x @ V in shares.
compute-sanitizer's racecheck sees shared memory only, and follows neither an mbarrier on which one lane
arrives for its warp nor named barriers on which some threads only arrive (docs/kernel.md). Here the
threads are the GPU's, and barriers and atomics order what the PTX memory model lets them order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def sanitizer() -> str:
    """The library that has to be loaded first; skips where it cannot run."""
    if shutil.which("nvcc") is None or shutil.which("setarch") is None:
        pytest.skip("needs nvcc, for CUDA's headers, and setarch")
    found = subprocess.run(["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    library = found.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("gcc has no libtsan")
    # Its shadow memory wants fixed addresses, which a container may not allow to ask for.
    works = subprocess.run(["setarch", "-R", "true"], env={**os.environ, "LD_PRELOAD": library}, check=False)
    if works.returncode != 0:
        pytest.skip("ThreadSanitizer does not run here")
    return library


def test_threads_race_for_nothing(repo_root: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer(),
        "TSAN_OPTIONS": f"log_path={tmp_path}/race exitcode=66",
        "ZQFP_EMULATOR_OPTIONS": "-fsanitize=thread -g",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = ["setarch", "-R", sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    file = repo_root / "tests" / "core" / "test_kernel_emulated.py"
    done = subprocess.run(
        [*command, file, "-m", "races"],
        cwd=repo_root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = "\n".join(path.read_text() for path in sorted(tmp_path.glob("race*")))
    assert "WARNING" not in said, said[:4000]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout
