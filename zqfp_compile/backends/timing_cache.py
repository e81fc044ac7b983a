"""The builder's timing cache: a file that several builds, also at once, may share.

TensorRT measures kernels on the GPU and keeps the results here. TensorRT-RTX does not measure: its
timing-cache calls are no-ops since 1.2, so the worker leaves the file alone for it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zqfp_compile.backends.trt_api import BuilderConfig


def load(config: BuilderConfig, path: Path) -> None:
    """Give ``config`` the timings in ``path``; a missing file is an empty cache."""
    config.set_timing_cache(config.create_timing_cache(_read(path)), False)


def save(config: BuilderConfig, path: Path) -> None:
    """Add what this build measured to ``path``, keeping what other builds wrote there meanwhile."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        others = _read(path)
        if others:
            cache.combine(config.create_timing_cache(others), True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(memoryview(cache.serialize()))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file ``<path>.lock``: the cache itself is replaced, so it cannot carry the lock."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
