"""Code blocks of the documents."""

from __future__ import annotations

import re
from pathlib import Path


def snippets(document: Path, language: str) -> list[str]:
    """The blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
