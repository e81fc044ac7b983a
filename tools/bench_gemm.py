"""Time the W4A8 GEMM against cuBLASLt FP8, FP16 and ONNX Runtime's 4-bit MatMuls, on one GPU in one run.

    make kernels && python tools/bench_gemm.py                        # writes docs/results/gemm.json
    make kernels VARIANTS=1 && python tools/bench_gemm.py --variants  # every kernel, tiles whole and cut

Every number is the median of single calls with the L2 cache flushed in between; times of the GEMM exclude the
activation quantizer, which has its own column (FP8 contenders would need one as well). Each result of ours is
compared with a float32 product of the host's decoding before it is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gemm_contenders import TOLERANCE, Case, TorchContenders, Zqfp
from gemm_timing import Timer, copy_gbps, fp8_tflops

from zqfp_compile.kernels.library import Library, load_library

SHAPES = ((28672, 8192), (14336, 4096), (4096, 14336), (4096, 4096))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192)
# What LoRC and a wider choice of scales cost: our kernel alone.
EXTRA_TOKENS = (1, 16, 1024, 4096)
EXTRAS = (("e4m3", 64, 32), ("m2", 64, 0), ("e4m3", 32, 0), ("e4m3", 128, 0))
CONTENDERS = ("zqfp", "cublaslt_fp8", "cublaslt_fp8_rowwise", "fp16", "ort_nbits", "ort_fp4")
# The chain of --variants: more than L2 holds, and the tokens of decoding.
CHAIN_BYTES = 200 << 20
CHAIN_TOKENS = 32
KEY = ("n", "k", "m", "group_size", "constraint", "lorc_rank", "hardware")

Row = dict[str, Any]


def zqfp_row(zqfp: Zqfp, case: Case, w8: torch.Tensor, timer: Timer) -> Row:
    """Check one case, time it, and return its row."""
    x = zqfp.inputs(case.m)
    error = zqfp.error(x, w8)
    if not error < TOLERANCE:
        raise SystemExit(f"wrong result for {case}: relative error {error:.2e}")
    us = timer.median_us(zqfp.gemm_call(x))
    moved = zqfp.weight_bytes + case.m * (case.k + 2 * case.n) + 2 * case.lorc_rank * (case.n + case.m)
    return {
        **vars(case),
        "us": {"zqfp": round(us, 2)},
        "quantizer_us": round(timer.median_us(zqfp.quantize_call(x)), 2),
        "gbps": round(moved / us / 1000, 1),
        "tflops": round(2 * case.m * case.n * case.k / us / 1e6, 2),
        "relative_error": float(f"{error:.2e}"),
    }


def shape_rows(library: Library, n: int, k: int, tokens: tuple[int, ...], timer: Timer) -> list[Row]:
    """Time our kernel and torch's contenders on one shape."""
    zqfp = Zqfp(library, Case(n, k, 1), max(tokens))
    w8 = zqfp.decoded()
    rows = [zqfp_row(zqfp, Case(n, k, m), w8, timer) for m in tokens]
    del zqfp, w8
    others = TorchContenders(n, k)
    for row in rows:
        for name, call in others.calls(row["m"]).items():
            try:
                row["us"][name] = round(timer.median_us(call), 2)
            except RuntimeError as error:
                print(
                    f"{name} does not run for M = {row['m']}: {str(error).splitlines()[0]}", file=sys.stderr
                )
    return rows


def extra_rows(library: Library, n: int, k: int, timer: Timer) -> list[Row]:
    """Time our kernel with LoRC, powers of two, and other group sizes."""
    rows = []
    for constraint, group_size, rank in EXTRAS:
        case = Case(n, k, 1, group_size, constraint, rank)
        zqfp = Zqfp(library, case, max(EXTRA_TOKENS))
        w8 = zqfp.decoded()
        rows += [zqfp_row(zqfp, Case(n, k, m, group_size, constraint, rank), w8, timer) for m in EXTRA_TOKENS]
    return rows


def add_ort(rows: list[Row], timer: Timer) -> None:
    """Time ONNX Runtime's contenders on the rows' shapes, where they can run."""
    import numpy as np

    try:
        import gemm_ort
    except ImportError as error:
        print(f"without ONNX Runtime: {error}", file=sys.stderr)
        return
    if (reason := gemm_ort.available()) is not None:
        print(f"without ONNX Runtime: {reason}", file=sys.stderr)
        return
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in rows):
        for name, make in gemm_ort.MODELS.items():
            session = gemm_ort.OrtContender(make(n, k, np.random.default_rng(0)))
            for row in rows:
                if (row["n"], row["k"]) == (n, k) and row["m"] <= 1024:
                    row["us"][name] = round(timer.median_us(session.call(row["m"], k)), 2)
            del session


def print_table(rows: list[Row], bandwidth: float, rate: float) -> None:
    """Print the rows; the last columns are shares of the measured ceilings."""
    names = [name for name in CONTENDERS if any(name in row["us"] for row in rows)]
    print(f"\nceilings: copy {bandwidth:.0f} GB/s, cuBLASLt FP8 {rate:.0f} TFLOP/s; times in microseconds")
    heads = ("N", "K", "M", "g", "scales", "rank", *names, "quantizer", "GB/s", "%", "TFLOP/s", "%", "error")
    lines = [[str(head) for head in heads]]
    for row in rows:
        times = [f"{row['us'][name]:.1f}" if name in row["us"] else "-" for name in names]
        case = [str(row[key]) for key in KEY[:-1]]
        shares = [
            f"{row['gbps']:.0f}",
            f"{100 * row['gbps'] / bandwidth:.0f}",
            f"{row['tflops']:.0f}",
            f"{100 * row['tflops'] / rate:.0f}",
        ]
        lines.append([*case, *times, f"{row['quantizer_us']:.1f}", *shares, f"{row['relative_error']:.0e}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_rows(rows: list[Row], path: Path) -> None:
    """Put the rows into the JSON list, in place of older ones of the same case and hardware."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    merged = {tuple(row[key] for key in KEY): row for row in [*old, *rows]}
    ordered = [merged[key] for key in sorted(merged)]
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def bench(options: argparse.Namespace) -> None:
    """The table of the issue."""
    timer, library, started = Timer(), load_library(), time.monotonic()
    bandwidth, rate = copy_gbps(timer), fp8_tflops(timer)
    extras: list[Row] = []
    if not options.no_extras:
        extras = [row for n, k in options.shapes for row in extra_rows(library, n, k, timer)]
    rows = [row for n, k in options.shapes for row in shape_rows(library, n, k, options.tokens, timer)]
    if not options.no_ort:
        add_ort(rows, timer)
    stamp = {
        "hardware": torch.cuda.get_device_name(),
        "copy_gbps": round(bandwidth),
        "fp8_tflops": round(rate),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tools/bench_gemm.py", *sys.argv[1:]]),
    }
    write_rows([{**row, **stamp} for row in (*extras, *rows)], options.output)
    for table in (extras, rows):
        print_table(table, bandwidth, rate)
    print(f"{len(extras) + len(rows)} rows in {options.output}, {time.monotonic() - started:.0f} s")


def bench_variants(options: argparse.Namespace) -> None:
    """Every kernel of the library on every case that it can compute without much waste, fastest first."""
    timer, library = Timer(), load_library()
    for n, k in options.shapes:
        zqfp = Zqfp(library, Case(n, k, 1), max(options.tokens))
        w8 = zqfp.decoded()
        for m in options.tokens:
            x = zqfp.inputs(m)
            chosen, schedule = library.describe_plan(zqfp.layer, m)
            print(f"\nN {n}  K {k}  M {m}  the plan: {chosen} {schedule}")
            for us, name, cut, error in sorted(variant_times(library, zqfp, x, w8, timer)):
                mark = "" if error < TOLERANCE else f"  WRONG: {error:.1e}"
                print(f"{us:9.1f} us  {name:12} cut={cut}  error {error:.1e}{mark}")
            if m <= CHAIN_TOKENS:
                apart, overlapping = (chain_us(library, n, k, m, overlap) for overlap in (0, 1))
                print(f"quantizer and GEMM in a graph: {apart:.1f} us, overlapping {overlapping:.1f} us")


def chain_us(library: Library, n: int, k: int, m: int, overlap: int) -> float:
    """Return the time of quantizer and GEMM in a CUDA graph of layers whose weights do not fit in L2."""
    first = Zqfp(library, Case(n, k, m), m)
    layers = [first] + [Zqfp(library, Case(n, k, m), m) for _ in range(CHAIN_BYTES // first.weight_bytes)]
    x = first.inputs(m)
    library.tune(overlap=overlap)
    try:
        for layer in layers:
            layer.linear(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in layers:
                layer.linear(x)
    finally:
        library.tune()
    return Timer().median_us(graph.replay) / len(layers)


def variant_times(
    library: Library, zqfp: Zqfp, x: torch.Tensor, w8: torch.Tensor, timer: Timer
) -> list[tuple[float, str, int, float]]:
    """Return (microseconds, kernel, cut, relative error) of each variant."""
    times = []
    for index, name in enumerate(library.kernel_names()):
        tile = int(name[1:].split("r")[0])
        if tile >= 2 * max(len(x), 8) or tile * 8 < len(x):
            continue
        for cut in (0, 1):
            library.tune(index, cut)
            try:
                size = library.workspace_bytes(zqfp.layer, len(x))
                if size > zqfp.linear.workspace.nbytes:
                    zqfp.linear.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
                error = zqfp.error(x, w8)
                times.append((timer.median_us(zqfp.gemm_call(x), 20), name, cut, error))
            finally:
                library.tune()
    return times


def numbers(text: str) -> tuple[int, ...]:
    """Parse "1,16,256"."""
    return tuple(int(part) for part in text.split(","))


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Parse "28672x8192,4096x4096": N x K."""
    pairs = (part.split("x") for part in text.split(","))
    return tuple((int(n), int(k)) for n, k in pairs)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="N x K, comma separated")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="values of M, comma separated")
    parser.add_argument("--variants", action="store_true", help="time every kernel of ours and nothing else")
    parser.add_argument("--no-ort", action="store_true", help="without ONNX Runtime")
    parser.add_argument("--no-extras", action="store_true", help="without LoRC, m2 and other group sizes")
    parser.add_argument("--output", type=Path, default=Path("docs/results/gemm.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    (bench_variants if options.variants else bench)(options)


if __name__ == "__main__":
    main()
