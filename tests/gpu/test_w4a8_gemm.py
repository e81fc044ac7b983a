"""libzqfp on an H100 against the float64 reference: fresh random data, poisoned outputs, every kernel.

make kernels && python -m pytest -q tests/gpu/test_w4a8_gemm.py
"""

import dataclasses
import os

import numpy as np
import pytest
import torch
from silu_products import gated

from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.scales import legal_scales
from zqfp_compile.kernels import reference
from zqfp_compile.kernels.library import WORKSPACE_ZEROED_BYTES, Layer, WrongArchitectureError
from zqfp_compile.kernels.torch_linear import PackedWeight, TorchLinear

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs an H100 (sm_90)", allow_module_level=True)

# Another seed each run: the kernels must be right for any data. A failing test prints it.
SEED = int(os.environ.get("ZQFP_SEED", np.random.SeedSequence().entropy % 2**31))


def generator():
    return np.random.default_rng(SEED)


@pytest.fixture(autouse=True)
def print_seed():
    print(f"ZQFP_SEED={SEED}")


class Problem:
    """A random layer, on the GPU and as the reference's arrays."""

    def __init__(self, library, layer, *, max_rows, constraint="e4m3", bias=True, scale=None):
        rng, self.layer = generator(), layer
        padded = -(-layer.k // layer.group_size) * layer.group_size
        self.codes = rng.integers(-7, 8, (layer.n, padded)).astype(np.int8)
        self.codes[:, layer.k :] = 0
        # Every legal exponent: groups next to each other differ by up to 2^11.
        self.group_scales = rng.choice(legal_scales(constraint, E2M1), (layer.n, padded // layer.group_size))
        self.row_scales = np.exp2(rng.uniform(-12, -6, layer.n)).astype(np.float32)
        self.factors = {"bias": None, "v": None, "u": None}
        if bias:
            self.factors["bias"] = torch.from_numpy(rng.standard_normal(layer.n)).to(layer.dtype)
        if layer.lorc_rank:
            v = rng.standard_normal((layer.k, layer.lorc_rank)) / np.sqrt(layer.k)
            u = rng.standard_normal((layer.lorc_rank, layer.n))
            self.factors |= {
                "v": torch.from_numpy(v).to(layer.dtype),
                "u": torch.from_numpy(u).to(layer.dtype),
            }
        self.scale = scale
        weight = PackedWeight.pack(self.codes, self.group_scales, self.row_scales, layer.group_size)
        self.linear = TorchLinear(library, layer, weight, max_rows=max_rows, scale=scale, **self.factors)

    def input(self, m):
        x = generator().standard_normal((m, self.layer.k)) * np.exp2(generator().uniform(-3, 3, (m, 1)))
        return torch.from_numpy(x.astype(np.float32)).to("cuda", self.layer.dtype)

    def expected(self, x8, a, xv):
        """The reference on the GPU in float64, from what the quantizer gave."""
        w8 = reference.decode_weight(self.codes, self.group_scales, self.layer.group_size, self.layer.k)
        y = x8.to(torch.float64) @ torch.from_numpy(w8).to("cuda", torch.float64).t()
        y *= a.double().reshape(-1, 1) * torch.from_numpy(self.row_scales).cuda().double()
        if xv is not None:
            y += xv.double() @ self.linear.u.double()
        if self.linear.bias is not None:
            y += self.linear.bias.double()
        return y

    def check(self, m):
        x8, a, xv = self.linear.quantize(self.input(m))
        y = self.linear.empty(m)
        for output in y if isinstance(y, tuple) else (y,):
            output.fill_(float("nan"))
        self.linear.multiply(x8, a, xv, y)
        torch.cuda.synchronize()
        y = torch.cat(y, dim=1) if isinstance(y, tuple) else y
        assert bool(torch.isfinite(y).all()), "part of the output was not written"
        error = relative_error(y, self.expected(x8, a, xv))
        assert error < self.linear.tolerance(m), f"relative error {error:.2e} for {self.layer}, m = {m}"
        counters = self.linear.workspace[:WORKSPACE_ZEROED_BYTES]
        assert not bool(counters.any()), "arrival counters were not left at zero"
        return y


def relative_error(y, wanted):
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "m", [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 128, 129, 250, 256, 300, 513, 1024]
)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rows(kernel_library, group_size, m):
    Problem(kernel_library, Layer(1024, 2048, group_size), max_rows=m).check(m)


@pytest.mark.parametrize("m", [1, 16, 48, 200])
@pytest.mark.parametrize(("n", "k"), [(8, 16), (72, 144), (520, 1040), (1000, 400), (4160, 528), (64, 8192)])
def test_odd_shapes(kernel_library, n, k, m):
    Problem(kernel_library, Layer(n, k, 32), max_rows=m).check(m)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8, 24, 32, 40, 64])
@pytest.mark.parametrize("m", [1, 40, 300])
def test_lorc_dtype_scale(kernel_library, rank, dtype, per_token, m):
    layer = Layer(776, 1040, 64, lorc_rank=rank, dtype=dtype, per_token=per_token)
    Problem(kernel_library, layer, max_rows=m, scale=None if per_token else 0.03).check(m)


@pytest.mark.parametrize("constraint", ["m1", "m2", "e4m3"])
def test_constraints(kernel_library, constraint):
    Problem(kernel_library, Layer(512, 1024, 64), max_rows=16, constraint=constraint).check(16)


@pytest.mark.parametrize(
    ("n", "k", "m"), [(4096, 4096, 1), (4096, 14336, 16), (4096, 4096, 8192), (14336, 4096, 2048)]
)
def test_the_issues_shapes(kernel_library, n, k, m):
    layer = Layer(n, k, 64, lorc_rank=32)
    Problem(kernel_library, layer, max_rows=m).check(m)


@pytest.mark.parametrize("m", [1, 16, 48, 200, 1000])
@pytest.mark.parametrize("outputs", [(4096, 1024, 1024), (64, 64, 320, 8), (448, 1096)])
def test_several_outputs(kernel_library, outputs, m):
    layer = Layer(sum(outputs), 1040, 64, lorc_rank=24, outputs=outputs)
    Problem(kernel_library, layer, max_rows=m).check(m)


# Of two numbers rounded once that were nearly the same.
LAST_PLACE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def check_gated(library, layer, m):
    """The gated layer's y against SiLU times up of the y that the same kernel writes without."""
    problem = Problem(library, layer, max_rows=m)
    problem.linear.weight.row_scales.mul_(1 / 16)  # no product overflows
    x8, a, xv = problem.linear.quantize(problem.input(m))
    wanted = gated(problem.linear.multiply(x8, a, xv)).to(layer.dtype)
    problem.linear.layer = dataclasses.replace(layer, gated=True)
    h = torch.full_like(wanted, float("nan"))
    problem.linear.multiply(x8, a, xv, h)
    torch.testing.assert_close(h, wanted, rtol=LAST_PLACE[layer.dtype], atol=2.0**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("m", [1, 5, 16, 48, 100, 200, 1000, 2048])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (720, 1040), (22016, 528)])
def test_gated(kernel_library, n, k, m, rank, dtype):
    check_gated(kernel_library, Layer(n, k, 64, lorc_rank=rank, dtype=dtype), m)


@pytest.mark.parametrize("cut", [0, 1])
def test_every_kernel(kernel_library, cut):
    """Each kernel of the table, also where no plan would choose it, with whole and with cut tiles."""
    failures = []
    for index, name in enumerate(kernel_library.kernel_names()):
        if name.endswith("q"):
            continue  # it quantizes its tokens: test_quantized_linear.py
        kernel_library.tune(index, cut)
        try:
            for n, k, m in ((1096, 1168, 70), (64, 4096, 5), (4096, 1024, 300), (8200, 1040, 3)):
                layer = Layer(n, k, 64, lorc_rank=40)
                Problem(kernel_library, layer, max_rows=m).check(m)
            check_gated(kernel_library, Layer(1104, 1168, 64, lorc_rank=40), 70)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
        finally:
            kernel_library.tune()
    assert not failures, "\n".join(failures)


def test_results_repeat_bit_for_bit(kernel_library):
    problem = Problem(kernel_library, Layer(4096, 4096, 64, lorc_rank=32), max_rows=16)
    first = problem.check(16)
    for _ in range(20):
        assert torch.equal(problem.check(16), first)


def test_rows_do_not_depend_on_each_other(kernel_library):
    """A NaN in one token stays in that token."""
    problem = Problem(kernel_library, Layer(512, 1024, 64), max_rows=32)
    x = problem.input(32)
    x[5, 100] = float("nan")
    y = problem.linear(x)
    assert bool(torch.isnan(y[5]).all())
    assert bool(torch.isfinite(y[torch.arange(32) != 5]).all())


@pytest.fixture(params=[0, 1], ids=["apart", "overlapping"])
def overlap(request, kernel_library):
    """Kernels that wait for the one before to end, and kernels that start while it ends."""
    kernel_library.tune(overlap=request.param)
    yield request.param
    kernel_library.tune()


def test_captured_in_a_graph(kernel_library, overlap):
    problem = Problem(kernel_library, Layer(2048, 4096, 64, lorc_rank=16), max_rows=4)
    x = problem.input(4)
    problem.linear(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = problem.linear(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(y, problem.expected(*problem.linear.quantize(x))) < problem.linear.tolerance(4)


def test_a_chain_of_layers_without_waiting(kernel_library, overlap):
    """Outputs become inputs, buffers are used again: what a missing wait between kernels would spoil."""
    layers = [Layer(4096, 4096, 64, lorc_rank=16), Layer(4096, 4096, 64), Layer(4096, 4096, 32, lorc_rank=32)]
    problems = [Problem(kernel_library, layer, max_rows=16) for layer in layers]
    for problem in problems:
        problem.linear.weight.row_scales.mul_(1 / 16)  # no overflow after three layers
    x = problems[0].input(16)
    expected, y = [], x
    for problem in problems:
        y = problem.linear(y)
        torch.cuda.synchronize()
        expected.append(y)
    assert bool(torch.isfinite(y).all())
    for _ in range(50):
        outputs, y = [], x
        for problem in problems:
            y = problem.linear(y)
            outputs.append(y)
        for y, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(y, wanted)


def test_one_workspace_serves_many_layers(kernel_library, overlap):
    """Calls of different layers follow each other on one stream and share the workspace."""
    layers = [Layer(4096, 4096, 64), Layer(520, 1040, 32, lorc_rank=8), Layer(1024, 8192, 128)]
    problems = [Problem(kernel_library, layer, max_rows=64) for layer in layers]
    largest = max((problem.linear.workspace for problem in problems), key=torch.Tensor.numel)
    for problem in problems:
        problem.linear.workspace = largest
    for m in (1, 64, 3, 16):
        for problem in problems:
            problem.check(m)


# ---- the quantizer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [None, 0.02])
@pytest.mark.parametrize(("m", "k"), [(1, 16), (1, 8192), (5, 4096), (17, 1040), (300, 28672)])
def test_quantizer_is_exact(kernel_library, m, k, scale, dtype):
    x = (torch.randn(m, k, device="cuda") * torch.exp2(torch.randint(-8, 6, (m, 1), device="cuda"))).to(dtype)
    static = None if scale is None else torch.tensor([scale], device="cuda")
    x8, a, xv = kernel_library.quantize_activation(x, static)
    wanted, wanted_scale = reference.quantize_activation(x.float().cpu().numpy(), scale)
    assert xv is None
    assert np.array_equal(a.cpu().numpy(), wanted_scale)
    assert np.array_equal(x8.float().cpu().numpy(), wanted)


def test_quantizer_of_zeros_and_ties(kernel_library):
    values = torch.tensor(
        [0.0, -0.0, 448.0, 1000.0, -1e4, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-11, -(2.0**-9)] + [0.0] * 6
    )
    x = values.cuda().reshape(1, 16)
    x8, _, _ = kernel_library.quantize_activation(x, torch.ones(1, device="cuda"))
    assert np.array_equal(
        x8.float().cpu().numpy(), reference.quantize_activation(values.numpy()[None], 1.0)[0]
    )
    x8, a, _ = kernel_library.quantize_activation(torch.zeros(3, 16, device="cuda"))
    assert not bool(x8.float().any())
    assert bool((a > 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", range(8, 65, 8))
@pytest.mark.parametrize(
    ("m", "k"),
    [
        *((1, 4096), (16, 272), (16, 1040), (33, 8192)),
        # Many tokens: blocks without columns; x in shared memory for good, and read twice.
        *((512, 16), (600, 272), (777, 1040), (1000, 2048), (1024, 14336), (2100, 8208), (5000, 1040)),
    ],
)
def test_x_at_v(kernel_library, m, k, rank, dtype):
    """The product, and x8 and its scales as without LoRC, whose kernels are others."""
    x, v = torch.randn(m, k, device="cuda").to(dtype), torch.randn(k, rank, device="cuda").to(dtype)
    for scale in (None, torch.full((1,), 0.02, device="cuda")):
        x8, a, xv = kernel_library.quantize_activation(x, scale, v)
        plain8, plain_a, _ = kernel_library.quantize_activation(x, scale)
        assert torch.equal(x8.view(torch.uint8), plain8.view(torch.uint8)) and torch.equal(a, plain_a)
        # float32 accumulation, then one rounding: half of 2^-10 or 2^-7 of each number at most.
        assert relative_error(xv, x.double() @ v.double()) < (4e-4 if dtype == torch.float16 else 3e-3)


def test_another_architecture_is_named(kernel_library):
    others = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) != (9, 0)]
    if not others:
        pytest.skip("every device here is sm_90")
    with torch.cuda.device(others[0]), pytest.raises(WrongArchitectureError, match="compute capability"):
        kernel_library.quantize_activation(torch.zeros(1, 16, device="cuda"))
