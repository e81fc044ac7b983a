"""Tokens per second and memory of LLM decoding in ONNX Runtime: float16, int4 (MatMulNBits) and ours.

On a GPU, after ``make kernels hosts`` (and with onnxruntime-gpu installed):

    python tools/bench_decode.py --check                        # GPU against CPU on a small model, first
    python tools/bench_decode.py --publish docs/results/decode.json
    python tools/bench_decode.py --preset qwen2.5-1.5b --publish docs/results/decode.json
    python tools/bench_decode.py --contenders fp16 zqfp zqfp_two_launches    # what join-quantizers saves

Without one, to see that it works:

    python tools/bench_decode.py --device cpu --layers 2 --hidden 256 --intermediate 512 --heads 2 \
        --kv-heads 2 --vocab 1000 --batches 1 2 --prefill 16 --context 32 --repeats 2

Models have the shape of the preset and random weights, and are made in --work (7B: 14 GB for float16,
deleted when it is measured). A contender's steps, measured in one session, are a token behind --context
cached ones for each batch, and one prompt of --prefill tokens. Buffers are bound, the cache is written in
place, and on a GPU decode steps are replayed as CUDA graphs (--no-cuda-graph: not). A row with the same
contender, step, model and hardware replaces the older one in --publish.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from decode_model import PRESETS, Float16Linears, Linears, NBitsLinears, Shape, W4A8Linears, write_model
from decode_session import DEVICES, Runner, Step, open_session

from zqfp_compile.backends.host_libraries import host_library, kernel_library

CONTENDERS: dict[str, Linears] = {
    item.name: item
    for item in (
        Float16Linears(),
        NBitsLinears(),
        W4A8Linears(),
        W4A8Linears(16),
        W4A8Linears(16, per_token=True),
        W4A8Linears(two_launches=True),
    )
}
PUBLISHED = [name for name in CONTENDERS if not name.endswith("_two_launches")]
KEY = ("model", "contender", "phase", "batch", "context", "hardware")
CHECK_SHAPE = Shape(layers=2, hidden=256, intermediate=640, heads=2, kv_heads=2, vocab=1000)
CHECK_SQNR_DB = 20.0


def main() -> int:
    """Measure, print a table and publish the rows."""
    arguments = parse()
    shape = shape_of(arguments)
    if (provider := DEVICES[arguments.device]) not in ort.get_available_providers():
        print(f"onnxruntime here has no {provider}; install onnxruntime-gpu", file=sys.stderr)
        return 6
    work = arguments.work or Path(tempfile.mkdtemp(prefix="zqfp-decode-"))
    work.mkdir(parents=True, exist_ok=True)
    if arguments.check:
        return check(work, arguments.contenders)
    rows: list[dict[str, Any]] = []
    failed = False
    for name in arguments.contenders:
        try:
            for row in measure(CONTENDERS[name], shape, arguments, work):
                rows.append(row)
                print(show(row), flush=True)
                publish(arguments.publish, [row])
        except (
            Exception
        ) as error:  # ONNX Runtime's have no common base; one contender must not cost the others
            failed = True
            print(f"{name}: {' '.join(str(error).split())[:400]}", file=sys.stderr)
    print(summary(rows))
    return int(failed)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="llama-7b")
    for spec in dataclasses.fields(Shape):
        parser.add_argument(f"--{spec.name.replace('_', '-')}", type=int, help="instead of the preset's")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=PUBLISHED)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=512, help="cached tokens when decoding")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt; 0: none")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-cuda-graph", action="store_true")
    parser.add_argument("--work", type=Path, help="folder for models; a temporary one by default")
    parser.add_argument("--publish", type=Path, help="decode.json to put the rows into")
    parser.add_argument(
        "--profile", action="store_true", help="print the GPU time of each step by kernel (needs torch)"
    )
    parser.add_argument("--check", action="store_true", help="compare GPU and CPU on a small model and exit")
    arguments = parser.parse_args()
    if arguments.profile and arguments.device != "cuda":
        parser.error("--profile is of a GPU")
    return arguments


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The preset's shape with what the command line changes."""
    given = {spec.name: getattr(arguments, spec.name) for spec in dataclasses.fields(Shape)}
    return dataclasses.replace(
        PRESETS[arguments.preset], **{name: value for name, value in given.items() if value is not None}
    )


def measure(linears: Linears, shape: Shape, arguments: argparse.Namespace, work: Path) -> Any:
    """Yield one row per step of one contender."""
    steps = [Step(batch, 1, arguments.context) for batch in arguments.batches]
    steps += [Step(1, arguments.prefill, 0)] if arguments.prefill else []
    library = library_of(linears, arguments.device)
    path, linear_bytes = write_model(work, shape, linears, max(step.past + step.sequence for step in steps))
    try:
        before = gpu_bytes_used(arguments.device)
        graphs = arguments.device == "cuda" and not arguments.no_cuda_graph
        session = open_session(path, arguments.device, library, graph=graphs)
        memory = None if before is None else gpu_bytes_used(arguments.device) - before
        for number, step in enumerate(steps, 1):
            graph = number if graphs and step.phase == "decode" else None
            runner = Runner(session, shape, step, arguments.device, graph)
            milliseconds = runner.milliseconds(arguments.repeats)
            if arguments.profile:
                print(gpu_times(runner), flush=True)
            yield {
                "model": model_name(shape, arguments),
                "contender": linears.name,
                "phase": step.phase,
                "batch": step.batch,
                "context": step.past + step.sequence,
                "ms": round(milliseconds, 4),
                "tokens_per_s": round(1e3 * step.batch * step.sequence / milliseconds, 1),
                "linear_weight_bytes": linear_bytes,
                "bits_per_weight": round(8 * linear_bytes / shape.linear_weights, 3),
                "session_gpu_bytes": memory,
                "cuda_graph": graph is not None,
                **surroundings(arguments.device),
            }
    finally:
        for file in work.glob(f"{path.name}*"):
            file.unlink()


def library_of(linears: Linears, device: str) -> Path | None:
    """The custom-op library, for our contenders.

    Raises:
        ZqfpError: When it is not built.
        RuntimeError: When the CUDA kernels are not.
    """
    if not isinstance(linears, W4A8Linears):
        return None
    if device == "cuda" and kernel_library() is None:
        raise RuntimeError("libzqfp.so is not built; run: make kernels")
    return host_library("onnxruntime")


def gpu_bytes_used(device: str) -> Any:
    """Memory in use on the GPU, by torch; ``None`` without a torch that has CUDA."""
    if device != "cuda":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def gpu_times(runner: Runner, runs: int = 10, shown: int = 12) -> str:
    """The kernels of a step: microseconds, calls and name, the longest first. What overlaps counts twice."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(runs):
            runner.run()
    averages = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)[:shown]
    lines = [f"{runner.step.phase} batch {runner.step.batch}, GPU microseconds per step:"]
    for event in averages:
        microseconds, calls = event.self_device_time_total / runs, event.count / runs
        lines.append(f"  {microseconds:9.1f}  {calls:5.0f} x  {event.key[:90]}")
    return "\n".join(lines)


def check(work: Path, names: list[str]) -> int:
    """Compare logits on the GPU with those on the CPU, decode and prefill; 1 when one contender differs."""
    bad = 0
    for name in names:
        path, _ = write_model(work, CHECK_SHAPE, CONTENDERS[name], 64)
        for step in (Step(1, 1, 16), Step(3, 1, 40), Step(2, 33, 0)):
            outputs = []
            for device in ("cpu", "cuda"):
                session = open_session(path, device, library_of(CONTENDERS[name], device), graph=False)
                runner = Runner(session, CHECK_SHAPE, step, device)
                runner.run()
                outputs.append(runner.output())
            noise = np.square(outputs[1] - outputs[0]).sum()
            sqnr = 10 * np.log10(np.square(outputs[0]).sum() / max(float(noise), 1e-30))
            good = sqnr > CHECK_SQNR_DB
            bad += not good
            print(
                f"{name:18} {step.phase:8} batch {step.batch}: {sqnr:6.1f} dB {'ok' if good else 'DIFFERS'}"
            )
    return int(bad > 0)


def model_name(shape: Shape, arguments: argparse.Namespace) -> str:
    """The preset's name when the shape is the preset's."""
    if shape == PRESETS[arguments.preset]:
        return f"{arguments.preset}, random weights"
    return f"{shape.layers} layers of {shape.hidden}, random weights"


def surroundings(device: str) -> dict[str, str]:
    """What a row needs to say where it is from."""
    hardware = platform.processor() or platform.machine()
    if device == "cuda":
        with contextlib.suppress(Exception):
            import torch

            hardware = torch.cuda.get_device_name()
    return {
        "runtime": f"onnxruntime {ort.__version__}",
        "hardware": hardware,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": "python " + shlex.join(sys.argv),
    }


def publish(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Put rows into a JSON list in the place of older ones of the same key."""
    if path is None:
        return
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    merged = {tuple(row[key] for key in KEY): row for row in (*known, *rows)}
    text = json.dumps([merged[key] for key in sorted(merged, key=str)], indent=1)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def show(row: dict[str, Any]) -> str:
    """One row as a line of text."""
    memory = (
        "" if row["session_gpu_bytes"] is None else f", {row['session_gpu_bytes'] / 1e9:.2f} GB on the GPU"
    )
    graph = ", CUDA graph" if row["cuda_graph"] else ""
    return (
        f"{row['contender']:18} {row['phase']:8} batch {row['batch']:2}: {row['ms']:9.3f} ms, "
        f"{row['tokens_per_s']:9.1f} tokens/s, {row['bits_per_weight']:.2f} bits{memory}{graph}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """How many times as fast as float16 each contender is."""
    base = {(row["phase"], row["batch"]): row["ms"] for row in rows if row["contender"] == "fp16"}
    lines = ["", "contender".ljust(18) + "".join(f"{phase} {batch}".rjust(14) for phase, batch in base)]
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = {(row["phase"], row["batch"]): row["ms"] for row in rows if row["contender"] == name}
        cells = [f"{base[key] / mine[key]:.2f}x".rjust(14) if key in mine else " " * 14 for key in base]
        lines.append(name.ljust(18) + "".join(cells))
    return "\n".join(lines) if base else ""


if __name__ == "__main__":
    sys.exit(main())
