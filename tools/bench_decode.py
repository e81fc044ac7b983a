"""Tokens per second and memory of LLM decoding in ONNX Runtime: float16, int4 (MatMulNBits) and ours.

On a GPU, after ``make kernels hosts`` (and with onnxruntime-gpu installed):

    python tools/bench_decode.py --check                        # GPU against CPU on a small model, first
    python tools/bench_decode.py --publish docs/results/decode.json
    python tools/bench_decode.py --preset qwen2.5-1.5b --publish docs/results/decode.json
    python tools/bench_decode.py --contenders fp16 zqfp zqfp_two_launches    # what join-quantizers saves
    python tools/bench_decode.py --contenders fp16 zqfp zqfp_ungated    # what a gated layer saves
    python tools/bench_decode.py --contenders zqfp ort_int4 --batches 1 --prefill 0 --turns 5

Without one, to see that it works:

    python tools/bench_decode.py --device cpu --layers 2 --hidden 256 --intermediate 512 --heads 2 \
        --kv-heads 2 --vocab 1000 --batches 1 2 --prefill 16 --context 32 --repeats 2

Models have the shape of the preset and random weights, and are made in --work (7B: 14 GB for float16,
deleted when it is measured). A contender's steps, measured in one session, are a token behind --context
cached ones for each batch, and one prompt of --prefill tokens. Buffers are bound, the cache is written in
place, and on a GPU decode steps are replayed as CUDA graphs (--no-cuda-graph: not). With --turns the
contenders take turns, each time in a session of its own, and their models are kept meanwhile; a row then has
the median of its turns, and each of them. A row with the same contender, step, model and hardware replaces
the older one in --publish.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
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
        W4A8Linears(ungated=True),
    )
}
PUBLISHED = [name for name in CONTENDERS if not name.endswith(("_two_launches", "_ungated"))]
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
    steps = [Step(batch, 1, arguments.context) for batch in arguments.batches]
    steps += [Step(1, arguments.prefill, 0)] if arguments.prefill else []
    contenders = [Contender(CONTENDERS[name], shape, steps, work) for name in arguments.contenders]
    with contextlib.ExitStack() as models:  # none stays, however it ends
        for contender in contenders:
            models.callback(contender.delete_model)
        failed = take_turns(contenders, arguments)
    print(summary([row for contender in contenders for row in contender.rows.values()]))
    return int(failed)


def take_turns(contenders: list[Contender], arguments: argparse.Namespace) -> bool:
    """Print and publish what the turns measure; tell whether one failed."""
    failed = False
    for turn in range(1, arguments.turns + 1):
        for contender in contenders:
            try:
                for row in contender.take_turn(arguments):
                    print(show(row), flush=True)
                    publish(arguments.publish, [row])
            except (
                Exception
            ) as error:  # ONNX Runtime's have no common base; one contender must not cost the others
                failed = True
                print(f"{contender.linears.name}: {' '.join(str(error).split())[:400]}", file=sys.stderr)
            if turn == arguments.turns:  # room for the next one's
                contender.delete_model()
    return failed


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
    parser.add_argument("--turns", type=int, default=1, help="of each contender, one after the other")
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
    if arguments.turns < 1:
        parser.error(f"--turns: {arguments.turns} is below 1")
    return arguments


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The preset's shape with what the command line changes."""
    given = {spec.name: getattr(arguments, spec.name) for spec in dataclasses.fields(Shape)}
    return dataclasses.replace(
        PRESETS[arguments.preset], **{name: value for name, value in given.items() if value is not None}
    )


class Contender:
    """One contender's model and times.

    Attributes:
        rows: What its turns have measured so far, by step.
    """

    def __init__(self, linears: Linears, shape: Shape, steps: list[Step], work: Path) -> None:
        self.linears, self.shape, self.steps, self.work = linears, shape, steps, work
        self.rows: dict[Step, dict[str, Any]] = {}
        self._times: dict[Step, list[float]] = {step: [] for step in steps}
        self._model: tuple[Path, int] | None = None

    def take_turn(self, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
        """Measure every step in a new session; yield one row for each."""
        path, linear_bytes = self._write_model()
        before = gpu_bytes_used(arguments.device)
        graphs = arguments.device == "cuda" and not arguments.no_cuda_graph
        library = library_of(self.linears, arguments.device)
        session = open_session(path, arguments.device, library, graph=graphs)
        memory = None if before is None else gpu_bytes_used(arguments.device) - before
        for number, step in enumerate(self.steps, 1):
            graph = number if graphs and step.phase == "decode" else None
            runner = Runner(session, self.shape, step, arguments.device, graph)
            self._times[step].append(round(runner.milliseconds(arguments.repeats), 4))
            if arguments.profile:
                print(gpu_times(runner), flush=True)
            self.rows[step] = {
                "model": model_name(self.shape, arguments),
                "contender": self.linears.name,
                "phase": step.phase,
                "batch": step.batch,
                "context": step.past + step.sequence,
                **times_of(step, self._times[step]),
                "linear_weight_bytes": linear_bytes,
                "bits_per_weight": round(8 * linear_bytes / self.shape.linear_weights, 3),
                "session_gpu_bytes": memory,
                "cuda_graph": graph is not None,
                **surroundings(arguments.device),
            }
            yield self.rows[step]

    def _write_model(self) -> tuple[Path, int]:
        if self._model is None:
            longest = max(step.past + step.sequence for step in self.steps)
            self._model = write_model(self.work, self.shape, self.linears, longest)
        return self._model

    def delete_model(self) -> None:
        """Delete its files, if there are any."""
        if self._model is not None:
            for file in self.work.glob(f"{self._model[0].name}*"):
                file.unlink()
            self._model = None


def times_of(step: Step, turns: list[float]) -> dict[str, Any]:
    """The median of the turns, in milliseconds, and each where there are several."""
    median = round(statistics.median(turns), 4)
    rate = round(1e3 * step.batch * step.sequence / median, 1)
    return {"ms": median, "tokens_per_s": rate, **({"ms_by_turn": list(turns)} if len(turns) > 1 else {})}


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
    turns = f", median of {len(row['ms_by_turn'])}" if "ms_by_turn" in row else ""
    return (
        f"{row['contender']:18} {row['phase']:8} batch {row['batch']:2}: {row['ms']:9.3f} ms, "
        f"{row['tokens_per_s']:9.1f} tokens/s, {row['bits_per_weight']:.2f} bits{memory}{graph}{turns}"
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
