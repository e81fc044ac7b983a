import pytest
import torch

from zqfp_compile.quantize.lorc import low_rank_factors
from zqfp_compile.quantize.rtn import quantize_weight


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
    values = torch.linalg.svdvals(error)[:10]
    torch.testing.assert_close(v.norm(dim=0), values.sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(u.norm(dim=1), values.sqrt(), rtol=1e-4, atol=0)
    captured = error.square().sum() - (error.t() - v @ u).square().sum()
    torch.testing.assert_close(captured, values.square().sum(), rtol=1e-4, atol=0)


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
