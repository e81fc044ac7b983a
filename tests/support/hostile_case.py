"""One hostile input: how it is made, the command that meets it, and how that command must end."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMPILE, GENERATE, VALIDATE = "zqfp-compile", "zqfp-generate", "zqfp-validate"
# A compile that takes a second where nothing stops it; the base model's folder has the text.
QUICK = ("--target", "none", "--no-evaluate", "--calibration-samples", "1", "--calibration-length", "32")
TEXT = ("--calibration", "m/text.txt")


@dataclass(frozen=True)
class HostileCase:
    """A file, or a folder of files, that somebody made to break the tool.

    Attributes:
        group: What kind of input it is.
        wrong: What is wrong with it.
        make: Writes it into an empty folder, or damages the copy of ``base`` in there.
        says: What the one error line must say.
        code: The exit code.
        command: Program and arguments, run in the folder.
        base: What is copied to ``m`` first: ``model`` (small_lm) or ``compiled`` (what was made of it).
    """

    group: str
    wrong: str
    make: Callable[[Path], object]
    says: tuple[str, ...]
    code: int = 3
    command: tuple[str, ...] = (COMPILE, "model.onnx", *QUICK)
    base: str = ""

    @property
    def name(self) -> str:
        """A name for a folder and for a test."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.group} {self.wrong}".lower()).strip("-")


def on_model(
    group: str,
    wrong: str,
    make: Callable[[Path], object],
    *says: str,
    code: int = 3,
    flags: tuple[str, ...] = (),
) -> HostileCase:
    """A compile of the small language model after ``make``."""
    command = (COMPILE, "m/model.onnx", *QUICK, *TEXT, *flags, "-o", "out")
    return HostileCase(group, wrong, make, says, code, command, "model")


def raw_file(wrong: str, content: bytes, *says: str) -> HostileCase:
    """``model.onnx`` of these bytes."""
    return HostileCase("file", wrong, lambda place: (place / "model.onnx").write_bytes(content), says)
