"""Engines for TensorRT and TensorRT-RTX: one builder, run in a process of its own under limits."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zqfp_compile
from zqfp_compile.backends.equal_products import equal_products
from zqfp_compile.backends.plan_lint import Layer, LintResult, lint, parse_layers
from zqfp_compile.backends.profiles import Profile
from zqfp_compile.backends.tensorrt_worker import Job
from zqfp_compile.backends.trt_api import LABELS
from zqfp_compile.errors import BuilderError, MissingDependencyError, UsageError, ZqfpError

_WORKER = "zqfp_compile.backends.tensorrt_worker"
_POLL_SECONDS = 0.5
_EXIT_SECONDS = 30
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class EngineResult:
    """A built engine.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        path: The engine file.
        bytes: Its size.
        version: Version of the builder; the engine loads in that version only.
        compute_capability: GPU architecture it is built for, such as ``"89"``.
        profiles: Optimisation profiles, in engine order.
        seconds: Build time.
        layers: The plan, per profile.
        lint: Verdict on the plan. ``build_engine`` does not raise for it; who does, calls :func:`keep_log`.
        log_path: The builder's log, beside the engine.
        peak_bytes: Largest resident memory of the builder process.
    """

    target: str
    path: Path
    bytes: int
    version: str
    compute_capability: str
    profiles: tuple[Profile, ...]
    seconds: float
    layers: tuple[tuple[Layer, ...], ...]
    lint: LintResult
    log_path: Path
    peak_bytes: int


@dataclass
class _Outcome:
    """What is known about a worker that has ended."""

    returncode: int = 0
    timed_out: bool = False
    phase: str = "starting"
    result: dict[str, Any] | None = None
    error: str | None = None
    text: str = ""
    log: str = field(default="", repr=False)


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    target: str,
    profiles: Sequence[Profile],
    compute_capability: str | None = None,
    timing_cache: Path | None = None,
    linears: Sequence[str] = (),
    plugin: Path | None = None,
    timeout_s: int = 3600,
    memory_gb: float | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> EngineResult:
    """Build an engine and lint its plan.

    The engine appears under ``engine_path`` whole or not at all; its log is ``<engine_path>.log``. After
    a failure the log stays in the system's temporary folder and the error names it.

    Args:
        onnx_path: Engine-ready ONNX (functions inlined, unique node names), external data beside it.
        engine_path: File to write; its folder must exist.
        target: ``tensorrt`` or ``tensorrt-rtx``.
        profiles: Optimisation profiles.
        compute_capability: Architecture such as ``"89"`` or ``"120"`` (TensorRT-RTX); ``None`` takes the GPU
            here, or 89 where there is none it can build for.
        timing_cache: File of kernel timings to use and extend (TensorRT; TensorRT-RTX has none).
        linears: Node names of the planned linears' main products, for the lint.
        plugin: Plugin library with the model's ``zqfp`` operators.
        timeout_s: Seconds after which the builder is killed.
        memory_gb: GiB of data the builder may allocate; ``None`` is no limit.
        on_progress: Called with a short text, at most four times a second.

    Raises:
        UsageError: The target or compute capability does not exist.
        MissingDependencyError: The runtime is missing, or the engine cannot be written.
        BuilderError: The builder failed, crashed, or ran into a limit.
    """
    if target not in LABELS:
        raise UsageError(f"no engine builder is called {target!r}; the builders are {', '.join(LABELS)}")
    if not onnx_path.is_file():
        raise UsageError(f"{onnx_path}: there is no such file to build an engine from")
    if not engine_path.parent.is_dir():
        raise UsageError(f"{engine_path.parent}: there is no such folder to write the engine to")
    started = time.monotonic()
    with _workplace(engine_path, target) as place:
        job = Job(
            target=target,
            onnx_path=str(onnx_path.resolve()),
            engine_path=str(place.engine),
            profiles=[dict(profile.shapes) for profile in profiles],
            compute_capability=compute_capability,
            timing_cache=None if timing_cache is None else str(timing_cache.resolve()),
            memory_gb=memory_gb,
            plugin=None if plugin is None else str(plugin.resolve()),
        )
        outcome = _run(job, place, timeout_s, on_progress)
        if outcome.result is None:
            raise _users_fault(outcome, job) or _diagnose(outcome, job, timeout_s, keep_log(place.log))
        place.engine.replace(engine_path)
        log_path = engine_path.with_name(engine_path.name + ".log")
        shutil.move(place.log, log_path)
    layers = parse_layers(outcome.log, max(1, len(profiles)))
    verdict = lint(layers, linears)
    if verdict.missing:  # what computes the same as another runs once, and only the model says which
        verdict = lint(layers, linears, equal=equal_products(onnx_path, linears))
    return EngineResult(
        target=target,
        path=engine_path,
        bytes=engine_path.stat().st_size,
        version=outcome.result["version"],
        compute_capability=outcome.result["compute_capability"],
        profiles=tuple(profiles),
        seconds=time.monotonic() - started,
        layers=layers,
        lint=verdict,
        log_path=log_path,
        peak_bytes=outcome.result["peak_bytes"],
    )


def keep_log(log: Path) -> str:
    """Save a builder's log from the removal of its folder, into the system's temporary folder.

    Returns:
        What an error says about it, to go at the end of its line; empty when there is nothing in the log.
    """
    if not log.exists() or log.stat().st_size == 0:
        return ""
    handle, name = tempfile.mkstemp(prefix="zqfp-build-", suffix=".log")
    os.close(handle)
    return f" (log: {shutil.move(log, name)})"


@dataclass(frozen=True)
class _Workplace:
    """Private files of one build: a folder, and the engine's temporary name beside its final one."""

    folder: Path
    engine: Path

    @property
    def log(self) -> Path:
        return self.folder / "build.log"


@contextmanager
def _workplace(engine_path: Path, target: str) -> Iterator[_Workplace]:
    engine = engine_path.with_name(f".{engine_path.name}.{os.getpid()}.tmp")
    with tempfile.TemporaryDirectory(prefix="zqfp-builder-") as name:
        folder = Path(name)
        if target == "tensorrt-rtx":
            _link_rtx_library(folder)
        try:
            yield _Workplace(folder, engine)
        finally:
            engine.unlink(missing_ok=True)


def _link_rtx_library(folder: Path) -> None:
    """Plugins and the parser load ``libtensorrt_rtx.so``, the wheel has ``.so.1`` only: without it, abort."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for library in sorted(Path(place).glob("libtensorrt_rtx.so.*")):
            (folder / "libtensorrt_rtx.so").symlink_to(library)
            return


def _run(job: Job, place: _Workplace, timeout_s: int, on_progress: Callable[[str], None] | None) -> _Outcome:
    """Run the worker to its end, whatever that is; its process group is gone when this returns or raises."""
    description = place.folder / "job.json"
    description.write_text(job.to_json(), encoding="utf-8")
    reader, writer = os.pipe()
    with place.log.open("ab") as log, os.fdopen(reader, "rb", buffering=0):
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(description), str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=place.folder,
                env=_environment(place.folder),
                pass_fds=(writer,),
                start_new_session=True,
            )
        finally:
            os.close(writer)
        try:
            outcome = _listen(reader, time.monotonic() + timeout_s, on_progress)
            if not outcome.timed_out:
                with suppress(subprocess.TimeoutExpired):  # stuck while unloading the library: all is said
                    outcome.returncode = process.wait(_EXIT_SECONDS)
        finally:
            _kill_group(process)
    outcome.log = place.log.read_text(encoding="utf-8", errors="replace")
    return outcome


def _environment(folder: Path) -> dict[str, str]:
    def prepend(name: str, value: str) -> str:
        return os.pathsep.join(filter(None, (value, os.environ.get(name))))

    return {
        **os.environ,
        "LD_LIBRARY_PATH": prepend("LD_LIBRARY_PATH", str(folder)),
        # The worker runs elsewhere, so a checkout that is not installed has to be named.
        "PYTHONPATH": prepend("PYTHONPATH", str(Path(zqfp_compile.__path__[0]).parent)),
    }


def _listen(channel: int, deadline: float, on_progress: Callable[[str], None] | None) -> _Outcome:
    """Read the worker's JSON lines until it closes the pipe or the deadline passes."""
    outcome = _Outcome()
    pending = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            outcome.timed_out = True
            return outcome
        if not select.select([channel], [], [], min(left, _POLL_SECONDS))[0]:
            continue
        chunk = os.read(channel, 65536)
        if not chunk:
            return outcome
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            message = json.loads(line)
            outcome.phase = message.get("phase", outcome.phase)
            outcome.result = message.get("result", outcome.result)
            outcome.error = message.get("error", outcome.error)
            outcome.text = message.get("text", outcome.text)
            if on_progress is not None and "phase" in message:
                on_progress(outcome.phase)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # raised when every process in it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _users_fault(outcome: _Outcome, job: Job) -> ZqfpError | None:
    """Return the errors for which nobody needs the builder's log."""
    if _ran_out_of_memory(outcome, job):
        return None
    kinds = {"UsageError": UsageError, "MissingDependencyError": MissingDependencyError}
    kind = kinds.get(outcome.error or "")
    return None if kind is None else kind(outcome.text)


def _diagnose(outcome: _Outcome, job: Job, timeout_s: int, hint: str) -> BuilderError:
    label, name = LABELS[job.target], Path(job.onnx_path).name
    if outcome.timed_out:
        return BuilderError(
            f"{label} did not finish {name} within {timeout_s} s (last seen: {outcome.phase}); "
            f"allow more with --builder-timeout, or lower --max-shapes{hint}"
        )
    if outcome.returncode == -signal.SIGKILL:
        return BuilderError(
            f"{label} was killed while {outcome.phase}, most likely by the kernel for lack of memory; "
            f"free some, or lower --max-shapes{hint}"
        )
    if _ran_out_of_memory(outcome, job):
        limit = "" if job.memory_gb is None else f" of {job.memory_gb:g} GiB"
        return BuilderError(
            f"{label} ran out of memory{limit} while {outcome.phase}; "
            f"allow more with --builder-memory-gb, or lower --max-shapes{hint}"
        )
    if outcome.error:
        return BuilderError(outcome.text + hint)
    if outcome.returncode < 0:
        return BuilderError(_crash(outcome, label, name) + hint)
    last = outcome.log[-_TAIL_BYTES:].strip().rpartition("\n")[2]
    return BuilderError(
        f"{label} stopped with code {outcome.returncode} while {outcome.phase}: {last or 'no output'}{hint}"
    )


def _ran_out_of_memory(outcome: _Outcome, job: Job) -> bool:
    """Whether Python or the library said so."""
    signs = ["bad_alloc", "out of memory", "OutOfMemory", "Cannot allocate memory", "MemoryError"]
    if job.memory_gb is not None:  # other faces of a failed allocation: dlopen's and Myelin's
        signs += ["failed to map segment", "CHECK(p) failed"]
    tail = outcome.log[-_TAIL_BYTES:] + outcome.text
    return outcome.error == "MemoryError" or any(sign in tail for sign in signs)


def _crash(outcome: _Outcome, label: str, name: str) -> str:
    reason = signal.Signals(-outcome.returncode).name
    advice = (
        "the model holds something the parser cannot take, such as a recursive function"
        if outcome.phase == "parsing the model"
        else "try --weight-lowering fp8, other shapes, or --target onnxruntime"
    )
    return f"{label} crashed ({reason}) on {name} while {outcome.phase}; {advice}"
