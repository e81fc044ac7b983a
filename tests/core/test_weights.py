from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from zqfp_compile.calibrate.linears import read_in_torch
from zqfp_compile.errors import ModelError
from zqfp_compile.plan import LinearSite, WeightSource
from zqfp_compile.weights import locate_weight, read_bias, read_weight


def model_with(**arrays: np.ndarray) -> ir.Model:
    values = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def site(name: str = "l", weight: str = "w", bias: str | None = None, scale: float = 1.0) -> LinearSite:
    source = WeightSource(weight, transposed=True)
    return LinearSite(name, name, "x", "y", source, bias, scale, k=3, n=4, dtype=ir.DataType.FLOAT)


def every_value(dtype: type) -> np.ndarray:
    """All finite values of a 16-bit type, as a matrix."""
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    return np.where(np.isfinite(values.astype(np.float32)), values, dtype(0)).reshape(256, 256)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_weights_become_float32_exactly(dtype: type, transposed: bool) -> None:
    array = every_value(dtype)
    weight = read_weight(model_with(w=array), WeightSource("w", transposed))
    assert weight.dtype == np.float32
    assert weight.flags.c_contiguous
    np.testing.assert_array_equal(weight, (array.T if transposed else array).astype(np.float32))


def test_casts_round_in_order_and_scale_comes_last() -> None:
    array = np.array([[1 + 2.0**-9, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1e9]], np.float32)
    casts = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    half = read_weight(model_with(w=array), WeightSource("w", False, casts=casts[:1]))
    # float16 has 10 fraction bits: ties go to the even neighbour, 1e9 overflows.
    np.testing.assert_array_equal(half, [[1 + 2.0**-9, 1, 1 + 2 * 2.0**-10, np.inf]])
    both = read_weight(model_with(w=array), WeightSource("w", False, scale=0.5, casts=casts))
    np.testing.assert_array_equal(both, [[0.5, 0.5, 0.5, np.inf]])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("casts", [(), (ir.DataType.BFLOAT16,)])
def test_torch_reads_the_same_bits(dtype: type, transposed: bool, casts: tuple) -> None:
    array = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    weight = locate_weight(model_with(w=array), WeightSource("w", transposed, scale=0.3, casts=casts))
    loaded = read_in_torch(weight, "cpu")
    assert loaded.is_contiguous()
    np.testing.assert_array_equal(loaded.numpy(), weight.read(), strict=True)


def test_the_result_is_a_copy() -> None:
    array = np.ones((4, 3), np.float32)
    read_weight(model_with(w=array), WeightSource("w", False))[:] = 7
    np.testing.assert_array_equal(array, 1)


def test_external_weights_are_mapped_one_at_a_time(tmp_path: Path) -> None:
    arrays = {f"w{i}": np.full((512, 512), i, np.float32) for i in range(8)}
    ir.save(model_with(**arrays), tmp_path / "m.onnx", external_data="m.data")
    model = ir.load(tmp_path / "m.onnx")
    tracemalloc.start()
    for number, name in enumerate(arrays):
        weight = read_weight(model, WeightSource(name, False))
        assert (weight.min(), weight.max()) == (number, number)
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.raw is None  # unmapped
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A weight is 1 MiB; the previous one lives until the name is assigned again. All eight would be 8 MiB.
    assert peak < 3 << 20
    np.testing.assert_array_equal(read_weight(model, WeightSource("w3", True)), arrays["w3"])  # reads again


def test_a_view_that_someone_holds_survives(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    ir.save(model_with(w=array), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    held = model.graph.initializers["w"].const_value.numpy()
    for _ in range(2):
        np.testing.assert_array_equal(read_weight(model, WeightSource("w", False)), array)
    np.testing.assert_array_equal(held, array)


@pytest.mark.parametrize("stored", [np.arange(4.0), np.arange(4.0)[None], np.float64(3), np.array([3.0])])
def test_bias_forms(stored: np.ndarray) -> None:
    model = model_with(w=np.ones((3, 4), np.float32), b=np.asarray(stored, np.float16))
    bias = read_bias(model, site(bias="b", scale=0.5))
    assert bias is not None
    assert (bias.dtype, bias.shape) == (np.float32, (4,))
    np.testing.assert_array_equal(bias, np.broadcast_to(np.asarray(stored) / 2, (1, 4))[0])


def test_no_bias_is_none() -> None:
    assert read_bias(model_with(w=np.ones((3, 4), np.float32)), site()) is None


def test_a_plan_of_another_model_is_an_error() -> None:
    model = model_with(w=np.ones((3, 4), "f4"), b=np.ones(3, "f4"), t=np.ones((2, 3, 4), "f4"))
    with pytest.raises(ModelError, match="no initializer 'q'; the plan was made for another model"):
        read_weight(model, WeightSource("q", True))
    with pytest.raises(ModelError, match="bias 'b' has 3 values for 4 outputs"):
        read_bias(model, site(bias="b"))
    with pytest.raises(ModelError, match="a weight is a matrix"):
        read_weight(model, WeightSource("t", True))
