"""Time and memory of our compile against NVIDIA Model Optimizer's, on one LLaMA-shaped model and machine.

    python -m venv /tmp/modelopt
    /tmp/modelopt/bin/pip install -e .[cpu] transformers -r tools/requirements-compare.txt
    python tools/compare_compile.py --size 0.135B --modelopt-python /tmp/modelopt/bin/python

Weights are random: the cost does not depend on them. Each contender runs alone, in a process of its own:

    ours       zqfp-compile of the ONNX file: 8 x 512 tokens, RTN and LoRC 32, every layer certified, written
    awq        modelopt.torch, INT4_AWQ_CFG, as many tokens, of transformers' model in bfloat16; not written
    onnx-rtn   modelopt.onnx, INT4 by round-to-nearest of the same ONNX file, written
    onnx-awq   the same by its default, awq_lite, with one sample of 512 tokens

Prints wall time, processor time and peak resident memory from start to end, imports included (of ours, that
of its main process, which is the largest), and puts them into ``docs/results/compare_compile.json``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "models")]

from bench_compile import SIZES, add_row, parameters  # noqa: E402
from make_large import HEAD_SIZE, make_large  # noqa: E402
from modelopt_lm import VERSION  # noqa: E402
from results import hardware, today  # noqa: E402

RESULTS = ROOT / "docs" / "results" / "compare_compile.json"
KEY = ("model", "contender", "hardware")
SAMPLES, LENGTH = 8, 512
ONNX_METHODS = {"onnx-rtn": "rtn_dq", "onnx-awq": "awq_lite"}
CONTENDERS = ("ours", "awq", *ONNX_METHODS)


def measured(command: list[str]) -> dict[str, Any]:
    """Run a command; return its wall time, processor time and peak resident bytes."""
    begin = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"compare_compile: {' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}"
        )
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": 1024 * usage.ru_maxrss,
    }


def awq(size: str) -> None:
    """Quantise transformers' model of this size by Model Optimizer's INT4_AWQ."""
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SIZES[size]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // HEAD_SIZE,
        vocab_size=shape.vocab,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    samples = torch.randint(0, shape.vocab, (SAMPLES, 1, LENGTH))

    def forward(quantized: torch.nn.Module) -> None:
        with torch.inference_mode():
            for sample in samples:
                quantized(sample, use_cache=False)

    mtq.quantize(model, mtq.INT4_AWQ_CFG, forward)


def onnx_int4(model: Path, method: str, output: Path) -> None:
    """Quantise an ONNX file by Model Optimizer, and write the result."""
    import onnx
    from modelopt.onnx.quantization.int4 import quantize

    random = np.random.default_rng(0)
    feed = {
        "input_ids": random.integers(0, 32000, (1, LENGTH)),
        "attention_mask": np.ones((1, LENGTH), np.int64),
        "position_ids": np.arange(LENGTH)[None],
    }
    quantized = quantize(str(model), ONNX_METHODS[method], [feed], calibration_eps=["cpu"])
    onnx.save(quantized, str(output / "model.onnx"), save_as_external_data=True)


def command_of(contender: str, given: argparse.Namespace, model: Path, output: Path) -> list[str]:
    """Return what runs a contender."""
    if contender == "ours":
        options = ["--target", "none", "--no-evaluate", "--fresh"]
        return [sys.executable, "-m", "zqfp_compile", str(model), "--output", str(output / "out"), *options]
    own = [str(given.modelopt_python), __file__, "--size", given.size, "--only", contender]
    return [*own, "--here", str(model), str(output)]


def compare(given: argparse.Namespace, model: Path, place: Path) -> None:
    """Run the contenders one after the other; show and keep the figures of each that succeeds."""
    for contender in given.only or CONTENDERS:
        output = place / contender
        output.mkdir()
        load = os.getloadavg()[0]
        row = {
            "model": f"LLaMA-shaped {given.size}, random weights",
            "parameters": parameters(SIZES[given.size]),
            "contender": contender,
            **measured(command_of(contender, given, model, output)),
            "load_before": round(load, 1),
            "modelopt": VERSION,
            "hardware": hardware("cpu"),
            "date": today(),
            "command": f"python tools/compare_compile.py --size {given.size} --only {contender}",
        }
        shutil.rmtree(output)
        print(
            f"{contender:10} {row['seconds']:8.1f} s, processor time {row['cpu_seconds']:8.1f} s, "
            f"peak {row['peak_rss_bytes'] / 1e9:.2f} GB, load of the machine before: {load:.1f}",
            flush=True,
        )
        add_row(given.results, row, KEY)


def main() -> None:
    """Run the contenders, or one of Model Optimizer's in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), required=True)
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="default: all")
    parser.add_argument("--modelopt-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--models", type=Path, help="existing folder that keeps the model; default: removed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default %(default)s")
    parser.add_argument("--here", nargs=2, type=Path, metavar=("MODEL", "OUTPUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        model, output = given.here
        if given.only == ["awq"]:
            awq(given.size)
        else:
            onnx_int4(model, given.only[0], output)
        return
    with tempfile.TemporaryDirectory(prefix="compare-", dir=given.models) as place:
        model = (given.models or Path(place)) / given.size.replace("/", "-") / "model.onnx"
        if not model.exists():
            make_large(model.parent, SIZES[given.size])
        compare(given, model, Path(place))


if __name__ == "__main__":
    main()
