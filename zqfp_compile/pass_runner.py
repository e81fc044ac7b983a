"""Runs one pass with everything that belongs between passes: timing, legality check, dump."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from zqfp_compile.errors import UsageError
from zqfp_compile.model_io import save_model
from zqfp_compile.pass_base import Declined, PassResult
from zqfp_compile.progress import StepTimer
from zqfp_compile.registry import PASSES, create_pass
from zqfp_compile.specs import Phase, check


class PassRunner:
    """Creates passes by name and runs them.

    Args:
        timer: Gets one entry per pass.
        dump_after: Names of passes after which the model is written.
        dump_folder: Where dumps go, numbered in running order.

    Raises:
        UsageError: When ``dump_after`` names no pass.
    """

    def __init__(self, timer: StepTimer, dump_after: Sequence[str], dump_folder: Path) -> None:
        unknown = [name for name in dump_after if name not in PASSES]
        if unknown:
            raise UsageError(
                f"--dump-after: no pass is called {unknown[0]!r}; the passes are {', '.join(PASSES)}"
            )
        self._timer = timer
        self._dump_after = frozenset(dump_after)
        self._dump_folder = dump_folder
        self._count = 0
        self._ran: set[str] = set()
        self.declined: dict[str, list[Declined]] = {}

    @property
    def not_dumped(self) -> list[str]:
        """Names in ``dump_after`` of passes that did not run."""
        return sorted(self._dump_after - self._ran)

    def run(self, model: ir.Model, name: str, phase: Phase, **options: object) -> PassResult:
        """Run the pass ``name`` with ``options``, then check that the graph is legal in ``phase``."""
        with self._timer.step(name):
            result = create_pass(name, **options).call(model)
            check(result.model, phase, after=name)
        self._count += 1
        self._ran.add(name)
        self.declined.setdefault(name, []).extend(result.declined)
        for declined in result.declined:
            self._timer.reporter.detail(f"  {name}: {declined.place}: {declined.reason}")
        if name in self._dump_after:
            self._dump_folder.mkdir(exist_ok=True)
            save_model(result.model, self._dump_folder / f"{self._count:02d}-{name}.onnx")
        return result
