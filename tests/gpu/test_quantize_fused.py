"""The quantizers of SiLU x up and of an RMS norm on an H100, against h in float64 and the quantizer of x.

make kernels && python -m pytest -q tests/gpu/test_quantize_fused.py
"""

import pytest
import torch
from graph_replays import check_replays
from silu_products import silu_mul

from zqfp_compile.kernels.library import QuantizerTensors

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs an H100 (sm_90)", allow_module_level=True)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPSILON = 1e-5
# Of codes, and of tokens' scales, on average: h computed in float32 may be rounded to its type the other
# way than in float64.
OFF_BY_A_STEP = 1e-4
OTHER_SCALES = 5e-3
DEVIATIONS = 5  # standard ones that their count may be above the average: x is random
SCALES = [None, 0.02]
SHAPES = [
    (1, 16),
    (1, 14336),
    (5, 4096),
    (17, 1040),
    (40, 8192),
    (100, 4096),
    (300, 28672),
    (3, 65536),
    (2048, 1536),
]
# Where the sum of x and skip goes: nowhere, into memory of its own, in place of x or of skip; and no skip.
SUMS = ["none", "new", "x", "skip", "no skip"]


def random_tokens(m, k, dtype):
    x = torch.randn(m, k, device="cuda") * torch.exp2(torch.randint(-4, 4, (m, 1), device="cuda"))
    return x.to(dtype)


def outputs(x, scale, v=None):
    """Poisoned."""
    static = None if scale is None else torch.tensor([scale], device="cuda")
    made = QuantizerTensors.empty(x, static, v)
    made.x8.view(torch.uint8).fill_(0x7F)
    made.a.fill_(float("nan"))
    if made.xv is not None:
        made.xv.fill_(float("nan"))
    return made


def ordered(x8):
    """E4M3 codes as numbers in the order of what they stand for."""
    code = x8.view(torch.uint8).to(torch.int16)
    return torch.where(code < 128, code, 128 - code)


class SiluMul:
    def __init__(self, m, k, dtype):
        self.gate, self.up = (random_tokens(m, k, dtype) for _ in range(2))
        self.h = silu_mul(self.gate, self.up).to(dtype)

    def quantize(self, library, made):
        library.quantize_silu_mul_into(self.gate, self.up, made)


class RmsNorm:
    def __init__(self, m, k, dtype, where="new"):
        self.x, self.skip = random_tokens(m, k, dtype), random_tokens(m, k, dtype)
        self.gamma = torch.randn(k, device="cuda").to(dtype)
        self.sum = self.x if where == "no skip" else self.x + self.skip
        wide = self.sum.double()
        norm = torch.sqrt(wide.square().mean(dim=1, keepdim=True) + EPSILON)
        self.h = (wide / norm * self.gamma.double()).to(dtype)
        self.where = where

    def quantize(self, library, made):
        x, skip = self.x.clone(), None if self.where == "no skip" else self.skip.clone()
        places = {"new": torch.full_like(x, float("nan")), "x": x, "skip": skip}
        place = places.get(self.where)
        library.quantize_rms_norm_into(x, self.gamma, EPSILON, made, skip=skip, sum_=place)
        assert place is None or torch.equal(place, self.sum)


def at_most(rate, count):
    """How many of ``count`` that come up at a rate may."""
    mean = rate * count
    return 1 + mean + DEVIATIONS * mean**0.5


def check(library, problem, scale):
    """x8 and a are those of h, but for what is written above; returns them."""
    made, wanted = outputs(problem.h, scale), outputs(problem.h, scale)
    problem.quantize(library, made)
    library.quantize_activation_into(problem.h, wanted)
    step = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}[problem.h.dtype]
    torch.testing.assert_close(made.a, wanted.a, rtol=step, atol=0)
    same = (made.a == wanted.a).expand(len(problem.h))
    if problem.h.dtype == torch.float32:  # many differ in the last place, which hardly ever changes a code
        same = torch.ones_like(same)
    assert int((~same).sum()) <= at_most(OTHER_SCALES, len(same))
    steps = (ordered(made.x8) - ordered(wanted.x8)).abs()
    assert int(steps.max()) <= 1
    assert int(steps[same].count_nonzero()) <= at_most(OFF_BY_A_STEP, steps.numel())
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_silu_mul(kernel_library, m, k, scale, dtype):
    check(kernel_library, SiluMul(m, k, dtype), scale)


@pytest.mark.parametrize("where", SUMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_rms_norm(kernel_library, m, k, scale, dtype, where):
    check(kernel_library, RmsNorm(m, k, dtype, where), scale)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rank", [8, 24, 32, 64])
@pytest.mark.parametrize(
    ("m", "k"), [(1, 4096), (1, 14336), (16, 1040), (33, 8192), (600, 272), (1000, 2048), (5000, 1040)]
)
def test_h_at_v(kernel_library, m, k, rank, dtype):
    """The product, and x8 and its scales as without LoRC, whose kernels are others."""
    v = torch.randn(k, rank, device="cuda").to(dtype)
    problems = [SiluMul(m, k, dtype), *(RmsNorm(m, k, dtype, where) for where in SUMS)]
    for problem in problems:
        for scale in SCALES:
            plain, made = check(kernel_library, problem, scale), outputs(problem.h, scale, v)
            problem.quantize(kernel_library, made)
            assert torch.equal(made.x8.view(torch.uint8), plain.x8.view(torch.uint8))
            assert torch.equal(made.a, plain.a)
            product = problem.h.double() @ v.double()
            # float32 accumulation, then one rounding: half of 2^-10 or 2^-7 of each number at most.
            error = (made.xv.double() - product).norm() / product.norm()
            assert error < (4e-4 if dtype == torch.float16 else 3e-3)


def test_tokens_do_not_depend_on_each_other(kernel_library):
    """A NaN in one token stays in that token."""
    others = torch.arange(20, device="cuda") != 5
    for problem in (SiluMul(20, 1040, torch.float16), RmsNorm(20, 1040, torch.float16, "no skip")):
        clean = check(kernel_library, problem, None)
        (problem.gate if isinstance(problem, SiluMul) else problem.x)[5, 100] = float("nan")
        made = outputs(problem.h, None)
        if isinstance(problem, SiluMul):
            problem.quantize(kernel_library, made)
        else:
            kernel_library.quantize_rms_norm_into(problem.x, problem.gamma, EPSILON, made)
        assert torch.equal(made.x8.view(torch.uint8)[others], clean.x8.view(torch.uint8)[others])
        assert bool(torch.isnan(made.x8[5].float()).any())


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("m", [1, 16])
def test_a_chain_in_a_graph_without_waiting(kernel_library, m, rank):
    """Each layer's sum takes the place of its input: what a missing wait between kernels would spoil."""
    k, layers = 4096, 16
    gammas = torch.randn(layers, k, device="cuda").half()
    start, gate = random_tokens(m, k, torch.float16), random_tokens(m, k, torch.float16)
    v = torch.randn(k, rank, device="cuda").half() if rank else None
    x = start.clone()
    made = [outputs(x, None, v) for _ in range(2 * layers)]

    def run():
        x.copy_(start)
        for i, gamma in enumerate(gammas):
            kernel_library.quantize_rms_norm_into(x, gamma, EPSILON, made[2 * i], skip=gate, sum_=x)
            kernel_library.quantize_silu_mul_into(gate, x, made[2 * i + 1])

    parts = [(one.x8.view(torch.uint8), one.a, one.xv) for one in made]
    check_replays(kernel_library, run, [part for one in parts for part in one if part is not None])
