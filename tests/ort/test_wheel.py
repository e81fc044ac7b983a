"""A wheel built from this tree and installed away from it works, and has every file it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

PACKAGES = ("passes", "zqfp_compile")
# The hosts of our kernel are built from a checkout.
CHECKOUT_ONLY = tuple(
    f"zqfp_compile/kernels/{name}" for name in ("hosts", "onnxruntime/", "tensorrt/", "fetch_ort_headers.sh")
)
CODE = """
import sys, passes, zqfp_compile
print(passes.__path__[0], zqfp_compile.__path__[0])
print(*zqfp_compile.Engine.load(sys.argv[1], device="cpu").generate_tokens([5, 6], max_new_tokens=3))
"""


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, built with the setuptools that are here."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, source)
    for name in PACKAGES:
        shutil.copytree(repo_root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = source / "wheels"
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment with the wheel; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    # A path in a .pth file is searched for packages, not for .pth files: an editable install stays unseen.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip("--python", folder / "bin" / "python", "install", "--quiet", "--no-deps", wheel)
    return folder / "bin"


def pip(*arguments: object) -> None:
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], Path.cwd())


def run(command: list[object], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_files(wheel: Path, repo_root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            name for name in archive.namelist() if name.startswith(PACKAGES) and ".dist-info/" not in name
        }
    tracked = {
        path.relative_to(repo_root).as_posix()
        for package in PACKAGES
        for path in (repo_root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    needed = {name for name in tracked if not name.startswith(CHECKOUT_ONLY) and not name.endswith(".md")}
    assert packed == needed
    assert {f"{package}/py.typed" for package in PACKAGES} < packed


def test_commands(installed: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    assert run([installed / "zqfp-compile", "--version"], tmp_path).startswith("zqfp-compile 0.")
    doctor = run([installed / "zqfp-doctor"], tmp_path)
    assert "onnxruntime   builds here: yes" in doctor
    options = ["--target", "onnxruntime", "--calibration-samples", 1, "--calibration-length", 32]
    options += ["--eval-tokens", 64, "--eval-length", 32]
    run([installed / "zqfp-compile", tiny_model("llama"), "--output", "out.zqfp", *options], tmp_path)
    assert (tmp_path / "out.zqfp" / "report.html").stat().st_size > 10_000
    paths, tokens = run([installed / "python", "-c", CODE, "out.zqfp"], tmp_path).splitlines()
    assert all(Path(path).is_relative_to(installed.parent) for path in paths.split())
    assert len(tokens.split()) == 3
