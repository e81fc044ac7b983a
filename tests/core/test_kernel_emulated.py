"""The kernels' own source run on the CPU, thread by thread, against the float64 reference.

``tests/support/kernel_emulator`` replaces the two files of PTX instructions by what the PTX ISA says of them,
swizzles, fragments and barriers included. It checks indices, the pipeline, cut tiles, clusters and LoRC; not
timing, and not whether the hardware agrees with the emulator.
"""

import ctypes
import dataclasses
import os
import shutil
import subprocess
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from fused_quantizers import code_steps

from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.scales import legal_scales
from zqfp_compile.kernels import reference
from zqfp_compile.kernels.packing import pack_codes, pack_group_scales

POINTERS = ("x8", "xv", "u", "codes", "group_scales", "bias", "row_scales", "a", "y", "workspace")
INTEGERS = ("m", "n", "k", "rank", "per_token", "bfloat", "gated", "workers", "cut", "order")
ZEROED_BYTES = 16384

# emulate.cpp's kernels by number: tokens, rows, slices, cluster, promotion; and their group size.
(
    T8,
    T32,
    T64,
    T128_PAIR,
    T256_PAIR,
    T256,
    T128_NARROW,
    S8,
    S16,
    S8_G32,
    T16_HALVES,
    T64_HALVES,
    T128_HALVES,
) = range(13)
# Those that quantize their tokens are numbered apart.
QUANTIZED = 100
Q2, Q2_G32, Q2_G128 = range(QUANTIZED, QUANTIZED + 3)
GROUP_SIZE = {T8: 64, T32: 32, T64: 128, T128_PAIR: 64, T256_PAIR: 64, T256: 32, T128_NARROW: 128}
GROUP_SIZE |= {T16_HALVES: 64, T64_HALVES: 32, T128_HALVES: 128}
GROUP_SIZE |= {S8: 64, S16: 128, S8_G32: 32, Q2: 64, Q2_G32: 32, Q2_G128: 128}


class Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in INTEGERS),
        ("outputs", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class Case:
    kernel: int
    m: int
    n: int
    k: int
    rank: int = 0
    workers: int = 3
    cut: bool = True
    bfloat: bool = False
    per_token: bool = True
    bias: bool = True
    outputs: tuple[int, ...] = ()
    order: int = 0
    gated: bool = False

    @property
    def width(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.gated else self.n


CASES = [
    Case(T8, m=5, n=72, k=1040, rank=40),
    Case(T8, m=8, n=200, k=400, rank=64, cut=False, bfloat=True),
    Case(T8, m=20, n=136, k=2000, workers=5),
    Case(T8, m=1, n=8, k=16, rank=8, workers=1),
    Case(T32, m=33, n=328, k=528, rank=24, workers=4),
    Case(T32, m=32, n=72, k=400, rank=8, cut=False, per_token=False),
    Case(T64, m=70, n=200, k=1040, rank=40, workers=4),
    Case(T128_PAIR, m=150, n=328, k=528, rank=40),
    Case(T128_PAIR, m=100, n=136, k=272, cut=False, bias=False),
    Case(T256_PAIR, m=300, n=136, k=400, rank=40, workers=2),
    Case(T256_PAIR, m=40, n=328, k=528, rank=64, cut=False, bfloat=True),
    Case(T256, m=257, n=72, k=272, rank=16, workers=2),
    Case(T128_NARROW, m=200, n=136, k=1040, rank=24, workers=4),
    # Many tiles of each worker, so that slots of the output's ring are used again.
    Case(T256, m=700, n=264, k=144, workers=1, cut=False),
    # More units than stages, so that stages are used again.
    Case(T8, m=8, n=136, k=4240, rank=40, workers=1),
    Case(T32, m=20, n=264, k=1552, rank=8, workers=1),
    Case(T128_PAIR, m=128, n=136, k=1552, workers=1),
    Case(T256_PAIR, m=64, n=136, k=1040, rank=24, workers=1, cut=False),
    # Several outputs: a tile may hold rows of more than one, and the last may end inside a block.
    Case(T8, m=5, n=264, k=1040, rank=40, outputs=(128, 64, 72)),
    Case(T32, m=33, n=456, k=272, workers=4, outputs=(64, 64, 320, 8)),
    Case(T128_PAIR, m=150, n=328, k=400, bfloat=True, outputs=(64, 264)),
    Case(T256_PAIR, m=40, n=192, k=272, cut=False, outputs=(64, 128)),
    # Two blocks with half of K each: units that two do not divide; several tiles of a pair, so that the room
    # for sums is used again.
    Case(T16_HALVES, m=5, n=72, k=1040, rank=40),
    Case(T16_HALVES, m=16, n=200, k=2000, rank=64, workers=1, bfloat=True),
    Case(T64_HALVES, m=70, n=328, k=528, rank=24, workers=2),
    Case(T64_HALVES, m=130, n=200, k=400, workers=1, outputs=(64, 64, 72)),
    Case(T128_HALVES, m=150, n=136, k=1040, rank=40, workers=1),
    Case(T128_HALVES, m=100, n=72, k=272, bias=False, per_token=False),
    # Strips: quarters of fewer blocks of K than warpgroups, of one, as many, more; a last quarter that is
    # short; rows of a strip that do not exist; chunks of x8.
    Case(S8, m=5, n=72, k=1040, rank=40),
    Case(S8, m=1, n=8, k=16, rank=8, workers=1),
    Case(S8, m=8, n=328, k=128, workers=1, per_token=False),
    Case(S8, m=3, n=136, k=1920, rank=64, workers=2, bfloat=True),
    Case(S8, m=7, n=200, k=5392, rank=24, bias=False),
    Case(S8, m=20, n=120, k=400, rank=8, workers=2),
    Case(S16, m=16, n=200, k=2576, rank=48, workers=4),
    Case(S16, m=9, n=72, k=400, bfloat=True, per_token=False),
    Case(S16, m=15, n=264, k=1040, rank=40, outputs=(128, 64, 72)),
    Case(S8_G32, m=4, n=456, k=272, workers=5, outputs=(64, 64, 320, 8)),
    # The last chunk of x8 has columns for one warpgroup in the first strip, for others in those after it.
    Case(S8, m=2, n=96, k=2576, workers=1),
]


@pytest.fixture(scope="module")
def emulator(repo_root, tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed; the emulator needs CUDA's headers")
    folder = tmp_path_factory.mktemp("emulator")
    for source in (
        repo_root / "zqfp_compile" / "kernels" / "cuda",
        repo_root / "tests/support/kernel_emulator",
    ):
        for path in source.iterdir():  # the emulator's files replace the kernel's of the same name
            shutil.copy(path, folder)
    # The variable is test_kernel_races.py's, and what it loads is not for compilers.
    options = ["-fPIC", "-pthread", "-Wno-attributes", *os.environ.get("ZQFP_EMULATOR_OPTIONS", "").split()]
    command = ["nvcc", "-std=c++17", "-O2", "-I.", "-shared", "-Xcompiler", ",".join(options)]
    include = repo_root / "zqfp_compile" / "kernels" / "include"
    done = subprocess.run(
        [*command, f"-I{include}", "emulate.cpp", "-o", "libemulate.so"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(folder / "libemulate.so"))


def aligned(array):
    """The array's bytes at an address that is a multiple of 16."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    view = room[start : start + array.nbytes]
    view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return view


def random_arrays(case):
    rng, group_size = np.random.default_rng(case.m), GROUP_SIZE[case.kernel]
    dtype = ml_dtypes.bfloat16 if case.bfloat else np.float16
    padded = -(-case.k // group_size) * group_size
    codes = rng.integers(-7, 8, (case.n, padded)).astype(np.int8)
    codes[:, case.k :] = 0
    scales = rng.choice(legal_scales("e4m3", E2M1), (case.n, padded // group_size))
    x = rng.standard_normal((case.m, case.k)).astype(np.float32)
    x8, a = reference.quantize_activation(x, None if case.per_token else 0.02)
    arrays = {
        "x8": x8,
        "a": a,
        "codes": codes,
        "group_scales": scales,
        "row_scales": np.exp2(rng.uniform(-12, -6, case.n)).astype(np.float32),
        "xv": rng.standard_normal((case.m, case.rank)).astype(dtype),
        "u": rng.standard_normal((case.rank, case.n)).astype(dtype),
        "bias": rng.standard_normal(case.n).astype(dtype) if case.bias else None,
    }
    return arrays, dtype


def expected(case, arrays):
    w8 = reference.decode_weight(arrays["codes"], arrays["group_scales"], GROUP_SIZE[case.kernel], case.k)
    wide = {
        name: None if arrays[name] is None else arrays[name].astype(np.float64)
        for name in ("xv", "u", "bias")
    }
    return reference.linear(arrays["x8"], arrays["a"], w8, arrays["row_scales"], **wide)


def written(case, y):
    """The outputs, which lie one after the other, side by side: [M, N]."""
    ends = case.m * np.cumsum(case.outputs or (case.width,))[:-1]
    return np.concatenate([part.reshape(case.m, -1) for part in np.split(y, ends)], axis=1)


def new_workspace():
    """Zero where it must be; elsewhere NaN, which no sum may take in."""
    workspace = np.full(ZEROED_BYTES + (16 << 20), 0xFF, np.uint8)
    workspace[:ZEROED_BYTES] = 0
    return workspace


def emulate(emulator, case, arrays, dtype, workspace, source=None):
    """Run the kernel on a poisoned output; return y [M, N or N / 2], checked for what any call leaves behind.

    ``source``: what x8 and a are made of by the kernel itself.
    """
    memory = {name: aligned(array) for name, array in arrays.items() if array is not None}
    if source is None:
        memory["x8"] = aligned(E4M3FN.encode(arrays["x8"]).view(np.uint8))
    memory["codes"] = aligned(pack_codes(arrays["codes"]))
    memory["group_scales"] = aligned(pack_group_scales(arrays["group_scales"], GROUP_SIZE[case.kernel]))
    memory["y"] = aligned(np.full((case.m, case.width), np.nan, dtype))
    memory["workspace"] = workspace
    problem = Problem(
        **{name: array.ctypes.data for name, array in memory.items()},
        **{name: int(getattr(case, name)) for name in INTEGERS},
        outputs=(ctypes.c_int * 4)(*(case.outputs or (case.n,))),
    )
    if source is None:
        group_size = emulator.emulate(case.kernel, ctypes.byref(problem))
    else:
        group_size = emulator.emulate_quantized(case.kernel - QUANTIZED, ctypes.byref(problem), *source)
    assert group_size == GROUP_SIZE[case.kernel]
    y = written(case, memory["y"].view(dtype))
    assert np.isfinite(y.astype(np.float32)).all(), "part of the output was not written"
    assert not workspace[:ZEROED_BYTES].any(), "arrival counters were not left at zero"
    return y


def check(case, arrays, y):
    wanted, y = expected(case, arrays), y.astype(np.float64)
    # float32 sums; rounding to float16 gives 2e-4, to bfloat16 1.7e-3.
    assert np.linalg.norm(y - wanted) < (3e-3 if case.bfloat else 4e-4) * np.linalg.norm(wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_source_computes_the_reference(emulator, case):
    arrays, dtype = random_arrays(case)
    check(case, arrays, emulate(emulator, case, arrays, dtype, new_workspace()))


@pytest.mark.parametrize(
    "case", [pytest.param(CASES[2], marks=pytest.mark.races), CASES[7], CASES[4]], ids=str
)
def test_the_order_of_the_workers_changes_no_bit(emulator, case):
    arrays, dtype = random_arrays(case)
    results = {
        emulate(emulator, dataclasses.replace(case, order=order), arrays, dtype, new_workspace()).tobytes()
        for order in (0, 1, 2)
    }
    assert len(results) == 1


def test_a_workspace_serves_one_layer_after_the_other(emulator):
    """As on a stream, or when a graph is replayed: partial sums of other layers lie where new ones will."""
    workspace = new_workspace()
    for case in (CASES[2], CASES[7], CASES[0], CASES[2]):
        arrays, dtype = random_arrays(case)
        check(case, arrays, emulate(emulator, case, arrays, dtype, workspace))


@dataclass(frozen=True)
class Quantizer:
    dtype: str
    m: int
    k: int
    scale: float | None = None
    rank: int = 0
    # Static without LoRC: eights of a thread. Else blocks of a cluster; without LoRC also 0, the
    # kernel for many tokens.
    share: int = 1
    # Without LoRC: threads of a token's block. With LoRC: 0 for few tokens; else for many, of x alone the
    # stages in shared memory.
    size: int = 0
    threads: int = 64  # of a norm: of a token's block


EPSILON = 1e-5
TYPES = {"float16": (1, np.float16), "bfloat16": (2, ml_dtypes.bfloat16), "float32": (3, np.float32)}
QUANTIZERS = [
    Quantizer("float16", 3, 1040, 0.02),
    Quantizer("bfloat16", 19, 528, 0.03, share=4),
    Quantizer("float32", 9, 1040, 0.02, share=4),
    Quantizer("float16", 3, 1040, share=0, size=160),
    Quantizer("bfloat16", 2, 2080, share=0, size=64),  # more than the threads hold
    Quantizer("float32", 2, 528, share=0, size=32),
    Quantizer("float16", 3, 1040, size=96),
    Quantizer("bfloat16", 2, 2080, share=2, size=64),  # more than the threads hold
    Quantizer("float32", 9, 528, share=8, size=32),
    Quantizer("float16", 2, 1040, share=4, size=32),
    Quantizer("float16", 1, 1040, 0.02, rank=32, share=2),
    Quantizer("float16", 19, 528, 0.02, rank=24),
    Quantizer("float16", 1, 2640, rank=8),  # more than the warps have under way
    Quantizer("bfloat16", 16, 1040, rank=40, share=4),
    Quantizer("float16", 70, 528, 0.02, rank=64, share=2, size=3),
    Quantizer("bfloat16", 40, 272, rank=24, share=4, size=3),
    Quantizer("float16", 1, 16, rank=8, share=2, size=3),  # a block without columns
    Quantizer("bfloat16", 64, 1552, 0.03, rank=32, share=2, size=3),  # slots serve twice
    Quantizer("float16", 19, 1552, rank=40, share=2, size=3),  # x read twice
]


def pointer(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def optional(array):
    return None if array is None else aligned(array)


class Inputs(ctypes.Structure):
    """What is quantised: x; SiLU of x times other; or a norm of x + other, which has a gamma."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "other", "gamma")),
        ("epsilon", ctypes.c_float),
        ("sum", ctypes.c_void_p),
    )


def quantized(emulator, case, v=None, **inputs):
    """Run the quantizer of aligned inputs on poisoned outputs; return x8 as bytes [M, K], a, and h @ V."""
    number, dtype = TYPES[case.dtype]
    x8 = aligned(np.full(case.m * case.k, 0x7F, np.uint8))
    a = np.full(case.m if case.scale is None else 1, np.nan, np.float32)
    xv = aligned(np.full((case.m, case.rank), np.nan, dtype))
    scale = None if case.scale is None else np.array([case.scale], np.float32)
    v = optional(v)
    given = Inputs(epsilon=EPSILON, **{name: pointer(array) for name, array in inputs.items()})
    emulator.emulate_quantizer(
        *(ctypes.byref(given), number, case.m, case.k),
        *(*map(pointer, (scale, x8, a, v)), case.rank, pointer(xv)),
        *(case.share, case.size, case.threads),
    )
    return x8.reshape(case.m, case.k), a, xv.view(dtype).reshape(case.m, case.rank)


def random_numbers(case, *shape, seed=0):
    """Normal, each row of a size of its own."""
    rng = np.random.default_rng([seed, case.m])
    sizes = np.exp2(rng.integers(-6, 6, (shape[0], 1)))
    return (rng.standard_normal(shape) * sizes).astype(TYPES[case.dtype][1])


def random_v(case):
    shape = (case.k, case.rank)
    return (
        np.random.default_rng(case.m).standard_normal(shape).astype(TYPES[case.dtype][1])
        if case.rank
        else None
    )


def check_product(case, h, v, xv):
    if v is None:
        return
    product = h.astype(np.float64) @ v.astype(np.float64)
    error = np.linalg.norm(xv.astype(np.float64) - product)
    assert error < (3e-3 if case.dtype == "bfloat16" else 4e-4) * np.linalg.norm(product)


@pytest.mark.parametrize("case", QUANTIZERS, ids=str)
def test_quantizer_computes_the_reference(emulator, case):
    x, v = random_numbers(case, case.m, case.k), random_v(case)
    x8, a, xv = quantized(emulator, case, v, x=aligned(x))
    wanted, wanted_scale = reference.quantize_activation(x.astype(np.float32), case.scale)
    assert np.array_equal(a, wanted_scale)
    assert np.array_equal(E4M3FN.decode(x8), wanted)
    check_product(case, x, v, xv)


# Of a number that is computed in float32 and rounded: half a unit in the last place, and a little.
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}


def check_quantized(case, wide, x8, a):
    """x8 and a of h, of which ``wide`` is unrounded; return h.

    Where float32 rounds h the other way it may take its code, or a token's scale, to the next.
    """
    h = wide.astype(np.float32).astype(TYPES[case.dtype][1])
    numbers = h.astype(np.float32)
    scales = reference.quantize_activation(numbers, case.scale)[1]
    assert np.allclose(a, scales, rtol=ROUNDING[case.dtype] if case.scale is None else 0, atol=0)
    wanted = E4M3FN.encode(E4M3FN.round(numbers / a[:, None])).view(np.uint8)
    steps = code_steps(x8, wanted)
    assert steps.max() <= 1
    assert np.count_nonzero(steps) <= 1 + 1e-4 * steps.size
    return h


@pytest.mark.parametrize("case", QUANTIZERS, ids=str)
def test_silu_mul_is_quantized_as_the_reference(emulator, case):
    gate, up = (random_numbers(case, case.m, case.k, seed=seed) for seed in (1, 2))
    v = random_v(case)
    x8, a, xv = quantized(emulator, case, v, x=aligned(gate), other=aligned(up))
    h = check_quantized(case, reference.silu_mul(gate, up), x8, a)
    check_product(case, h, v, xv)


def test_silu_of_the_largest_numbers(emulator):
    """exp(-x) overflows long before x does."""
    gate = np.array([-88.0, -89.0, -104.0, -3e38, 88.0, 3e38, 0.0, -0.0] * 2, np.float32)[None]
    inputs = {"x": aligned(gate), "other": aligned(np.ones_like(gate))}
    x8, _, _ = quantized(emulator, Quantizer("float32", 1, 16, 1.0), **inputs)
    assert np.array_equal(E4M3FN.decode(x8)[0], [0, 0, 0, 0, 88, 448, 0, 0] * 2)


@dataclass(frozen=True)
class Norm(Quantizer):
    skip: bool = True
    sum: str | None = "new"  # where it goes: into memory of its own, or into that of x or skip


NORMS = [
    Norm("float16", 1, 1040, threads=160),
    Norm("bfloat16", 40, 272, 0.03, skip=False),
    Norm("float32", 7, 1040, sum="x", threads=32),  # more than the threads hold
    Norm("float16", 3, 2080, 0.02, sum="skip", threads=96),
    Norm("float16", 5, 1040, sum="skip"),
    Norm("bfloat16", 3, 1040, sum="x", threads=32),
    Norm("bfloat16", 2, 1552, sum=None, threads=32),
    Norm("float32", 2, 16, 0.02, sum=None, threads=32),
    Norm("float16", 1, 528, 0.02, skip=False, sum=None, threads=1024),
    Norm("float16", 1, 1040, 0.02, rank=32, share=2),
    Norm("float16", 19, 528, rank=24, sum="x"),
    Norm("bfloat16", 3, 2640, rank=64, sum="skip"),  # more than the warps have under way
    Norm("float16", 17, 528, rank=40, skip=False, sum=None, share=4),
    Norm("bfloat16", 40, 272, 0.02, rank=8, sum=None, size=1),
    Norm("float16", 35, 1040, rank=64, share=2, sum="x", size=1),
]


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_rms_norm_is_quantized_as_the_reference(emulator, case):
    x = random_numbers(case, case.m, case.k, seed=1)
    skip = random_numbers(case, case.m, case.k, seed=2) if case.skip else None
    gamma, v = random_numbers(case, 1, case.k, seed=3)[0], random_v(case)
    x[-1, :2] = 0.0, -0.0
    if case.m > 1:  # a token of zeros
        x[0] = 0
        if case.skip:
            skip[0] = 0
    s, wide = reference.rms_norm(x, skip, gamma, EPSILON)
    held = {"x": aligned(x), "skip": optional(skip), "new": aligned(np.full_like(x, np.nan)), None: None}
    inputs = {"x": held["x"], "other": held["skip"], "gamma": aligned(gamma), "sum": held[case.sum]}
    x8, a, xv = quantized(emulator, case, v, **inputs)
    h = check_quantized(case, wide, x8, a)
    check_product(case, h, v, xv)
    if case.sum is not None:
        assert held[case.sum].tobytes() == s.tobytes()


SCALES = [1.0, 0.02, 1 / 3, 448.0, 1.9999999, 1.0000001, 3e-5, 2.0**-126, 1e-40, 2.0**-149, 3e37, 3.4e38]


@pytest.mark.parametrize("scale", SCALES)
def test_quantizer_divides_as_the_reference_near_ties(emulator, scale):
    """Numbers halfway between two of E4M3 times the scale, their neighbours in float32, the extremes."""
    numbers = np.unique(E4M3FN.decode(np.arange(0x7F, dtype=np.uint8)).astype(np.float64))
    ties = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, [464.0, 480.0, 1024.0]])
    with np.errstate(over="ignore"):
        near = (ties * np.float32(scale)).astype(np.float32)
    steps = np.arange(-8, 9, dtype=np.int32)
    near = (near[:, None].view(np.int32) + steps).view(np.float32).reshape(-1)
    near = near[np.isfinite(near)]
    largest = np.finfo(np.float32).max
    x = np.concatenate([near, [0.0, 2.0**-149, 2.0**-126, 1e-20, 1e20, largest, np.inf]]).astype(np.float32)
    x = np.concatenate([x, -x])
    x = np.pad(x, (0, -len(x) % 16))[None]
    case = Quantizer("float32", 1, x.shape[1], scale, share=4)
    x8, _, _ = quantized(emulator, case, x=aligned(x))
    with np.errstate(over="ignore"):
        wanted = reference.quantize_activation(x, scale)[0]
    assert np.array_equal(E4M3FN.decode(x8), wanted)
    assert np.array_equal(np.signbit(E4M3FN.decode(x8)), np.signbit(x))


@pytest.mark.parametrize(("share", "size"), [(1, 0), (2, 3)])
@pytest.mark.parametrize("scale", [None, 0.0, np.inf])
def test_quantizer_divides_as_ieee_by_infinity_and_zero(emulator, scale, share, size):
    x = np.tile(np.array([1.0, -2.0, 0.0, np.inf, -np.inf, np.nan, 3.0, -0.0], np.float16), 34)[None]
    v = np.zeros((x.shape[1], 8), np.float16)
    case = Quantizer("float16", 1, x.shape[1], scale, rank=8, share=share, size=size)
    x8, a, _ = quantized(emulator, case, v, x=aligned(x))
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = x.astype(np.float32) / a
    wanted = np.where(np.isinf(quotient), np.copysign(448.0, quotient), quotient)
    assert np.array_equal(E4M3FN.decode(x8), wanted, equal_nan=True)


PLAIN, SILU_MUL, RMS_NORM = 1, 2, 3  # zqfpSource


@dataclass(frozen=True)
class Joined(Case):
    source: int = PLAIN
    skip: bool = True
    sum: bool = True


# With order = 1 the first warp rehearses (strip_tokens.cuh).
JOINED = [
    Joined(Q2, m=1, n=72, k=1040, order=1),
    Joined(Q2, m=1, n=8, k=16, per_token=False, workers=1),
    Joined(Q2, m=2, n=136, k=4240, source=SILU_MUL, workers=5, order=1),  # three rounds of the threads
    Joined(Q2_G32, m=2, n=40, k=528, source=SILU_MUL, bfloat=True, per_token=False),
    Joined(Q2, m=1, n=328, k=1040, source=RMS_NORM, workers=4, outputs=(128, 192, 8), order=1),
    Joined(Q2_G32, m=2, n=40, k=6160, source=RMS_NORM, bfloat=True, per_token=False),  # rounds in two batches
    Joined(Q2, m=2, n=24, k=272, source=RMS_NORM, skip=False, sum=False),
    Joined(Q2, m=2, n=24, k=4096, source=RMS_NORM, sum=False, bias=False, per_token=False, order=1),
    # With LoRC: shares of 128 columns, the last of them short; ranks that fill no step of 16; more blocks
    # than shares, and fewer.
    Joined(Q2, m=1, n=72, k=1040, rank=16),
    Joined(Q2, m=1, n=72, k=16, rank=8, per_token=False, workers=5, order=1),
    Joined(Q2_G32, m=1, n=136, k=2576, rank=24, source=SILU_MUL, bfloat=True, per_token=False),
    Joined(Q2_G128, m=1, n=328, k=1040, rank=64, source=RMS_NORM, workers=4, outputs=(128, 192, 8)),
    Joined(Q2, m=2, n=40, k=1200, rank=32, source=RMS_NORM, bfloat=True, bias=False),
    Joined(Q2_G32, m=2, n=24, k=4240, rank=64, source=SILU_MUL, per_token=False),
    Joined(Q2_G128, m=1, n=40, k=528, rank=40, source=RMS_NORM, skip=False, sum=False, per_token=False),
]


def run_joined(emulator, case, workspace):
    """Run the strips that quantize; return y, and what the reference needs: x8, a and xv of the quantizer.

    The tests above compare the quantizer with its own reference.
    """
    arrays, dtype = random_arrays(case)
    quantizer = Quantizer(
        "bfloat16" if case.bfloat else "float16",
        case.m,
        case.k,
        None if case.per_token else 0.02,
        rank=case.rank,
        share=0 if case.per_token and not case.rank else 1,
        size=0 if case.rank else 64,
        threads=512,
    )
    x, other = (random_numbers(quantizer, case.m, case.k, seed=seed) for seed in (1, 2))
    v = (random_v(quantizer) / (8 * case.k**0.5)).astype(dtype) if case.rank else None
    has_other = case.source == SILU_MUL or (case.source == RMS_NORM and case.skip)
    held = {
        "x": aligned(x),
        "other": aligned(other) if has_other else None,
        "gamma": aligned(random_numbers(quantizer, 1, case.k, seed=3)) if case.source == RMS_NORM else None,
    }
    sums = [aligned(np.full_like(x, np.nan)) for _ in range(2)]
    summed = case.source == RMS_NORM and case.sum
    codes, arrays["a"], arrays["xv"] = quantized(
        emulator, quantizer, v, sum=sums[0] if summed else None, **held
    )
    arrays["x8"] = E4M3FN.decode(codes)
    pointers = {name: pointer(array) for name, array in held.items()}
    given = Inputs(epsilon=EPSILON, **pointers, sum=pointer(sums[1]) if summed else None)
    scale, v = None if case.per_token else arrays["a"], optional(v)
    source = (ctypes.byref(given), case.source, pointer(scale), pointer(v))
    weights = {name: array for name, array in arrays.items() if name not in ("x8", "a", "xv")}
    y = emulate(emulator, case, weights, dtype, workspace, source)
    assert sums[0].tobytes() == sums[1].tobytes()
    return y, arrays


@pytest.mark.parametrize("case", JOINED, ids=str)
def test_strips_that_quantize_compute_the_reference(emulator, case):
    y, arrays = run_joined(emulator, case, new_workspace())
    check(case, arrays, y)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.races if case.rank == 32 else ())
        for case in JOINED
        if case.rank in (24, 32, 64) and case.n > 24
    ],
    ids=str,
)
def test_who_multiplies_a_share_changes_no_bit(emulator, case):
    """One block after the other, when the first makes all of x @ V; all at once; and fewer blocks."""
    results = set()
    for order, workers in ((0, case.workers), (1, case.workers), (2, case.workers), (2, 2)):
        dealt = dataclasses.replace(case, order=order, workers=workers)
        results.add(run_joined(emulator, dealt, new_workspace())[0].tobytes())
    assert len(results) == 1


# Rows that end inside a block, and a strip; tiles that are stored in each of the ways that there are.
GATED = [
    Case(T8, m=5, n=80, k=1040, rank=40),
    Case(T8, m=20, n=144, k=400, cut=False, bfloat=True),
    Case(T32, m=33, n=336, k=528, rank=24, workers=4),
    Case(T64, m=70, n=208, k=1040, rank=40, workers=4, bias=False),
    Case(T128_PAIR, m=150, n=336, k=528, rank=40, bfloat=True),
    Case(T256, m=257, n=80, k=272, rank=16, workers=2, per_token=False),
    Case(T128_HALVES, m=150, n=80, k=528, rank=16, workers=1),
    Case(S8, m=5, n=80, k=1040, rank=40),
    Case(S16, m=15, n=208, k=400, rank=48, workers=4, bfloat=True),
    Joined(Q2, m=1, n=80, k=1040, rank=16, bfloat=True, source=RMS_NORM, order=1),
    Joined(Q2_G32, m=2, n=176, k=528, bias=False),
]


@pytest.mark.parametrize("case", GATED, ids=str)
def test_a_gated_layer_writes_silu_of_gate_times_up(emulator, case):
    def run(case):
        if isinstance(case, Joined):
            return run_joined(emulator, case, new_workspace())[0]
        return emulate(emulator, case, *random_arrays(case), new_workspace())

    h, wanted = run(dataclasses.replace(case, gated=True)), reference.gated(run(case))
    # What is gated are the same numbers, so that but one rounding is between them.
    rounding = ROUNDING["bfloat16" if case.bfloat else "float16"]
    assert np.allclose(h.astype(np.float64), wanted, rtol=rounding, atol=2.0**-24)


def test_a_workspace_serves_one_product_after_the_other(emulator):
    """Sums of other layers, and of tiles that are cut, lie where new ones will."""
    workspace = new_workspace()
    for case in (JOINED[8], JOINED[11], CASES[2], JOINED[10], JOINED[8]):
        if isinstance(case, Joined):
            y, arrays = run_joined(emulator, case, workspace)
        else:
            arrays, dtype = random_arrays(case)
            y = emulate(emulator, case, arrays, dtype, workspace)
        check(case, arrays, y)
