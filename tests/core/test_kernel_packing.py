"""The kernel's weight layout: what its docstring says, and back again."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.scales import legal_scales
from zqfp_compile.kernels.packing import (
    gated_order,
    pack_codes,
    pack_group_scales,
    packed_sizes,
    padded_shape,
    unpack_codes,
    unpack_group_scales,
)


def random_codes(n, k, seed=0):
    return np.random.default_rng(seed).integers(-7, 8, (n, k)).astype(np.int8)


def random_scales(n, groups, seed=0):
    return np.random.default_rng(seed).choice(legal_scales("e4m3", E2M1), (n, groups))


def read_code(packed, k, row, column):
    """One code by the docstring's formula, digit by digit."""
    blocks = padded_shape(1, k)[1] // 128
    nb, w, h, q = row // 64, row % 64 // 16, row % 16 // 8, row % 8
    kb, j, s, b, c, e = (
        column // 128,
        column % 128 // 64,
        column % 64 // 32,
        column % 32 // 16,
        column % 16 // 4,
        column % 4,
    )
    index = ((((nb * blocks + kb) * 2 + j) * 128 + 32 * w + 4 * q + c) * 2 + s) * 2 + h
    word = int(packed.view("<u4")[index])
    magnitude = word >> (4 * (4 * b + e)) & 7
    return -magnitude if word >> (8 * e + 7 - 4 * b) & 1 else magnitude


def read_scale(packed, k, group_size, row, group):
    """One scale's byte by the docstring's formula."""
    blocks, per_block = padded_shape(1, k)[1] // 128, 128 // group_size
    nb, w, h, q = row // 64, row % 64 // 16, row % 16 // 8, row % 8
    kb, j = divmod(group, per_block)
    return int(packed[((nb * blocks + kb) * 32 + 8 * w + q) * 2 * per_block + 2 * j + h])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 200), k=st.integers(1, 300), seed=st.integers(0, 100))
def test_codes_round_trip(n, k, seed):
    codes = random_codes(n, k, seed)
    packed = pack_codes(codes)
    assert packed.dtype == np.uint8
    assert packed.size == packed_sizes(n, k, 32)[0]
    assert np.array_equal(unpack_codes(packed, n, k), codes)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 200), k=st.integers(1, 600), g=st.sampled_from([32, 64, 128]), seed=st.integers(0, 100)
)
def test_scales_round_trip(n, k, g, seed):
    scales = random_scales(n, -(-k // g), seed)
    packed = pack_group_scales(scales, g)
    assert packed.size == packed_sizes(n, k, g)[1]
    assert np.array_equal(unpack_group_scales(packed, n, k, g), scales)


def test_every_code_lies_where_the_docstring_says():
    codes = random_codes(130, 260)
    packed = pack_codes(codes)
    rng = np.random.default_rng(1)
    for row, column in zip(rng.integers(0, 130, 2000), rng.integers(0, 260, 2000), strict=True):
        assert read_code(packed, 260, int(row), int(column)) == codes[row, column]


def test_padding_codes_are_zero():
    packed = pack_codes(np.full((1, 1), 7, dtype=np.int8))
    assert np.count_nonzero(packed) == 1


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_scale_lies_where_the_docstring_says(group_size):
    k = 400
    scales = random_scales(130, -(-k // group_size))
    packed = pack_group_scales(scales, group_size)
    for row, group in np.ndindex(192, padded_shape(1, k)[1] // group_size):
        inside = row < scales.shape[0] and group < scales.shape[1]
        scale = scales[row, group] if inside else np.float32(1)
        byte = read_scale(packed, k, group_size, row, group)
        assert E4M3FN.decode(np.uint8([byte & 0x7F]))[0] == scale
        # Bit 7 completes the E4M3 number nearest to 1.5 * s.
        one_and_a_half = E4M3FN.encode(np.float32([1.5 * scale])).view(np.uint8)[0]
        assert (byte & 0x7F) + 4 + (byte >> 7) == one_and_a_half


def test_rows_of_a_gated_layer_take_turns():
    gate, up = np.arange(16), 100 + np.arange(16)
    rows = np.concatenate([gate, up])[gated_order(16)]
    assert np.array_equal(rows, np.concatenate([gate[:8], up[:8], gate[8:], up[8:]]))


def test_a_gated_layer_has_whole_turns():
    with pytest.raises(ValueError, match="12 features are no multiple of 8"):
        gated_order(12)


def test_scales_come_as_float32_e4m3_or_bits():
    scales = random_scales(64, 4)
    encoded = scales.astype(ml_dtypes.float8_e4m3fn)
    wanted = pack_group_scales(scales, 32)
    assert np.array_equal(pack_group_scales(encoded, 32), wanted)
    assert np.array_equal(pack_group_scales(encoded.view(np.uint8), 32), wanted)


def test_packing_does_not_change_its_input():
    bits = random_scales(3, 5).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    before = bits.copy()
    pack_group_scales(bits, 64)
    assert np.array_equal(bits, before)


@pytest.mark.parametrize("scale", [0.0, 2.0**-6, 72.0, -1.0, 1.03, np.nan])
def test_refuses_scales_outside_the_range(scale):
    with pytest.raises(ValueError, match="E4M3 numbers"):
        pack_group_scales(np.array([[scale]], dtype=np.float32), 32)


def test_refuses_codes_and_sizes():
    with pytest.raises(ValueError, match=r"-7\.\.7"):
        pack_codes(np.array([[-8]], dtype=np.int8))
    with pytest.raises(ValueError, match="int8"):
        pack_codes(np.zeros((2, 2), dtype=np.int32))
    with pytest.raises(ValueError, match="groups of 16"):
        pack_group_scales(np.ones((1, 1), dtype=np.float32), 16)
    with pytest.raises(ValueError, match="packed codes"):
        unpack_codes(np.zeros(5, dtype=np.uint8), 64, 128)
    with pytest.raises(ValueError, match="packed group scales"):
        unpack_group_scales(np.zeros(5, dtype=np.uint8), 64, 128, 32)
