"""Fuzzes the readers of untrusted files with atheris (coverage-guided): ``pip install atheris`` first.

    python tools/fuzz_readers.py model --seconds 300
    python tools/fuzz_readers.py recipe --runs 100000

Starts from the good and the hostile files of the target's kind. A diagnosed error of one line is what should
come out; any other exception, a crash or ten seconds for one file is a finding, and its bytes stay in
``--output``. docs/robustness.md has the figures.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
for folder in ("models", "tests/support", "."):
    sys.path.insert(0, str(ROOT / folder))

with atheris.instrument_imports(include=["zqfp_compile", "yaml", "json", "numpy.lib"]):
    from fuzz_targets import TARGETS
    from hostile_protos import WEIGHT


def main() -> None:
    """Parse the arguments and fuzz; libFuzzer ends the process."""
    targets = {target.name: target for target in TARGETS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=targets)
    parser.add_argument("--seconds", type=int, default=0, help="stop after this time")
    parser.add_argument("--runs", type=int, default=-1, help="stop after so many files")
    parser.add_argument("--output", type=Path, default=Path("build/fuzz"), help="where findings go")
    arguments = parser.parse_args()
    target = targets[arguments.target]
    # Freed when the process ends: libFuzzer leaves no other moment.
    place = Path(tempfile.mkdtemp(prefix="zqfp-fuzz-", dir="/dev/shm"))
    corpus = arguments.output / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds()
    for index, data in enumerate(seeds):
        (corpus / f"seed-{index}").write_bytes(data)
    (place / "w.data").write_bytes(WEIGHT.tobytes())
    flags = [f"-artifact_prefix={arguments.output}/{target.name}-", f"-runs={arguments.runs}"]
    flags += [f"-max_total_time={arguments.seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=32768"]

    def check(data: bytes) -> None:
        target.check(data, place)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            # libFuzzer forgets seeds that reach nothing new in Python; native readers have more to them.
            start = data if rng.random() < 0.5 else rng.choice(seeds)
            return target.mutate(start, rng)[:max_size]
        made: bytes = atheris.Mutate(data, len(data))
        return made

    atheris.Setup([sys.argv[0], *flags, str(corpus)], check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
