"""Shell completion: what bash and zsh ask for at <TAB>, answered without loading a heavy library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from zqfp_compile import recipe
from zqfp_compile.registry import PASSES

# Completion runs at every <TAB>: whatever takes long to import stays out of the way.
HEAVY = ("jinja2", "numpy", "onnx", "onnx_ir", "onnxruntime", "tokenizers", "torch")
_WITHOUT_HEAVY = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))  # importing any of them raises
from zqfp_compile.cli import main
main()
"""

Answers = Callable[..., str]


@pytest.fixture
def answer() -> Answers:
    """``answer("complete_bash", NAME=value)``: what the command prints for a shell's completion."""

    def ask(instruction: str, **words: str) -> str:
        environment = {**os.environ, "_ZQFP_COMPILE_COMPLETE": instruction, **words}
        command = [sys.executable, "-c", _WITHOUT_HEAVY]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment, check=False
        )
        assert result.returncode == 0 and result.stderr == "", result.stderr
        return result.stdout

    return ask


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--target", get_args(recipe.Target)),
        ("--scale-constraint", get_args(recipe.ScaleConstraint)),
        ("--emit", get_args(recipe.Emit)),
        ("--dump-after", tuple(PASSES)),
    ],
)
def test_values(answer: Answers, flag: str, values: tuple[str, ...]) -> None:
    """``zqfp-compile FLAG <TAB>`` and, in zsh, the same with the value's first letter."""
    words = {"COMP_WORDS": f"zqfp-compile {flag} ", "COMP_CWORD": "2"}
    assert answer("complete_bash", **words).split() == list(values)
    letter = values[0][0]
    text = answer("complete_zsh", _TYPER_COMPLETE_ARGS=f"zqfp-compile {flag} {letter}")
    assert [value for value in values if f'"{value}"' in text] == [v for v in values if v.startswith(letter)]


def test_options(answer: Answers) -> None:
    words = {"COMP_WORDS": "zqfp-compile --sc", "COMP_CWORD": "1"}
    assert answer("complete_bash", **words).split() == ["--scale-constraint", "--scale-rows"]
    text = answer("complete_zsh", _TYPER_COMPLETE_ARGS="zqfp-compile --sc")
    assert '"--scale-rows":"Rows that share one scale under m2 (default 1)."' in text


def test_files_are_left_to_the_shell(answer: Answers) -> None:
    assert answer("complete_bash", COMP_WORDS="zqfp-compile mod", COMP_CWORD="1").strip() == ""
    assert answer("complete_zsh", _TYPER_COMPLETE_ARGS="zqfp-compile mod").strip() == "_files"


def test_bash_after_installation(tmp_path: Path) -> None:
    """``--install-completion`` in a home of its own, then <TAB> in a new bash."""
    program = tmp_path / "bin" / "zqfp-compile"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m zqfp_compile "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": path}

    def bash(script: str) -> str:
        command = ["bash", "--norc", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return done.stdout

    # The line after keeps this bash alive, which is how the command finds out what shell it is in.
    assert "bash completion installed" in bash("zqfp-compile --install-completion\ntrue")
    tab = "COMP_WORDS=(zqfp-compile --target ten) COMP_CWORD=2; _zqfp_compile_completion zqfp-compile"
    found = bash(f'. ~/.bashrc\n{tab}\nprintf "%s\\n" "${{COMPREPLY[@]}}"\ncomplete -p zqfp-compile')
    assert found.splitlines() == [
        "tensorrt",
        "tensorrt-rtx",
        "complete -o default -F _zqfp_compile_completion zqfp-compile",  # default: file names
    ]
