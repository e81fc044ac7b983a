"""Our W4A8 against NVIDIA Model Optimizer: one model, calibration text, test text, window and run.

    pip install -r tools/requirements-compare.txt
    D=../shared/data
    python tools/compare_modelopt.py --model build/cache/SmolLM2-135M-Instruct.Q4_1.gguf --device cuda \
        --calibration $D/wikitext2-valid.txt --test $D/wikitext2-test.txt

Every method quantises all linears of the decoder; ``lm_head`` and the embedding keep their float weights, in
Model Optimizer's presets as in ours. Ours run as torch fake quantisation with the ``quantize/`` code.
Bits per weight count codes, scales and LoRC factors of those linears (``modelopt_lm.py`` says what Model
Optimizer's are).

Each result is appended to ``--state`` at once, and a method whose result is there is not run again; after
a change of the quantiser's code take a new one. ``--publish`` puts the results into an accuracy.json. Methods
that fail are reported, the others still run, and the exit code is 1.

--configs takes a JSON list as ``paper_table.py`` does: more configurations of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import modelopt_lm  # noqa: E402
import torch_models  # noqa: E402
from modelopt_lm import PRESETS  # noqa: E402
from paper_table import State, rows_of_file  # noqa: E402
from results import Row, add_row, hardware, today  # noqa: E402
from torch_lm import Calibration, QuantConfig, quantized  # noqa: E402

from zqfp_compile.calibrate.samples import take_windows  # noqa: E402
from zqfp_compile.errors import ZqfpError  # noqa: E402

_GPTQ = QuantConfig(algorithm="gptq")
OURS = {
    "zqfp-fp8": QuantConfig(weights="fp8-e4m3", group_size=0),
    "zqfp-rtn": QuantConfig(),
    # Fewer bits than INT4 AWQ's: by whole rows for any K, by groups of 128 where they divide K (Qwen).
    "zqfp-gptq-row": dataclasses.replace(_GPTQ, group_size=0),
    "zqfp-gptq-g128": dataclasses.replace(_GPTQ, group_size=128),
    "zqfp-gptq": _GPTQ,
    "zqfp-gptq-none": dataclasses.replace(_GPTQ, constraint="none"),
    "zqfp-gptq-m2-lorc32": dataclasses.replace(_GPTQ, constraint="m2", lorc_rank=32),
    "zqfp-gptq-lorc8-fp8": dataclasses.replace(_GPTQ, lorc_rank=8, lorc_dtype="fp8"),
    "zqfp-gptq-lorc16-fp8": dataclasses.replace(_GPTQ, lorc_rank=16, lorc_dtype="fp8"),
    "zqfp-gptq-lorc32": dataclasses.replace(_GPTQ, lorc_rank=32),
}
# Calibration tokens run together through Model Optimizer: AWQ rounds every weight anew for each batch.
CUDA_TOKENS = 1 << 14
CPU_TOKENS = 1 << 11


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's values, ``methods`` as a tuple of names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face folder")
    parser.add_argument("--calibration", type=Path, required=True, help="WikiText file to calibrate on")
    parser.add_argument("--test", type=Path, required=True, help="WikiText file to score")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows (default 64)")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens per calibration window (default 2048)"
    )
    parser.add_argument("--limit-tokens", type=int, help="score only the text's first tokens")
    parser.add_argument("--configs", type=Path, metavar="FILE.json", help="more configurations of ours")
    parser.add_argument(
        "--methods",
        default="zqfp,modelopt",
        help=f"comma list of zqfp (all of ours), modelopt (all of theirs), {', '.join((*OURS, *PRESETS))}, "
        "and names in --configs (default all)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "compare_modelopt.jsonl")
    parser.add_argument("--table", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="put the rows into this accuracy.json")
    values = parser.parse_args(arguments)
    values.ours = _ours(parser, values.configs)
    values.methods = _expand(parser, values.methods, values.ours)
    if values.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {values.device}: torch sees no GPU here; leave it out to run on the CPU")
    return values


def _ours(parser: argparse.ArgumentParser, configs: Path | None) -> dict[str, QuantConfig]:
    """Return our configurations by name, those of ``--configs`` included."""
    if configs is None:
        return OURS
    try:
        more = rows_of_file(configs)
    except (OSError, ValueError) as error:
        parser.error(f"--configs: {error}")
    return OURS | {name: config for name, config in more.items() if config is not None}


def _expand(parser: argparse.ArgumentParser, text: str, ours: Mapping[str, QuantConfig]) -> tuple[str, ...]:
    """Return the methods a comma list names, in the table's order."""
    order = (*ours, *PRESETS)
    sets = {"zqfp": tuple(ours), "modelopt": tuple(PRESETS)}
    names = text.split(",")
    for name in names:
        if name not in sets and name not in order:
            parser.error(f"--methods {name}: take some of {', '.join((*sets, *order))}")
    chosen = {method for name in names for method in sets.get(name, (name,))}
    return tuple(method for method in order if method in chosen)


class Comparison:
    """The model, its texts, and the results so far."""

    def __init__(self, values: argparse.Namespace) -> None:
        """Load the model and the texts.

        Raises:
            ZqfpError: When a text cannot be used.
        """
        self.values = values
        self.loaded = torch_models.load(values.model, device=values.device)
        self.tokens = self.loaded.tokens(values.test)[: values.limit_tokens]
        self.windows = take_windows(self.loaded.tokens(values.calibration), values.samples, values.length)
        self.calibration: Calibration | None = None
        self.modelopt: Any = None
        self.reference = 0.0

    def run(self, method: str) -> Row:
        """Quantise with one method, score, and return its row."""
        if not self.reference:
            self.reference = self.perplexity(self.loaded.model)
        return self._ours(method) if method in self.values.ours else self._preset(method)

    def perplexity(self, model: Any, batch: int | None = None) -> float:
        """Score the test text."""
        return torch_models.perplexity(model, self.tokens, batch=batch)

    def _ours(self, method: str) -> Row:
        config = self.values.ours[method]
        self.calibration = self.calibration or Calibration(self.loaded.model, self.windows)
        with quantized(self.calibration, config) as summary:
            return self._row(
                method,
                f"zqfp in torch, {method}",
                algorithm=config.algorithm,
                weights=config.weights,
                activations=f"{config.activations} per {config.activation_scale}",
                constraint=None if config.weights == "fp8-e4m3" else config.constraint,
                group_size=None if config.weights == "fp8-e4m3" else config.group_size,
                lorc_rank=config.lorc_rank,
                bits_per_weight=summary.bits_per_weight,
                perplexity=self.perplexity(self.loaded.model),
            )

    def _preset(self, method: str) -> Row:
        preset = PRESETS[method]
        self.modelopt = self.modelopt or modelopt_lm.load_modelopt()
        result = modelopt_lm.quantized_copy(self.modelopt, self.loaded.model, preset, self._batches())
        # A dynamic scale is one number for the whole batch: alone, every window gets its own.
        score = self.perplexity(result.model, batch=1 if result.dynamic else None)
        return self._row(
            method,
            f"modelopt {modelopt_lm.VERSION} {preset.config}"
            + (" weight-only" if preset.weight_only else ""),
            algorithm=result.algorithm,
            weights=preset.weights,
            activations=preset.activations,
            constraint=None,
            group_size=result.group_size,
            lorc_rank=0,
            bits_per_weight=result.bits_per_weight,
            perplexity=score,
        )

    def _batches(self) -> Iterator[npt.NDArray[np.int64]]:
        budget = CPU_TOKENS if self.values.device == "cpu" else CUDA_TOKENS
        size = max(1, budget // self.windows.shape[1])
        for start in range(0, len(self.windows), size):
            yield self.windows[start : start + size]

    def _row(self, method: str, name: str, **fields: Any) -> Row:
        return {
            "model": self.loaded.name,
            "text": text_label(self.values),
            "method": f"{name}, calibration {len(self.windows)} x {self.windows.shape[1]} tokens",
            **fields,
            "reference_perplexity": self.reference,
            "command": command(self.values, method),
            "hardware": hardware(self.values.device),
            "date": today(),
        }


def text_label(values: argparse.Namespace) -> str:
    """Return the test text's name, with the number of tokens when it is cut."""
    name = str(values.test.name)
    return f"{name}, first {values.limit_tokens} tokens" if values.limit_tokens else name


def command(values: argparse.Namespace, method: str) -> str:
    """Return the command line that makes one method's row."""
    limit = ["--limit-tokens", values.limit_tokens] if values.limit_tokens else []
    configs = ["--configs", values.configs] if values.configs and method not in (*OURS, *PRESETS) else []
    words = [
        *("python", "tools/compare_modelopt.py", "--model", values.model),
        *("--calibration", values.calibration, "--test", values.test),
        *("--samples", values.samples, "--length", values.length, *limit),
        *(*configs, "--device", values.device, "--methods", method),
    ]
    return shlex.join(str(word) for word in words)


def state_key(values: argparse.Namespace, method: str) -> str:
    """Return what identifies a result, the quantiser's defaults spelt out."""
    config = values.ours.get(method)
    options = None if config is None else [dataclasses.asdict(c) for c in (config, config.layer_options())]
    return json.dumps([command(values, method), options], sort_keys=True)


def why_not(method: str, device: str) -> str:
    """Return why a method cannot run on a device, or ""."""
    preset = PRESETS.get(method)
    return f"{preset.cuda}: needs --device cuda" if preset and preset.cuda and device == "cpu" else ""


def run_methods(values: argparse.Namespace) -> tuple[dict[str, Row], list[str]]:
    """Run what has no result yet.

    Returns:
        The rows of all methods that have one, by method, and a line for each that has none.
    """
    if any(method in PRESETS for method in values.methods):
        modelopt_lm.load_modelopt()  # missing: say so before minutes of other methods
    state = State(values.state)
    waiting = [method for method in values.methods if state_key(values, method) not in state.done]
    say(f"{len(values.methods) - len(waiting)} of {len(values.methods)} results are in {values.state}")
    failures = []
    comparison = Comparison(values) if waiting else None
    for method in waiting:
        assert comparison is not None
        start = time.perf_counter()
        row, reason = _attempt(comparison, method)
        if row is None:
            failures.append(f"{method}: {reason}")
            say(failures[-1])
            continue
        state.add({"key": state_key(values, method), "row": row})
        say(f"{method}: {row['perplexity']:.3f}, {time.perf_counter() - start:.0f} s")
    found = {method: state.done.get(state_key(values, method)) for method in values.methods}
    return {method: record["row"] for method, record in found.items() if record is not None}, failures


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def _attempt(comparison: Comparison, method: str) -> tuple[Row | None, str]:
    """Return a method's row, or ``None`` and why not: one failure must not cost the others their results."""
    if reason := why_not(method, comparison.values.device):
        return None, reason
    try:
        return comparison.run(method), ""
    except ZqfpError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_table(rows: Mapping[str, Row]) -> str:
    """Return the table, Markdown, fewest bits first; each rival beside our best at no more bits."""
    lines = [
        "| method | weights | activations | bits/weight | perplexity | over float | ours at no more bits |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    order = sorted(rows, key=lambda method: (rows[method]["bits_per_weight"], rows[method]["perplexity"]))
    for method in order:
        row = rows[method]
        increase = 100.0 * (row["perplexity"] / row["reference_perplexity"] - 1.0)
        name = f"{method} ({PRESETS[method].config})" if method in PRESETS else method
        lines.append(
            f"| {name} | {row['weights']} | {row['activations']} | {row['bits_per_weight']:.3f} "
            f"| {row['perplexity']:.3f} | {increase:+.2f}% | {_best_of_ours(method, rows)} |"
        )
    return "\n".join(lines)


def _best_of_ours(method: str, rows: Mapping[str, Row]) -> str:
    """Return our lowest perplexity at no more bits than a rival's, as a table cell; "" for our own rows."""
    if method not in PRESETS:
        return ""
    rival = rows[method]
    able = [
        name for name in rows if name in OURS and rows[name]["bits_per_weight"] <= rival["bits_per_weight"]
    ]
    if not able:
        return "none"
    best = min(able, key=lambda name: rows[name]["perplexity"])
    word = "lower" if rows[best]["perplexity"] < rival["perplexity"] else "not lower"
    return f"{rows[best]['perplexity']:.3f}, {word}: {best}, {rows[best]['bits_per_weight']:.3f} bits"


def main(arguments: list[str]) -> int:
    """Run the tool and return the exit code."""
    values = parse_arguments(arguments)
    try:
        rows, failures = run_methods(values)
    except ZqfpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if rows:
        any_row = next(iter(rows.values()))
        head = (
            f"{any_row['model']}, {any_row['text']}: float perplexity {any_row['reference_perplexity']:.3f}"
        )
        text = f"{head}\n\n{make_table(rows)}\n" + "".join(f"\nNo result: {line}" for line in failures)
        print(text)
        if values.table:
            values.table.write_text(text + "\n", encoding="utf-8")
    if values.publish:
        for row in rows.values():
            add_row(values.publish, row)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
