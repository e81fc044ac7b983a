"""Compile generated graphs and check what must hold for them (docs/generated_graphs.md).

    python tools/fuzz_graphs.py --count 2000 --seed 100000

A graph that fails is cut to as few blocks as still fail and saved with its recipe and the error; the exit
code is then 1. ``--engines`` also gives so many of the graphs to the TensorRT-RTX builder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "tests" / "support")]

import onnx  # noqa: E402
from graph_checks import check_engine, check_graph, random_recipe  # noqa: E402
from random_blocks import BLOCK_LIMIT, random_graph  # noqa: E402

Check = Callable[..., str]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="graphs to generate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first")
    parser.add_argument("--engines", type=int, default=0, help="of them, graphs to build an engine of")
    parser.add_argument("--save", type=Path, default=ROOT / "build" / "fuzz-graphs", help="for failures")
    options = parser.parse_args()
    begin, processor = time.monotonic(), time.process_time()
    outcomes: Counter[str] = Counter()
    jobs: list[tuple[Check, int]] = [(check_graph, options.seed + number) for number in range(options.count)]
    jobs += [(check_engine, options.seed + number) for number in range(options.engines)]
    for check, seed in jobs:
        error, outcome = attempt(check, seed, BLOCK_LIMIT)
        if error is not None:
            folder = save(check, seed, options.save)
            print(f"seed {seed}: {type(error).__name__}: {error}\n  saved in {folder}", flush=True)
        outcomes[outcome] += 1
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(f"{time.monotonic() - begin:.0f} s, {time.process_time() - processor:.0f} s of processor time")
    return 1 if outcomes["FAILED"] else 0


def attempt(check: Check, seed: int, blocks: int) -> tuple[Exception | None, str]:
    """Check one graph; return what was raised, if anything, and the outcome for the statistics."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return None, check(seed, Path(folder), blocks=blocks)
        except Exception as error:  # whatever is raised is what we are looking for
            return error, "FAILED"


def save(check: Check, seed: int, parent: Path) -> Path:
    """Save the smallest beginning of a graph that fails."""
    for blocks in range(BLOCK_LIMIT + 1):
        error, _ = attempt(check, seed, blocks)
        if error is not None:
            break
    folder = parent / f"{check.__name__}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    graph = random_graph(seed, blocks)
    onnx.save(graph.proto, folder / "model.onnx")
    (folder / "recipe.json").write_text(json.dumps(random_recipe(seed, graph), indent=2))
    text = "".join(traceback.format_exception(error)) if error is not None else "it does not fail again\n"
    (folder / "error.txt").write_text(f"blocks: {blocks}\n{text}")
    return folder


if __name__ == "__main__":
    sys.exit(main())
