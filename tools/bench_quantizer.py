"""Time the activation quantizer: static and per-token scales, without and with x @ V of LoRC.

    make kernels && python tools/bench_quantizer.py

Medians of single launches in microseconds, L2 flushed in between. The floor is what has to move at the copy
bandwidth: x read once (2 bytes), x8 written once.
"""

from __future__ import annotations

import argparse
import sys

import torch
from bench_gemm import numbers
from gemm_timing import Timer, copy_gbps, launch_us

from zqfp_compile.kernels.library import Library, load_library


def times(library: Library, timer: Timer, m: int, k: int, rank: int) -> list[float]:
    """Return the time of a static scale and of one per token."""
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    v = (torch.randn(k, rank, device="cuda") / k**0.5).half() if rank else None
    found = []
    for scale in (torch.tensor([0.02], device="cuda"), None):
        x8, a, xv = library.quantize_activation(x, scale, v)

        def call(
            x8: torch.Tensor = x8,
            a: torch.Tensor = a,
            xv: torch.Tensor | None = xv,
            scale: torch.Tensor | None = scale,
        ) -> None:
            library.quantize_activation_into(x, x8, a, scale=scale, v=v, xv=xv)

        found.append(timer.median_us(call))
    return found


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
    ranks = f"{options.rank}: static", "per token"
    print("    K      M   floor   static  per token   rank " + "  ".join(ranks))
    for k in options.columns:
        for m in options.tokens:
            plain, lorc = (times(library, timer, m, k, rank) for rank in (0, options.rank))
            floor = 3 * m * k / bandwidth / 1000
            print(
                f"{k:5} {m:6} {floor:7.1f} {plain[0]:8.1f} {plain[1]:10.1f} {lorc[0]:15.1f} {lorc[1]:10.1f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
