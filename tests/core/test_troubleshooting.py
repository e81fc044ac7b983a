"""docs/troubleshooting.md quotes messages as the source has them, under the exit code they end with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from zqfp_compile import errors
from zqfp_compile.pass_base import PassError

DOCUMENT = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
PLACE = "…"  # stands for what an f-string puts in
CODES = {kind.__name__: kind.exit_code for kind in (*errors.ZqfpError.__subclasses__(), PassError)}


def _quotes() -> list[tuple[int | None, str]]:
    """The exit code of the section (``None``: no error) and the message of each row."""
    code, found = None, []
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = re.match(r"## Exit (\d)", line)
            code = int(heading[1]) if heading else None
        elif line.startswith("| `"):
            found.append((code, line.split("`")[1]))
    return found


def _texts(root: Path) -> Iterator[tuple[str, str | None]]:
    """Every text in the source, f-strings with :data:`PLACE`, and the name of the error it is raised with."""
    for path in sorted((*root.glob("zqfp_compile/**/*.py"), *root.glob("passes/*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised: dict[ast.AST, str] = {}
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                raised.update(dict.fromkeys(ast.walk(node.exc), name))
        for node in ast.walk(tree):
            if node not in docstrings and (text := _text(node)):
                yield text, raised.get(node)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        parts = (str(part.value) if isinstance(part, ast.Constant) else PLACE for part in node.values)
        return re.sub(f"{PLACE}+", PLACE, "".join(parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@pytest.fixture(scope="module")
def texts(repo_root: Path) -> list[tuple[str, str | None]]:
    return list(_texts(repo_root))


@pytest.mark.parametrize(("code", "quote"), _quotes())
def test_the_source_has_the_message(
    texts: list[tuple[str, str | None]], code: int | None, quote: str
) -> None:
    places = [error for text, error in texts if quote in text]
    assert places, f"no text in the source holds {quote!r}"
    codes = {CODES[error] for error in places if error in CODES}
    assert code is None or not codes or code in codes, f"{quote!r} ends with {codes}"


def test_every_exit_code_has_its_rows() -> None:
    counted = [code for code, _ in _quotes()]
    assert all(counted.count(code) >= 3 for code in (2, 3, 4, 5, 6, None))
    assert len(set(_quotes())) == len(_quotes()) > 90
