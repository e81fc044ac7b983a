"""Fixtures for every suite: the repository, exported tiny models (cached in build/), SmolLM2."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from zqfp_compile.kernels.library import Library

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "build" / "models" / "smollm2-135m" / "model.onnx"
OPTIMUM = ROOT / "build" / "models" / "optimum"

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder of setup.cfg."""
    return ROOT


@pytest.fixture(scope="session")
def models_folder() -> Path:
    """models/ with its scripts importable (``import tiny_models``)."""
    folder = ROOT / "models"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder


def tiny_key() -> str:
    """A digest that changes with the export scripts and with the libraries that shape the graph."""
    digest = hashlib.sha256()
    for script in ("tiny.py", "tiny_models.py", "causal_lm_export.py"):
        digest.update((ROOT / "models" / script).read_bytes())
    for package in ("torch", "transformers", "onnxscript", "onnx", "onnx-ir", "tokenizers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:12]


@pytest.fixture(scope="session")
def tiny_model(models_folder: Path) -> TinyModel:
    """``tiny_model(family, exporter="torch", dtype="float32")`` -> path of a tiny ``model.onnx``.

    Families: llama, qwen2, opt, gpt2. Dtypes: float32, float16, with "torch" bfloat16. The folder also
    holds tokenizer.json and config.json; treat it as read-only. "optimum" skips where it is not built.
    """
    cache = ROOT / "build" / "models" / "tiny" / tiny_key()

    def exported(family: str, exporter: str = "torch", dtype: str = "float32") -> Path:
        if exporter == "optimum":
            return _optimum_model(OPTIMUM / f"{family}-{dtype}" / "model.onnx")
        path = cache / f"{family}-{dtype}" / "model.onnx"
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{family}-{dtype}.lock").open("w") as lock:  # pytest-xdist workers share the cache
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                from tiny import build_tiny

                build_tiny(family, dtype, path.parent)
        return path

    return exported


def _optimum_model(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not built: run `make optimum-models`")
    return path


@pytest.fixture(scope="session")
def make() -> Callable[[str], Path]:
    """``make(rule)``: build one of our libraries, and return the folder; $ZQFP_KERNELS is taken as it is."""

    def build(rule: str) -> Path:
        from zqfp_compile.backends.host_libraries import FOLDER_VARIABLE, libraries_folder

        if FOLDER_VARIABLE in os.environ:
            return libraries_folder()
        folder = ROOT / "build" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        command = ["make", "--silent", rule, f"PYTHON={sys.executable}"]
        with (folder / ".lock").open("w") as lock:  # pytest-xdist workers share the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"make {rule}: {result.stderr}"
        return folder

    return build


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Puts back the handlers that a command run in this process sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The exported SmolLM2-135M ``model.onnx`` (float16); skips where it is not exported."""
    if not SMOLLM2.exists():
        command = "python models/export_smollm2.py --output build/models/smollm2-135m"
        pytest.skip(f"{SMOLLM2.relative_to(ROOT)} is not exported: run `{command}`")
    return SMOLLM2


@pytest.fixture(scope="session")
def kernel_library() -> Library:
    """libzqfp, built by ``make kernels`` first; $ZQFP_KERNELS is taken as it is. Skips without nvcc."""
    from zqfp_compile.kernels import library

    if library.VARIABLE not in os.environ:
        if shutil.which("nvcc") is None:
            pytest.skip("nvcc is not installed, so libzqfp.so cannot be built")
        (ROOT / "build").mkdir(exist_ok=True)
        with (ROOT / "build" / "kernels.lock").open("w") as lock:  # pytest-xdist workers build once
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = subprocess.run(
                ["make", "-j4", "kernels"], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return library.load_library()
