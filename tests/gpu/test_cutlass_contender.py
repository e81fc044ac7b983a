"""The CUTLASS contender of bench_gemm.py: it loads and refuses bad calls without a GPU, and is right on one.

make -f tools/cutlass/contender.mk && python -m pytest -q tests/gpu/test_cutlass_contender.py
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import gemm_cutlass

if gemm_cutlass.find() is None:
    pytest.skip("not built: make -f tools/cutlass/contender.mk (minutes)", allow_module_level=True)


@pytest.fixture(scope="module")
def library():
    return gemm_cutlass.Library(gemm_cutlass.find())


def test_the_kernels_are_named(library):
    assert library.names[0] == "t16 stream-K" and len(set(library.names)) == len(library.names) == 5


GOOD = {"kernel": 0, "shape": (16, 256, 512), "pointers": (4096, 4096, 4096, 4096, 4096)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kernel": 5}, "there is no such kernel"),
        ({"kernel": -1}, "there is no such kernel"),
        ({"shape": (0, 256, 512)}, "must be positive"),
        ({"shape": (16, 20, 512)}, "n must be a multiple of 8"),
        ({"shape": (16, 256, 192)}, "k of 128"),
        ({"pointers": (0, 4096, 4096, 4096, 4096)}, "must be device pointers"),
        ({"pointers": (4096, 4096, 4104, 4096, 4096)}, "aligned to 16 bytes"),
    ],
)
def test_bad_calls_are_refused(library, change, says):
    call = {**GOOD, **change}
    with pytest.raises(RuntimeError, match=says):
        library.gemm(call["kernel"], call["shape"], call["pointers"], 1.0, 0)


def test_a_workspace_of_no_shape_is_refused(library):
    with pytest.raises(RuntimeError, match="must be positive"):
        library.workspace_bytes(0, 1, -8, 128)


@pytest.mark.parametrize("m", [1, 16, 100, 1000])
def test_every_kernel_is_right(library, m):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an H100 (sm_90)")
    contender = gemm_cutlass.CutlassContender(library, 1032, 1024)
    assert set(contender.right_calls(m, contender.decoded())) == set(library.names)
