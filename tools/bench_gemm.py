"""Time the W4A8 GEMM against cuBLASLt FP8, FP16 and ONNX Runtime's 4-bit MatMuls, on one GPU in one run.

    make kernels && python tools/bench_gemm.py                        # writes docs/results/gemm.json
    make kernels VARIANTS=1 && python tools/bench_gemm.py --variants  # every kernel, tiles whole and cut

onnxruntime-gpu and CUTLASS (make -f tools/cutlass/contender.mk) compete where they are there. Every number is
the median of single calls with the L2 cache flushed in between; times of the GEMM exclude the activation
quantizer, which has its own column (FP8 contenders would need one as well). Each result of ours is compared
with a float32 product of the host's decoding before it is timed; what is wrong is said and not timed, what
fails costs its own column, and rows are written after each step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemm_cutlass
import gemm_ort
import numpy as np
import torch
from gemm_contenders import Case, TorchContenders, Zqfp
from gemm_timing import Timer, copy_gbps, fp8_tflops, launch_us

from zqfp_compile.kernels.library import Library, NotSupportedError, load_library

SHAPES = ((28672, 8192), (14336, 4096), (4096, 14336), (4096, 4096))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192)
# What LoRC and a wider choice of scales cost: our kernel alone.
EXTRA_TOKENS = (1, 16, 1024, 4096)
EXTRAS = (("e4m3", 64, 32), ("m2", 64, 0), ("e4m3", 32, 0), ("e4m3", 128, 0))
OURS = "zqfp"
CUTLASS = "cutlass_e2m1"
OTHERS = ("cublaslt_fp8", "cublaslt_fp8_rowwise", "fp16", CUTLASS, "ort_nbits", "ort_fp4")
ORT_LARGEST_M = 1024
# The chain of --variants: more than L2 holds, and the tokens of decoding.
CHAIN_BYTES = 200 << 20
CHAIN_TOKENS = 32
KEY = ("n", "k", "m", "group_size", "constraint", "lorc_rank", "hardware")

Row = dict[str, Any]


def zqfp_row(zqfp: Zqfp, case: Case, w8: torch.Tensor, timer: Timer) -> Row:
    """Check one case, time it, and return its row; of a wrong result it has no times."""
    x = zqfp.inputs(case.m)
    error = zqfp.error(x, w8)
    row = {**vars(case), "us": {}, "quantizer_us": 0.0, "gbps": 0.0, "tflops": 0.0}
    row["relative_error"] = float(f"{error:.2e}")
    if not error < zqfp.linear.tolerance(case.m):
        print(f"WRONG: {case}, relative error {error:.2e}", flush=True)
        return row
    us = timer.median_us(zqfp.gemm_call(x))
    moved = zqfp.weight_bytes + case.m * (case.k + 2 * case.n) + 2 * case.lorc_rank * (case.n + case.m)
    row["us"] = {OURS: round(us, 2)}
    row["quantizer_us"] = round(timer.median_us(zqfp.quantize_call(x)), 2)
    row["gbps"] = round(moved / us / 1000, 1)
    row["tflops"] = round(2 * case.m * case.n * case.k / us / 1e6, 2)
    return row


def zqfp_rows(library: Library, cases: list[Case], timer: Timer) -> list[Row]:
    """Time our kernel on cases of one weight."""
    zqfp = Zqfp(library, cases[0], max(case.m for case in cases))
    w8 = zqfp.decoded()
    return [zqfp_row(zqfp, case, w8, timer) for case in cases]


def add_time(row: Row, name: str, call: Callable[[], object], timer: Timer) -> None:
    """Put a contender's time into a row, when it runs: ONNX Runtime and torch raise errors of many kinds."""
    try:
        us = timer.median_us(call)
    except Exception as error:
        print(f"{name} does not run for M = {row['m']}: {str(error).splitlines()[0]}", file=sys.stderr)
        return
    row["us"][name] = min(round(us, 2), row["us"].get(name, math.inf))


def add_torch(rows: list[Row], wanted: tuple[str, ...], timer: Timer) -> None:
    """Time torch's contenders on the rows of one shape."""
    n, k = rows[0]["n"], rows[0]["k"]
    others = TorchContenders(n, k)
    fast, promoted = others.fp8_errors(256)
    print(f"{n} x {k}: relative error of cuBLASLt FP8 {fast:.1e} fast, {promoted:.1e} promoted accumulation")
    for row in rows:
        for name, call in others.calls(row["m"]).items():
            if name in wanted:
                add_time(row, name, call, timer)


def add_cutlass(rows: list[Row], timer: Timer) -> None:
    """Time CUTLASS on the rows of one shape, where it is built: the fastest of its kernels."""
    path = gemm_cutlass.find()
    if path is None:
        print("without CUTLASS: run make -f tools/cutlass/contender.mk", file=sys.stderr)
        return
    contender = gemm_cutlass.CutlassContender(gemm_cutlass.Library(path), rows[0]["n"], rows[0]["k"])
    w8 = contender.decoded()
    for row in rows:
        for call in contender.right_calls(row["m"], w8).values():
            add_time(row, CUTLASS, call, timer)


def add_ort(rows: list[Row], wanted: tuple[str, ...], timer: Timer) -> None:
    """Time ONNX Runtime's contenders on the rows of one shape, where they can run."""
    if (reason := gemm_ort.available()) is not None:
        print(f"without ONNX Runtime: {reason}", file=sys.stderr)
        return
    n, k = rows[0]["n"], rows[0]["k"]
    for name in (name for name in gemm_ort.MODELS if name in wanted):
        try:
            contender = gemm_ort.OrtContender(gemm_ort.MODELS[name](n, k, np.random.default_rng(0)))
        except Exception as error:
            print(f"{name} does not load: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        for row in rows:
            if row["m"] <= ORT_LARGEST_M:
                add_time(row, name, contender.call(row["m"], k), timer)


def print_table(rows: list[Row], bandwidth: float, rate: float, launch: float) -> None:
    """Print the rows; the last columns are shares of the measured ceilings."""
    names = [name for name in (OURS, *OTHERS) if any(name in row["us"] for row in rows)]
    print(f"\nceilings: copy {bandwidth:.0f} GB/s, cuBLASLt FP8 {rate:.0f} TFLOP/s")
    print(f"times in microseconds; an empty launch takes {launch:.1f}")
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
    """Put the right rows into the JSON list, in place of older ones of the same case and hardware."""
    rows = [row for row in rows if OURS in row["us"]]
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    merged = {tuple(row[key] for key in KEY): row for row in [*old, *rows]}
    ordered = [merged[key] for key in sorted(merged)]
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def bench(options: argparse.Namespace) -> int:
    """The table of the issue; 1 when a result of ours is wrong."""
    timer, library, started = Timer(), load_library(), time.monotonic()
    bandwidth, rate, launch = copy_gbps(timer), fp8_tflops(timer), launch_us(timer)
    stamp = {
        "hardware": torch.cuda.get_device_name(),
        "copy_gbps": round(bandwidth),
        "fp8_tflops": round(rate),
        "launch_us": round(launch, 2),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tools/bench_gemm.py", *sys.argv[1:]]),
    }

    def publish(rows: list[Row]) -> None:
        write_rows([{**row, **stamp} for row in rows], options.output)

    def compete(rows: list[Row], wanted: tuple[str, ...]) -> None:
        add_torch(rows, wanted, timer)
        publish(rows)
        if CUTLASS in wanted:
            add_cutlass(rows, timer)
        add_ort(rows, wanted, timer)
        publish(rows)

    tables: dict[str, list[Row]] = {"rows": [], "extras": []}
    for n, k in options.shapes:
        rows = zqfp_rows(library, [Case(n, k, m) for m in options.tokens], timer)
        publish(rows)
        compete(rows, options.contenders)
        tables["rows"] += rows
    for n, k in () if options.no_extras else options.shapes:
        for constraint, group, rank in EXTRAS:
            cases = [Case(n, k, m, group, constraint, rank) for m in EXTRA_TOKENS]
            tables["extras"] += zqfp_rows(library, cases, timer)
        publish(tables["extras"])
    for table in reversed(tables.values()):
        print_table(table, bandwidth, rate, launch)
    everything = [row for table in tables.values() for row in table]
    wrong = sum(OURS not in row["us"] for row in everything)
    print(f"{len(everything)} rows for {options.output}, {wrong} wrong, {time.monotonic() - started:.0f} s")
    return int(wrong > 0)


def bench_variants(options: argparse.Namespace) -> int:
    """Every kernel of the library on every case that it can compute without much waste, fastest first."""
    timer, library = Timer(), load_library()
    for n, k in options.shapes:
        zqfp = Zqfp(library, Case(n, k, 1), max(options.tokens))
        w8 = zqfp.decoded()
        for m in options.tokens:
            x = zqfp.inputs(m)
            chosen, schedule = library.describe_plan(zqfp.layer, m)
            print(f"\nN {n}  K {k}  M {m}  the plan: {chosen} {schedule}")
            for us, name, cut, error, right in sorted(variant_times(library, zqfp, x, w8, timer)):
                print(f"{us:9.1f} us  {name:12} cut={cut}  error {error:.1e}{'' if right else '  WRONG'}")
            if m <= CHAIN_TOKENS:
                apart, overlapping = (chain_us(library, n, k, m, overlap) for overlap in (0, 1))
                print(f"quantizer and GEMM in a graph: {apart:.1f} us, overlapping {overlapping:.1f} us")
    return 0


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
) -> list[tuple[float, str, int, float, bool]]:
    """Return (microseconds, kernel, cut, relative error, whether it is tolerable) of each variant."""
    times = []
    for index, name in enumerate(library.kernel_names()):
        tile = int(re.findall(r"\d+", name)[0])
        if tile > 2 * max(len(x), 8) or tile < min(len(x) // 8, 128):
            continue
        for cut in (0, 1):
            if cut == 1 and "w" in name:
                continue  # strips are never cut
            library.tune(index, cut)
            try:
                size = library.workspace_bytes(zqfp.layer, len(x))
                if size > zqfp.linear.workspace.nbytes:
                    zqfp.linear.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
                error = zqfp.error(x, w8)
                right = error < zqfp.linear.tolerance(len(x))
                times.append((timer.median_us(zqfp.gemm_call(x), 20), name, cut, error, right))
            except NotSupportedError:
                continue  # strips whose tokens need more shared memory than there is
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


def names(text: str) -> tuple[str, ...]:
    """Parse "fp16,ort_nbits".

    Raises:
        ArgumentTypeError: When one is unknown.
    """
    given = tuple(part for part in text.split(",") if part)
    if unknown := set(given).difference(OTHERS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose from {', '.join(OTHERS)}")
    return given


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="N x K, comma separated")
    parser.add_argument("--tokens", type=numbers, default=TOKENS, help="values of M, comma separated")
    parser.add_argument("--variants", action="store_true", help="time every kernel of ours and nothing else")
    parser.add_argument(
        "--contenders", type=names, default=OTHERS, help=f"of {','.join(OTHERS)}; '': ours alone"
    )
    parser.add_argument("--no-extras", action="store_true", help="without LoRC, m2 and other group sizes")
    parser.add_argument("--output", type=Path, default=Path("docs/results/gemm.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_stream(torch.cuda.Stream())  # one that ONNX Runtime can be given
    return (bench_variants if options.variants else bench)(options)


if __name__ == "__main__":
    sys.exit(main())
