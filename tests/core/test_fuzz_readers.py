"""Damaged files at every reader: taken or refused in one line, never another exception.

A few hundred inputs, the same ones every time; ``tools/fuzz_readers.py`` runs atheris on the same functions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_targets import TARGETS, FuzzTarget
from hostile_protos import WEIGHT

RUNS = 150


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.usefixtures("models_folder")  # the small model's tokenizer is written by a script in there
def test_damaged_files_are_taken_or_diagnosed(target: FuzzTarget, tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(WEIGHT.tobytes())
    good, seeds = target.good(), target.seeds()
    assert all(target.check(data, tmp_path) for data in good)
    assert len(seeds) > len(good), "no hostile file of this kind was found"
    taken = [target.check(data, tmp_path) for data in target.mutations(RUNS)]
    assert not all(taken)
