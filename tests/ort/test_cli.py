"""The command line when nothing goes wrong: help, what is shown where."""

from __future__ import annotations

import dataclasses
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zqfp_compile import __version__
from zqfp_compile.recipe import Recipe

COMPILE = [sys.executable, "-m", "zqfp_compile"]
VALIDATE = [sys.executable, "-m", "zqfp_compile.cli_validate"]
FAST = ["--target", "none", "--no-evaluate", "--calibration-samples", "1", "--calibration-length", "32"]

TinyModel = Callable[..., Path]


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.parametrize("program", [COMPILE, VALIDATE], ids=["compile", "validate"])
def test_help_fits_a_terminal_of_80_columns(program: list[str]) -> None:
    text = _run(*program, "--help", COLUMNS="80", TERM="dumb").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "an option's name is cut"
    assert "Exit codes: 0 done, 2 usage" in text


def test_every_recipe_option_has_a_flag() -> None:
    text = _run(*COMPILE, "--help", COLUMNS="80", TERM="dumb").stdout
    flags = set(re.findall(r"--[a-z0-9-]+", text))
    wanted = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Recipe)}
    assert wanted <= flags
    for choice in ("tensorrt-rtx", "e2m1 (default)", "e4m3", "fp8-e5m2", "plugin"):
        assert choice in " ".join(text.replace("│", " ").split())


def test_version() -> None:
    assert _run(*COMPILE, "--version").stdout == f"zqfp-compile {__version__}\n"


def test_default_output_is_short_and_plain(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Results on standard output, progress on standard error, neither with control characters."""
    result = _run(*COMPILE, str(tiny_model("llama")), *FAST, "-o", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.stdout + result.stderr)
    assert "certificate: 14 layers checked, 0 mismatches" in result.stdout
    assert result.stdout.splitlines()[-1] == f"output: {tmp_path / 'out'}"
    assert "strip-metadata" not in result.stderr
    shown = [float(seconds) for seconds in re.findall(r"✓ .* (\d+\.\d) s", result.stderr)]
    assert all(seconds >= 0.5 for seconds in shown)


def test_quiet_shows_warnings_only(tiny_model: TinyModel, tmp_path: Path) -> None:
    arguments = [str(tiny_model("llama")), *FAST, "-q", "-o", str(tmp_path / "out")]
    result = _run(*COMPILE, *arguments, "--max-shapes", "input_ids:1x8")
    assert result.returncode == 0 and result.stdout == ""
    assert result.stderr == "warning: --min/opt/max-shapes has no effect with target none\n"


def test_verbose_shows_steps_versions_and_declined_places(tiny_model: TinyModel, tmp_path: Path) -> None:
    result = _run(*COMPILE, str(tiny_model("llama")), *FAST, "-v", "-o", str(tmp_path / "out"))
    assert result.returncode == 0
    for wanted in (
        "✓ strip-metadata",
        "onnxruntime ",
        "torch ",
        "select-linears: lm_head",
        "calibrated on 1 x 32",
    ):
        assert wanted in result.stderr


def test_flags_win_over_the_recipe_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("group_size: 32\nlorc-rank: 4\ntarget: none\n", encoding="utf-8")
    arguments = ["--recipe", str(tmp_path / "r.yaml"), "--group-size", "16", *FAST[2:], "-q"]
    result = _run(*COMPILE, str(tiny_model("llama")), *arguments, "-o", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    effective = Recipe.from_yaml(tmp_path / "out" / "recipe.yaml")
    assert (effective.group_size, effective.lorc_rank, effective.target) == (16, 4, "none")


def test_bars_on_a_terminal(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Standard error is a terminal: bars are drawn, and taken away again before the results."""
    ours, theirs = pty.openpty()
    command = [*COMPILE, str(tiny_model("llama")), *FAST, "-o", str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # how Linux says that nobody holds the other end
                break
            shown += chunk
        assert process.stdout is not None
        results = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[" in shown and "━".encode() in shown
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h"), "the cursor stays hidden"
    assert "\x1b" not in results and "certificate: 14 layers" in results


def test_validate_groups_caches(tiny_model: TinyModel) -> None:
    """One row for the caches of all layers, every one with -v; any output encoding will do."""
    model = str(tiny_model("llama"))
    arguments = [model, model, "--samples", "1", "--length", "8"]
    short = _run(*VALIDATE, *arguments, PYTHONIOENCODING="ascii")
    assert short.returncode == 0, short.stderr
    assert (
        "present.*.key x2" in short.stdout and "equal" in short.stdout and "present.1.key" not in short.stdout
    )
    full = _run(*VALIDATE, *arguments, "-v")
    assert "present.1.key" in full.stdout and "x2" not in full.stdout
