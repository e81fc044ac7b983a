import pytest
import torch

from zqfp_compile.quantize.lorc import low_rank_factors as low_rank
from zqfp_compile.quantize.rtn import quantize_weight


def low_rank_factors(*args, **options):
    factors = low_rank(*args, **options)
    return factors.v, factors.u


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k"), [(40, 100), (100, 40), (700, 300), (300, 700)])
def test_recovers_a_low_rank_error(n, k):
    error = normal(n, 5) @ normal(5, k, seed=1)
    v, u = low_rank_factors(error, 5)
    assert (v.shape, u.shape, v.dtype, u.dtype) == ((k, 5), (5, n), torch.float32, torch.float32)
    # float32 arithmetic on values of about 10
    torch.testing.assert_close(v @ u, error.t(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_captures_what_the_exact_svd_captures(rank):
    weight = normal(700, 320) * 0.02
    error = weight - torch.from_numpy(quantize_weight(weight).dequantize())
    v, u = low_rank_factors(error, rank)
    captured = error.square().sum() - (error.t() - v @ u).square().sum()
    best = torch.linalg.svdvals(error)[:rank].square().sum()
    # White error is the worst case of the randomised method; 0.96 or more measured.
    assert 0.93 * best < captured <= best * 1.001


def test_small_matrices_are_exact_and_balanced():
    error = normal(64, 48)
    v, u = low_rank_factors(error, 10)
    # Both factors must fit float16 alike: their largest values are a power of two's rounding apart.
    assert bool(((u.abs().amax(dim=1) / v.abs().amax(dim=0)).log2().abs() <= 1).all())
    captured = error.square().sum() - (error.t() - v @ u).square().sum()
    best = torch.linalg.svdvals(error)[:10].square().sum()
    torch.testing.assert_close(captured, best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-31, 1e-29, 1e-20])
def test_tiny_errors_give_finite_factors(size, dtype):
    for factor in low_rank_factors(normal(40, 16) * size, 5, dtype=dtype):
        assert bool(torch.isfinite(factor).all())


@pytest.mark.parametrize("seed", range(24))
def test_directions_that_the_moment_does_not_see(seed):
    """Equal tokens, an error that GPTQ has turned away from them: dividing by rounding made huge factors."""
    x = normal(1, 40, seed=seed).expand(12, 40)
    error = normal(16, 40, seed=seed + 100) * 50
    error -= (1 - 1e-4) * (error @ x[0])[:, None] * x[0] / x[0].square().sum()
    v, u = low_rank_factors(error, 5, moment=x.t() @ x / 12)
    # Balanced factors of an error whose largest singular value is 500 stay near its root.
    assert float(v.abs().max()) < 50 and float(u.abs().max()) < 50


@pytest.mark.parametrize("n", [64, 600])
def test_a_full_moment_decides_what_is_compensated(n):
    error, mix = normal(n, 200), normal(200, 200, seed=2)
    moment = mix @ torch.diag(torch.linspace(0, 3, 200).exp()) @ mix.t()

    def left(factors):
        v, u = factors
        rest = error.t() - v @ u
        return float((rest * (moment @ rest)).sum())

    best = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(moment.double()))[8:].square().sum()
    weighed = left(low_rank_factors(error, 8, moment=moment))
    # The randomised method may miss a little of the rest.
    assert float(best) * 0.999 < weighed < float(best) * 1.03
    assert weighed < 0.9 * left(low_rank_factors(error, 8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "fp8"])
def test_factors_are_values_of_their_storage_type(dtype):
    error = 1e-3 * normal(90, 300)
    exact = low_rank(error, 16)
    stored = low_rank(error, 16, dtype=dtype)
    for factor, scale, axis in ((stored.v, stored.v_scale, 0), (stored.u, stored.u_scale, 1)):
        if dtype == "fp8":
            codes = factor / scale.unsqueeze(axis)
            rounded = codes.to(torch.float8_e4m3fn).float()
            # One division after one multiplication: off by the last bit of a float32 at most.
            torch.testing.assert_close(codes, rounded, rtol=2e-7, atol=0)
            assert float(rounded.abs().amax()) == 448.0
        else:
            assert scale is None
            assert torch.equal(factor, factor.to(getattr(torch, dtype)).float())
    # Half a step is 2^-12, 2^-9, 2^-5 of a value: these are well above the squares.
    lost = {"float16": 1e-5, "bfloat16": 1e-3, "fp8": 0.02}[dtype]
    best, kept = ((error - factors.weight()).square().sum() for factors in (exact, stored))
    captured = error.square().sum() - best
    assert best <= kept <= best + lost * captured


def test_rank_is_cut_and_full_rank_is_exact():
    error = normal(6, 20)
    v, u = low_rank_factors(error, 64)
    assert v.shape == (20, 6)
    torch.testing.assert_close(v @ u, error.t(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="rank 0"):
        low_rank_factors(error, 0)


def test_is_a_function_of_its_arguments():
    error = normal(400, 300)
    first = low_rank_factors(error, 8)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = low_rank_factors(error, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert not torch.equal(first[0], low_rank_factors(error, 8, seed=1)[0])


def test_does_not_depend_on_the_number_of_threads():
    error = normal(400, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = low_rank_factors(error, 8)
        assert torch.get_num_threads() == 2, "the caller's setting is restored"
        torch.set_num_threads(1)
        second = low_rank_factors(error, 8)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_zero_error():
    v, u = low_rank_factors(torch.zeros(300, 400), 4)
    assert torch.equal(v @ u, torch.zeros(400, 300))


@pytest.mark.parametrize("n", [64, 600])
def test_energies_of_the_inputs_decide_what_is_compensated(n):
    error = normal(n, 300)
    energy = torch.ones(300).index_fill(0, torch.tensor([7, 100]), 1000.0)
    weighed = low_rank_factors(error, 8, moment=energy)
    plain = low_rank_factors(error, 8)

    def left(factors):
        v, u = factors
        return float((energy[:, None] * (error.t() - v @ u).square()).sum())

    # Two channels hold 87% of the energy and rank 8 can take both out; the plain SVD does not know them.
    assert left(weighed) < 0.3 * left(plain)
    best = torch.linalg.svdvals(error * energy.sqrt())[8:].square().sum()
    # The randomised method may miss a little of the white rest.
    assert left(weighed) == pytest.approx(float(best), rel=0.02)


def test_equal_energies_are_the_plain_svd():
    error = normal(50, 40)
    for energy in (torch.full((40,), 3.0), torch.zeros(40)):
        for weighed, plain in zip(
            low_rank_factors(error, 4, moment=energy), low_rank_factors(error, 4), strict=True
        ):
            torch.testing.assert_close(weighed, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("energy", [torch.ones(3), -torch.ones(40), torch.full((40,), torch.nan)])
def test_wrong_energies_are_refused(energy):
    with pytest.raises(ValueError, match="channel"):
        low_rank_factors(normal(50, 40), 4, moment=energy)
