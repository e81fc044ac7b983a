"""libzqfp without a GPU: it builds, decodes as the formats say, and refuses bad input with a sentence."""

import ctypes
import dataclasses
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.formats.scales import legal_scales
from zqfp_compile.kernels import library as binding
from zqfp_compile.kernels.library import Layer
from zqfp_compile.kernels.packing import pack_codes, pack_group_scales, packed_sizes
from zqfp_compile.kernels.reference import decode_weight

LAYER = Layer(n=64, k=128, group_size=64)


def decoded(library, codes, scales, group_size):
    n, k = codes.shape
    layer = Layer(n=n, k=k, group_size=group_size)
    return library.decode(layer, pack_codes(codes), pack_group_scales(scales, group_size))


def expected_bits(codes, scales, group_size):
    w8 = decode_weight(codes, scales, group_size, codes.shape[1])
    return E4M3FN.encode(w8).view(np.uint8)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_decodes_every_code_with_every_legal_scale(kernel_library, group_size):
    table = legal_scales("e4m3", E2M1)
    codes = np.resize(np.arange(-7, 8, dtype=np.int8), (len(table) + 7) // 8 * 8 * group_size)
    codes = codes.reshape(-1, group_size)
    scales = np.resize(table, len(codes))[:, None]
    assert {(c, s) for row, s in zip(codes, scales[:, 0], strict=True) for c in row} == {
        (c, s) for c in range(-7, 8) for s in table
    }
    assert np.array_equal(
        decoded(kernel_library, codes, scales, group_size), expected_bits(codes, scales, group_size)
    )


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("n", "k"), [(8, 16), (72, 400), (200, 1040)])
def test_decodes_any_shape(kernel_library, n, k, group_size):
    rng = np.random.default_rng(n)
    codes = rng.integers(-7, 8, (n, k)).astype(np.int8)
    scales = rng.choice(legal_scales("e4m3", E2M1), (n, -(-k // group_size)))
    assert np.array_equal(
        decoded(kernel_library, codes, scales, group_size), expected_bits(codes, scales, group_size)
    )


@pytest.mark.parametrize("constraint", ["m1", "m2", "e4m3"])
def test_decodes_what_the_quantizer_validates(kernel_library, constraint):
    rng = np.random.default_rng(5)
    padded = 192
    codes = rng.integers(-7, 8, (24, padded)).astype(np.int8)
    codes[:, 144:] = 0
    scales = rng.choice(legal_scales(constraint, E2M1), (24, padded // 64))
    rows = np.exp2(rng.integers(-9, -3, 24)).astype(np.float32)
    weight = QuantizedWeight(codes, scales, rows, 144, "e2m1", 64, constraint)
    layer = Layer(n=24, k=144, group_size=64)
    bits = kernel_library.decode(layer, pack_codes(codes), pack_group_scales(scales, 64))
    assert np.array_equal(E4M3FN.decode(bits), weight.fp8_weight())


def test_sizes_agree_with_the_packer(kernel_library):
    for n, k, group_size in [(8, 16, 32), (4096, 4096, 64), (72, 400, 128)]:
        layer = Layer(n=n, k=k, group_size=group_size)
        assert kernel_library.packed_sizes(layer) == packed_sizes(n, k, group_size)


REFUSED = [
    ({"n": 0}, binding.InvalidValueError, "n = 0"),
    ({"k": -16}, binding.InvalidValueError, "k = -16"),
    ({"k": 1 << 40}, binding.InvalidValueError, "k = 1099511627776"),
    ({"n": 20}, binding.NotSupportedError, "multiple of 8"),
    ({"k": 100}, binding.NotSupportedError, "multiple of 16"),
    ({"group_size": 16}, binding.NotSupportedError, "groups of 16"),
    ({"group_size": 0}, binding.InvalidValueError, "group_size = 0"),
    ({"lorc_rank": 12}, binding.NotSupportedError, "rank 12"),
    ({"lorc_rank": 72}, binding.NotSupportedError, "rank 72"),
    ({"lorc_rank": -8}, binding.InvalidValueError, "lorc_rank = -8"),
    ({"dtype": torch.float32}, binding.NotSupportedError, "float32"),
    ({"dtype": torch.int8}, binding.InvalidValueError, "dtype"),
    ({"per_token": 2}, binding.InvalidValueError, "per_token"),
    ({"gated": 2}, binding.InvalidValueError, "gated = 2"),
    ({"n": 72, "gated": True}, binding.NotSupportedError, "n = 72 of a gated layer"),
    ({"n": 128, "outputs": (64, 64), "gated": True}, binding.NotSupportedError, "one output"),
    ({"n": 136, "outputs": (72, 64)}, binding.NotSupportedError, r"outputs\[0\] = 72"),
    ({"n": 128, "outputs": (64, 0, 64)}, binding.InvalidValueError, r"outputs\[1\] = 0"),
    ({"n": 128, "outputs": (64, -64)}, binding.InvalidValueError, r"outputs\[1\] = -64"),
    ({"n": 128, "outputs": (64, 72)}, binding.InvalidValueError, "have 136 features"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED)
def test_refuses_layers_with_a_sentence(kernel_library, change, error, words):
    layer = dataclasses.replace(LAYER, **change)
    for call in (kernel_library.packed_sizes, lambda bad: kernel_library.workspace_bytes(bad, 1)):
        with pytest.raises(error, match=words):
            call(layer)


def call_end(args, m, workspace, workspace_bytes):
    """What the calls of a layer have in common: all behind its description, on the default stream."""
    size = ctypes.c_size_t(workspace_bytes)
    return ctypes.byref(args), ctypes.c_int64(m), ctypes.c_void_p(workspace), size, None


def linear_call(library, layer=LAYER, m=4, **changes):
    """The C call with plausible (never read) pointers; returns the status."""
    pointers = dict.fromkeys(("x8", "a", "codes", "group_scales", "row_scales", "y"), 4096)
    pointers |= {"bias": None, "xv": None, "u": None, "workspace": 8192}
    workspace_bytes = changes.pop("workspace_bytes", 1 << 30)
    pointers |= changes
    y = pointers.pop("y")
    outputs = binding._Pointers(*(y if isinstance(y, tuple) else (y,)))
    args = binding._Args(*(pointers[name] for name in binding._ARGUMENTS), outputs)
    return library._c.zqfpLinear(
        binding._desc(layer), *call_end(args, m, pointers["workspace"], workspace_bytes)
    )


def last_error(library):
    return library._c.zqfpGetLastErrorString().decode()


@pytest.mark.parametrize("name", ["x8", "a", "codes", "group_scales", "row_scales", "y", "workspace"])
def test_refuses_null_and_misaligned_pointers(kernel_library, name):
    assert linear_call(kernel_library, **{name: None}) == 1
    assert f"{name} is null" in last_error(kernel_library)
    assert linear_call(kernel_library, **{name: 4100}) == 1
    assert "aligned to 16 bytes" in last_error(kernel_library)


def test_refuses_missing_lorc_factors(kernel_library):
    layer = dataclasses.replace(LAYER, lorc_rank=8)
    assert linear_call(kernel_library, layer, u=4096) == 1
    assert "xv is null" in last_error(kernel_library)
    assert linear_call(kernel_library, layer, xv=4096) == 1
    assert "u is null" in last_error(kernel_library)
    assert linear_call(kernel_library, bias=4104) == 1
    assert "bias" in last_error(kernel_library)


def test_refuses_a_missing_output(kernel_library):
    layer = dataclasses.replace(LAYER, n=192, outputs=(64, 64, 64))
    assert linear_call(kernel_library, layer, y=(4096, None, 4096)) == 1
    assert "y is null" in last_error(kernel_library)


def test_refuses_wrong_counts_and_small_workspaces(kernel_library):
    assert linear_call(kernel_library, m=-1) == 1
    assert "m = -1" in last_error(kernel_library)
    assert linear_call(kernel_library, workspace_bytes=64) == 4
    assert "64 bytes" in last_error(kernel_library)
    assert linear_call(kernel_library, m=0) == 0


def test_null_structures_are_refused(kernel_library):
    c = kernel_library._c
    assert c.zqfpGetPackedSizes(None, None, None) == 1
    assert c.zqfpGetPackedSizes(binding._desc(LAYER), None, None) == 1
    assert c.zqfpGetWorkspaceSize(binding._desc(LAYER), ctypes.c_int64(1), None) == 1
    assert c.zqfpLinear(None, None, ctypes.c_int64(1), None, ctypes.c_size_t(0), None) == 1
    assert c.zqfpLinear(binding._desc(LAYER), None, ctypes.c_int64(1), None, ctypes.c_size_t(0), None) == 1
    assert c.zqfpDecodeHost(binding._desc(LAYER), None, None, None) == 1


QUANTIZERS = {
    "zqfpQuantizeActivation": ("x",),
    "zqfpQuantizeSiluMul": ("gate", "up"),
    "zqfpQuantizeRmsNorm": ("x", "skip", "gamma", "epsilon"),
}


def quantize_call(library, function="zqfpQuantizeActivation", *, x_dtype=1, m=4, k=64, rank=0, **changes):
    """The C call with plausible (never read) pointers, all there may be but LoRC's; returns the status."""
    names, is_norm = QUANTIZERS[function], function.endswith("Norm")
    given = dict.fromkeys((*names, "x8", "a", "sum"), 4096) | {"scale": None, "v": None, "xv": None}
    given |= {"epsilon": 1e-5} | changes

    def value(name):
        return (ctypes.c_float if name == "epsilon" else ctypes.c_void_p)(given[name])

    return getattr(library._c, function)(
        *map(value, names),
        ctypes.c_int32(x_dtype),
        ctypes.c_int64(m),
        ctypes.c_int64(k),
        *map(value, ("scale", "x8", "a", "sum", "v") if is_norm else ("scale", "x8", "a", "v")),
        ctypes.c_int32(rank),
        value("xv"),
        None,
    )


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"x8": 4104}, 1, "aligned"),
        ({"a": None}, 1, "a is null"),
        ({"scale": 4098}, 1, "scale"),
        ({"x_dtype": 9}, 1, "dtype 9"),
        ({"m": -3}, 1, "m = -3"),
        ({"k": 0}, 1, "k = 0"),
        ({"k": 72}, 2, "multiple of 16"),
        ({"v": 4096}, 1, "both"),
        ({"v": 4096, "xv": 4096}, 1, "rank = 0"),
        ({"v": 4096, "xv": 4096, "rank": 68}, 2, "rank 68"),
        ({"v": 4096, "xv": 4096, "rank": 8, "x_dtype": 3}, 2, "float32"),
    ],
)
@pytest.mark.parametrize("function", QUANTIZERS)
def test_quantizers_refuse(kernel_library, function, changes, status, words):
    assert quantize_call(kernel_library, function, **changes) == status
    assert words in last_error(kernel_library)


@pytest.mark.parametrize(
    ("function", "changes", "words"),
    [
        ("zqfpQuantizeActivation", {"x": None}, "x is null"),
        ("zqfpQuantizeSiluMul", {"gate": None}, "gate is null"),
        ("zqfpQuantizeSiluMul", {"up": None}, "up is null"),
        ("zqfpQuantizeSiluMul", {"up": 4104}, "up at 0x1008 is not aligned"),
        ("zqfpQuantizeRmsNorm", {"x": None}, "x is null"),
        ("zqfpQuantizeRmsNorm", {"gamma": None}, "gamma is null"),
        ("zqfpQuantizeRmsNorm", {"gamma": 4104}, "gamma at 0x1008 is not aligned"),
        ("zqfpQuantizeRmsNorm", {"skip": 4104}, "skip at 0x1008 is not aligned"),
        ("zqfpQuantizeRmsNorm", {"sum": 4104}, "sum at 0x1008 is not aligned"),
        ("zqfpQuantizeRmsNorm", {"epsilon": -1e-5}, "epsilon = -1e-05 is not"),
        ("zqfpQuantizeRmsNorm", {"epsilon": float("nan")}, "epsilon = nan is not"),
        ("zqfpQuantizeRmsNorm", {"epsilon": float("inf")}, "epsilon = inf is not"),
    ],
)
def test_quantizers_refuse_what_they_cannot_read(kernel_library, function, changes, words):
    assert quantize_call(kernel_library, function, **changes) == 1
    assert words in last_error(kernel_library)


@pytest.mark.parametrize("function", QUANTIZERS)
def test_nothing_to_quantize_is_no_error(kernel_library, function):
    assert quantize_call(kernel_library, function, m=0) == 0


def quantized_call(library, layer=LAYER, m=1, workspace_bytes=1 << 30, **changes):
    """zqfpQuantizedLinear of a norm with plausible (never read) pointers; returns the status."""
    given = {"source": 3, "x_dtype": 1, "epsilon": 1e-5, "scale": None, "v": None, "u": None}
    given |= dict.fromkeys(("x", "other", "gamma", "sum", "codes", "group_scales", "row_scales", "y"), 4096)
    given |= changes
    activation = binding._Activation(**{name: given[name] for name, _ in binding._Activation._fields_})
    pointers = (given.get(name) for name in binding._ARGUMENTS)
    args = binding._Args(*pointers, binding._Pointers(given["y"]))
    end = call_end(args, m, given.get("workspace", 4096), workspace_bytes)
    return library._c.zqfpQuantizedLinear(binding._desc(layer), ctypes.byref(activation), *end)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"source": 0}, 1, "unknown source 0"),
        ({"source": 4}, 1, "unknown source 4"),
        ({"x_dtype": 9}, 1, "dtype 9"),
        ({"x": None}, 1, "x is null"),
        ({"source": 1, "x": 4100}, 1, "x at 0x1004 is not aligned"),
        ({"source": 2, "x": None}, 1, "gate is null"),
        ({"source": 2, "other": None}, 1, "up is null"),
        ({"other": 4104}, 1, "skip at 0x1008 is not aligned"),
        ({"gamma": None}, 1, "gamma is null"),
        ({"sum": 4104}, 1, "sum at 0x1008 is not aligned"),
        ({"epsilon": float("nan")}, 1, "epsilon = nan is not"),
        ({"scale": 4096}, 1, "static scale or is per token"),
        ({"v": 4096}, 1, "lorc_rank = 0"),
        ({"codes": None}, 1, "codes is null"),
        ({"group_scales": 4097}, 1, "group_scales"),
        ({"row_scales": None}, 1, "row_scales is null"),
        ({"y": None}, 1, "y is null"),
        ({"workspace": None}, 1, "the workspace is null"),
        ({"workspace_bytes": 64}, 4, "64 bytes"),
        ({"m": -1}, 1, "m = -1"),
    ],
)
def test_quantizer_and_linear_in_one_refuse(kernel_library, changes, status, words):
    assert quantized_call(kernel_library, **changes) == status
    assert words in last_error(kernel_library)


def test_quantizer_and_linear_in_one_refuse_lorc_that_is_not_there(kernel_library):
    layer = dataclasses.replace(LAYER, lorc_rank=8)
    assert quantized_call(kernel_library, layer, u=4096) == 1
    assert "lorc_rank = 8" in last_error(kernel_library)
    assert quantized_call(kernel_library, layer, v=4096) == 1
    assert "u is null" in last_error(kernel_library)
    assert quantized_call(kernel_library, layer, v=4096, u=4096, x_dtype=3) == 2
    assert "x @ v has the type 3" in last_error(kernel_library)


def test_nothing_to_multiply_is_no_error(kernel_library):
    assert quantized_call(kernel_library, m=0, x=None, y=None) == 0


def test_the_workspace_of_both_is_larger(kernel_library):
    """x8, scales, and x @ V lie behind what the GEMM needs."""
    layer = dataclasses.replace(LAYER, lorc_rank=8)
    more = kernel_library.quantized_workspace_bytes(layer, 100) - kernel_library.workspace_bytes(layer, 100)
    assert more >= 100 * layer.k + 4 * 100 + 2 * 8 * 100
    with pytest.raises(binding.NotSupportedError, match="rank 12"):
        kernel_library.quantized_workspace_bytes(dataclasses.replace(LAYER, lorc_rank=12), 1)


def test_a_kernel_that_quantizes_is_for_nothing_else(kernel_library):
    names = kernel_library.kernel_names()
    assert not any(kernel_library.describe_plan(LAYER, m)[0].endswith("q") for m in (1, 2, 8))
    try:
        kernel_library.tune(kernel=next(i for i, name in enumerate(names) if name.endswith("q")))
        with pytest.raises(binding.NotSupportedError, match="zqfpTune asks for"):
            kernel_library.describe_plan(LAYER, 1)
    finally:
        kernel_library.tune()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the pointers are not real: only for machines without a GPU"
)
def test_without_a_driver_cuda_errors_come_back(kernel_library):
    assert linear_call(kernel_library) == 5
    assert "CUDA error" in last_error(kernel_library)
    for m in (1, 100):
        assert quantized_call(kernel_library, m=m) == 5
        assert "CUDA error" in last_error(kernel_library)
    for function in QUANTIZERS:
        assert quantize_call(kernel_library, function) == 5
        assert "CUDA error" in last_error(kernel_library)
    # skip, sum, and with a scale a, may be missing.
    assert quantize_call(kernel_library, "zqfpQuantizeRmsNorm", skip=None, sum=None, a=None, scale=4096) == 5


@pytest.mark.parametrize("m", [1, 16, 17, 33, 100, 256, 1000, 8192])
@pytest.mark.parametrize(("n", "k"), [(8, 16), (4096, 4096), (28672, 8192), (4096, 14336), (128256, 4096)])
def test_plans_cover_the_output(kernel_library, n, k, m):
    layer = Layer(n=n, k=k, group_size=64)
    name, (workers, row_tiles, token_tiles, units, whole) = kernel_library.describe_plan(layer, m)
    size = {letter: int(number) for letter, number in re.findall(r"([a-z])(\d+)", name)}
    if "w" in size:
        rows, columns = 16, 128
    else:
        rows, columns = 64 * size["r"] * size.get("c", 1), 128 * size["s"]
    assert row_tiles * rows >= n > (row_tiles - 1) * rows
    assert token_tiles * size["t"] >= m > (token_tiles - 1) * size["t"]
    assert units * columns >= k > (units - 1) * columns
    cut = row_tiles * token_tiles - whole
    assert 0 <= cut < 2 * 132
    assert 1 <= workers * size.get("c", 1) * size.get("k", 1) <= 132
    assert cut == 0 or workers <= cut * units


# Tokens, and what an H100 ran fastest for each of them, within 4%: bench_gemm.py --variants, 2026-11-28.
MANY = (1, 16, 64, 128, 256, 1024, 4096)
FEW = (1, 8, 16)
SOME = (8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("n", "k", "tokens", "kernels"),
    [
        (28672, 8192, MANY, "t8r1s4p4k2 t16r1s4p4k2 t64r2s2 t128r1s2 t256r2s1 t256r2s1 t256r2s1c2"),
        (14336, 4096, MANY, "t8r2s2p4 t16r2s2p4 t64r2s2 t128r2s1 t256r2s1 t256r2s1 t256r2s1"),
        (4096, 14336, MANY, "t8w3 t16r1s4p4k2 t64r1s4k2 t128r1s2k2 t128r1s2 t256r2s1 t256r2s1"),
        (4096, 4096, MANY, "t8w2 t16r1s4p4k2 t128r1s2k2 t128r1s2k2 t128r1s2 t256r2s1 t256r2s1"),
        (28672, 8192, FEW, "t8r1s4p4k2 t8r1s4p4k2 t16r1s4p4k2"),
        (4096, 14336, FEW, "t8w3 t8r1s4p4k2 t16r1s4p4k2"),
        (14336, 4096, FEW, "t8r2s2p4 t8r2s2p4 t16r2s2p4"),
        (4096, 4096, FEW, "t8w2 t8w2 t16r1s4p4k2"),
        (1536, 1536, FEW, "t8w3 t8w2 t16w3"),
        (2048, 1536, FEW, "t8w3 t8w2 t16w3"),
        (1536, 8960, FEW, "t8w2 t8w2 t16r1s4p4"),
        (17920, 1536, FEW, "t8r2s2p4 t8r2s2p4 t16r2s2p4"),
        (12288, 4096, SOME, "t8r1s4p4k2 t16r1s4p4k2 t32r1s4p4 t64r2s2 t128r1s2k2 t256r2s1"),
        (22016, 4096, SOME, "t8r1s4p4 t16r1s4p4 t32r1s4p4 t64r2s2 t128r1s2 t256r2s1"),
        (4096, 11008, SOME, "t8r1s4p4k2 t16r1s4p4k2 t32r1s4p4k2 t64r1s4k2 t128r1s2k2 t128r1s2"),
        (5120, 5120, SOME, "t8w2 t16r1s4p4 t32r1s4p4 t64r1s4 t128r1s2 t128r1s2"),
    ],
)
def test_plans_choose_what_an_h100_ran_fastest(kernel_library, n, k, tokens, kernels):
    layer = Layer(n=n, k=k, group_size=64)
    assert " ".join(kernel_library.describe_plan(layer, m)[0] for m in tokens) == kernels


@pytest.mark.parametrize("k", [16400, 20480, 65536])
def test_a_kernel_that_cannot_hold_the_tokens_is_refused(kernel_library, k):
    """Strips keep x8 in shared memory, in at most eight chunks: no plan has them for more, nor can tuning."""
    layer = Layer(n=16, k=k, group_size=64)
    assert "w" not in kernel_library.describe_plan(layer, 1)[0]
    try:
        kernel_library.tune(kernel=kernel_library.kernel_names().index("t8w2"))
        assert kernel_library.describe_plan(Layer(n=16, k=16384, group_size=64), 1)[0] == "t8w2"
        with pytest.raises(binding.NotSupportedError, match=f"zqfpTune asks for cannot have k = {k}"):
            kernel_library.describe_plan(layer, 1)
    finally:
        kernel_library.tune()


def test_tuning_can_be_undone(kernel_library):
    layer = Layer(n=4096, k=4096, group_size=64)
    chosen = kernel_library.describe_plan(layer, 1)
    try:
        kernel_library.tune(kernel=7, cut=0)
        assert kernel_library.describe_plan(layer, 1)[0] == kernel_library.kernel_names()[7]
        with pytest.raises(binding.InvalidValueError, match="no kernel"):
            kernel_library.tune(kernel=1000)
    finally:
        kernel_library.tune()
    assert kernel_library.describe_plan(layer, 1) == chosen


@pytest.mark.parametrize("name", ["schedule_test", "sharing_test"])
def test_what_the_host_plans(repo_root, tmp_path, name):
    """Every unit of K is dealt once; kernels share multiprocessors with others, not with themselves."""
    source, program = repo_root / "tests" / "support" / f"{name}.cpp", tmp_path / name
    include = repo_root / "zqfp_compile" / "kernels" / "cuda"
    subprocess.run(["g++", "-std=c++17", "-O1", "-I", include, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_constants_are_those_of_the_header(repo_root):
    header = (repo_root / "zqfp_compile" / "kernels" / "include" / "zqfp.h").read_text()
    defined = dict(re.findall(r"#define (ZQFP_\w+) (\d+)", header))
    assert int(defined["ZQFP_ABI_VERSION"]) == binding.ABI_VERSION
    assert int(defined["ZQFP_WORKSPACE_ZEROED_BYTES"]) == binding.WORKSPACE_ZEROED_BYTES


def test_a_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv(binding.VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependencyError, match="make kernels"):
        binding.load_library()


def test_a_broken_library_is_diagnosed(monkeypatch, tmp_path):
    (tmp_path / binding.NAME).write_bytes(b"not a library")
    monkeypatch.setenv(binding.VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependencyError, match="does not load"):
        binding.load_library()


def test_make_kernels_without_nvcc_says_so(repo_root):
    done = subprocess.run(
        ["make", "kernels", "NVCC=/nonexistent/nvcc"],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "install the CUDA toolkit" in done.stderr


def test_an_overlapping_quantizer_reads_nothing_that_is_still_being_made(repo_root, tmp_path):
    """Before the wait it loads weights at most, V and gamma; nothing by ld.global.nc, which may run ahead."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    kernels = repo_root / "zqfp_compile" / "kernels"
    source, target = kernels / "cuda/quantize.cu", tmp_path / "quantize.ptx"
    options = ["-std=c++17", "-DNDEBUG", "-arch=compute_90a", "-ptx", f"-I{kernels / 'include'}"]
    subprocess.run(["nvcc", *options, str(source), "-o", str(target)], check=True)
    entries = target.read_text().split(".visible .entry ")[1:]
    assert len(entries) == 38
    for entry in entries:
        assert "ld.global.nc" not in entry
        before, after = entry.split("griddepcontrol.wait;")
        assert "ld.global.v4" in after or "cp.async.cg" in after
        loads = re.findall(r"ld\.global[.\w]*", before)
        # Of a row of V four bytes or eight; of gamma, in norms, sixteen once or twice. What is still being
        # made, of which a thread has sixteen or more, only after the wait. Of copies V's: two in each of two
        # stages.
        name = entry.split("(")[0]
        allowed = {"ld.global.u32", "ld.global.v2.u32"} if "LorcShape" in name else set()
        gammas = (1, 2) if "norm" in name.lower() else (0,)
        assert {load for load in loads if load != "ld.global.v4.u32"} <= allowed
        assert loads.count("ld.global.v4.u32") in gammas
        assert before.count("cp.async.cg") == (4 if "StagedShape" in name else 0)
