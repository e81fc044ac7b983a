"""The paper's comparison formats against a plain numpy form, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
import torch

from zqfp_compile.errors import ModelError
from zqfp_compile.quantize.layer import LayerOptions
from zqfp_compile.quantize.moments import InputMoments
from zqfp_compile.quantize.reference import (
    CLIP_FACTORS,
    REFERENCE_WEIGHTS,
    ReferenceGrid,
    asymmetric_parameters,
    fake_quantize_asymmetric,
    quantize_reference,
)

f32 = np.float32
RANGES = {"int4-asym": (0, 15), "int8": (-127, 127), "int8-asym": (0, 255)}


def numpy_group(values: np.ndarray, weight_format: str, factor: float = 1.0) -> np.ndarray:
    """One group [g] -> its rounded values, written straight from the rules in the module's docstring."""
    low, high = f32(values.min()) * f32(factor), f32(values.max()) * f32(factor)
    if weight_format == "fp8-e5m2":
        largest = max(-low, high)
        scale = largest / f32(57344) if largest > 0 else f32(1)
        return (values / scale).astype(ml_dtypes.float8_e5m2).astype(f32) * scale
    bottom, top = RANGES[weight_format]
    if bottom < 0:
        largest = max(-low, high)
        scale = largest / f32(top) if largest > 0 else f32(1)
        return np.clip(np.round(values / scale), bottom, top).astype(f32) * scale
    low, high = min(low, f32(0)), max(high, f32(0))
    scale = (high - low) / f32(top) if high > low else f32(1)
    zero = np.clip(np.round(-low / scale), 0, top)
    return (np.clip(np.round(values / scale) + zero, 0, top) - zero).astype(f32) * scale


def weights(n: int = 6, k: int = 80, seed: int = 0) -> np.ndarray:
    w = np.random.default_rng(seed).standard_t(4, (n, k)).astype(f32)
    w[0] = 0
    w[1] = np.abs(w[1])  # one-sided: the range must still hold 0
    w[2] = -np.abs(w[2])
    w[3] *= f32(1e-6)
    return w


@pytest.mark.parametrize("weight_format", REFERENCE_WEIGHTS)
@pytest.mark.parametrize("group_size", [0, 16, 32])
def test_bit_for_bit_without_search(weight_format: str, group_size: int) -> None:
    w = weights()  # groups of 32 do not divide 80
    width = group_size or 80
    padded = np.pad(w, ((0, 0), (0, -80 % width)))
    wanted = np.stack(
        [
            np.concatenate([numpy_group(part, weight_format) for part in row.reshape(-1, width)])[:80]
            for row in padded
        ]
    )
    grid = ReferenceGrid(torch.from_numpy(w), weight_format, group_size, search=False)
    np.testing.assert_array_equal(grid.round(torch.from_numpy(w)).numpy(), wanted)
    columns = [grid.nearest(torch.from_numpy(w[:, k]), k).numpy() for k in range(80)]
    np.testing.assert_array_equal(np.stack(columns, axis=1), wanted)


@pytest.mark.parametrize("weight_format", RANGES)
def test_search_takes_the_best_shrunken_range(weight_format: str) -> None:
    w = weights()
    grid = ReferenceGrid(torch.from_numpy(w), weight_format, 16, search=True)
    error = (grid.round(torch.from_numpy(w)).numpy() - w).reshape(6, 5, 16).astype(np.float64)
    for row in range(6):
        for group in range(5):
            values = w[row].reshape(5, 16)[group]
            tried = [np.square(numpy_group(values, weight_format, f) - values).sum() for f in CLIP_FACTORS]
            # the search compares float32 sums
            assert np.square(error[row, group]).sum() <= min(tried) * (1 + 1e-5) + 1e-30


def test_every_code_is_used_and_rounds_to_itself() -> None:
    w = torch.arange(-7.0, 9.0)[None]  # 16 values: exactly the codes of a 4-bit asymmetric group
    grid = ReferenceGrid(w, "int4-asym", 0, search=False)
    assert torch.equal(grid.round(w), w)


@pytest.mark.parametrize(
    ("weight_format", "group_size", "bits"),
    [("int8", 0, 8 + 32 / 80), ("int8-asym", 16, 8 + 40 / 16), ("int4-asym", 16, 4 + 36 / 16)],
)
def test_bits_per_weight(weight_format: str, group_size: int, bits: float) -> None:
    grid = ReferenceGrid(torch.from_numpy(weights()), weight_format, group_size, search=False)
    assert grid.bits_per_weight == pytest.approx(bits)


def numpy_activation(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    low, high = np.minimum(low, f32(0)), np.maximum(high, f32(0))
    scale = np.where(high > low, (high - low) / f32(255), f32(1)).astype(f32)
    zero = np.clip(np.round(-low / scale), 0, 255).astype(f32)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero).astype(f32) * scale


def test_asymmetric_activation_per_token_and_per_tensor() -> None:
    x = np.random.default_rng(3).normal(0.7, 2, (2, 5, 33)).astype(f32)
    x[0, 0] = 0
    token = numpy_activation(x, x.min(-1, keepdims=True), x.max(-1, keepdims=True))
    np.testing.assert_array_equal(fake_quantize_asymmetric(torch.from_numpy(x)).numpy(), token)
    scale, zero = asymmetric_parameters(torch.tensor(-1.5), torch.tensor(2.5))  # narrower than x: clips
    tensor = numpy_activation(x, f32(-1.5), f32(2.5))
    np.testing.assert_array_equal(fake_quantize_asymmetric(torch.from_numpy(x), scale, zero).numpy(), tensor)


def correlated_inputs(k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + 0.5 * torch.eye(k)
    return torch.randn(400, k, generator=generator) @ mixing


@pytest.mark.parametrize("weight_format", REFERENCE_WEIGHTS)
def test_gptq_lowers_the_output_error_and_stays_on_a_grid(weight_format: str) -> None:
    w = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    x = correlated_inputs(48)
    moments = InputMoments(48)
    moments.add(x)
    errors = {}
    for algorithm in ("rtn", "gptq"):
        options = LayerOptions(algorithm=algorithm, group_size=16)
        result = quantize_reference(w, weight_format, options, moments=moments)
        errors[algorithm] = float((x @ (w - result.weight).T).square().mean())
        levels = [len(group.unique()) for row in result.weight for group in row.split(16)]
        assert max(levels) <= 16
    assert errors["gptq"] < 0.95 * errors["rtn"]


def test_lorc_lowers_the_error_further() -> None:
    w = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    x = correlated_inputs(48)
    moments = InputMoments(48)
    moments.add(x)
    errors = []
    for rank in (0, 8):
        options = LayerOptions(algorithm="rtn", group_size=16, lorc_rank=rank)
        result = quantize_reference(w, "int4-asym", options, moments=moments)
        effective = result.weight if result.lorc is None else result.weight + result.lorc.weight()
        errors.append(float((x @ (w - effective).T).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_errors() -> None:
    w = torch.ones(2, 4)
    with pytest.raises(ValueError, match="int5"):
        quantize_reference(w, "int5", LayerOptions(algorithm="rtn"))
    with pytest.raises(ValueError, match="moments"):
        quantize_reference(w, "int8", LayerOptions(algorithm="gptq"))
    w[0, 0] = torch.nan
    with pytest.raises(ModelError, match="layer3"):
        quantize_reference(w, "int8", LayerOptions(algorithm="rtn"), name="layer3")
