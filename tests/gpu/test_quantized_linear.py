"""Quantizer and linear layer in one call on an H100, against the two calls.

make kernels && python -m pytest -q tests/gpu/test_quantized_linear.py
"""

import dataclasses
import itertools

import pytest
import torch
from graph_replays import check_replays
from silu_products import gated as silu_product

from zqfp_compile.kernels.library import (
    WORKSPACE_ZEROED_BYTES,
    Activation,
    Layer,
    QuantizerTensors,
    Source,
)
from zqfp_compile.kernels.packing import packed_sizes
from zqfp_compile.kernels.torch_linear import PackedWeight, TorchLinear

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs an H100 (sm_90)", allow_module_level=True)

EPSILON = 1e-5
SOURCES = [*Source]
# y is rounded once to its type; its sums are added in another order, and those of a norm as well, so that h
# may be rounded the other way here and there. A lost block of K would give 0.05 or more.
DIFFERENCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


def random_weight(n, k, group_size):
    """Any bytes are codes; scales of 0.5, 1 and 2 are packed as they are."""
    codes, scales = packed_sizes(n, k, group_size)
    powers = torch.tensor([0x30, 0x38, 0x40], dtype=torch.uint8, device="cuda")
    return PackedWeight(
        codes=torch.randint(0, 256, (codes,), dtype=torch.uint8, device="cuda"),
        group_scales=powers[torch.randint(0, 3, (scales,), device="cuda")],
        row_scales=torch.exp2(torch.empty(n, device="cuda").uniform_(-12, -8)),
    )


def random_activation(source, m, k, dtype, *, skip=True):
    """A norm's sum is poisoned."""
    x, other = (torch.randn(m, k, device="cuda").to(dtype) for _ in range(2))
    if source == Source.PLAIN:
        return Activation(source, x)
    if source == Source.SILU_MUL:
        return Activation(source, x, other)
    gamma = torch.randn(k, device="cuda").to(dtype)
    total = torch.full_like(x, float("nan")) if skip else None
    return Activation(source, x, other if skip else None, gamma, EPSILON, sum_=total)


def random_factors(n, k, rank):
    """V and U whose product is about as large as that with a random weight; none of rank 0."""
    return {"v": torch.randn(k, rank) / k**0.5, "u": torch.randn(rank, n) / 16} if rank else {}


def empty(linear, m):
    """Poisoned."""
    y = linear.empty(m)
    for output in y if isinstance(y, tuple) else (y,):
        output.fill_(float("nan"))
    return y


def apart(linear, activation):
    """y, and the sum, of the two calls."""
    made = QuantizerTensors.empty(activation.x, linear.scale, linear.v)
    total = None if activation.sum_ is None else torch.empty_like(activation.sum_)
    if activation.source == Source.SILU_MUL:
        linear.library.quantize_silu_mul_into(activation.x, activation.other, made)
    elif activation.source == Source.RMS_NORM:
        linear.library.quantize_rms_norm_into(
            activation.x, activation.gamma, EPSILON, made, skip=activation.other, sum_=total
        )
    else:
        linear.library.quantize_activation_into(activation.x, made)
    return linear.multiply(made.x8, made.a, made.xv, empty(linear, len(activation.x))), total


def side_by_side(y):
    return torch.cat(y, dim=1) if isinstance(y, tuple) else y


def check(linear, activation, wanted, total, *, exact):
    """The kernels of ``exact`` calls add in the same order."""
    got = linear.quantized(activation, empty(linear, len(activation.x)))
    wanted, got = side_by_side(wanted), side_by_side(got)
    if exact:
        assert torch.equal(got, wanted)
    else:
        error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
        assert error < DIFFERENCE[got.dtype]
    assert total is None or torch.equal(activation.sum_, total)


@pytest.fixture
def one_launch(kernel_library):
    """Makes one kernel of two tokens as well, which by themselves are quantized by another."""
    kernel_library.tune(kernel=kernel_library.kernel_names().index("t2w3g3q"))
    yield
    kernel_library.tune()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"),
    [
        (1, 4096, 4096, 64),
        (1, 72, 1040, 32),
        (2, 200, 4096, 128),
        (2, 1000, 400, 64),
        (1, 8, 16, 32),
        (1, 4096, 11008, 64),
        (2, 136, 16400, 32),
        (2, 520, 4240, 32),
        (1, 28672, 8192, 64),
        (1, 8192, 28672, 64),
        (2, 264, 20480, 128),
    ],
)
def test_one_kernel_gives_what_two_give(
    kernel_library, m, n, k, group_size, source, per_token, dtype, request
):
    layer = Layer(n, k, group_size, dtype=dtype, per_token=per_token)
    weight = random_weight(n, k, group_size)
    scale = None if per_token else 0.03
    linear = TorchLinear(kernel_library, layer, weight, max_rows=m, scale=scale, bias=torch.randn(n))
    activation = random_activation(source, m, k, dtype)
    wanted, total = apart(linear, activation)
    request.getfixturevalue("one_launch")
    check(linear, activation, wanted, total, exact=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "rank"),
    [
        (1, 4096, 4096, 64, 16),
        (1, 72, 1040, 32, 24),
        (2, 200, 4096, 128, 64),
        (1, 8, 16, 32, 8),
        (1, 4096, 11008, 64, 32),
        (2, 136, 16400, 32, 40),
        (1, 28672, 8192, 64, 64),
        (1, 8192, 28672, 64, 16),
    ],
)
def test_one_kernel_multiplies_by_v(
    kernel_library, m, n, k, group_size, rank, source, per_token, dtype, request
):
    """x @ V is rounded to 16 bits, as where a kernel of its own makes it, of sums in another order."""
    layer = Layer(n, k, group_size, lorc_rank=rank, dtype=dtype, per_token=per_token)
    factors, scale = random_factors(n, k, rank), None if per_token else 0.03
    weight = random_weight(n, k, group_size)
    linear = TorchLinear(kernel_library, layer, weight, max_rows=m, scale=scale, **factors)
    activation = random_activation(source, m, k, dtype)
    wanted, total = apart(linear, activation)
    request.getfixturevalue("one_launch")
    check(linear, activation, wanted, total, exact=False)
    again = empty(linear, m)
    assert torch.equal(linear.quantized(activation, again), linear.quantized(activation))
    assert not linear.workspace[:WORKSPACE_ZEROED_BYTES].any()


def test_two_streams_wait_for_none_of_each_other(kernel_library):
    """Blocks of two kernels come as there is room: neither may wait for one that has not begun."""
    n, k, calls = 4096, 11008, 400
    layer = Layer(n, k, 64, lorc_rank=16)
    linears = [
        TorchLinear(kernel_library, layer, random_weight(n, k, 64), max_rows=1, **random_factors(n, k, 16))
        for _ in range(2)
    ]
    activations = [random_activation(Source.SILU_MUL, 1, k, torch.float16) for _ in linears]
    wanted = [linear.quantized(x) for linear, x in zip(linears, activations, strict=True)]
    outputs = [torch.empty(calls, n, dtype=torch.float16, device="cuda") for _ in linears]
    streams = [torch.cuda.Stream() for _ in linears]
    torch.cuda.synchronize()
    for call in range(calls):
        for linear, activation, stream, output in zip(linears, activations, streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                linear.quantized(activation, output[call : call + 1])
    torch.cuda.synchronize()
    for output, once in zip(outputs, wanted, strict=True):
        assert torch.equal(output, once.expand_as(output))


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("m", [1, 2, 5, 16, 40, 600])
def test_the_plans_choice(kernel_library, m, source, per_token, rank):
    """One launch or two, with several outputs; where two, the same kernels run as in two calls."""
    layer = Layer(456, 1040, 64, lorc_rank=rank, per_token=per_token, outputs=(64, 320, 72))
    factors, scale = random_factors(456, 1040, rank), None if per_token else 0.03
    weight = random_weight(456, 1040, 64)
    linear = TorchLinear(kernel_library, layer, weight, max_rows=m, scale=scale, **factors)
    for skip in (True, False):
        activation = random_activation(source, m, 1040, torch.float16, skip=skip)
        check(linear, activation, *apart(linear, activation), exact=m > 1)


def test_a_sum_in_place(kernel_library):
    """Other blocks would still read what the sum replaces: that is two launches."""
    layer = Layer(256, 1040, 64)
    linear = TorchLinear(kernel_library, layer, random_weight(256, 1040, 64), max_rows=1)
    activation = random_activation(Source.RMS_NORM, 1, 1040, torch.float16)
    wanted, total = apart(linear, activation)
    in_place = Activation(
        Source.RMS_NORM, activation.x, activation.other, activation.gamma, EPSILON, sum_=activation.x
    )
    got = linear.quantized(in_place, empty(linear, 1))
    assert torch.equal(got, wanted)
    assert torch.equal(activation.x, total)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("rank", [0, 16])
def test_gated(kernel_library, m, source, rank, request):
    """The same numbers, gated, and one of two places may be rounded the other way."""
    n, k = 1104, 1040
    layer = Layer(n, k, 64, lorc_rank=rank, per_token=False)
    weight, factors = random_weight(n, k, 64), random_factors(n, k, rank)
    linear = TorchLinear(kernel_library, layer, weight, max_rows=m, scale=0.03, **factors)
    activation = random_activation(source, m, k, torch.float16)
    request.getfixturevalue("one_launch")
    wanted = silu_product(linear.quantized(activation)).half()
    linear.layer = dataclasses.replace(layer, gated=True)
    got = linear.quantized(activation, empty(linear, m))
    torch.testing.assert_close(got, wanted, rtol=2.0**-10, atol=2.0**-24)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("m", [1, 4])
def test_a_chain_in_a_graph_without_waiting(kernel_library, m, rank, gated):
    """Each layer reads what the one before wrote: what a missing wait between kernels would spoil.

    With LoRC, of the second layers alone, kernels of one kind come after those of the other.
    """
    width, inner, layers = 4096, 2048, 8
    gammas = torch.randn(layers, width, device="cuda").half()
    start = torch.randn(m, width, device="cuda").half()
    wide = Layer(2 * inner, width, 64, outputs=() if gated else (inner, inner), gated=gated)
    narrow = Layer(width, inner, 64, lorc_rank=rank)
    v, u = (torch.randn(inner, rank) / 45, torch.randn(rank, width) / 100) if rank else (None, None)
    up, down = (
        [
            TorchLinear(kernel_library, layer, random_weight(layer.n, layer.k, 64), max_rows=m, **factors)
            for _ in gammas
        ]
        for layer, factors in ((wide, {}), (narrow, {"v": v, "u": u}))
    )
    sums = [torch.empty_like(start) for _ in gammas]
    middles = [linear.empty(m) for linear in up]
    outputs = [linear.empty(m) for linear in down]

    def run():
        x, skip = start, start
        for i, gamma in enumerate(gammas):
            norm = Activation(Source.RMS_NORM, x, skip, gamma, EPSILON, sum_=sums[i])
            h = up[i].quantized(norm, middles[i])
            activation = Activation(Source.PLAIN, h) if gated else Activation(Source.SILU_MUL, *h)
            skip = down[i].quantized(activation, outputs[i])
            x = sums[i]

    written = middles if gated else itertools.chain.from_iterable(middles)
    check_replays(kernel_library, run, [*sums, *written, *outputs])
