"""``report.json``: the report for machines."""

from __future__ import annotations

import json
from pathlib import Path

from zqfp_compile.report.model import Report


def write_json(report: Report, path: str | Path) -> None:
    """Write ``report`` as UTF-8 JSON: stable key order, null for the unmeasured, one newline at the end.

    Raises:
        OSError: When the file cannot be written.
        ValueError: When the recipe holds something JSON has no form for.
    """
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    # A path that is no UTF-8 arrives as lone surrogates; their backslash form is JSON's own escape.
    Path(path).write_text(text + "\n", encoding="utf-8", errors="backslashreplace", newline="\n")
