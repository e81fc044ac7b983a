"""The tables of ZeroQuant-FP (arXiv 2307.09782) on any model and text, by torch fake quantisation.

    D=../shared/data
    python tools/paper_table.py --model build/cache/SmolLM2-135M-Instruct.Q4_1.gguf --device cuda \\
        --calibration $D/wikitext2-valid.txt --test $D/wikitext2-test.txt
    python tools/paper_table.py ... --rows 'constraint/.*gptq'      # some rows
    python tools/paper_table.py ... --configs MY.json               # rows of one's own
    python tools/paper_table.py ... --shard 0/4 --device cuda:0     # one of four processes, one per GPU
    python tools/paper_table.py ... --finished --publish R.json     # what another machine's state file holds
    python tools/paper_table.py --list                              # the rows' names

Every finished row is appended to the state file at once; a second run skips the rows it holds and prints the
table of all. After a change of the quantiser's code take a new --state. Perplexity by DESIGN section 8:
WikiText detokenised, windows of 2048 tokens, every token but a window's first scored, all decoder linears
quantised, lm_head and embedding kept.

A row's settings: "rtn" is nearest rounding with a search over clipped scales; "gptq" is GPTQ as published
(activation order, quantised predecessors, fixed scales); "lorc8" adds the papers' compensation, a plain SVD
of rank 8 after quantising; "ours" is the product's quantiser with its defaults, LoRC of rank 32 weighted by
the input's moments.

--configs takes a JSON list of objects with the fields of ``torch_lm.QuantConfig``, and optionally ``name``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from results import FIELDS, add_row, hardware, today  # noqa: E402
from torch_lm import ALGORITHMS, PRODUCT_WEIGHTS, Calibration, QuantConfig, quantized  # noqa: E402
from torch_models import LoadedModel, Tokens, load, perplexity  # noqa: E402

from zqfp_compile.calibrate.samples import take_windows  # noqa: E402

# GPTQ as published: no repetitions, no descent after it, no correction of drift, scales by plain error.
PUBLISHED = {"sweeps": 0, "repeats": 0, "correction": 0.0, "importance": "none"}
FOUR_BIT = ("fp4-e2m1", "fp4-e3m0", "int4", "int4-asym")
EIGHT_BIT = ("int8", "int8-asym", "fp8-e4m3", "fp8-e5m2")
QUICK = {"samples": 4, "length": 256, "limit_tokens": 4096}
CLASSES = {
    "int-int": ("int8", "int4", "int8"),
    "int-fp": ("int8", "int4", "fp8-e4m3"),
    "fp-fp": ("fp8-e4m3", "fp4-e2m1", "fp8-e4m3"),
}

Rows = dict[str, QuantConfig | None]


def paper_rows() -> Rows:
    """Return every row by name; ``None`` is the model as it is."""
    rows: Rows = {"w16a16": None}
    rows.update(_activation_rows())
    rows.update(_class_rows())
    rows.update(_weight_format_rows())
    rows.update(_constraint_rows())
    return rows


def _activation_rows() -> Rows:
    """A8 alone, weights untouched."""
    return {
        f"a8/{name}/{scale}": QuantConfig(weights="none", activations=name, activation_scale=scale)
        for name in ("fp8-e4m3", "fp8-e5m2", "int8", "int8-asym")
        for scale in ("token", "tensor")
    }


def _class_rows() -> Rows:
    """W8A8 and W4A8 in INT-INT, INT-FP and FP-FP, token-wise activations, no constraint."""
    rows: Rows = {}
    for name, (eight, four, activations) in CLASSES.items():
        for bits, weights in (("w8a8", eight), ("w4a8", four)):
            gptq = QuantConfig(
                weights=weights,
                activations=activations,
                activation_scale="token",
                constraint="none",
                group_size=64 if bits == "w4a8" else 0,
                algorithm="gptq",
                tuning=PUBLISHED,
            )
            rows |= {f"{bits}/{name}/gptq": gptq, f"{bits}/{name}/gptq/lorc8": _published_lorc(gptq)}
    return rows


def _weight_format_rows() -> Rows:
    """4-bit and 8-bit weight formats under FP8 activations, no constraint."""
    return {
        f"weights/{weights}/{algorithm}": QuantConfig(
            weights=weights,
            constraint="none",
            group_size=64 if weights in FOUR_BIT else 0,
            algorithm=algorithm,
            tuning=PUBLISHED,
        )
        for weights in FOUR_BIT + EIGHT_BIT
        for algorithm in ALGORITHMS
    }


def _constraint_rows() -> Rows:
    """What a scale constraint costs, and what LoRC pays back."""
    rows: Rows = {}
    for constraint in ("none", "m1", "m2", "e4m3"):
        rtn = QuantConfig(constraint=constraint, tuning=PUBLISHED)
        gptq = dataclasses.replace(rtn, algorithm="gptq")
        ours = QuantConfig(constraint=constraint, algorithm="gptq")
        rows[f"constraint/{constraint}/rtn"] = rtn
        rows[f"constraint/{constraint}/rtn/lorc8"] = _published_lorc(rtn)
        rows[f"constraint/{constraint}/gptq"] = gptq
        rows[f"constraint/{constraint}/gptq/lorc8"] = _published_lorc(gptq)
        rows[f"constraint/{constraint}/ours"] = ours
        rows[f"constraint/{constraint}/ours/lorc32"] = dataclasses.replace(ours, lorc_rank=32)
    return rows


def _published_lorc(config: QuantConfig) -> QuantConfig:
    """Return the configuration with LoRC as published."""
    return dataclasses.replace(config, lorc_rank=8, lorc_metric="plain")


def rows_of_file(path: Path) -> Rows:
    """Read ``--configs``: each entry's name is its ``name``, or its fields.

    Raises:
        ValueError: When an entry is no configuration, or a name comes twice.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    rows: Rows = {}
    for entry in entries:
        options = dict(entry)
        name = options.pop("name", None) or json.dumps(options, sort_keys=True)
        if name in rows:
            raise ValueError(f"{path}: two rows are named {name}")
        try:
            rows[name] = QuantConfig(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, {name}: {error}") from error
    return rows


@dataclass(frozen=True)
class Setting:
    """What all rows of a run share; rows measured under another setting are measured again."""

    model: str
    dtype: str
    text: str
    calibration: str
    samples: int
    length: int

    def key(self, config: QuantConfig | None) -> str:
        """Return what identifies a measurement."""
        row = None
        if config is not None:
            # With the quantiser's defaults spelt out: a row measured under others is another row.
            row = {**dataclasses.asdict(config), "options": dataclasses.asdict(config.layer_options())}
        return json.dumps({**dataclasses.asdict(self), "config": row}, sort_keys=True)


class State:
    """Finished measurements, one JSON line each; several processes may append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        self.reload()

    def reload(self) -> None:
        """Read what is there; a line cut off by a killed process is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.done[record["key"]] = record

    def add(self, record: dict[str, Any]) -> None:
        """Append one measurement."""
        self.done[record["key"]] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A cut-off line must not swallow this one.
        torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(record) + "\n")


class Bench:
    """The loaded model, its tokens and its calibration; loaded when the first row needs them."""

    def __init__(self, values: argparse.Namespace) -> None:
        self.values = values
        self._loaded: LoadedModel | None = None
        self._calibration: Calibration | None = None

    def measure(self, config: QuantConfig | None) -> dict[str, Any]:
        """Return perplexity, bits per weight and seconds of one row."""
        loaded = self._load()
        begin = time.perf_counter()
        if config is None:
            value, bits, quantising = self._perplexity(loaded), 8.0 * loaded.model.dtype.itemsize, 0.0
        else:
            if self._calibration is None:
                valid = loaded.tokens(self.values.calibration, wikitext=not self.values.plain_text)
                windows = take_windows(valid, self.values.samples, self.values.length)
                self._calibration = Calibration(loaded.model, windows)
            with quantized(self._calibration, config, progress=self._progress) as summary:
                value, bits, quantising = self._perplexity(loaded), summary.bits_per_weight, summary.seconds
        seconds = time.perf_counter() - begin
        return {
            "perplexity": value,
            "bits_per_weight": round(bits, 4),
            "quantize_seconds": round(quantising, 1),
            "seconds": round(seconds, 1),
        }

    def _load(self) -> LoadedModel:
        if self._loaded is None:
            self._loaded = load(self.values.model, device=self.values.device, dtype=self.values.dtype)
            self._test: Tokens = self._loaded.tokens(self.values.test, wikitext=not self.values.plain_text)
            self._test = self._test[: self.values.limit_tokens]
        return self._loaded

    def _perplexity(self, loaded: LoadedModel) -> float:
        return perplexity(loaded.model, self._test)

    def _progress(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r  {text}   ", end="", file=sys.stderr, flush=True)


def table(rows: Rows, setting: Setting, state: State) -> str:
    """Return the finished rows as a markdown table."""
    lines = [
        "| row | weights | activations | constraint, group | algorithm | LoRC | bits | perplexity "
        "| against unquantised | seconds (quantising) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = state.done.get(setting.key(None), {}).get("perplexity")
    for name, config in rows.items():
        record = state.done.get(setting.key(config))
        if record is not None:
            lines.append(_line(name, config, record, reference))
    return "\n".join(lines)


def _line(name: str, config: QuantConfig | None, record: Mapping[str, Any], reference: float | None) -> str:
    seconds = f"{record['seconds']:.0f} ({record['quantize_seconds']:.0f})"
    change = f"{100 * (record['perplexity'] / reference - 1):+.2f}%" if reference else ""
    figures = f"{record['bits_per_weight']:.2f} | {record['perplexity']:.3f} | {change} | {seconds} |"
    if config is None:
        return f"| {name} | none | none | | | | {figures}"
    fields = _published_fields(config)
    group = (
        ""
        if fields["group_size"] is None
        else f"{fields['constraint'] or '-'}, {fields['group_size'] or 'row'}"
    )
    lorc = f"{config.lorc_rank} {config.lorc_metric} {config.lorc_dtype}" if config.lorc_rank else ""
    return (
        f"| {name} | {fields['weights']} | {fields['activations']} | {group} | {fields['algorithm']} "
        f"| {lorc} | {figures}"
    )


def _published_fields(config: QuantConfig | None) -> dict[str, Any]:
    """Return the fields of a row of accuracy.json that a configuration gives."""
    if config is None:
        empty = {"algorithm": "none", "weights": "none", "activations": "none"}
        return {**empty, "constraint": None, "group_size": None, "lorc_rank": 0}
    scale = "" if config.activations == "none" else f" per {config.activation_scale}"
    constrained = config.weights in FOUR_BIT and config.weights in PRODUCT_WEIGHTS
    grouped = config.weights not in ("none", "fp8-e4m3")
    return {
        "algorithm": "none" if config.weights == "none" else config.algorithm,
        "weights": config.weights,
        "activations": config.activations + scale,
        "constraint": config.constraint if constrained else None,
        "group_size": config.group_size if grouped else None,
        "lorc_rank": config.lorc_rank,
    }


def publish(path: Path, rows: Rows, setting: Setting, state: State, command: str) -> None:
    """Put the finished rows into ``accuracy.json``."""
    reference = state.done.get(setting.key(None), {}).get("perplexity")
    for config in rows.values():
        record = state.done.get(setting.key(config))
        if record is None:
            continue
        row = {
            "model": setting.model,
            "text": setting.text,
            "method": _method(setting, config),
            **_published_fields(config),
            "bits_per_weight": record["bits_per_weight"],
            "perplexity": round(record["perplexity"], 4),
            "reference_perplexity": None if reference is None else round(reference, 4),
            "command": command,
            "hardware": record["hardware"],
            "date": record["date"],
        }
        add_row(path, {name: row[name] for name in FIELDS})


def _method(setting: Setting, config: QuantConfig | None) -> str:
    """Describe what the other fields of a row do not say."""
    parts = [f"torch fake quantisation, {setting.dtype} model"]
    if config is None:
        return f"torch, {setting.dtype} model"
    parts.append(f"calibration {setting.samples} x {setting.length} tokens of {setting.calibration}")
    if config.lorc_rank:
        parts.append(f"LoRC {config.lorc_metric} in {config.lorc_dtype}")
    if config.weights != "none" and (config.algorithm == "gptq" or config.lorc_rank):
        shown = {name: getattr(config.layer_options(), name) for name in PUBLISHED} | dict(config.tuning)
        parts.append(" ".join(f"{key}={value}" for key, value in sorted(shown.items())))
    return "; ".join(parts)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="GGUF file or Hugging Face folder")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text to calibrate on")
    parser.add_argument("--test", type=Path, help="UTF-8 text to score")
    parser.add_argument("--plain-text", action="store_true", help="texts are not WikiText: do not detokenise")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows (default 64)")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens per calibration window (default 2048)"
    )
    parser.add_argument("--limit-tokens", type=int, help="score only the text's first tokens")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name matches somewhere")
    parser.add_argument("--configs", type=Path, metavar="FILE.json", help="these rows instead of the paper's")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th row, from the I-th")
    parser.add_argument("--quick", action="store_true", help=f"smoke run: {_quick_text()}")
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / "build" / "paper_table.jsonl",
        help="finished rows (default %(default)s)",
    )
    parser.add_argument("--table", type=Path, help="also write the markdown table to this file")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="put the rows into this accuracy.json")
    parser.add_argument("--finished", action="store_true", help="measure nothing; print the finished rows")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    values = parser.parse_args(arguments)
    if values.quick:
        vars(values).update(QUICK)
    if not values.list:
        for name in ("model", "calibration", "test"):
            if getattr(values, name) is None:
                parser.error(f"--{name} is needed")
    if not re.fullmatch(r"\d+/[1-9]\d*", values.shard):
        parser.error(f"--shard {values.shard}: write I/N, such as 0/4")
    return values


def _quick_text() -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in QUICK.items())


def chosen_rows(values: argparse.Namespace) -> Rows:
    """Return the rows of this run; the unquantised model is always among them, as the reference.

    Raises:
        ValueError: When ``--configs`` cannot be used or no row matches.
    """
    rows = paper_rows() if values.configs is None else {"w16a16": None, **rows_of_file(values.configs)}
    chosen = {name: config for name, config in rows.items() if config is None or re.search(values.rows, name)}
    if len(chosen) == 1 and not re.search(values.rows, "w16a16"):
        raise ValueError(f"--rows {values.rows}: no row matches; --list shows the names")
    return chosen


def run(values: argparse.Namespace, rows: Rows, setting: Setting, state: State, command: str) -> int:
    """Measure this shard's missing rows; return the number of rows that failed."""
    bench, failures = Bench(values), 0
    place, shards = (int(part) for part in values.shard.split("/"))
    for name, config in list(rows.items())[place::shards]:
        key = setting.key(config)
        if key in state.done:
            continue
        try:
            figures = bench.measure(config)
        except Exception as error:  # a row that cannot be must not cost the session its other rows
            failures += 1
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
            continue
        origin = {"command": command, "hardware": hardware(values.device), "date": today()}
        state.add({"key": key, "name": name, **figures, **origin})
        print(
            f"{name}: perplexity {figures['perplexity']:.4f}, {figures['bits_per_weight']:.3f} bits, "
            f"{figures['seconds']:.1f} s ({figures['quantize_seconds']:.1f} quantising)",
            flush=True,
        )
    return failures


def main(arguments: list[str]) -> int:
    """Run the tool and return the exit code."""
    values = parse_arguments(arguments)
    try:
        rows = chosen_rows(values)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if values.list:
        print("\n".join(rows))
        return 0
    limited = f", first {values.limit_tokens} tokens" if values.limit_tokens else ""
    setting = Setting(
        model=values.model.stem if values.model.suffix == ".gguf" else values.model.name,
        dtype=values.dtype,
        text=f"{values.test.name}{limited}",
        calibration=values.calibration.name,
        samples=values.samples,
        length=values.length,
    )
    command = shlex.join(["python", "tools/paper_table.py", *arguments])
    state = State(values.state)
    failures = 0 if values.finished else run(values, rows, setting, state, command)
    state.reload()
    text = table(rows, setting, state)
    print(
        f"\n{setting.model}, {setting.text}; calibration {setting.samples} x {setting.length} tokens of "
        f"{setting.calibration}; {setting.dtype}\n\n{text}"
    )
    if values.table is not None:
        values.table.write_text(text + "\n", encoding="utf-8")
    if values.publish is not None:
        publish(values.publish, rows, setting, state, command)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
