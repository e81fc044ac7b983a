"""Every hostile input through the real command: one line with the expected words and exit code, nothing left.

``python tools/hostile_files.py`` runs the same list and prints it as a table.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
from hostile_case import HostileCase, on_model
from hostile_cases import CASES
from hostile_models import damage_lm
from hostile_run import HostileRunner

pytest.importorskip("onnxruntime")

# More than the ten seconds that the tool gives: here other tests run at the same time.
LIMIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> HostileRunner:
    return HostileRunner(tmp_path_factory.mktemp("hostile"), LIMIT_SECONDS)


def test_the_list() -> None:
    """At least 60 inputs, each with a name of its own and words to look for."""
    assert len(CASES) >= 60
    assert [name for name, times in Counter(case.name for case in CASES).items() if times > 1] == []
    assert all(case.says and all(case.says) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_diagnosed(runner: HostileRunner, case: HostileCase) -> None:
    outcome = runner.run(case)
    assert outcome.faults == [], outcome.err


NAMES = ("a\nerror: all is well\x1b[31m", "[/red] {{7*7}} %s", "../../../tmp/x", "\u202eexe.txt", "x" * 5_000)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_a_good_model_steer_nothing(runner: HostileRunner, name: str) -> None:
    """The model compiles; its layer's name ends no line, colours nothing, names no file."""

    def rename(model: onnx.ModelProto) -> None:
        model.graph.node[1].name = model.graph.node[1].output[0] = model.graph.node[2].input[0] = name
        model.graph.initializer[1].name = model.graph.node[1].input[1] = f"{name}.w"

    flags = ("--explain", "-v", "--emit", "fp4", "--dump-after", "add-lorc")
    case = on_model("name", str(NAMES.index(name)), damage_lm(rename), "", code=0, flags=flags)
    outcome = runner.run(case)
    assert outcome.code == 0 and not outcome.traceback and "control characters" not in outcome.faults
    assert len([line for line in outcome.err.splitlines() if line.startswith("rewritten")]) == 1
    assert "\u202e" not in outcome.err + outcome.out and not outcome.gone
    assert all(path.startswith("out") for path in outcome.left)


def test_faults_are_found(runner: HostileRunner) -> None:
    """The judge itself: a run that ends well, leaves a folder and says nothing has every fault of these."""
    good = HostileCase(
        "good",
        "nothing",
        lambda place: None,
        ("no such words",),
        3,
        ("zqfp-compile", "m/model.onnx", "--target", "none", "--no-evaluate", "-o", "out"),
        "model",
    )
    outcome = runner.run(good)
    assert outcome.code == 0 and "out/manifest.json" in outcome.left
    assert [fault.split(" ")[0] for fault in outcome.faults] == ["exit", "0", "does", "printed", "left"]


def test_a_hang_is_found(tmp_path: Path) -> None:
    case = HostileCase(
        "hang", "of the judge", lambda place: None, ("",), 3, ("zqfp-compile", "m/model.onnx"), "model"
    )
    short = HostileRunner(tmp_path, 0.01)
    assert short.run(case).faults[0] == "hang"
