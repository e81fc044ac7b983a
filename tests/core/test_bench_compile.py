"""tools/bench_compile.py, and the committed docs/results/compile.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FIELDS = "model parameters algorithm lorc_rank jobs device seconds peak_rss_bytes hardware date command"


def test_committed_rows(tool) -> None:  # type: ignore[no-untyped-def]
    rows = json.loads(tool.RESULTS.read_text(encoding="utf-8"))
    assert rows and len({tuple(row[name] for name in tool.KEY) for row in rows}) == len(rows)
    for row in rows:
        assert set(FIELDS.split()) <= set(row)
        assert row["seconds"]["total"] > 0 and row["peak_rss_bytes"] > row["peak_anonymous_bytes"] > 0
        words = row["command"].split()
        options = dict(zip(words[2::2], words[3::2], strict=True))
        layers = int(options["--layers"]) if "--layers" in options else None
        assert row["parameters"] == tool.parameters(tool.shape_of(options["--size"], layers))
        if "killed" in row:
            assert row["killed"]["times"] >= 5 and row["killed"]["cpu_seconds"] > row["cpu_seconds"]


def test_a_row_replaces_that_of_the_same_configuration(tool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    row = {**dict.fromkeys(tool.KEY, "x"), "parameters": 5, "jobs": 1, "cpu_seconds": 1.0}
    for new in (row, {**row, "jobs": 2}, {**row, "cpu_seconds": 3.0}):
        tool.add_row(tmp_path / "rows.json", new)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(one["jobs"], one["cpu_seconds"]) for one in rows] == [(1, 3.0), (2, 1.0)]


def test_seven_billion(tool) -> None:  # type: ignore[no-untyped-def]
    assert tool.parameters(tool.SIZES["7B"]) == 6_476_005_376
    assert tool.parameters(tool.shape_of("7B", 4)) == tool.parameters(tool.SIZES["7B/8"])
    assert tool.parameters(tool.SIZES["7B/8"]) * 8 == tool.parameters(tool.SIZES["7B"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_after_so_much_work(tool, tiny_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, output = tiny_model("llama"), tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    before = tool.processor_seconds()
    assert not tool.compile_once(model, output, ["--target", "none"], kill_after=0.5)
    assert tool.processor_seconds() - before > 0.4 and not output.exists()
    assert tool.compile_once(model, output, ["--help"])
    with pytest.raises(SystemExit, match="ended with 2"):
        tool.compile_once(model, output, ["--target", "nothing"])
    assert other.poll() is None, "it waited for a process that is none of its own"
    other.communicate(b"\n")


_BURN = "import time\nwhile time.process_time() < 0.4: pass"
_PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {_BURN!r}])
print(flush=True)
input()
"""


def test_the_time_of_processes_that_ended_counts(tool) -> None:  # type: ignore[no-untyped-def]
    """Workers end before the certificate: a kill is due all the same."""
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert tool.family_seconds(parent.pid) > 0.35
        parent.communicate(b"\n")
