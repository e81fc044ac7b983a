"""Rows of ``docs/results/accuracy.json``: every perplexity that was measured, with how it was measured.

The file is a JSON list of objects with exactly the fields of :data:`FIELDS`. A row with the same
configuration (:data:`KEY`) replaces the older one; the list is sorted by it.

    python tools/results.py docs/results/accuracy.json      # checks the file
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FIELDS: dict[str, str] = {
    "model": "name, such as SmolLM2-135M-Instruct.Q4_1",
    "text": "what the perplexity is over, such as 'WikiText-2 test' or its first N tokens",
    "method": "what computed it, with everything the other fields do not say (calibration, LoRC's storage)",
    "algorithm": "rtn, gptq, ...; none for the unquantised model",
    "weights": "format, such as fp4-e2m1; none when not quantised",
    "activations": "format and scale, such as 'fp8-e4m3 per tensor'; none when not quantised",
    "constraint": "none, m1, m2 or e4m3; null where a format has no group scales to constrain",
    "group_size": "weights per group scale, 0 for a whole row; null without group scales",
    "lorc_rank": "0 without compensation",
    "bits_per_weight": "mean over the quantised linears, scales and LoRC factors included",
    "perplexity": "exp(mean negative log likelihood)",
    "reference_perplexity": "of the unquantised model, same tokens, same tool; null if not measured",
    "command": "what to type, from the repository's root",
    "hardware": "GPU or CPU",
    "date": "YYYY-MM-DD",
}
KEY = (
    "model",
    "text",
    "method",
    "algorithm",
    "weights",
    "activations",
    "constraint",
    "group_size",
    "lorc_rank",
)
_TEXTS = ("model", "text", "method", "algorithm", "weights", "activations", "command", "hardware")


def check_row(row: Mapping[str, Any]) -> None:
    """Check one row.

    Raises:
        ValueError: Naming the field that is missing, unknown or out of range.
    """
    if set(row) != set(FIELDS):
        missing, extra = sorted(set(FIELDS) - set(row)), sorted(set(row) - set(FIELDS))
        raise ValueError(f"fields do not match: missing {missing}, unknown {extra}")
    for name in _TEXTS:
        _require(isinstance(row[name], str) and row[name].strip(), row, name, "a non-empty text")
    _require(
        row["constraint"] in (None, "none", "m1", "m2", "e4m3"), row, "constraint", "a constraint or null"
    )
    _require(row["group_size"] is None or _is_count(row["group_size"]), row, "group_size", "a count or null")
    _require(_is_count(row["lorc_rank"]), row, "lorc_rank", "a count")
    _require(_is_positive(row["bits_per_weight"]), row, "bits_per_weight", "a positive number")
    _require(_is_positive(row["perplexity"]), row, "perplexity", "a positive number")
    reference = row["reference_perplexity"]
    _require(
        reference is None or _is_positive(reference), row, "reference_perplexity", "a positive number or null"
    )
    _require(_is_date(row["date"]), row, "date", "a date YYYY-MM-DD")


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Put a row into the file, which is made when missing; the row of the same configuration is replaced.

    Safe against other processes that do the same; the file is replaced in one step.

    Raises:
        ValueError: When the row, or one that the file holds, is not valid.
    """
    check_row(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        rows = [old for old in read_rows(path) if _key(old) != _key(row)] if path.exists() else []
        rows.append(dict(row))
        rows.sort(key=_key)
        ordered = [{name: one[name] for name in FIELDS} for one in rows]
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Return the file's rows.

    Raises:
        ValueError: When it is no list of valid rows.
    """
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: not a list of rows")
    for number, row in enumerate(rows):
        try:
            check_row(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return rows


def today() -> str:
    """Return the date for a row."""
    return datetime.date.today().isoformat()


def hardware(device: str = "cpu") -> str:
    """Return the name of the GPU, or of the CPU with the number of its cores that this process may use."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    names = [line for line in _cpu_info() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _key(row: Mapping[str, Any]) -> tuple[tuple[bool, str, float], ...]:
    """Sort key: texts, numbers and null beside each other."""
    values = (row[name] for name in KEY)
    return tuple((v is not None, v if isinstance(v, str) else "", v if _is_count(v) else 0) for v in values)


def _require(holds: object, row: Mapping[str, Any], name: str, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {row[name]!r}, not {wanted}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder itself: no lock file is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(arguments: list[str]) -> int:
    """Check the files named on the command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name, meaning in FIELDS.items():
            print(f"{name:22} {meaning}")
        return 0 if arguments else 2
    for argument in arguments:
        try:
            print(f"{argument}: {len(read_rows(Path(argument)))} rows")
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
