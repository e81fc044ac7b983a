"""The timing-cache file, through the API both runtimes share (TensorRT-RTX keeps it, without effect)."""

from __future__ import annotations

from pathlib import Path

import pytest

from zqfp_compile.backends import timing_cache

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_cache_is_made_read_back_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "timings" / "cache.bin"
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    sizes = []
    for _ in range(2):
        config = builder.create_builder_config()
        timing_cache.load(config, path)
        timing_cache.save(config, path)
        sizes.append(path.stat().st_size)
    assert sizes[0] > 0
    assert sizes[0] == sizes[1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["cache.bin", "cache.bin.lock"]
