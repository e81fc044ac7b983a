"""tools/embed_cpp, built and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def headers(variable: str, name: str, *places: str) -> Path:
    """Return the folder of a runtime's headers: what ``variable`` names, else the first place; else skip."""
    named = os.environ.get(variable)
    folders = [ROOT / place for place in ([named] if named else places)]
    found = next((folder for folder in folders if (folder / name).is_file()), None)
    if found is None:
        pytest.skip(f"no {name}: set {variable} to its folder")
    return found


def build(folder: Path, **options: Path) -> Path:
    """Build the programs whose headers and library ``options`` names; skips without CMake or a compiler."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no CMake or no C++ compiler")
    given = [f"-D{name.upper()}={path}" for name, path in options.items()]
    commands: tuple[list[str | Path], ...] = (
        ["cmake", "-S", ROOT / "tools" / "embed_cpp", "-B", folder, "-DCMAKE_CXX_FLAGS=-Werror", *given],
        ["cmake", "--build", folder],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def start(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program."""
    command = [str(program), *map(str, arguments)]
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def tokens_of(
    program: Path, folder: Path, prompt: list[int], count: int, end: int, **environment: str
) -> list[int]:
    """Return the tokens a program prints."""
    done = start(program, folder, count, end, *prompt, **environment)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def check_error(done: subprocess.CompletedProcess[str], code: int, says: str) -> None:
    """Assert that a program said what is wrong in one line, and nothing else."""
    assert done.returncode == code, done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert says in done.stderr
