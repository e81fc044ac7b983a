"""Launches in a CUDA graph, overlapping, against the same launches one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zqfp_compile.kernels.library import Library

REPLAYS = 20


def check_replays(library: Library, run: Callable[[], None], written: Sequence[torch.Tensor]) -> None:
    """Assert that ``run`` writes the same, bit for bit, in a graph whose kernels overlap as they may.

    Args:
        library: What launches; its tuning is reset.
        run: Launches the same every time, with a state of its own.
        written: What it writes: uint8 or floating point, poisoned before each replay.
    """

    def results() -> list[torch.Tensor]:
        torch.cuda.synchronize()
        return [tensor.clone() for tensor in written]

    try:
        library.tune(overlap=0)
        run()
        wanted = results()
        library.tune(overlap=1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for _ in range(REPLAYS):
            for tensor in written:
                tensor.fill_(0x7F if tensor.dtype == torch.uint8 else float("nan"))
            graph.replay()
            for got, tensor in zip(results(), wanted, strict=True):
                assert torch.equal(got, tensor)
    finally:
        library.tune()
