"""Text files that anybody may have written: bounded, UTF-8, and nothing that blocks for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from zqfp_compile.disk import format_bytes

COMPANION_BYTES = 1 << 24  # a large tokenizer_config.json has a few megabytes


class UnreadableError(Exception):
    """A file cannot be read as text; ``str(error)`` is the reason, for a message that names the file."""


def read_text(path: Path, limit: int, *, regular: bool = True) -> str:
    """Return the text of a file, with ``\\n`` for every line end.

    Args:
        path: The file.
        limit: Most bytes it may have.
        regular: Refuse pipes and devices, on which reading would wait for a writer or never end.

    Raises:
        UnreadableError: When it cannot be opened, is longer, no UTF-8, or not a regular file.
    """
    never_wait = os.O_NONBLOCK if regular else 0
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | never_wait)) as file:
            if regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableError("not a regular file")
            content = file.read(limit + 1)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    if len(content) > limit:
        raise UnreadableError(f"larger than {format_bytes(limit)}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError("not UTF-8 text") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
