"""zqfp::QuantizeSiluMul and zqfp::QuantizeRmsNorm on the CPU against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fused_quantizers import Fused, check, inputs, model, reference, run, session_of, variants

pytest.importorskip("onnxruntime")

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


@pytest.fixture(scope="module")
def library(make) -> Path:
    return make("onnxruntime-ops") / "libzqfp_onnxruntime.so"


CASES = [case for dtype in (F32, F16, BF16) for case in variants(dtype=dtype)]
CASES += [case for k in (1, 7, 576) for case in variants(dtype=F16, k=k, rank=3)[::2]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_variant_equals_float64(case, library):
    feeds = inputs(case, 37)
    check(case, run(session_of(model(case), library), feeds), reference(case, feeds))


@pytest.mark.parametrize("case", variants(rank=16)[::2], ids=str)
def test_rows_do_not_depend_on_the_batch_nor_on_threads(case, library):
    feeds = inputs(case, 33)
    whole = run(session_of(model(case), library, threads=1), feeds)
    session = session_of(model(case), library, threads=3)
    rows = {name: x[5:6] if name in ("x", "up", "skip") else x for name, x in feeds.items()}
    for name, value in run(session, rows).items():
        assert np.array_equal(value, whole[name][5:6])
    empty = {name: x[:0] if name in ("x", "up", "skip") else x for name, x in feeds.items()}
    for name, value in run(session, empty).items():
        assert value.shape == (0, *whole[name].shape[1:])


def test_large_and_small_numbers(library):
    """SiLU of +-1e4 does not overflow; a row of zeros has the smallest range; a norm of zeros is zero."""
    case = Fused(tokens=True, k=4)
    x = np.array([[-1e4, -100, 100, 1e4], [0, 0, 0, 0]], np.float32)
    got = run(session_of(model(case), library), {"x": x, "up": np.ones_like(x)})
    assert got["x8"].tolist() == [[0x80, 0x80, 0x49, 0x7E], [0, 0, 0, 0]]
    assert np.allclose(got["a.out"].ravel(), [1e4 / 448, 1e-30 / 448], rtol=1e-6, atol=0)
    norm = Fused(norm=True, tokens=True, k=4)
    got = run(session_of(model(norm), library), {"x": x * 0, "gamma": np.ones(4, np.float32)})
    assert not (got["x8"] & 0x7F).any()


@pytest.mark.parametrize("case", variants(rank=16), ids=str)
def test_shapes_are_inferred(case, library):
    graph = model(case)
    declared = [[d if isinstance(d, int) else str(d) for d in value.shape] for value in graph.graph.outputs]
    for value in graph.graph.outputs:
        value.shape = None
    assert [output.shape for output in session_of(graph, library).get_outputs()] == declared


def changed(case: Fused, **attributes: int) -> ir.Model:
    graph = model(case)
    for value in graph.graph.outputs:  # what they declare would be the first error
        value.shape = None
    for name, value in attributes.items():
        graph.graph.node(0).attributes[name] = ir.AttrInt64(name, value)
    return graph


@pytest.mark.parametrize(
    ("case", "attributes", "says"),
    [
        (Fused(), {"tokens": 1}, "QuantizeSiluMul has 3 inputs and 1 outputs, its attributes say 2 and 2"),
        (Fused(rank=8), {"lorc_rank": 0}, "QuantizeSiluMul has 4 inputs and 2 outputs"),
        (Fused(rank=8), {"lorc_rank": 16}, r"lorc_v has shape \[208, 8\]"),
        (Fused(norm=True, skip=True), {"skip": 0}, "QuantizeRmsNorm has 4 inputs and 2 outputs"),
    ],
    ids=["scale", "rank", "v", "skip"],
)
def test_attributes_that_do_not_fit_are_errors(case, attributes, says, library):
    graph = changed(case, **attributes)
    with pytest.raises(Exception, match=says):
        run(session_of(graph, library), inputs(case, 3))


@pytest.mark.parametrize(
    ("case", "name", "says"),
    [
        (Fused(), "up", r"up has shape \[3, 104\], it must be \[3, 208\]"),
        (Fused(norm=True), "gamma", r"gamma has shape \[104\], it must be \[208\]"),
        (Fused(norm=True, skip=True), "skip", r"skip has shape \[3, 104\], it must be \[3, 208\]"),
    ],
    ids=["up", "gamma", "skip"],
)
def test_operands_of_another_shape_are_errors(case, name, says, library):
    graph = model(case)
    value = next(value for value in graph.graph.inputs if value.name == name)
    value.shape = None
    feeds = inputs(case, 3)
    feeds[name] = feeds[name][..., :104]
    with pytest.raises(Exception, match=says):
        run(session_of(graph, library), feeds)


def test_operands_of_another_type_are_errors(library):
    graph = model(Fused())
    value = next(value for value in graph.graph.inputs if value.name == "up")
    value.dtype = F16
    feeds = inputs(Fused(), 3)
    feeds["up"] = feeds["up"].astype(np.float16)
    with pytest.raises(Exception, match="of x's type"):
        run(session_of(graph, library), feeds)
