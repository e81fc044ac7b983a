"""GPTQ, its descent and refits, the correction of drift, LoRC on top: ``quantize_layer`` and its parts."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from zqfp_compile.errors import ModelError
from zqfp_compile.quantize import layer as layer_module
from zqfp_compile.quantize import moments as moments_module
from zqfp_compile.quantize.activation import token_scales
from zqfp_compile.quantize.descent import descend, refit_rows, refit_scales
from zqfp_compile.quantize.gptq import gptq_round
from zqfp_compile.quantize.grid import WeightGrid, decoded
from zqfp_compile.quantize.layer import (
    LayerOptions,
    LayerTask,
    QuantizedLayer,
    corrected,
    quantize_layer,
    quantize_layers,
    work_items,
)
from zqfp_compile.quantize.moments import InputMoments, damp
from zqfp_compile.quantize.products import full_products, halved, short_products
from zqfp_compile.quantize.rounding import round_minifloat
from zqfp_compile.quantize.rtn import quantize_tensors
from zqfp_compile.quantize.threads import DeviceThreads, side_by_side

N, K = 24, 80  # K is no multiple of 32 or 64: the last group is padded
CONSTRAINTS = ("none", "m1", "m2", "e4m3")
FORMS = [*itertools.product(("e2m1", "e3m0", "int4"), CONSTRAINTS), ("fp8", "e4m3")]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(k: int = K, tokens: int = 600, seed: int = 1) -> torch.Tensor:
    """Rows [tokens, k] whose channels are correlated and of very different loudness, as LLM inputs are."""
    mix = normal(k, k, seed=seed) / k**0.5 + torch.eye(k)
    return (
        normal(tokens, k, seed=seed + 1)
        @ mix
        * torch.logspace(-1, 1, k)[torch.randperm(k, generator=torch.Generator().manual_seed(9))]
    )


def moments_of(x: torch.Tensor, original: torch.Tensor | None = None) -> InputMoments:
    moments = InputMoments(x.shape[-1], cross=original is not None)
    moments.add(x, original)
    return moments


def cost(error: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ``tr(E G E^T)``."""
    error, gram = error.double(), gram.double()
    return float(((error @ gram) * error).sum())


def start_of(weight: torch.Tensor, form: str, constraint: str, group_size: int = 32):
    return quantize_tensors(
        weight, weight_format=form, group_size=group_size, scale_constraint=constraint, name="w"
    )


def same(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    parts = [(a.weight.codes, b.weight.codes), (a.weight.row_scales, b.weight.row_scales)]
    if a.weight.group_scales is not None:
        parts.append((a.weight.group_scales, b.weight.group_scales))
    if a.lorc is not None and b.lorc is not None:
        parts += [(a.lorc.v, b.lorc.v), (a.lorc.u, b.lorc.u)]
    return all(np.array_equal(np.asarray(left), np.asarray(right)) for left, right in parts)


# Output error of the result over that of round-to-nearest, at most. Measured: 0.29 to 0.53.
@pytest.mark.parametrize(("form", "constraint"), FORMS)
def test_gptq_beats_rounding_to_nearest(form: str, constraint: str) -> None:
    weight, moments = normal(N, K), moments_of(inputs())
    options = LayerOptions(weight_format=form, scale_constraint=constraint, group_size=32)
    nearest = quantize_layer(weight, dataclasses.replace(options, algorithm="rtn"), moments=moments)
    found = quantize_layer(weight, options, moments=moments)
    before, after = (cost(weight - layer.effective_weight(), moments.gram) for layer in (nearest, found))
    assert after < 0.6 * before


def test_it_beats_rounding_on_tokens_it_has_not_seen() -> None:
    weight, rows = normal(N, K), inputs(tokens=3000)
    moments = moments_of(rows[:2000])
    error = {}
    for algorithm in ("rtn", "gptq"):
        options = LayerOptions(algorithm=algorithm, group_size=32)
        layer = quantize_layer(weight, options, moments=moments)
        error[algorithm] = float((rows[2000:] @ (weight - layer.effective_weight()).t()).square().sum())
    assert error["gptq"] < 0.5 * error["rtn"]


@pytest.mark.parametrize("group_size", [16, 64, 0])
@pytest.mark.parametrize(("form", "constraint"), FORMS)
def test_every_step_stays_on_the_grid_and_lowers_the_error(
    form: str, constraint: str, group_size: int
) -> None:
    """Values are decoded codes bit for bit; ``checked`` looks whether scales are legal."""
    weight, moments = normal(N, K), moments_of(inputs())
    gram = damp(moments.gram.clone(), 0.01)
    quantized = start_of(weight, form, constraint, group_size)
    grid = WeightGrid(quantized, "cpu")
    values = gptq_round(weight, moments, grid)
    quantized = grid.encode(values)
    assert torch.equal(torch.from_numpy(quantized.checked().dequantize()), values)
    costs = [cost(weight - values, gram)]
    for refit in (refit_scales, refit_rows):
        quantized = refit(quantized, weight, gram)
        costs.append(cost(weight - decoded(quantized, "cpu"), gram))
    grid = WeightGrid(quantized, "cpu")
    values = descend(weight, decoded(quantized, "cpu"), gram, grid)
    quantized = grid.encode(values)
    # Values are reached by adding changes: an ulp off.
    torch.testing.assert_close(torch.from_numpy(quantized.checked().dequantize()), values, rtol=0, atol=2e-6)
    costs.append(cost(weight - values, gram))
    for before, after in itertools.pairwise(costs):
        assert after <= before * (1 + 1e-5)  # float32 sums


@pytest.mark.parametrize("constraint", ["m2", "e4m3"])
def test_descent_improves_rounding_to_nearest(constraint: str) -> None:
    """Without GPTQ before it: each sweep lowers the error, until none does."""
    weight, moments = normal(N, K), moments_of(inputs())
    quantized = start_of(weight, "e2m1", constraint)
    grid, values = WeightGrid(quantized, "cpu"), decoded(quantized, "cpu")
    first = last = cost(weight - values, moments.gram)
    for _ in range(12):
        values = descend(weight, values, moments.gram, grid)
        now = cost(weight - values, moments.gram)
        assert now <= last * (1 + 1e-5)
        last = now
    assert last < 0.55 * first  # measured 0.43 and 0.45


def test_refits_find_what_was_scaled_away() -> None:
    """A weight on the grid, its scales then moved: the refits bring them back."""
    moments = moments_of(inputs())
    for constraint in ("e4m3", "none"):
        right = start_of(normal(N, K), "e2m1", constraint)
        target = decoded(right, "cpu")
        assert right.group_scales is not None
        if constraint == "none":
            wrong = dataclasses.replace(right, group_scales=right.group_scales * 1.07)
        else:
            wrong = dataclasses.replace(right, row_scales=right.row_scales * 1.07)
        refit = refit_rows if constraint == "e4m3" else refit_scales
        found = decoded(refit(wrong, target, moments.gram), "cpu")
        if constraint == "e4m3":
            torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)
        else:  # one group after the other, each given the others; ``wrong`` is not written to (0.004)
            before = cost(target - decoded(wrong, "cpu"), moments.gram)
            assert cost(target - found, moments.gram) < 0.2 * before
    # Powers of two are no free scales: nothing moves.
    fixed = start_of(normal(N, K), "e2m1", "m1")
    assert refit_rows(fixed, normal(N, K), moments.gram) is fixed
    assert refit_scales(fixed, normal(N, K), moments.gram) is fixed


def test_correction_undoes_a_linear_drift() -> None:
    """x_hat = A x: W* = W A^-1 gives the original output exactly."""
    x, weight = inputs(tokens=4000), normal(N, K)
    drift = torch.eye(K) + 0.3 * normal(K, K, seed=7) / K**0.5
    moments = moments_of(x @ drift.t(), x)
    wanted = torch.linalg.solve(drift.t().double(), weight.double().t()).t()
    exact = LayerOptions(correction_damping=1e-7)
    scale = float(wanted.abs().max())
    # float32 moments of channels whose energies are a factor of 10^4 apart.
    torch.testing.assert_close(corrected(weight, moments, exact).double(), wanted, rtol=0, atol=0.02 * scale)
    assert float((weight - wanted).abs().max()) > 0.2 * scale, "the drift is too small to see"
    half = corrected(weight, moments, dataclasses.replace(exact, correction=0.5))
    torch.testing.assert_close(half.double(), (weight + wanted) / 2, rtol=0, atol=0.02 * scale)
    for options, part in ((dataclasses.replace(exact, correction=0.0), moments), (exact, moments_of(x))):
        assert torch.equal(corrected(weight, part, options), weight)
    # In the whole: the output comes closer to the original model's, damped as it is by default.
    error = {}
    for share in (0.0, 1.0):
        options = LayerOptions(weight_format="fp8", correction=share)
        layer = quantize_layer(weight, options, moments=moments)
        y = (x @ drift.t()) @ layer.effective_weight().t()
        error[share] = float((y - x @ weight.t()).square().sum())
    assert error[1.0] < 0.3 * error[0.0]


def test_moments_are_means_however_they_come() -> None:
    x, original = inputs(), inputs(seed=4)
    whole, parts = moments_of(x, original), InputMoments(K, cross=True)
    for start, stop in ((0, 1), (1, 400), (400, 600)):
        parts.add(x[None, start:stop], original[None, start:stop])
    assert parts.tokens == whole.tokens == 600
    for moments in (whole, parts):
        for found, left in ((moments.gram, x), (moments.cross, original)):
            expected = left.double().t() @ x.double() / 600
            torch.testing.assert_close(
                found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
            )
    torch.testing.assert_close(whole.energy, x.square().mean(dim=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("per_token", [False, True])
def test_moments_of_scaled_fp8_numbers(per_token: bool) -> None:
    """``x8`` with its scale is the same as ``a * x8``, on matrix units that take bfloat16 as well."""
    from zqfp_compile.formats.minifloat import E4M3FN

    x = inputs()
    a = token_scales(x, "e4m3") if per_token else float(x.abs().max()) / 448
    x8 = round_minifloat(x / a, E4M3FN)
    expected = moments_of(x8 * a, x)
    found = InputMoments(K, cross=True)
    for part in (slice(0, 250), slice(250, 600)):
        found.add(x8[part], x[part], scale=a[part] if isinstance(a, torch.Tensor) else a)
    # One scale: products of 8 significant bits are exact. Scales per token may be rounded to them (2^-9 a
    # factor), as may x - x_hat; those errors average out over tokens.
    tolerance = 1e-3 if per_token else 1e-6
    largest = float(expected.gram.abs().max())
    torch.testing.assert_close(found.gram, expected.gram, rtol=0, atol=tolerance * largest)
    largest = float(expected.drift.abs().max())
    torch.testing.assert_close(found.drift, expected.drift, rtol=0, atol=1e-2 * largest)


def test_moments_are_merged() -> None:
    x, original = inputs(), inputs(seed=2)
    whole = moments_of(x, original)
    merged = moments_of(x[:100], original[:100])
    merged.inverse_factor()
    merged.merge(moments_of(x[100:], original[100:]))
    assert merged.tokens == whole.tokens
    torch.testing.assert_close(merged.gram, whole.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.drift, whole.drift, rtol=1e-5, atol=1e-5)
    assert merged.on("cpu") is merged
    torch.testing.assert_close(merged.inverse_factor()[0], whole.inverse_factor()[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no cross moment"):
        merged.merge(moments_of(x))


def test_each_factor_is_computed_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three devices wait for each other's, and for ever for none."""
    x, original = inputs(), inputs(seed=2)
    alone, first = moments_of(x, original), moments_of(x, original)
    devices = [first, first._copy("cpu"), first._copy("cpu")]

    def work(_: int, moments: InputMoments) -> list[torch.Tensor]:
        moments.prepare(0.01, 0.3)
        return [moments.correction_factor(0.3), *moments.inverse_factor(), moments.conditional_energy()]

    wanted, calls, cholesky = work(0, alone), [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: (calls.append(matrix), cholesky(matrix))[1])
    with DeviceThreads(["cpu"] * 3) as threads:
        found = list(threads.map(work, devices))
    assert len(calls) == 2
    assert all(torch.equal(*pair) for each in found for pair in zip(each, wanted, strict=True))
    first.add(3 * x, original)
    alone.add(3 * x, original)
    assert torch.equal(first.correction_factor(0.3), alone.correction_factor(0.3)) and len(calls) == 4
    assert not torch.equal(first.correction_factor(0.3), wanted[0])
    gone = weakref.ref(first)
    del first, devices[0]
    assert gone() is None and torch.equal(devices[0].inverse_factor()[0], wanted[1])


def test_what_is_derived_follows_new_tokens() -> None:
    x, moments = inputs(), InputMoments(K)
    moments.add(x[:300])
    (
        moments.inverse_factor(),
        moments.damped_gram(),
        moments.conditional_energy(),
        moments.correction_factor(0.1),
    )
    moments.add(x[300:])
    for found, expected in (
        (moments.damped_gram(), damp(moments.gram.clone(), 0.01)),
        (moments.correction_factor(0.1), torch.linalg.cholesky(damp(moments.gram.clone(), 0.1))),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    factor, order = moments.inverse_factor()
    inverse = torch.linalg.inv(moments.damped_gram().double()[order][:, order])
    torch.testing.assert_close((factor.t() @ factor).double(), inverse, rtol=1e-3, atol=1e-4)
    assert (moments.gram.diagonal()[order].diff() <= 0).all()
    # A channel that the others predict has little energy of its own.
    assert (moments.conditional_energy() <= moments.damped_gram().diagonal() * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", ["float16", "fp8"])
def test_lorc_on_top(dtype: str) -> None:
    weight, moments = normal(N, K), moments_of(inputs())
    options = LayerOptions(group_size=32, lorc_dtype=dtype)
    last = cost(weight - quantize_layer(weight, options, moments=moments).effective_weight(), moments.gram)
    for rank in (2, 8):
        layer = quantize_layer(weight, dataclasses.replace(options, lorc_rank=rank), moments=moments)
        assert layer.lorc is not None and layer.lorc.rank == rank
        now = cost(weight - layer.effective_weight() - layer.lorc.weight(), moments.gram)
        assert now < 0.9 * last
        last = now
    # More ranks than the matrix has: cut; the compensation is then exact but for its own rounding.
    layer = quantize_layer(weight, dataclasses.replace(options, lorc_rank=100), moments=moments)
    assert layer.lorc is not None and layer.lorc.rank == N
    left = cost(weight - layer.effective_weight() - layer.lorc.weight(), moments.gram)
    assert left < (1e-3 if dtype == "fp8" else 1e-6) * cost(weight, moments.gram)


def test_results_repeat_and_do_not_depend_on_threads() -> None:
    weights, moments = [normal(rows, K, seed=rows) for rows in (40, 300, 24)], moments_of(inputs())
    options = LayerOptions(group_size=32, lorc_rank=4)

    def work(weight: torch.Tensor) -> QuantizedLayer:
        return quantize_layer(weight, options, moments=moments, seed=3)

    alone = [work(weight) for weight in weights]
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            found = side_by_side(work, weights, weights)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        assert all(map(same, alone, found))


def spread(tasks: list[LayerTask], moments: InputMoments) -> list[QuantizedLayer]:
    """Quantise on one, two and three devices; the bits are the same."""
    found = []
    for count in (1, 2, 3):
        with DeviceThreads(["cpu"] * count) as threads:
            found.append(quantize_layers(tasks, threads, moments=moments))
    for layers in found[1:]:
        assert all(map(same, found[0], layers))
    return found[0]


def left(weight: torch.Tensor, layer: QuantizedLayer, moments: InputMoments) -> float:
    assert layer.lorc is not None
    return cost(weight - layer.effective_weight() - layer.lorc.weight(), moments.gram)


def test_a_large_layer_is_shared_by_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two halves whoever does them; which cost a layer nothing."""
    weights, moments = [normal(rows, K, seed=rows) for rows in (60, 40, 24)], moments_of(inputs())
    options = LayerOptions(group_size=32, lorc_rank=4, scale_constraint="m2", scale_rows=8)
    tasks = [LayerTask(weight, options, seed=3) for weight in weights]
    whole = [quantize_layer(weight, options, moments=moments, seed=3) for weight in weights]
    monkeypatch.setattr(layer_module, "HALVED_SIZE", 40 * K)
    halves = [(0, slice(0, 24)), (0, slice(24, 60)), (1, slice(0, 16)), (1, slice(16, 40)), (2, slice(0, 24))]
    assert work_items(tasks) == [[piece] for piece in halves]
    found = spread(tasks, moments)
    for weight, layer, other in zip(weights, found, whole, strict=True):
        assert left(weight, layer, moments) == pytest.approx(left(weight, other, moments), rel=1e-3)
    assert same(found[2], whole[2])


@pytest.mark.parametrize("form", ["e2m1", "fp8"])
def test_layers_of_one_input_are_rounded_together(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one matrix, cut in the middle of one of them; the layer with other options by itself."""
    weights, x = [normal(rows, K, seed=rows) for rows in (24, 32, 40, 25)], inputs()
    moments = moments_of(x, x + normal(*x.shape, seed=5))
    options = LayerOptions(group_size=32, weight_format=form, lorc_rank=4)
    each = [options, options, dataclasses.replace(options, lorc_rank=2), options]
    tasks = [
        LayerTask(weight, one, seed, name=f"w{seed}")
        for seed, (weight, one) in enumerate(zip(weights, each, strict=True))
    ]
    first, *last = [(0, slice(0, 24)), (1, slice(0, 32)), (3, slice(0, 25))]
    assert work_items(tasks) == [[first, *last], [(2, slice(0, 40))]]
    monkeypatch.setattr(layer_module, "HALVED_SIZE", 60 * K)
    assert work_items(tasks) == [
        [first, (1, slice(0, 16))],
        [(1, slice(16, 32)), last[1]],
        [(2, slice(0, 40))],
    ]
    for weight, task, layer in zip(weights, tasks, spread(tasks, moments), strict=True):
        alone = quantize_layer(weight, task.options, moments=moments, seed=task.seed)
        assert layer.weight.codes.shape == alone.weight.codes.shape
        assert left(weight, layer, moments) == pytest.approx(left(weight, alone, moments), rel=1e-3)
    tasks[3].weight[0, 0] = torch.nan
    with DeviceThreads(["cpu", "cpu"]) as threads, pytest.raises(ModelError, match="weight 'w3': 1 of"):
        quantize_layers(tasks, threads, moments=moments)


@pytest.mark.parametrize("size", [1, 5, 64, 301])
def test_a_triangular_matrix_is_inverted_by_quarters(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "_SOLVED_SIZE", 32)
    x = inputs(size).double()
    factor = torch.linalg.cholesky(damp(x.t() @ x / len(x), 0.01))
    inverse = moments_module._inverse_of_lower(factor)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ factor, torch.eye(size).double(), rtol=0, atol=1e-9)


def test_layers_of_several_ranks_together() -> None:
    weights, moments = [normal(rows, K, seed=rows) for rows in (24, 40, 16)], moments_of(inputs())
    options = [LayerOptions(group_size=32, lorc_rank=rank, repeats=rank // 4) for rank in (0, 4, 8)]
    tasks = [LayerTask(weight, one, 3) for weight, one in zip(weights, options, strict=True)]
    with DeviceThreads(["cpu", "cpu"]) as threads:
        found = quantize_layers(tasks, threads, moments=moments)
    for task, layer in zip(tasks, found, strict=True):
        assert same(layer, quantize_layer(task.weight, task.options, moments=moments, seed=3))
    assert quantize_layers([], DeviceThreads(), moments=moments) == []


def test_threads_wait_for_each_others_products() -> None:
    """Precision of products is one setting: two threads that want different ones never meet in it."""
    before, seen = torch.get_float32_matmul_precision(), []

    def work(_: int, short: bool) -> None:
        wanted = "medium" if short else "highest"
        for _ in range(200):
            with short_products() if short else full_products():
                seen.append(torch.get_float32_matmul_precision() == wanted)

    with DeviceThreads(["cpu"] * 3) as threads:
        list(threads.map(work, [True, False, True]))
    assert len(seen) == 600 and all(seen)
    assert torch.get_float32_matmul_precision() == before


def test_halves_add_up_and_the_first_is_a_tf32_number() -> None:
    matrix = normal(N, K) * torch.logspace(-20, 20, K)
    high, low = halved(matrix)
    assert torch.equal(high + low, matrix)
    bits = torch.frexp(high).mantissa * 2**11
    assert torch.equal(bits, bits.round()) and bool((low.abs() <= high.abs() * 2.0**-10).all())


def test_an_error_in_a_thread_is_raised() -> None:
    weights = [normal(N, K), torch.full((N, K), torch.nan)]
    moments = moments_of(inputs())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ModelError, match="NaN"):
            side_by_side(lambda w: quantize_layer(w, LayerOptions(), moments=moments), weights, weights)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(1, K), (N, 1), (1, 1), (3, 7)])
@pytest.mark.parametrize(
    ("form", "constraint"), [("e2m1", "e4m3"), ("e2m1", "none"), ("int4", "m2"), ("fp8", "e4m3")]
)
def test_small_shapes(form: str, constraint: str, shape: tuple[int, int]) -> None:
    weight, moments = normal(*shape), moments_of(inputs(shape[1]))
    options = LayerOptions(weight_format=form, scale_constraint=constraint, group_size=32, lorc_rank=1)
    layer = quantize_layer(weight, options, moments=moments)
    assert layer.effective_weight().shape == shape and layer.lorc is not None
    assert cost(weight - layer.effective_weight(), moments.gram) <= 0.05 * cost(weight, moments.gram)


def test_silent_channels_and_rows_of_zeros() -> None:
    """A channel without energy says nothing about its weights: they are rounded to nearest, not lost."""
    x = inputs()
    x[:, [3, 40]] = 0
    weight = normal(N, K)
    weight[5] = 0
    moments = moments_of(x, x)
    layer = quantize_layer(weight, LayerOptions(group_size=32), moments=moments)
    found = layer.effective_weight()
    assert torch.isfinite(found).all() and not found[5].any()
    assert cost(weight - found, moments.gram) < 0.05 * cost(weight, moments.gram)
    silent = (weight - found)[:, [3, 40]]
    assert float(silent.square().sum()) < 0.05 * float(weight[:, [3, 40]].square().sum())
    everything = quantize_layer(weight, LayerOptions(group_size=32), moments=moments_of(torch.zeros(9, K)))
    left = (weight - everything.effective_weight()).square().sum()
    assert float(left) < 0.05 * float(weight.square().sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.full((N, K), torch.inf)}, "repair the weight"),
        ({"moments": None}, "GPTQ needs the input's second moments"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"weight": normal(N, K), "moments": moments_of(inputs()), **change}
    with pytest.raises((ModelError, ValueError), match=message):
        quantize_layer(arguments["weight"], LayerOptions(), moments=arguments["moments"], name="here")


def test_the_cross_moment_needs_the_original() -> None:
    with pytest.raises(ValueError, match="original"):
        InputMoments(K, cross=True).add(inputs())
