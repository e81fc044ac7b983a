"""Time, throughput and memory of a compile, for LLaMA-shaped models of any size with random weights.

    python tools/bench_compile.py --size 1.5B --jobs 2

The model is made on the spot by ``models/make_large.py`` (kept with ``--models``), compiled with
``--target none --no-evaluate`` in a process of its own, and removed. Prints time per step, weights read per
second, processor time and peak memory, and puts a row into ``docs/results/compile.json``.

    python tools/bench_compile.py --size 1.5B --kill-times 5

then compiles once more, kills that at five random moments (of its processor time, which other programs do not
move much), goes on each time, says what this cost, and fails unless the files are the same.

    python tools/bench_compile.py --size 7B --layers 4 --algorithm gptq --devices cuda --jobs 6 \
        --calibration-samples 64 --calibration-length 2048

is GPTQ on a GPU, for four layers of that model; the calibration text are random tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "models"), str(ROOT / "tools")]

from make_large import Shape, make_large  # noqa: E402
from results import hardware, today  # noqa: E402

from zqfp_compile.disk import file_sha256  # noqa: E402
from zqfp_compile.parallel.choice import Workers  # noqa: E402

SIZES = {
    "0.135B": Shape(layers=30, hidden=576, intermediate=1536, vocab=49152),
    # As wide as the 7B model, an eighth as deep: needs its memory.
    "7B/8": Shape(layers=4, hidden=4096, intermediate=11008, vocab=32000),
    "1.5B": Shape(layers=28, hidden=2048, intermediate=5632, vocab=32000),
    "7B": Shape(layers=32, hidden=4096, intermediate=11008, vocab=32000),
}
PR_SET_CHILD_SUBREAPER = 36
RESULTS = ROOT / "docs" / "results" / "compile.json"
READ_ALL_WEIGHTS = ("calibrate", "quantize", "certificate", "total")
# A row with the same values here replaces the older one.
KEY = ("model", "algorithm", "lorc_rank", "jobs", "device", "hardware", "command")


def shape_of(size: str, layers: int | None) -> Shape:
    """Return a model's shape, as deep as it is or with so many layers."""
    return SIZES[size] if layers is None else dataclasses.replace(SIZES[size], layers=layers)


def parameters(shape: Shape) -> int:
    """Return the weights of the linears that are quantised: all but lm_head's."""
    return sum(linear_sizes(shape))


def linear_sizes(shape: Shape) -> list[int]:
    """Return the weights of each of them."""
    one = [shape.hidden**2] * 4 + [shape.hidden * shape.intermediate] * 3
    return shape.layers * one


def compile_measured(model: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """Compile in a process of its own; return what its report and the kernel say."""
    before, begin = processor_seconds(), time.monotonic()
    compile_once(model, output, [*options, "--fresh"])
    wall, spent = time.monotonic() - begin, processor_seconds() - before
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {
        "seconds": {
            **{step: round(seconds, 1) for step, seconds in report["seconds"].items() if seconds >= 0.05},
            "total": round(wall, 1),
        },
        "cpu_seconds": round(spent, 1),
        "peak_rss_bytes": report["resources"]["resident_bytes"],
        "peak_anonymous_bytes": report["resources"]["anonymous_bytes"],
        "estimated": report["resources"]["estimated"],
    }


def compile_killed(
    model: Path, output: Path, options: list[str], lasts: float, times: int, seed: int
) -> dict[str, Any]:
    """Compile, killed at random moments of the ``lasts`` seconds of processor time; return what it took."""
    moments = sorted(np.random.default_rng(seed).uniform(0, lasts, times))
    before, begin = processor_seconds(), time.monotonic()
    for seconds in np.diff([0.0, *moments]):
        if compile_once(model, output, options, kill_after=float(seconds)):
            raise SystemExit("bench_compile: it came to its end before it was killed")
    compile_once(model, output, options)
    wall, spent = time.monotonic() - begin, processor_seconds() - before
    return {"times": times, "seed": seed, "seconds": round(wall, 1), "cpu_seconds": round(spent, 1)}


def compile_once(model: Path, output: Path, options: list[str], kill_after: float | None = None) -> bool:
    """Run the command to its end, or kill it and its workers after so many seconds of their processor time.

    Returns:
        Whether it came to its end.
    """
    command = [sys.executable, "-m", "zqfp_compile", str(model), "--output", str(output), *options]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    workers: list[int] = []
    while kill_after is not None and process.poll() is None:
        if family_seconds(process.pid) >= kill_after:
            workers = [each for each in family(process.pid) if each != process.pid]
            process.kill()  # its workers die with it
            break
        time.sleep(0.05)
    code = process.wait()
    for worker in workers:  # ours now, but for those that had ended
        with suppress(ChildProcessError):
            os.waitpid(worker, 0)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"bench_compile: {' '.join(command)} ended with {code}")
    return code == 0


def family(process: int) -> list[int]:
    """Return a process and its descendants."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            children += map(int, (task / "children").read_text(encoding="ascii").split())
    return [*(each for child in children for each in family(child)), process]


def family_seconds(process: int) -> float:
    """User and system time of a process and its descendants so far, also of those that have ended."""
    ticks = 0
    for each in family(process):
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # its own, and its children's that it has waited for
    return ticks / os.sysconf("SC_CLK_TCK")


def processor_seconds() -> float:
    """User and system time of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of the artifact's files."""
    return {path.name: file_sha256(path) for path in sorted(output.glob("model.zqfp.onnx*"))}


def show(row: dict[str, Any], weights: int, data_bytes: int, load: float) -> None:
    """Print one row for a reader."""
    print(f"\n{row['model']}: {weights / 1e9:.3f}e9 weights to quantise, {data_bytes / 1e9:.2f} GB of fp16")
    for step, seconds in row["seconds"].items():
        rate = f"{2 * weights / 1e9 / seconds:8.3f} GB/s" if step in READ_ALL_WEIGHTS else ""
        print(f"  {step:20} {seconds:8.1f} s {rate}")
    per_weight = 1e9 / weights
    print(f"  processor time {row['cpu_seconds']:.1f} s, {row['cpu_seconds'] * per_weight:.0f} ns per weight")
    print(
        f"  peak memory {row['peak_anonymous_bytes'] / 1e9:.2f} GB anonymous, "
        f"{row['peak_rss_bytes'] / 1e9:.2f} GB with mapped files; load of the machine before: {load:.1f}"
    )
    for name, digest in row["sha256"].items():
        print(f"  sha256 of {name}: {digest[:16]}")
    if "killed" in row:
        killed = row["killed"]
        more = killed["seconds"] / row["seconds"]["total"] - 1
        more_work = killed["cpu_seconds"] / row["cpu_seconds"] - 1
        print(
            f"  killed {killed['times']} times: {killed['seconds']:.1f} s ({more:+.1%}), "
            f"processor time {killed['cpu_seconds']:.1f} s ({more_work:+.1%}), same bytes"
        )


def add_row(path: Path, row: dict[str, Any], key: tuple[str, ...] = KEY) -> None:
    """Put a row into the file, smaller models first; the row that has the same ``key`` is replaced."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [old for old in rows if any(old[name] != row[name] for name in key)]
    rows = sorted([*rows, row], key=lambda one: (one["parameters"], *(str(one[name]) for name in key)))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Make the model, compile it, show and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), required=True)
    parser.add_argument("--layers", type=int, help="layers of that size; default: all")
    parser.add_argument("--jobs", type=int, help="default: the command's")
    parser.add_argument("--algorithm", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--lorc-rank", type=int, default=32)
    parser.add_argument(
        "--devices", "--device", default="cpu", help="such as cuda or cuda:0,cuda:1; default %(default)s"
    )
    parser.add_argument("--calibration-samples", type=int, help="default: the command's")
    parser.add_argument("--calibration-length", type=int, help="default: the command's")
    parser.add_argument("--models", type=Path, help="existing folder that keeps the model; default: removed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default %(default)s")
    parser.add_argument("--kill-times", type=int, default=0, help="default: not killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default %(default)s")
    given = parser.parse_args()
    if given.kill_times:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # the time of killed workers counts
    shape = shape_of(given.size, given.layers)
    name = given.size if given.layers is None else f"{given.size} with {given.layers} layers"
    jobs = Workers(given.jobs).processes(linear_sizes(shape))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.models) as place:
        model = (given.models or Path(place)) / name.replace("/", "-").replace(" ", "-") / "model.onnx"
        if not model.exists():
            begin = time.monotonic()
            make_large(model.parent, shape)
            print(f"model made in {time.monotonic() - begin:.0f} s", flush=True)
        chosen = ["--jobs", str(jobs), "--algorithm", given.algorithm]
        chosen += ["--lorc-rank", str(given.lorc_rank), "--devices", given.devices]
        for flag in ("calibration_samples", "calibration_length"):
            value = getattr(given, flag)
            chosen += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
        options = ["--target", "none", "--no-evaluate", *chosen]
        load = os.getloadavg()[0]
        output = Path(place) / "out.zqfp"
        measured = compile_measured(model, output, options)
        found = digests(output)
        if given.kill_times:
            shutil.rmtree(output)
            lasts = measured["cpu_seconds"]
            measured["killed"] = compile_killed(model, output, options, lasts, given.kill_times, given.seed)
            if digests(output) != found:
                raise SystemExit("bench_compile: what was killed and went on gave other bytes")
        data_bytes = model.with_name("model.onnx.data").stat().st_size
        shutil.rmtree(output)
    row = {
        "model": f"LLaMA-shaped {name}, random weights",
        "parameters": parameters(shape),
        "algorithm": given.algorithm,
        "lorc_rank": given.lorc_rank,
        "jobs": jobs,
        "device": given.devices,
        **measured,
        "load_before": round(load, 1),
        "sha256": found,
        "hardware": hardware(given.devices.partition(":")[0]),
        "date": today(),
        "command": f"python tools/bench_compile.py --size {given.size} "
        + ("" if given.layers is None else f"--layers {given.layers} ")
        + " ".join(chosen)
        + (f" --kill-times {given.kill_times} --seed {given.seed}" if given.kill_times else ""),
    }
    show(row, row["parameters"], data_bytes, load)
    add_row(given.results, row)


if __name__ == "__main__":
    main()
