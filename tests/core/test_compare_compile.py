"""tools/compare_compile.py: what is measured of a process, and the committed figures."""

from __future__ import annotations

import json
import sys

import pytest


def test_a_process_is_measured(tool) -> None:  # type: ignore[no-untyped-def]
    work = "import time; block = b'x' * (1 << 30); time.sleep(0.2)"
    found = tool.measured([sys.executable, "-c", work])
    assert found["seconds"] >= 0.2 and found["cpu_seconds"] > 0
    assert found["peak_rss_bytes"] > 1 << 30  # no upper bound: a child starts with this process's own peak
    with pytest.raises(SystemExit, match="ended with 3"):
        tool.measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_committed_rows(tool) -> None:  # type: ignore[no-untyped-def]
    rows = json.loads(tool.RESULTS.read_text(encoding="utf-8"))
    assert len({tuple(row[name] for name in tool.KEY) for row in rows}) == len(rows)
    for model in {row["model"] for row in rows}:
        contenders = [row["contender"] for row in rows if row["model"] == model]
        assert "ours" in contenders and set(contenders) <= set(tool.CONTENDERS)
