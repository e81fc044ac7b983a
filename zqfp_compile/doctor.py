"""What this machine has, which targets it can build and run, and the fix for each that it cannot.

Imports none of the libraries it asks about: each is looked at in a process of its own (``doctor_probe.py``).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from zqfp_compile import __version__
from zqfp_compile.backends import gpu
from zqfp_compile.backends.target import decide
from zqfp_compile.backends.trt_api import LABELS, MODULES
from zqfp_compile.doctor_probe import PROBES
from zqfp_compile.errors import MissingDependencyError

# Nothing compiles without these.
_NEEDED = ("numpy", "onnx", "onnx-ir", "tokenizers", "torch", "onnxruntime")
_PROBE_SECONDS = 120
# Measured: TensorRT-RTX 1.7 "does not support this compute capability" on an H100.
_NOT_FOR_RTX = ("90",)


@dataclass(frozen=True)
class Library:
    """Something a compile or an engine uses.

    Attributes:
        name: What people call it.
        version: ``None`` when it cannot be used.
        detail: What else there is to know.
        fix: What to do when it cannot be used.
    """

    name: str
    version: str | None
    detail: str = ""
    fix: str | None = None


@dataclass(frozen=True)
class TargetVerdict:
    """Whether a target can be built and run here; a fix is ``None`` when it can.

    Attributes:
        target: Value of ``--target``.
        build_fix: What keeps it from being built, and what to do.
        run_fix: What keeps its engines from running, and what to do.
    """

    target: str
    build_fix: str | None
    run_fix: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found.

    Attributes:
        system: Name to value: ``zqfp-compile``, ``python``, ``platform``.
        gpus: Compute capability of each GPU.
        libraries: Libraries a compile or an engine uses, our own kernels, and the tool that builds them.
        targets: One verdict per target.
        auto: What ``--target auto`` takes and why; or why it takes nothing.
    """

    system: dict[str, str]
    gpus: tuple[str, ...]
    libraries: tuple[Library, ...]
    targets: tuple[TargetVerdict, ...]
    auto: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; ``builds`` and ``runs`` say of each target whether it has no fix."""
        targets = [
            {**asdict(item), "builds": item.build_fix is None, "runs": item.run_fix is None}
            for item in self.targets
        ]
        return {"schema_version": 1, **asdict(self), "targets": targets}


def diagnose() -> Diagnosis:
    """Look at everything; a library that is broken, or crashes, is a finding."""
    with ThreadPoolExecutor() as pool:
        found = {library.name: library for library in pool.map(_probe, PROBES)}
    gpus = gpu.compute_capabilities()
    return Diagnosis(
        system={
            "zqfp-compile": __version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform(),
        },
        gpus=gpus,
        libraries=(*found.values(), _nvcc()),
        targets=tuple(
            TargetVerdict(target, _build_fix(target, found, gpus), _run_fix(target, found, gpus))
            for target in (*MODULES, "onnxruntime")
        ),
        auto=_automatic(found, gpus),
    )


def _probe(name: str) -> Library:
    """Import a library in a process of its own."""
    command = [sys.executable, "-m", "zqfp_compile.doctor_probe", name]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Library(name, None, fix=f"does not load within {_PROBE_SECONDS} s; reinstall it")
    if ended.returncode < 0:
        text = signal.Signals(-ended.returncode).name
        return Library(name, None, fix=f"crashes when imported ({text}); reinstall it")
    try:
        facts = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        reason = (ended.stderr.splitlines() or ["no output"])[-1][:200]
        return Library(name, None, fix=f"does not load ({reason}); reinstall it")
    return Library(name, facts.get("version"), facts.get("detail", ""), facts.get("error"))


def _nvcc() -> Library:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if path is None:
        fix = "not on PATH nor in CUDA_HOME; only building our kernels needs it: install the CUDA toolkit"
        return Library("nvcc", None, fix=fix)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Library("nvcc", None, fix=f"{path} does not run ({error}); reinstall it")
    release = re.search(r"release (\d+\.\d+)", said.stdout)
    return Library("nvcc", release[1] if release else "unknown", path)


def _missing(found: dict[str, Library]) -> dict[str, MissingDependencyError]:
    return {
        target: MissingDependencyError(found[target].fix or "") for target in MODULES if found[target].fix
    }


def _build_fix(target: str, found: dict[str, Library], gpus: tuple[str, ...]) -> str | None:
    for name in _NEEDED:
        if found[name].fix is not None:
            return f"every compile needs {name}: {found[name].fix}"
    try:
        decide(target, missing=_missing(found), gpus=gpus, has_onnxruntime=True)
    except MissingDependencyError as error:
        return str(error).removeprefix(f"--target {target}: ")
    return None


def _run_fix(target: str, found: dict[str, Library], gpus: tuple[str, ...]) -> str | None:
    if found[target].fix is not None:
        return found[target].fix
    if target == "onnxruntime":
        return None
    if not gpus:
        return f"{LABELS[target]} engines run on an NVIDIA GPU, and there is none here (or no driver)"
    if target == "tensorrt-rtx" and set(gpus) <= set(_NOT_FOR_RTX):
        return f"{LABELS[target]} does not support SM{gpus[0]}; use --target tensorrt or onnxruntime"
    torch = found["torch"]
    if torch.fix is not None or torch.detail.startswith("built without"):
        return "Engine moves tensors with torch, which has no CUDA here; install a CUDA build of torch"
    return None


def _automatic(found: dict[str, Library], gpus: tuple[str, ...]) -> str:
    has_ort = found["onnxruntime"].fix is None
    try:
        choice = decide("auto", missing=_missing(found), gpus=gpus, has_onnxruntime=has_ort)
    except MissingDependencyError as error:
        return str(error)
    return f"{choice.target}: {choice.reason}"
