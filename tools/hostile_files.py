"""Makes every hostile input, runs the command that meets it, and prints how that ended.

    python tools/hostile_files.py                       # a line for each, then the figures
    python tools/hostile_files.py --make build/hostile  # only writes the files, a folder for each

Exit code 1 when one is not diagnosed: one line with the expected words and exit code, nothing left behind,
within ten seconds. ``tests/ort/test_hostile_files.py`` runs the same list; docs/robustness.md has more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from hostile_cases import CASES
from hostile_run import HostileRunner, summary

LIMIT_SECONDS = 10.0


def main() -> int:
    """Parse the arguments and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the files here and run nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="inputs with this in their name")
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.only in case.name]
    if arguments.make is not None:
        arguments.make.mkdir(parents=True)
        runner = HostileRunner(arguments.make, LIMIT_SECONDS)
        for case in cases:
            print(runner.make(case))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        runner = HostileRunner(Path(folder), LIMIT_SECONDS)
        outcomes = []
        for case in cases:
            outcome = runner.run(case)
            outcomes.append(outcome)
            verdict = "; ".join(outcome.faults) or "diagnosed"
            print(f"{case.group}: {case.wrong} | {outcome.code} | {verdict} | {outcome.line[:160]}")
    print(summary(outcomes))
    return int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
