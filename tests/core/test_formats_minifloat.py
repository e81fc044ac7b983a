import numpy as np
import pytest

from zqfp_compile.formats.minifloat import E4M3FN, E5M2, MINI_FLOATS

SPECS = pytest.mark.parametrize("spec", MINI_FLOATS.values(), ids=lambda spec: spec.name)


def finite_values(spec):
    values = np.arange(256, dtype=np.uint8).view(spec.dtype).astype(np.float32)
    return np.unique(values[np.isfinite(values)] + np.float32(0))


@SPECS
def test_every_code_round_trips(spec):
    bits = np.arange(256, dtype=np.uint8)
    values = spec.decode(bits)
    finite = np.isfinite(values) & (bits != 0x80)  # -0 becomes +0
    assert np.array_equal(spec.round(values[finite]), values[finite])
    assert np.array_equal(spec.encode(values[finite]).view(np.uint8), bits[finite])
    assert spec.encode(np.float32(-0.0)).view(np.uint8) == 0


@SPECS
def test_decodes_to_float32_from_values_or_bits(spec):
    bits = np.arange(0x40, dtype=np.uint8)
    assert spec.decode(bits).dtype == np.float32
    assert np.array_equal(spec.decode(bits.view(spec.dtype)), spec.decode(bits))


@SPECS
def test_every_tie_and_its_neighbours_against_ml_dtypes(spec):
    values = finite_values(spec)
    ties = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    inputs = np.concatenate([
        np.nextafter(ties, np.float32(-np.inf)), ties, np.nextafter(ties, np.float32(np.inf)),
    ])  # fmt: skip
    assert np.array_equal(spec.round(inputs), inputs.astype(spec.dtype).astype(np.float32))


@SPECS
def test_random_bits_against_ml_dtypes(spec):
    inputs = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    inputs = inputs[np.abs(inputs) <= spec.max_value]
    assert len(inputs) > 50_000
    assert np.array_equal(spec.round(inputs), inputs.astype(spec.dtype).astype(np.float32))


@SPECS
def test_saturation_nan_and_zero(spec):
    top = spec.max_value
    rounded = spec.round(np.array([top * 2, -top * 2, np.inf, -np.inf, np.nan, -0.0, 1e-30, -1e-30]))
    assert np.array_equal(rounded, [top, -top, top, -top, np.nan, 0, 0, 0], equal_nan=True)
    assert not np.signbit(rounded[5:]).any()


@SPECS
def test_input_is_left_alone_and_shape_kept(spec):
    x = np.full((2, 3), 1.03, dtype=np.float32)
    assert spec.round(x).shape == (2, 3)
    assert (x == np.float32(1.03)).all()
    assert spec.round(3.14159).shape == ()


def test_limits():
    assert finite_values(E4M3FN).max() == E4M3FN.max_value == 448
    assert finite_values(E5M2).max() == E5M2.max_value == 57344
    assert len(finite_values(E4M3FN)) == 253
