"""Time, throughput and memory of a compile, for LLaMA-shaped models of any size with random weights.

    python tools/bench_compile.py --size 1.5B --jobs 2

The model is made on the spot by ``models/make_large.py`` (kept with ``--models``), compiled with
``--target none --no-evaluate`` in a process of its own, and removed. Prints time per step, weights read per
second, processor time and peak memory, and puts a row into ``docs/results/compile.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "models"), str(ROOT / "tools")]

from make_large import Shape, make_large  # noqa: E402
from results import hardware, today  # noqa: E402

SIZES = {
    "0.135B": Shape(layers=30, hidden=576, intermediate=1536, vocab=49152),
    # As wide as the 7B model, an eighth as deep: needs its memory.
    "7B/8": Shape(layers=4, hidden=4096, intermediate=11008, vocab=32000),
    "1.5B": Shape(layers=28, hidden=2048, intermediate=5632, vocab=32000),
    "7B": Shape(layers=32, hidden=4096, intermediate=11008, vocab=32000),
}
RESULTS = ROOT / "docs" / "results" / "compile.json"
READ_ALL_WEIGHTS = ("calibrate", "quantize", "certificate", "total")
# A row with the same values here replaces the older one.
KEY = ("model", "algorithm", "lorc_rank", "jobs", "device", "hardware")


def parameters(shape: Shape) -> int:
    """Return the weights of the linears that are quantised: all but lm_head's."""
    return shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)


def compile_measured(model: Path, output: Path, options: list[str]) -> dict[str, Any]:
    """Compile in a process of its own; return what its report and the kernel say."""
    command = [sys.executable, "-m", "zqfp_compile", str(model), "--output", str(output), *options]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wall = time.monotonic() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {
        "seconds": {
            **{step: round(seconds, 1) for step, seconds in report["seconds"].items() if seconds >= 0.05},
            "total": round(wall, 1),
        },
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_rss_bytes": report["resources"]["resident_bytes"],
        "peak_anonymous_bytes": report["resources"]["anonymous_bytes"],
        "estimated": report["resources"]["estimated"],
    }


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


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file; the row of the same configuration is replaced."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [old for old in rows if any(old[name] != row[name] for name in KEY)]
    rows = sorted([*rows, row], key=lambda one: (one["parameters"], one["algorithm"], one["jobs"]))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Make the model, compile it, show and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), required=True)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: cores")
    parser.add_argument("--algorithm", choices=("rtn", "gptq"), default="rtn")
    parser.add_argument("--lorc-rank", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", type=Path, help="existing folder that keeps the model; default: removed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default %(default)s")
    given = parser.parse_args()
    shape = SIZES[given.size]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.models) as place:
        model = (given.models or Path(place)) / given.size.replace("/", "-") / "model.onnx"
        if not model.exists():
            make_large(model.parent, shape)
        options = ["--target", "none", "--no-evaluate", "--algorithm", given.algorithm]
        options += ["--lorc-rank", str(given.lorc_rank), "--device", given.device]
        options += ["--jobs", str(given.jobs), "--fresh"]
        load = os.getloadavg()[0]
        measured = compile_measured(model, Path(place) / "out.zqfp", options)
        data_bytes = model.with_name("model.onnx.data").stat().st_size
        shutil.rmtree(Path(place) / "out.zqfp")
    row = {
        "model": f"LLaMA-shaped {given.size}, random weights",
        "parameters": parameters(shape),
        "algorithm": given.algorithm,
        "lorc_rank": given.lorc_rank,
        "jobs": given.jobs,
        "device": given.device,
        **measured,
        "load_before": round(load, 1),
        "hardware": hardware(given.device),
        "date": today(),
        "command": f"python tools/bench_compile.py --size {given.size} --jobs {given.jobs} "
        f"--algorithm {given.algorithm} --lorc-rank {given.lorc_rank} --device {given.device}",
    }
    show(row, row["parameters"], data_bytes, load)
    add_row(given.results, row)


if __name__ == "__main__":
    main()
