"""tools/bench_compile.py, and the committed docs/results/compile.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIELDS = "model parameters algorithm lorc_rank jobs device seconds peak_rss_bytes hardware date command"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import bench_compile

    yield bench_compile
    sys.modules.pop("bench_compile")


def test_committed_rows(bench) -> None:  # type: ignore[no-untyped-def]
    rows = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    assert rows and len({tuple(row[name] for name in bench.KEY) for row in rows}) == len(rows)
    for row in rows:
        assert set(FIELDS.split()) <= set(row)
        assert row["seconds"]["total"] > 0 and row["peak_rss_bytes"] > row["peak_anonymous_bytes"] > 0
        size = row["command"].split("--size ")[1].split()[0]
        assert row["parameters"] == bench.parameters(bench.SIZES[size])
        if "killed" in row:
            assert row["killed"]["times"] >= 5 and row["killed"]["cpu_seconds"] > row["cpu_seconds"]


def test_a_row_replaces_that_of_the_same_configuration(bench, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    row = {**dict.fromkeys(bench.KEY, "x"), "parameters": 5, "jobs": 1, "cpu_seconds": 1.0}
    for new in (row, {**row, "jobs": 2}, {**row, "cpu_seconds": 3.0}):
        bench.add_row(tmp_path / "rows.json", new)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(one["jobs"], one["cpu_seconds"]) for one in rows] == [(1, 3.0), (2, 1.0)]


def test_seven_billion(bench) -> None:  # type: ignore[no-untyped-def]
    assert bench.parameters(bench.SIZES["7B"]) == 6_476_005_376
    assert bench.parameters(bench.SIZES["7B/8"]) * 8 == bench.parameters(bench.SIZES["7B"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_after_so_much_work(bench, tiny_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, output = tiny_model("llama"), tmp_path / "out"
    before = bench.processor_seconds()
    assert not bench.compile_once(model, output, ["--target", "none"], kill_after=0.5)
    assert bench.processor_seconds() - before > 0.4 and not output.exists()
    assert bench.compile_once(model, output, ["--help"])
    with pytest.raises(SystemExit, match="ended with 2"):
        bench.compile_once(model, output, ["--target", "nothing"])
