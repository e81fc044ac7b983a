import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest

from zqfp_compile.formats.codebook import CODE_BOOKS, E2M1
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.formats.scales import constrain_scales, legal_scales


def example(**changes):
    """N=2, K=5, g=4: the last group is padded by three."""
    codes = np.array([[1, -3, 7, 0, 5, 0, 0, 0], [-7, 2, 4, -6, -1, 0, 0, 0]], dtype=np.int8)
    scales = np.array([[1.125, 64], [0.03125, 2]], dtype=np.float32)
    rows = np.array([0.3, 1.7], dtype=np.float32)
    fields = {
        "codes": codes, "group_scales": scales, "row_scales": rows, "k": 5,
        "weight_format": "e2m1", "group_size": 4, "scale_constraint": "e4m3",
    }  # fmt: skip
    return QuantizedWeight(**{**fields, **changes})


def fp8_example(**changes):
    fields = {
        "codes": np.array([[1, -448, 0.5]], dtype=ml_dtypes.float8_e4m3fn), "group_scales": None,
        "row_scales": np.array([0.1], dtype=np.float32), "k": 3, "weight_format": "fp8", "group_size": 64,
        "scale_constraint": "e4m3",
    }  # fmt: skip
    return QuantizedWeight(**{**fields, **changes})


def test_decodes_by_the_definition():
    weight = example()
    # 1.5 * 1.125 = 1.6875 is a tie between the E4M3 numbers 1.625 and 1.75; the even mantissa is 1.75.
    expected = np.array([[0.5625, -1.75, 6.5, 0, 192], [-0.1875, 0.03125, 0.0625, -0.125, -1]])
    expected[0, 2] = 7.0  # 6.75 is a tie between 6.5 and 7
    assert weight.fp8_weight().dtype == np.float32
    assert np.array_equal(weight.fp8_weight(), expected.astype(np.float32))
    assert np.array_equal(weight.dequantize(), expected.astype(np.float32) * weight.row_scales[:, None])


@pytest.mark.parametrize("name", CODE_BOOKS)
@pytest.mark.parametrize("constraint", ["m1", "m2", "e4m3"])
def test_every_code_under_every_scale(name, constraint):
    book = CODE_BOOKS[name]
    scales = legal_scales(constraint, book)[:, None]
    codes = np.tile(np.arange(-7, 8, dtype=np.int8), (len(scales), 1))
    rows = np.ones(len(scales), dtype=np.float32)
    weight = QuantizedWeight(codes, scales, rows, 15, name, 15, constraint).fp8_weight()
    for (n, scale), code in itertools.product(enumerate(scales[:, 0]), range(-7, 8)):
        exact = np.sign(code) * book.magnitudes[abs(code)] * float(scale)
        assert weight[n, code + 7] == np.float32(ml_dtypes.float8_e4m3fn(exact))


def test_unconstrained_is_not_rounded():
    scales = np.array([[0.123, 4.5], [9.9, 1.1]], dtype=np.float32)
    weight = example(group_scales=scales, row_scales=np.ones(2, dtype=np.float32), scale_constraint="none")
    assert weight.dequantize()[0, 1] == np.float32(-1.5) * np.float32(0.123)


def test_fp8():
    weight = fp8_example()
    assert weight.fp8_weight().tolist() == [[1, -448, 0.5]]
    assert np.array_equal(weight.dequantize()[0], np.array([1, -448, 0.5], np.float32) * np.float32(0.1))


def test_bits_per_weight():
    assert example().bits_per_weight() == (2 * 8 * 4 + 4 * 8 + 2 * 32) / 10
    assert fp8_example().bits_per_weight() == (3 * 8 + 32) / 3
    reference = example(scale_constraint="none", row_scales=np.ones(2, np.float32))
    assert reference.bits_per_weight() == (2 * 8 * 4 + 4 * 32 + 2 * 32) / 10
    smollm2 = QuantizedWeight(
        np.zeros((8, 576), np.int8),
        np.ones((8, 9), np.float32),
        np.ones(8, np.float32),
        576,
        "e2m1",
        64,
        "m2",
    )
    assert smollm2.bits_per_weight() == pytest.approx(4.181, abs=1e-3)  # 4 + 8/64 + 32/576


SCALES = "group scales are not all {} scales in [0.03125, 64.0]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.full((2, 8), -8, np.int8)}, "codes leave -7..7"),
        ({"codes": np.full((2, 8), 8, np.int8)}, "codes leave -7..7"),
        ({"codes": np.ones((2, 8), np.int8)}, "padding codes are not 0"),
        ({"codes": np.zeros((2, 5), np.int8)}, "codes are int8 (2, 5), not int8 [N, 8]"),
        ({"codes": np.zeros((2, 8), np.int32)}, "codes are int32 (2, 8), not int8 [N, 8]"),
        ({"group_scales": np.full((2, 2), 1.1, np.float32)}, SCALES.format("e4m3")),
        ({"group_scales": np.full((2, 2), 128, np.float32)}, SCALES.format("e4m3")),
        (
            {"group_scales": np.full((2, 2), 1.5, np.float32), "scale_constraint": "m2"},
            SCALES.format("m2"),
        ),
        (
            {"group_scales": np.ones((2, 2), np.float32), "scale_constraint": "m1"},
            "m1 row scales must be powers of two",
        ),
        (
            {"group_scales": np.zeros((2, 2), np.float32), "scale_constraint": "none"},
            "group scales must be positive and finite",
        ),
        ({"group_scales": np.ones((2, 3), np.float32)}, "group scales are not float32 [2, 2]"),
        ({"group_scales": np.ones((2, 2))}, "group scales are not float32 [2, 2]"),
        ({"group_scales": None}, "group scales are not float32 [2, 2]"),
        ({"row_scales": np.zeros(2, np.float32)}, "row scales must be positive and finite"),
        ({"row_scales": np.full(2, np.inf, np.float32)}, "row scales must be positive and finite"),
        ({"row_scales": np.ones(3, np.float32)}, "codes (2, 8) and row scales (3,) do not match"),
        ({"row_scales": np.ones(2)}, "row scales are float64, not float32"),
        ({"scale_constraint": "none"}, "unconstrained weights have row scales of 1"),
        ({"scale_constraint": "m3"}, "unknown scale constraint 'm3'"),
        ({"scale_rows": 2}, "e4m3 scales have no compute groups of 2 rows"),
        (
            {"scale_constraint": "m2", "group_scales": np.ones((2, 2), np.float32), "scale_rows": 2},
            "row scales differ in a compute group of 2 rows",
        ),
        (
            {"scale_constraint": "m2", "group_scales": np.ones((2, 2), np.float32), "scale_rows": 0},
            "m2 scales have no compute groups of 0 rows",
        ),
        ({"group_size": 0}, "codes are int8 (2, 8), not int8 [N, 5]"),
        ({"weight_format": "e1m2"}, "unknown weight format 'e1m2'"),
    ],
)
def test_refuses_inconsistent_parts(changes, message):
    with pytest.raises(ValueError) as info:
        example(**changes)
    assert str(info.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.array([[1, np.nan, 0]], dtype=ml_dtypes.float8_e4m3fn)}, "fp8 weights hold a NaN"),
        ({"group_scales": np.ones((1, 1), np.float32)}, "fp8 weights have no group scales"),
        ({"k": 4}, "fp8 weights are float8_e4m3fn (1, 3), not float8_e4m3fn [N, K]"),
        (
            {"codes": np.ones((1, 3), ml_dtypes.float8_e5m2)},
            "fp8 weights are float8_e5m2 (1, 3), not float8_e4m3fn [N, K]",
        ),
    ],
)
def test_refuses_wrong_fp8(changes, message):
    with pytest.raises(ValueError) as info:
        fp8_example(**changes)
    assert str(info.value) == message


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fp8_example().k = 4


@pytest.mark.parametrize(("n", "k"), [(300, 1000), (2, (1 << 17) + 8)])
def test_a_weight_of_several_blocks(n, k):
    """Rows decode the same alone and in a weight of more elements than are decoded at once."""
    generator = np.random.default_rng(0)
    codes = generator.integers(-7, 8, (n, k)).astype(np.int8)
    scales = generator.choice(legal_scales("e4m3", E2M1), (n, k // 8))
    rows = np.ones(n, np.float32)
    weight = QuantizedWeight(codes, scales, rows, k, "e2m1", 8, "e4m3").fp8_weight()
    assert weight.shape == (n, k)
    for row in range(0, n, 7):
        alone = QuantizedWeight(codes[row : row + 1], scales[row : row + 1], rows[:1], k, "e2m1", 8, "e4m3")
        assert np.array_equal(alone.fp8_weight()[0], weight[row])


@pytest.mark.parametrize("constraint", ["none", "m1", "m2", "e4m3"])
def test_plain_scales_do_not_saturate(constraint):
    wanted = np.random.default_rng(0).lognormal(0, 1.5, (200, 9)).astype(np.float32)
    wanted[3] = 0
    wanted[4, :8] = 0
    scales, rows = constrain_scales(wanted, constraint, E2M1)
    real = scales * rows[:, None]
    assert (real >= wanted * (1 - 2e-6)).all()  # R and the quotient are each rounded once
    spare = {"none": 1, "m1": 2, "m2": 2, "e4m3": 1.125}[constraint]
    floor = E2M1.min_scale * rows[:, None]
    lowest = wanted == 0 if constraint == "none" else real <= floor
    assert (lowest | (real <= spare * wanted * (1 + 2e-6))).all()
    assert (scales[3] > 0).all()
    assert rows[3] == 1


def test_m1_and_m2_follow_the_paper():
    wanted = np.array([[3.0, 0.3, 1.6]], dtype=np.float32)
    scales, rows = constrain_scales(wanted, "m1", E2M1)
    assert (scales * rows[:, None]).tolist() == [[4.0, 0.5, 2.0]]
    scales, rows = constrain_scales(wanted, "m2", E2M1)
    assert np.allclose(scales * rows[:, None], [[3.0, 0.375, 3.0]], rtol=1e-7)


def test_groups_below_the_range_are_lifted_to_it():
    scales, rows = constrain_scales(np.array([[1.0, 1e-6]], dtype=np.float32), "m2", E2M1)
    assert scales.tolist() == [[64.0, 2.0**-5]]
    assert rows[0] == np.float32(1 / 64)


def test_one_group_for_a_whole_row():
    plain = example(group_scales=np.array([[1.125, 1.125], [0.5, 0.5]], np.float32))
    whole = example(
        codes=plain.codes[:, :5].copy(), group_scales=plain.group_scales[:, :1].copy(), group_size=0
    )
    assert np.array_equal(whole.dequantize(), plain.dequantize())
    assert whole.bits_per_weight() == (2 * 5 * 4 + 2 * 8 + 2 * 32) / 10


def test_compute_groups_of_rows():
    scales = np.ones((5, 1), np.float32)
    rows = np.array([0.3, 0.3, 1.7, 1.7, 9.1], np.float32)

    def weight(scale_rows):
        return QuantizedWeight(np.ones((5, 4), np.int8), scales, rows, 4, "e2m1", 4, "m2", scale_rows)

    assert weight(2).bits_per_weight() == weight(1).bits_per_weight()
    with pytest.raises(ValueError, match="row scales differ in a compute group of 3 rows"):
        weight(3)
