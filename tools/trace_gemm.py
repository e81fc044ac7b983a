"""When the GEMM's warpgroups do what: cycles since their block began, medians over the blocks, L2 flushed.

    make -C zqfp_compile/kernels/cuda OUT=$PWD/build/trace TRACE=1
    ZQFP_KERNELS=build/trace python tools/trace_gemm.py --shapes 4096x4096 --tokens 1,4096

Each line is a warpgroup, the last one the producer's; a step that only some blocks get to has their number
behind it. The stamps cost a store each and a few registers. Groups of 64.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import torch
from bench_gemm import numbers, shapes
from gemm_contenders import Case, Zqfp
from gemm_timing import Timer

from zqfp_compile.kernels.library import load_library

# The order of Step in zqfp_compile/kernels/cuda/trace.cuh, and its array.
STEPS = ("entered", "met", "tile", "data", "multiplied", "slices", "shared", "stored", "weights")
BLOCKS, WARPGROUPS, STAMPS = 132, 5, 32


def read(library: ctypes.CDLL) -> np.ndarray:
    """Return the stamps [block, warpgroup, number], 0 where there is none: cycles * 256 + step."""
    stamps = np.zeros((BLOCKS, WARPGROUPS, STAMPS), np.uint64)
    if error := library.zqfpReadTrace(stamps.ctypes.data_as(ctypes.c_void_p)):
        raise SystemExit(f"trace_gemm: CUDA error {error} while reading the stamps")
    return stamps


def lines(stamps: np.ndarray) -> list[str]:
    """Return a line for each warpgroup: step and median of its cycles since the block began."""
    cycles, step = (stamps >> np.uint64(8)).astype(np.int64), (stamps & np.uint64(255)).astype(int)
    text = []
    for warpgroup in range(WARPGROUPS):
        words = []
        for number in range(1, STAMPS):
            there = stamps[:, warpgroup, number] > 0
            if not there.any():
                break
            since = np.median(cycles[there, warpgroup, number] - cycles[there, warpgroup, 0])
            names = "/".join(STEPS[i] for i in sorted(set(step[there, warpgroup, number])))
            words.append(f"{names} {since:.0f}" + (f" ({there.sum()})" if there.sum() < BLOCKS else ""))
        if words:
            text.append(f"  {warpgroup}: {', '.join(words)}")
    return text


def main() -> int:
    """Parse the command line, trace one call of each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=shapes, default=((4096, 4096),), help="N x K, comma separated")
    parser.add_argument("--tokens", type=numbers, default=(1, 4096), help="values of M, comma separated")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    path = Path(os.environ.get("ZQFP_KERNELS", "build/kernels")) / "libzqfp.so"
    library, traced, timer = load_library(), ctypes.CDLL(str(path)), Timer()
    if not hasattr(traced, "zqfpReadTrace"):
        parser.error(f"{path} is not built with TRACE=1")
    for n, k in options.shapes:
        for m in options.tokens:
            zqfp = Zqfp(library, Case(n, k, m), m)
            call = zqfp.gemm_call(zqfp.inputs(m))
            us = timer.median_us(call)
            traced.zqfpClearTrace()
            timer.flush()
            call()
            torch.cuda.synchronize()
            name, schedule = library.describe_plan(zqfp.layer, m)
            print(f"N {n}  K {k}  M {m}  {name} {schedule}  {us:.1f} us")
            print("\n".join(lines(read(traced))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
