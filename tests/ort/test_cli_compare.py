"""``zqfp-compile --compare``: two compiles by their reports; a report may be anybody's."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compiled_models import quick

from zqfp_compile import compile_model

COMPARE = [sys.executable, "-m", "zqfp_compile", "--compare"]
LAYER = "model.layers.0.mlp.up_proj"

Runs = tuple[Path, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Runs:
    """The same model compiled twice: FP4 with LoRC, and FP8 without evaluation and without one layer."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        "fp4": quick(lorc_rank=8),
        "fp8": quick(weights="fp8", lorc_rank=0, evaluate=False, exclude=[re.escape(LAYER)]),
    }
    for name, recipe in recipes.items():
        compile_model(tiny_model("llama"), recipe, output=folder / name)
    return folder / "fp4", folder / "fp8"


def _compare(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*COMPARE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert "Traceback" not in result.stderr and "internal error" not in result.stderr
    return result


def _json(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    result = _compare(*arguments, "--json", tmp_path / "found.json", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    return found


def test_what_differs_is_found(runs: Runs, tmp_path: Path) -> None:
    """Every number is that of the two reports, and the layer that changed most comes first."""
    found = _json(tmp_path, *runs)
    one, other = (json.loads((run / "report.json").read_text()) for run in runs)

    options = {item["name"]: (item["a"], item["b"]) for item in found["options"]}
    assert options == {
        "weights": ("fp4", "fp8"),
        "lorc_rank": (8, 0),
        "evaluate": (True, False),
        "exclude": ([], [re.escape(LAYER)]),
    }
    figures = {item["name"]: (item["a"], item["b"]) for item in found["figures"]}
    assert figures["layers rewritten"] == (14, 13)
    assert figures["size"] == (one["size"]["compiled_bytes"], other["size"]["compiled_bytes"])
    assert figures["perplexity, compiled"] == (one["perplexity"]["compiled"], None)
    assert figures["top-1 agreement"] == (one["logits"]["top1_agreement"], None)
    assert figures["time"] == tuple(pytest.approx(sum(run["seconds"].values())) for run in (one, other))
    assert "FP8 linears in the engine" not in figures  # neither has an engine

    sqnr = [{layer["name"]: layer["sqnr_db"] for layer in run["layers"]} for run in (one, other)]
    layers = {item["name"]: item for item in found["layers"]}
    assert len(layers) == 14 and found["equal_layers"] == 1  # lm_head is left alone in both
    assert (layers[LAYER]["a"], layers[LAYER]["b"], layers[LAYER]["change"]) == ("e2m1 r8", "float", None)
    for name, item in layers.items():
        assert (item["sqnr_a"], item["sqnr_b"]) == (sqnr[0][name], sqnr[1][name])
    changes = [abs(item["change"]) for item in found["layers"] if item["change"] is not None]
    assert len(changes) == 13 and changes == sorted(changes, reverse=True) and changes[0] > 1
    assert found["warnings"] == []


def test_a_run_equals_itself(runs: Runs, tmp_path: Path) -> None:
    found = _json(tmp_path, runs[0], runs[0])
    assert (found["options"], found["layers"], found["equal_layers"]) == ([], [], 15)
    assert all(item["a"] == item["b"] for item in found["figures"])
    text = _compare(runs[0], runs[0]).stdout
    assert "The options are the same." in text and "No layer differs." in text


def test_tables_without_a_terminal_are_plain(runs: Runs) -> None:
    result = _compare(*runs, PYTHONIOENCODING="ascii", COLUMNS="100")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii() and not re.search(r"[\x00-\x09\x0b-\x1f]", result.stdout)
    assert re.search(r"--weights +\| fp4 +\| fp8", result.stdout)
    assert re.search(r"layers rewritten +\| +14 \| +13 \| +-1", result.stdout)
    assert "Layers that differ less: 4; -v shows them." in result.stdout and LAYER not in result.stdout
    assert LAYER in _compare(*runs, "-v", COLUMNS="100").stdout


def test_tables_on_a_terminal_are_styled(runs: Runs) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        [*COMPARE, *runs], stdout=theirs, check=True, timeout=60, env={**os.environ, "TERM": "xterm-256color"}
    )
    os.close(theirs)
    assert b"\x1b[1m" in os.read(ours, 1 << 16)
    os.close(ours)


def _copy(run: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    report = json.loads((run / "report.json").read_text())
    change(report)
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def test_other_models_and_texts_are_warned_of(runs: Runs, tmp_path: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["source_sha256"] = "0" * 64
        report["perplexity"]["text"] = "another text"
        report["layers"][0]["name"] = "renamed"

    warnings = _json(tmp_path, runs[0], _copy(runs[0], tmp_path / "other", change))["warnings"]
    assert warnings == [
        "the runs compiled different model files",
        "the perplexities are of different texts or numbers of tokens",
        "1 layers are in the first run only, such as model.layers.0.self_attn.q_proj",
        "1 layers are in the second run only, such as renamed",
    ]


def test_names_cannot_steer_the_terminal(runs: Runs, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\u202e[bold]"

    def change(report: dict[str, Any]) -> None:
        report["layers"][0]["name"] = report["layers"][0]["weight_format"] = evil
        report["recipe"][evil] = [evil]
        report["seconds"][evil] = 1e6

    copies = [_copy(run, tmp_path / run.name, change) for run in runs]
    text = _compare(*copies, "-v").stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    assert "[bold]" in text


def _text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "report.json").write_text(content, encoding="utf-8")


def _with(**values: Any) -> Callable[[Path], object]:
    return _text(json.dumps({"schema_version": 1, "layers": [], **values}))


HOSTILE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no folder": (lambda folder: folder.rmdir(), 2, "no such folder"),
    "no report": (lambda _: None, 2, "has no report.json"),
    "a folder": (lambda folder: (folder / "report.json").mkdir(), 2, "has no report.json"),
    "a pipe": (lambda folder: os.mkfifo(folder / "report.json"), 2, "has no report.json"),
    "no JSON": (_text("{"), 3, "is no report of zqfp-compile"),
    "too deep": (_text("[" * 100_000), 3, "is no report of zqfp-compile"),
    "no UTF-8": (lambda folder: (folder / "report.json").write_bytes(b"\xff"), 3, "not UTF-8 text"),
    "a list": (_text("[]"), 3, "is no report of zqfp-compile"),
    "another version": (
        _text('{"schema_version": 7}'),
        3,
        "has schema version '7', this",
    ),
    "no number": (_with(bits_per_weight="many"), 3, "bits_per_weight is not a number"),
    "no finite number": (_text('{"schema_version": 1, "layers": [], "seconds": {"x": NaN}}'), 3, "seconds.x"),
    "a huge number": (_with(size={"compiled_bytes": 10**400}), 3, "size.compiled_bytes is not a number"),
    "no layers": (_with(layers={}), 3, "layers is not a list"),
    "a layer": (_with(layers=[{"name": 3, "rewritten": True}]), 3, "layers.0.name is not text"),
    "an option": (_with(recipe={"min_shapes": {"x": 5}}), 3, "recipe.min_shapes is not an option"),
    "an infinite option": (
        _text('{"schema_version": 1, "layers": [], "recipe": {"seed": [1e999]}}'),
        3,
        "recipe.seed is not an option",
    ),
    "a name": (_with(recipe={"\x1b[2J": {"x": 5}}), 3, "a value is not an option"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_report_that_cannot_be_used_is_one_line(runs: Runs, tmp_path: Path, case: str) -> None:
    make, code, says = HOSTILE[case]
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    result = _compare(runs[0], folder)
    assert result.returncode == code and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"zqfp-compile: error: {folder}") and says in line and line.isprintable()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("a",), "--compare"),
        (("a", "b", "model.onnx"), "no MODEL"),
        (("a", "b", "--lorc-rank", "3"), "no --lorc-rank"),
        (("a", "b", "--fresh"), "no --fresh"),
        (("a", "b", "--json", "no/such/folder.json"), "its folder does not exist"),
    ],
)
def test_usage(arguments: tuple[str, ...], says: str) -> None:
    result = _compare(*arguments)
    assert result.returncode == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_json_is_for_a_comparison() -> None:
    result = subprocess.run(
        [*COMPARE[:-1], "model.onnx", "--json", "x.json"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "--json goes with --compare" in result.stderr
