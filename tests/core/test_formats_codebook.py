import itertools

import numpy as np
import pytest

from zqfp_compile.formats.codebook import CODE_BOOKS, E2M1, E3M0, INT4
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.scales import legal_scales

BOOKS = pytest.mark.parametrize("book", CODE_BOOKS.values(), ids=lambda book: book.name)


@BOOKS
def test_every_code_round_trips(book):
    codes = np.arange(-7, 8, dtype=np.int8)
    values = book.decode(codes)
    assert values.dtype == np.float32
    assert np.array_equal(values, [np.sign(c) * book.magnitudes[abs(c)] for c in range(-7, 8)])
    assert np.array_equal(book.encode(values), codes)


@BOOKS
@pytest.mark.parametrize("low", range(7))
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_and_their_neighbours(book, low, sign):
    tie = np.float32((book.magnitudes[low] + book.magnitudes[low + 1]) / 2)
    below, above = np.nextafter(tie, np.float32(0)), np.nextafter(tie, np.float32(np.inf))
    even = low if low % 2 == 0 else low + 1
    codes = book.encode(np.array([below, tie, above]) * np.float32(sign))
    assert codes.tolist() == [sign * low, sign * even, sign * (low + 1)]


@BOOKS
def test_saturates_and_refuses_nan(book):
    top = np.float32(book.max_magnitude)
    codes = book.encode(np.array([np.inf, -np.inf, 1e30, np.nextafter(top, np.float32(np.inf)), 0.0, -0.0]))
    assert codes.tolist() == [7, -7, 7, 7, 0, 0]
    with pytest.raises(ValueError, match=book.name):
        book.encode([1.0, np.nan])
    assert np.isnan(book.decode(np.array([-8], dtype=np.int8))).all()


def test_float64_counts_as_the_float32_it_rounds_to():
    assert E2M1.encode(np.array([0.25 + 1e-12, 0.25 + 1e-6])).tolist() == [0, 1]


def test_e2m1_ties_go_to_the_even_mantissa():
    # The mantissa bit is 0 for 0, 1, 2, 4 (OCP MX 1.0, FP4 E2M1).
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.decode(E2M1.encode(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_magnitudes():
    assert E2M1.magnitudes == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert E3M0.magnitudes == (0, *(2.0**e for e in range(-2, 5)))
    assert INT4.magnitudes == tuple(range(8))


@BOOKS
@pytest.mark.parametrize("constraint", ["m1", "m2", "e4m3"])
def test_every_decoded_weight_is_a_normal_e4m3_number(book, constraint):
    for scale, magnitude in itertools.product(legal_scales(constraint, book), book.magnitudes[1:]):
        product = np.float32(magnitude) * scale
        decoded = E4M3FN.round(product)
        assert 2.0**-6 <= product <= 448
        assert 2.0**-6 <= decoded <= 448
        if constraint != "e4m3":
            assert decoded == product, "power-of-two scales only move the exponent"


@BOOKS
def test_range_is_as_wide_as_it_can_be(book):
    assert book.magnitudes[1] * book.min_scale / 2 < 2.0**-6
    assert book.max_magnitude * book.max_scale * 2 > 448


def test_e2m1_range_is_the_binding_one():
    assert (E2M1.min_scale, E2M1.max_scale) == (2.0**-5, 2.0**6)
    assert len(legal_scales("m2", E2M1)) == 12  # k = 0..11
