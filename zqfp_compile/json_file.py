"""``--json FILE``: what a command found, for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zqfp_compile.errors import MissingDependencyError, UsageError


def check_folder(path: Path | None) -> None:
    """Refuse a file that cannot be made, before the work.

    Raises:
        UsageError: When its folder does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: its folder does not exist; create it first")


def write(value: dict[str, Any], path: Path | None) -> None:
    """Write JSON types into the file, if one was asked for.

    Raises:
        MissingDependencyError: When it cannot be written.
    """
    if path is None:
        return
    text = json.dumps(value, indent=2, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise MissingDependencyError(
            f"--json {path}: cannot be written ({error.strerror}); choose another file"
        ) from error
