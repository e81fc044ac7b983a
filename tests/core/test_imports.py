"""Imports point one way (DESIGN section 4), and every module imports without engines, plots or a GPU.

The rules read the source tree, so modules written later are covered as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("zqfp_compile", "passes")
HEAVY = (
    "onnx_graphsurgeon",
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "matplotlib",
    "transformers",
    "triton",
)

# Part of the tree -> what of ours it may import ("." stands for the part itself).
MAY_IMPORT = {
    "zqfp_compile.formats": (".", "zqfp_compile.errors"),
    "zqfp_compile.quantize": (".", "zqfp_compile.errors", "zqfp_compile.formats"),
    "passes": (
        ".",
        "zqfp_compile.errors",
        "zqfp_compile.formats",
        "zqfp_compile.kernels.packing",
        "zqfp_compile.pass_base",
        "zqfp_compile.plan",
        "zqfp_compile.quantize",
        "zqfp_compile.weights",
    ),
}
# Module -> the only modules that may import it.
IMPORTED_ONLY_BY = {
    "passes": ("passes",),
    "zqfp_compile.cli": (
        "zqfp_compile.cli",
        "zqfp_compile.cli_doctor",
        "zqfp_compile.cli_generate",
        "zqfp_compile.cli_validate",
        "zqfp_compile.__main__",
    ),
    "zqfp_compile.cli_doctor": ("zqfp_compile.cli_doctor",),
    "zqfp_compile.cli_generate": ("zqfp_compile.cli_generate",),
    "zqfp_compile.cli_validate": ("zqfp_compile.cli_validate",),
    "zqfp_compile.pipeline": ("zqfp_compile.cli", "zqfp_compile"),
    "zqfp_compile.runtime": ("zqfp_compile.cli_generate", "zqfp_compile"),
    "zqfp_compile.steps": ("zqfp_compile.pipeline",),
}
# Part -> what it may import from elsewhere; the standard library is always allowed.
THIRD_PARTY = {
    "zqfp_compile.formats": ("numpy", "ml_dtypes"),
    "zqfp_compile.quantize": ("numpy", "ml_dtypes", "torch"),
}
# Module -> what it may do without, and therefore imports inside functions only.
OPTIONAL = {"zqfp_compile.quantize.fused": ("triton",)}


@dataclass(frozen=True)
class Import:
    importer: str
    target: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def _in(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def _imports_of(module: str, source: str, is_package: bool) -> Iterator[Import]:
    """Every import statement; a name imported from a package counts as package.name (it may be a module)."""
    tree = ast.parse(source)
    eager = set(_eager_statements(tree.body))
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            targets = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                parts = module.split(".")
                kept = parts[: len(parts) - statement.level + is_package]
                base = ".".join([*kept, *([base] if base else [])])
            targets = [f"{base}.{alias.name}" for alias in statement.names]
        else:
            continue
        for target in targets:
            yield Import(module, target, statement.lineno, statement in eager)


def _eager_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not in functions, not for type checkers only."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from _eager_statements(statement.orelse)
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _eager_statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _eager_statements(handler.body)


def _violations(found: list[Import]) -> list[str]:
    return [f"{item}: {reason}" for item in found if (reason := _fault(item)) is not None]


def _fault(item: Import) -> str | None:
    ours = item.target.split(".")[0] in PACKAGES
    if item.at_import_time and item.target.split(".")[0] in HEAVY:
        return "import it inside the function that needs it"
    for part, allowed in MAY_IMPORT.items():
        if (
            ours
            and _in(item.importer, part)
            and not any(_in(item.target, part if name == "." else name) for name in allowed)
        ):
            return f"{part} may import only {', '.join(allowed)} of ours"
    for target, importers in IMPORTED_ONLY_BY.items():
        # "zqfp_compile" as an importer means the package's own __init__, "passes" the whole package.
        if _in(item.target, target) and item.importer not in importers and not _in(item.importer, target):
            return f"{target} is imported only by {', '.join(importers)}"
    top = item.target.split(".")[0]
    if not item.at_import_time and top in OPTIONAL.get(item.importer, ()):
        return None
    for part, allowed in THIRD_PARTY.items():
        if _in(item.importer, part) and not ours and top not in (*allowed, *sys.stdlib_module_names):
            return f"{part} may import only {', '.join(allowed)}"
    return None


def _modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _all_imports() -> list[Import]:
    return [
        item
        for module, path in _modules()
        for item in _imports_of(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]


def test_imports_point_one_way() -> None:
    found = _all_imports()
    assert len(found) > 100, "the walk does not see the tree"
    assert not _violations(found)


def test_no_import_cycles() -> None:
    """Modules that import each other at import time cannot be understood, or loaded, one at a time."""
    names = {module for module, _ in _modules()}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for item in _all_imports():
        if item.at_import_time:
            target = item.target if item.target in names else item.target.rpartition(".")[0]
            graph[item.importer] |= {target} & names - {item.importer}
    while free := {name for name, targets in graph.items() if not targets & graph.keys()}:
        for name in free:
            del graph[name]
    assert not graph, f"import cycle among {sorted(graph)}"


@pytest.mark.parametrize(
    ("module", "source", "wanted"),
    [
        ("zqfp_compile.formats.e2m1", "from zqfp_compile.plan import QuantPlan", "formats may import only"),
        ("zqfp_compile.formats.e2m1", "from ..plan import QuantPlan", "formats may import only"),
        ("zqfp_compile.formats.e2m1", "import torch", "formats may import only"),
        ("zqfp_compile.quantize.rtn", "import onnx_ir as ir", "quantize may import only"),
        ("zqfp_compile.quantize.rtn", "from zqfp_compile.pipeline import x", "quantize may import only"),
        ("passes.x", "from zqfp_compile.recipe import Recipe", "passes may import only"),
        ("passes.x", "from zqfp_compile import model_io", "passes may import only"),
        ("zqfp_compile.pipeline", "from passes.strip_metadata import x", "passes is imported only by"),
        ("zqfp_compile.pipeline", "def f():\n    import passes", "passes is imported only by"),
        ("zqfp_compile.pipeline", "from zqfp_compile.cli import main", "cli is imported only by"),
        ("zqfp_compile.report.html", "from zqfp_compile import pipeline", "pipeline is imported only by"),
        ("zqfp_compile.report.html", "from zqfp_compile.steps import rewrite", "steps is imported only by"),
        ("zqfp_compile.steps.build", "from zqfp_compile.pipeline import x", "pipeline is imported only by"),
        (
            "zqfp_compile.compare",
            "from zqfp_compile.runtime.engine import Engine",
            "runtime is imported only",
        ),
        ("zqfp_compile.report.html", "import matplotlib.pyplot as plt", "inside the function"),
        (
            "zqfp_compile.backends.ort",
            "try:\n    import onnxruntime\nexcept ImportError:\n    pass",
            "inside",
        ),
        ("zqfp_compile.quantize.fused", "import triton", "inside the function"),
        ("zqfp_compile.quantize.grid", "def f():\n    import triton", "quantize may import only"),
        ("zqfp_compile.backends.ort", "class A:\n    import tensorrt_rtx", "inside the function"),
    ],
)
def test_the_rules_can_fail(module: str, source: str, wanted: str) -> None:
    (violation,) = _violations(list(_imports_of(module, source, is_package=False)))
    assert wanted in violation


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("passes.x", "from zqfp_compile.formats.e2m1 import VALUES\nfrom passes import _emit"),
        ("zqfp_compile.backends.ort", "def f():\n    import onnxruntime"),
        ("zqfp_compile.backends.ort", "if TYPE_CHECKING:\n    import onnxruntime"),
        ("zqfp_compile.cli", "from zqfp_compile.pipeline import compile_model"),
        ("zqfp_compile.pipeline", "from zqfp_compile.steps.rewrite import rewrite"),
        ("zqfp_compile.steps.quantize", "from zqfp_compile.steps.calibrate import calibrate"),
        ("zqfp_compile.quantize.fused", "def f():\n    import triton.language as tl"),
        ("zqfp_compile.formats.x", "import math\nimport numpy as np\nfrom .e2m1 import VALUES"),
    ],
)
def test_the_rules_allow_what_the_design_wants(module: str, source: str) -> None:
    assert not _violations(list(_imports_of(module, source, is_package=False)))


_IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print("imported", len(sys.argv[2].split(",")))
"""


def test_every_module_imports_without_the_heavy_ones() -> None:
    """In a fresh process where importing any of them raises, and without a visible GPU."""
    names = [name for name, _ in _modules() if not name.endswith("__main__")]
    command = [sys.executable, "-c", _IMPORT_ALL, ",".join(HEAVY), ",".join(names)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"imported {len(names)}\n"
