"""Time the activation quantizers: of x, of SiLU(gate) x up, of an RMS norm of x + skip that writes the sum.

    make kernels && python tools/bench_quantizer.py

Static and per-token scales, without and with x @ V of LoRC. Medians of single launches in microseconds, L2
flushed in between; then, for few tokens, of one of 32 calls in a CUDA graph, which find their input in the
cache. The floor is what has to move at the copy bandwidth: 16-bit inputs read once and the sum written, x8
written once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from bench_gemm import numbers
from gemm_timing import Timer, copy_gbps, launch_us

from zqfp_compile.kernels.library import Library, QuantizerTensors, load_library

Call = Callable[[], None]

# Bytes that each of them moves per number.
BYTES = {"x": 3, "silu": 5, "norm": 7}
CALLS = 32  # in a graph
FEW = 32


def quantizer(library: Library, kind: str, m: int, k: int, rank: int, scale: torch.Tensor | None) -> Call:
    """Return a call of one quantizer on random data."""
    x, other, total = (torch.randn(m, k, device="cuda", dtype=torch.float16) for _ in range(3))
    gamma = torch.randn(k, device="cuda", dtype=torch.float16)
    v = (torch.randn(k, rank, device="cuda") / k**0.5).half() if rank else None
    made = QuantizerTensors.empty(x, scale, v)
    if kind == "x":
        return lambda: library.quantize_activation_into(x, made)
    if kind == "silu":
        return lambda: library.quantize_silu_mul_into(x, other, made)
    return lambda: library.quantize_rms_norm_into(x, gamma, 1e-5, made, skip=other, sum_=total)


def graph_us(timer: Timer, call: Call) -> float:
    """Return the time of one of many calls in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return timer.median_us(graph.replay) / CALLS


def measure(library: Library, timer: Timer, kind: str, m: int, k: int, rank: int) -> str:
    """Return a row's columns: static and per token without LoRC, then with it, then all four in a graph."""
    calls = [
        quantizer(library, kind, m, k, r, scale)
        for r in (0, rank)
        for scale in (torch.tensor([0.02], device="cuda"), None)
    ]
    times = [timer.median_us(call) for call in calls]
    if m <= FEW:
        times += [graph_us(timer, call) for call in calls]
    return " ".join(f"{time:9.1f}" for time in times)


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", type=numbers, default=(4096, 8192, 14336), help="values of K")
    parser.add_argument("--tokens", type=numbers, default=(1, 16, 256, 1024, 4096, 8192), help="values of M")
    parser.add_argument("--rank", type=int, default=32, help="of LoRC")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    library, timer = load_library(), Timer()
    bandwidth = copy_gbps(timer)
    print(f"copy {bandwidth:.0f} GB/s, an empty launch {launch_us(timer):.1f} us; microseconds")
    scales, lorc = f"{'static':>9} per token", f"rank {options.rank}: static, per token"
    print(f"of       K      M   floor {scales} {lorc} graph: the same four")
    for kind, per_number in BYTES.items():
        for k in options.columns:
            for m in options.tokens:
                floor = per_number * m * k / bandwidth / 1000
                row = measure(library, timer, kind, m, k, options.rank)
                print(f"{kind:4} {k:5} {m:6} {floor:7.1f} {row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
