"""zqfp::QuantizedW4A8Linear on the CPU, made by join-quantizers: bit for bit what the two nodes compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fused_quantizers import Fused, run, session_of
from quantized_layers import LAYERS, Layer, activations, joined, layers, model, set_attributes

pytest.importorskip("onnxruntime")

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
CASES = [layer for dtype in (F32, F16, BF16) for layer in layers(dtype=dtype)]
NORM = Layer(Fused(norm=True, skip=True, rank=16, k=80), (64, 72), bias=True)


@pytest.fixture(scope="module")
def library(make) -> Path:
    return make("onnxruntime-ops") / "libzqfp_onnxruntime.so"


@pytest.mark.parametrize("layer", CASES, ids=str)
def test_every_number_is_that_of_the_two_nodes(layer, library):
    apart, one = session_of(model(layer), library), session_of(joined(layer), library)
    for rows in (1, 7, 33, 0):
        feeds = activations(layer, rows)
        wanted, got = run(apart, feeds), run(one, feeds)
        assert [*got] == [*wanted] and all(np.array_equal(got[name], wanted[name]) for name in wanted)
        assert got["y.0"].shape == (rows, layer.sizes[0])
        assert rows == 0 or np.ptp(got["y.0"]) > 0


@pytest.mark.parametrize("layer", LAYERS[::3], ids=str)
def test_threads_and_dimensions_change_no_bit(layer, library):
    graph, feeds = joined(layer), activations(layer, 12)
    wanted = run(session_of(graph, library, threads=1), feeds)
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        value.shape = ir.Shape(["a", "b", "c", int(value.shape[-1])])
    session = session_of(graph, library, threads=3)
    got = run(session, {name: x.reshape(2, 3, 2, -1) for name, x in feeds.items()})
    for name, value in wanted.items():
        assert np.array_equal(got[name], value.reshape(2, 3, 2, -1)), name


@pytest.mark.parametrize("layer", layers(dtype=F16), ids=str)
def test_shapes_are_inferred(layer, library):
    graph = joined(layer)
    declared = [[d if isinstance(d, int) else str(d) for d in value.shape] for value in graph.graph.outputs]
    for value in graph.graph.outputs:
        value.shape = None
    outputs = session_of(graph, library).get_outputs()
    assert [output.shape for output in outputs] == declared
    assert {output.type for output in outputs} == {"tensor(float16)"}


def damaged(layer: Layer, **attributes: int | list[int]) -> ir.Model:
    graph = joined(layer)
    for value in graph.graph.outputs:  # what they declare would be the first error
        value.shape = None
        if "dtype" in attributes and value.name != "sum":
            value.dtype = ir.DataType(attributes["dtype"])
    set_attributes(graph.graph.node(0), **attributes)
    return graph


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"source": 4}, r"attribute source is 4, it must be 1 \(x\), 2 \(SiLU\) or 3 \(norm\)"),
        ({"source": 2}, "QuantizedW4A8Linear has 10 inputs and 3 outputs, its attributes say 9 and 2"),
        ({"skip": 0}, "QuantizedW4A8Linear has 10 inputs and 3 outputs, its attributes say 9 and 2"),
        ({"per_token": 1}, "10 inputs and 3 outputs, its attributes say 9 and 3"),
        ({"bias": 0}, "10 inputs and 3 outputs, its attributes say 9 and 3"),
        ({"lorc_rank": 0}, "10 inputs and 3 outputs, its attributes say 8 and 3"),
        ({"lorc_rank": 8}, r"lorc_v has shape \[80, 16\], it must be \[80, 8\]"),
        ({"output_n": [64, 64]}, "does not divide n = 136"),
        ({"n": 264, "output_n": [64, 200]}, "codes have 24576 elements"),
        ({"k": 144}, "codes have 24576 elements"),
        ({"k": 96}, r"x has shape \[3, 80\], its last dimension must be 96"),
        ({"group_size": 16}, "32, 64 or 128"),
        ({"dtype": int(F16)}, "bias does not have the type of the output"),
        ({"dtype": 7}, "attribute dtype has element type 7"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_attributes_that_do_not_fit_are_errors(attributes, says, library):
    with pytest.raises(Exception, match=f"zqfp: .*{says}"):
        run(session_of(damaged(NORM, **attributes), library), activations(NORM, 3))


def test_lorc_needs_the_type_of_x(library):
    """V has that of x, U that of y."""
    layer = Layer(Fused(dtype=F16, rank=16, k=80))
    graph = damaged(layer, dtype=int(F32))
    u = graph.graph.initializers["u"]
    u.const_value, u.dtype = ir.tensor(u.const_value.numpy().astype(np.float32)), F32
    with pytest.raises(Exception, match="x does not have the type of the output"):
        run(session_of(graph, library), activations(layer, 3))


def test_without_lorc_y_may_have_another_type(library):
    layer = Layer(Fused(dtype=F16, plain=True, k=80))
    graph = damaged(layer, dtype=int(F32))
    feeds = activations(layer, 3)
    half, single = (run(session_of(each, library), feeds)["y.0"] for each in (joined(layer), graph))
    assert np.array_equal(half, single.astype(np.float16)) and not np.array_equal(half, single)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("codes", "float", "codes has element type 1, it must be 22"),
        ("group_scales", "float", "group_scales has element type 1, it must be 17"),
        ("row_scales", "short", r"row_scales has shape \[68\], it must have 136 elements"),
        ("bias", "short", r"bias has shape \[68\], it must have 136 elements"),
        ("u", "short", "lorc_u has shape"),
        ("gamma", "short", r"gamma has shape \[40\], it must be \[80\]"),
        ("v", "short", "lorc_v has shape"),
        ("a", "half", "a static scale must be one FLOAT"),
        ("row_scales", "half", "row_scales has element type 10, it must be 1"),
        ("codes", "computed", "codes is not an initializer"),
    ],
)
def test_wrong_inputs_are_errors(name, change, says, library):
    graph = damaged(NORM)
    value = graph.graph.initializers[name]
    array = value.const_value.numpy().astype(np.float32)
    if change == "computed":
        graph.graph.initializers.pop(name)
        value.const_value = None
        graph.graph.inputs.append(value)
    else:
        array = array.astype(np.float16) if change == "half" else array
        value.const_value = ir.tensor(array[: len(array) // 2] if change == "short" else array)
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(value.const_value.shape.numpy())
    with pytest.raises(Exception, match=says):
        run(session_of(graph, library), activations(NORM, 3))


@pytest.mark.parametrize("name", ["skip", "up"])
def test_operands_of_another_shape_are_errors(name, library):
    layer = NORM if name == "skip" else LAYERS[4]
    graph = damaged(layer)
    next(value for value in graph.graph.inputs if value.name == name).shape = None
    feeds = activations(layer, 3)
    feeds[name] = feeds[name][:, :40]
    with pytest.raises(Exception, match=rf"{name} has shape \[3, 40\], it must be \[3, 80\]"):
        run(session_of(graph, library), feeds)
