"""Estimate what the compile needs, and refuse it when there is less."""

from __future__ import annotations

from zqfp_compile.compilation import Compilation
from zqfp_compile.device import activation_room
from zqfp_compile.disk import ensure_free_space, format_bytes, size_of
from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.estimate import estimate as estimate_needs
from zqfp_compile.memory import available_memory
from zqfp_compile.parallel.choice import cores

# Shorter compiles are not announced.
_WORTH_A_LINE_SECONDS = 60.0


def estimate(run: Compilation) -> None:
    """Say what memory, disk and time it will take; refuse, with figures, what cannot fit."""
    processes = run.workers.processes([site.k * site.n for site in run.plan.linears])
    room = list(activation_room(run.devices).values()) if run.walks else []
    needs = run.estimate = estimate_needs(
        run.model,
        run.plan,
        run.recipe,
        builds=run.choice.target != "none",
        processes=processes,
        cores=cores(),
        activation_room=room,
    )
    text = (
        f"estimate: {format_bytes(needs.memory_bytes)} of memory, {format_bytes(needs.disk_bytes)} of disk, "
        f"about {needs.seconds / 60:.0f} minutes on {cores()} cores"
        + (f" and {len(room)} GPU{'s' * (len(room) > 1)}" if room else "")
    )
    tell = run.reporter.info if needs.seconds >= _WORTH_A_LINE_SECONDS else run.reporter.detail
    tell(text)
    ensure_free_space(run.folder.final, needs.disk_bytes - size_of(run.work.path))
    available = available_memory()
    if available is not None and available < needs.memory_bytes:
        raise MissingDependencyError(
            f"{run.name}: about {format_bytes(needs.memory_bytes)} of memory are needed and "
            f"{format_bytes(available)} are available; close other programs or lower "
            "--jobs, --calibration-length or --eval-length"
        )
