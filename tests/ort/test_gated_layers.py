"""Gated layers on the CPU: bit for bit what gate and up apart, and QuantizeSiluMul behind them, compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fused_quantizers import Fused, run, session_of
from quantized_layers import Layer, activations, gate_and_up, gated_layers, joined, model, set_attributes

pytest.importorskip("onnxruntime")

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
CASES = [layer for dtype in (F32, F16, BF16) for layer in gated_layers(dtype=dtype)]
LAYER = Layer(Fused(norm=True, skip=True, tokens=True, rank=16, k=80), (24,), bias=True, gated=True)
Form = Callable[[Layer], ir.Model]
FORMS = pytest.mark.parametrize("form", [model, joined], ids=["PackedW4A8Linear", "QuantizedW4A8Linear"])


@pytest.fixture(scope="module")
def library(make) -> Path:
    return make("onnxruntime-ops") / "libzqfp_onnxruntime.so"


@pytest.mark.parametrize("layer", CASES, ids=str)
def test_every_number_is_that_of_gate_and_up_apart(layer, library):
    apart, *gated = (session_of(form(layer), library) for form in (gate_and_up, model, joined))
    for rows in (1, 5, 33, 0):
        feeds = activations(layer, rows)
        wanted = run(apart, feeds)
        assert wanted["y.0"].shape == (rows, *layer.sizes) and (rows == 0 or np.ptp(wanted["y.0"]) > 0)
        for session in gated:
            got = run(session, feeds)
            assert [*got] == [*wanted] and all(np.array_equal(got[name], wanted[name]) for name in wanted)


@FORMS
def test_a_missing_attribute_is_zero(form, library):
    """A layer that is not gated may also say so."""
    layer = Layer(Fused(dtype=F16, tokens=True, k=80))
    said = form(layer)
    set_attributes(linear(said), gated=0)
    feeds = activations(layer, 3)
    silent, spoken = (run(session_of(graph, library), feeds)["y.0"] for graph in (form(layer), said))
    assert silent.shape == (3, 72) and np.array_equal(silent, spoken)


@FORMS
@pytest.mark.parametrize("features", [8, 24, 72])
def test_shapes_are_inferred(features, form, library):
    graph = form(Layer(Fused(dtype=F16, norm=True, skip=True, k=80), (features,), gated=True))
    for value in graph.graph.outputs:
        value.shape = None
    y, total = session_of(graph, library).get_outputs()
    assert (y.shape, y.type) == (["batch", features], "tensor(float16)")
    assert (total.shape, total.type) == (["batch", 80], "tensor(float16)")


@FORMS
def test_dimensions_change_no_bit(form, library):
    graph, feeds = form(LAYER), activations(LAYER, 12)
    wanted = run(session_of(graph, library), feeds)
    for value in (*graph.graph.inputs, *(output for node in graph.graph for output in node.outputs)):
        value.shape = None
    got = run(session_of(graph, library), {name: x.reshape(2, 6, -1) for name, x in feeds.items()})
    assert np.array_equal(got["y.0"], wanted["y.0"].reshape(2, 6, -1))


def linear(graph: ir.Model) -> ir.Node:
    return next(node for node in graph.graph if node.op_type.endswith("W4A8Linear"))


@FORMS
@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"gated": 2}, "attribute gated is 2, it must be 0 or 1"),
        ({"gated": -1}, "attribute gated is -1, it must be 0 or 1"),
        ({"n": 40}, "attribute n of a gated layer is 40, it must be a multiple of 16"),
        ({"output_n": [48]}, "a gated layer has one output, it cannot have the attribute output_n"),
        ({"n": 64}, r"row_scales has shape \[48\], it must have 64 elements"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_attributes_that_do_not_fit_are_errors(attributes, says, form, library):
    graph = form(LAYER)
    for value in graph.graph.outputs:  # what they declare would be the first error
        value.shape = None
    set_attributes(linear(graph), **attributes)
    with pytest.raises(Exception, match=f"zqfp: .*{says}"):
        run(session_of(graph, library), activations(LAYER, 3))
