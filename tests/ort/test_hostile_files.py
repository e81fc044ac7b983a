"""Every hostile input through the real command: one line with the expected words and exit code, nothing left.

``python tools/hostile_files.py`` runs the same list and prints it as a table.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hostile_case import HostileCase
from hostile_cases import CASES
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
