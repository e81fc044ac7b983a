"""The plain choice of scales, value by value."""

import numpy as np
import pytest

from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.scales import (
    ceil_index,
    check_group_scales,
    constrain_scales,
    legal_scales,
    row_scale,
)


def test_e4m3_scales_are_eight_to_the_octave():
    scales = legal_scales("e4m3", E2M1)
    assert len(scales) == 11 * 8 + 1
    assert (np.diff(scales) > 0).all()
    assert scales[:3].tolist() == [2.0**-5, 2.0**-5 * 1.125, 2.0**-5 * 1.25]
    assert scales[-2:].tolist() == [60.0, 64.0]


def test_unconstrained_scales_have_no_table():
    with pytest.raises(ValueError, match="'none' has no table"):
        legal_scales("none", E2M1)


@pytest.mark.parametrize(
    ("constraint", "wanted"),
    [
        ("m1", [2 / 64, 4 / 64, 1 / 64]),  # 2^ceil(log2) in the largest s
        ("m2", [2 / 64, 3 / 64, 0.7 / 64]),
        ("e4m3", [2 / 52, 3 / 52, 0.7 / 52]),  # 52 = 13/16 of 64
    ],
)
def test_row_scales(constraint, wanted):
    rows = row_scale(np.array([2.0, 3.0, 0.7], np.float32), constraint, E2M1)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, np.array(wanted, np.float32))


def test_small_rows_use_the_whole_range():
    """A row's R follows its largest group, however small, and float64 is taken as float32."""
    scales, rows = constrain_scales(np.array([[0.001, 0.0005]]), "m2", E2M1)
    assert scales.dtype == rows.dtype == np.float32
    assert scales.tolist() == [[64.0, 32.0]]
    assert rows[0] == np.float32(0.001) / np.float32(64)


def test_groups_of_zeros_have_scale_1_without_a_constraint():
    scales, rows = constrain_scales(np.array([[0.0, 0.3]]), "none", E2M1)
    assert scales.dtype == np.float32
    assert scales.tolist() == [[1.0, np.float32(0.3)]]
    assert rows.tolist() == [1.0]


def test_the_smallest_table_entry_that_is_large_enough():
    table = legal_scales("e4m3", E2M1)
    every = np.arange(len(table))
    assert np.array_equal(ceil_index(table, table), every)
    assert np.array_equal(ceil_index(table * np.float32(1 + 5e-7), table), every)  # R's rounding error
    above = ceil_index(table * np.float32(1 + 3e-6), table)
    assert np.array_equal(above, np.minimum(every + 1, len(table) - 1))
    assert ceil_index(np.array([1e9], np.float32), table).tolist() == [len(table) - 1]


@pytest.mark.parametrize(
    ("constraint", "scale", "row", "message"),
    [
        ("none", np.inf, 1.0, "group scales must be positive and finite"),
        ("none", -1.0, 1.0, "group scales must be positive and finite"),
        ("m1", 2.0, 3.0, "m1 row scales must be powers of two"),
        ("m1", 3.0, 2.0, "group scales are not all m1 scales in [0.03125, 64.0]"),
    ],
)
def test_refuses_scales_that_break_the_constraint(constraint, scale, row, message):
    with pytest.raises(ValueError) as info:
        check_group_scales(np.array([[scale]], np.float32), np.array([row], np.float32), constraint, E2M1)
    assert str(info.value) == message
