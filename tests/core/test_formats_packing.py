import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zqfp_compile.formats.packing import pack_int4, unpack_int4


def test_low_nibble_first_twos_complement():
    packed = pack_int4(np.array([[1, -1, -7], [7, -8, 0]], dtype=np.int8))
    assert packed.tolist() == [0xF1, 0x79, 0x08]


def test_odd_count_leaves_a_zero_nibble():
    assert pack_int4(np.array([3, 2, -2], dtype=np.int8)).tolist() == [0x23, 0x0E]


@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0), elements=st.integers(-8, 7)))
def test_round_trip(codes):
    packed = pack_int4(codes)
    assert packed.size == (codes.size + 1) // 2
    assert np.array_equal(unpack_int4(packed, codes.shape), codes)


def test_agrees_with_onnx():
    onnx_helper = pytest.importorskip("onnx.numpy_helper")
    import onnx

    codes = np.random.default_rng(0).integers(-7, 8, (5, 7)).astype(np.int8)
    proto = onnx.TensorProto(
        data_type=onnx.TensorProto.INT4, dims=codes.shape, raw_data=pack_int4(codes).tobytes()
    )
    assert np.array_equal(onnx_helper.to_array(proto).astype(np.int8), codes)


def test_wider_integers_and_bytes_in_any_shape():
    packed = pack_int4(np.array([1, -1, -7, 7, 2, -2, 3, -8]))
    assert packed.tolist() == [0xF1, 0x79, 0xE2, 0x83]
    assert unpack_int4(packed.reshape(2, 2), (2, 4)).tolist() == [[1, -1, -7, 7], [2, -2, 3, -8]]


@pytest.mark.parametrize("code", [-9, 8])
def test_refuses_what_does_not_fit(code):
    with pytest.raises(ValueError, match="4 bits"):
        pack_int4(np.array([code], dtype=np.int8))


def test_refuses_bytes_of_another_count():
    with pytest.raises(ValueError, match="do not hold"):
        unpack_int4(np.zeros(2, dtype=np.uint8), (5,))
