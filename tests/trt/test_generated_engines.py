"""Generated graphs given to the real builder. Of other seeds it refuses some, always in one line.

    python tools/fuzz_graphs.py --count 0 --engines 1 --seed SEED

repeats one of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from graph_checks import check_engine

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")


# Equal products, which the builder computes once (in 14 in one profile only; in 1028 of inputs that a Cast to
# their own type makes look different), and linears behind a constant If.
LINTED = (12, 14, 1028, 40)


@pytest.mark.parametrize("seed", [*range(10), *LINTED])
def test_generated_engine(seed: int, tmp_path: Path) -> None:
    assert check_engine(seed, tmp_path) == "engine built"
