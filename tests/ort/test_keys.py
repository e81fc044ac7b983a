"""The keys of finished work and of measurements change with every file that holds weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_protos import WEIGHT, branching, external, node, write_model

from zqfp_compile.model_io import load_model
from zqfp_compile.plan import QuantPlan
from zqfp_compile.precision.cache import cache_key
from zqfp_compile.recipe import Recipe
from zqfp_compile.work_key import work_key

pytest.importorskip("onnxruntime")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A linear whose weight is in ``w.data``, then one in an If, whose weight is in ``branch.data``."""
    model = external()
    model.graph.node[0].output[0] = "h"
    model.graph.node.extend(branching([node("Gemm", ["h", "v"], "b", transB=1)], "b"))
    for branch in model.graph.node[-1].attribute:
        branch.g.initializer.add().CopyFrom(external("branch.data").graph.initializer[0])
        branch.g.initializer[0].name = "v"
    (tmp_path / "branch.data").write_bytes(WEIGHT.tobytes())
    return write_model(tmp_path, model)


def _of_work(path: Path) -> str:
    return work_key(path, load_model(path), Recipe(), "cpu")


def _of_measurements(path: Path) -> str:
    return cache_key(load_model(path), QuantPlan(), [])


@pytest.mark.parametrize("data", ["w.data", "branch.data"])
@pytest.mark.parametrize("key", [_of_work, _of_measurements])
def test_every_file_of_weights_counts(path: Path, key: Callable[[Path], str], data: str) -> None:
    before = key(path)
    assert key(path) == before
    (path.parent / data).write_bytes((WEIGHT + 1).tobytes())
    os.utime(path.parent / data, (1, 1))  # the clock of a file system may be coarse
    assert key(path) != before
