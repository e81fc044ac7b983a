from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from passes.raise_opset import RaiseOpset
from passes.strip_metadata import NAME_SCOPES
from zqfp_compile.pass_base import PassError, PassResult

# Every operator kind that optimum's and torch's decomposed LLM exports contain, in its opset-13 form.
LLM_BODY = """
g (int64[B,S] ids, bool flag) => (float[B,S,8] y, float[B,S,8] z) <
  float[6,8] table = {0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8, 1,2,3,4,5,6,7,8, -1,-2,-3,-4,5,6,7,8,
                      9,8,7,6,5,4,3,2, 1,1,2,2,3,3,4,4, 5,5,6,6,7,7,8,8},
  float[8,8] w = {1,0,0,0,0,0,0,2, 0,1,0,0,0,0,2,0, 0,0,1,0,0,2,0,0, 0,0,0,1,2,0,0,0,
                  0,0,0,2,1,0,0,0, 0,0,2,0,0,1,0,0, 0,2,0,0,0,0,1,0, 2,0,0,0,0,0,0,1},
  float two = {2}, float eps = {0.00001}, float low = {-10000}, int64 zero = {0}, int64 one = {1},
  int64[1] i0 = {0}, int64[1] i1 = {1}, int64[1] last = {-1}, int64[1] four = {4},
  int64[6] pads = {0,0,0,0,0,4}, int64[3] as_is = {0,0,-1}, int64[2] halves = {4,4}> {
  x = Gather (table, ids)
  square = Pow (x, two)
  mean = ReduceMean <axes = [-1]> (square)
  shifted = Add (mean, eps)
  root = Sqrt (shifted)
  normed = Div (x, root)
  centre = ReduceMean <axes = [-1], keepdims = 1> (normed)
  top = ReduceMax <axes = [-1], keepdims = 1> (normed)
  total = ReduceSum (normed, last)
  bottom = ReduceMin (normed)
  h = MatMul (normed, w)
  a, b = Split <axis = -1> (h)
  c, d = Split <axis = -1> (h, halves)
  minus = Neg (b)
  rotated = Concat <axis = -1> (minus, a)
  angle = Cos (rotated)
  wave = Sin (rotated)
  front = Slice (h, i0, four, last)
  padded = Pad (front, pads)
  shape = Shape (ids)
  s = Gather <axis = 0> (shape, one)
  range = Range (zero, s, one)
  column = Unsqueeze (range, i1)
  row = Unsqueeze (range, i0)
  future = Greater (row, column)
  s1 = Unsqueeze (s, i0)
  square_shape = Concat <axis = 0> (s1, s1)
  zeros = ConstantOfShape <value = float[1] {0}> (square_shape)
  mask = Where (future, low, zeros)
  turned = Transpose <perm = [0, 2, 1]> (h)
  scores = MatMul (h, turned)
  masked = Add (scores, mask)
  probs = Softmax <axis = -1> (masked)
  context = MatMul (probs, h)
  gate = Sigmoid (context)
  silu = Mul (context, gate)
  cdf = Erf (silu)
  squashed = Tanh (cdf)
  flat = Reshape (squashed, as_is)
  count = CumSum (flat, one)
  hole = Equal (row, column)
  kept = Not (hole)
  as_float = Cast <to = 1> (kept)
  area = MatMul (as_float, context)
  wide = Expand (total, shape3)
  shape3 = Shape (h)
  r0 = Add (centre, top)
  r1 = Add (r0, bottom)
  r2 = Add (r1, wide)
  r3 = Add (r2, angle)
  r4 = Add (r3, wave)
  r5 = Add (r4, padded)
  r6 = Add (r5, count)
  r7 = Add (r6, area)
  halfs = Concat <axis = -1> (c, d)
  r8 = Sub (r7, halfs)
  y = LeakyRelu (r8)
  z = If (flag) <
    then_branch = yes () => (float[B,S,8] p) {
      e, f = Split <axis = -1> (y)
      m = ReduceMean <axes = [-1]> (e)
      n = Add (f, m)
      p = Concat <axis = -1> (n, e)
    },
    else_branch = no () => (float[B,S,8] q) { q = Identity (y) }>
}
"""


def llm_model(opset: int) -> ir.Model:
    body = LLM_BODY
    if opset >= 18:
        body = (
            body.replace("ReduceMean <axes = [-1]> (square)", "ReduceMean (square, last)")
            .replace("<axes = [-1], keepdims = 1> (normed)", "<keepdims = 1> (normed, last)")
            .replace("ReduceMean <axes = [-1]> (e)", "ReduceMean (e, last)")
            .replace("Split <axis = -1> (h)", "Split <axis = -1, num_outputs = 2> (h)")
            .replace("Split <axis = -1> (y)", "Split <axis = -1, num_outputs = 2> (y)")
        )
    swapped = "  shape3 = Shape (h)\n  wide = Expand (total, shape3)\n"
    body = body.replace("  wide = Expand (total, shape3)\n  shape3 = Shape (h)\n", swapped)
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : {opset}]>' + body)
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"/model/{node.op_type}_{number}"
        node.metadata_props[NAME_SCOPES] = f"['', 'layers.{number}', 'op']"
    return model


def outputs(model: ir.Model, flag: bool) -> list[np.ndarray]:
    ids = np.array([[1, 2, 3, 4, 5], [0, 5, 2, 2, 1]], dtype=np.int64)
    proto = ir.to_proto(model)
    return ReferenceEvaluator(proto).run(None, {"ids": ids, "flag": np.array(flag)})


@pytest.mark.parametrize("opset", range(13, 21))
def test_same_results_names_and_metadata(opset: int, run_pass: Callable[..., PassResult]) -> None:
    model = llm_model(opset)
    wanted = [outputs(model, flag) for flag in (True, False)]
    nodes = [(node.op_type, node.name, dict(node.metadata_props)) for node in model.graph.all_nodes()]
    assert run_pass(RaiseOpset(), model).modified
    assert model.graph.opset_imports == {"": 21}
    assert model.ir_version == 10
    assert [(n.op_type, n.name, dict(n.metadata_props)) for n in model.graph.all_nodes()] == nodes
    for flag, old in zip((True, False), wanted, strict=True):
        for before, after in zip(old, outputs(model, flag), strict=True):
            # The same numpy operations on the same numbers: bit equal.
            np.testing.assert_array_equal(after, before)


def test_golden(run_pass: Callable[..., PassResult], golden: Callable[[str, ir.Model], None]) -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 14]>
    g (float[M,8] x) => (float[M,8] y, float axes_m1) {
      m = ReduceMean <axes = [-1]> (x)
      n = ReduceMax <axes = [-1]> (x)
      axes_m1 = ReduceMin <keepdims = 0> (x)
      p = Add (m, n)
      a, b = Split <axis = 1> (x)
      c = Concat <axis = 1> (b, a)
      y = Add (c, p)
    }""")
    run_pass(RaiseOpset(), model)
    golden("raise_opset", model)


@pytest.mark.parametrize("opset", [21, 23, 26])
def test_a_new_enough_opset_is_left_alone(opset: int, run_pass: Callable[..., PassResult]) -> None:
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[M] x) => (float[M] y) {{ y = Relu(x) }}'
    model = ir.from_onnx_text(text)
    assert not run_pass(RaiseOpset(), model).modified


@pytest.mark.parametrize(("stored", "wanted"), [(8, 10), (10, 10), (11, 11), (13, 13), (14, 13)])
def test_ir_version_stays_readable(stored: int, wanted: int, run_pass: Callable[..., PassResult]) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: {stored}, opset_import: ["" : 21]> g (float[M] x) => (float[M] y) {{ y = Relu(x) }}'
    )
    assert run_pass(RaiseOpset(), model).modified == (stored != wanted)
    assert model.ir_version == wanted


@pytest.mark.parametrize("opset", [14, 18])
def test_external_weights_are_neither_read_nor_lost(
    opset: int, tmp_path: Path, run_pass: Callable[..., PassResult]
) -> None:
    ir.save(llm_model(opset), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=64)
    model = ir.load(tmp_path / "m.onnx")
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert isinstance(before["w"], ir.ExternalTensor)
    (tmp_path / "m.data").unlink()  # a read would fail
    run_pass(RaiseOpset(), model, check=False)
    for name, tensor in before.items():
        assert model.graph.initializers[name].const_value is tensor


def test_functions_are_inlined_with_their_scopes(run_pass: Callable[..., PassResult]) -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[M,8] x) => (float[M,8] y) { y = local.Centre(x) }
    <domain: "local", opset_import: ["" : 17]>
    Centre (a) => (b) { m = ReduceMean <axes = [-1]> (a)
      b = Sub (a, m) }""")
    (function,) = model.functions.values()
    for node in function:
        node.metadata_props[NAME_SCOPES] = "['', 'norm', 'op']"
    run_pass(RaiseOpset(), model)
    assert not model.functions
    assert [node.op_type for node in model.graph] == ["ReduceMean", "Sub"]
    assert all(node.metadata_props[NAME_SCOPES] == "['', 'norm', 'op']" for node in model.graph)


def test_operators_outside_the_standard_are_left_alone(run_pass: Callable[..., PassResult]) -> None:
    """ONNX Runtime's optimiser writes SimplifiedLayerNormalization into the default domain."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[M,8] x, float[8] s) => (float[M,8] y) {
      n = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x, s)
      y = com.microsoft.QuickGelu (n)
    }""")
    run_pass(RaiseOpset(), model, check=False)
    assert [node.op_type for node in model.graph] == ["SimplifiedLayerNormalization", "QuickGelu"]


@pytest.mark.parametrize("opset", [11, 12, 27])
def test_unsupported_opset_says_what_to_do(opset: int) -> None:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[M] x) => (float[M] y) {{ y = Relu(x) }}'
    with pytest.raises(PassError, match=f"opset {opset}; export it again with an opset between 13 and 26"):
        RaiseOpset().call(ir.from_onnx_text(text))


def test_what_the_converter_skips_in_silence_is_an_error() -> None:
    """GroupNormalization of opset 18 has scales per group; onnxscript leaves an unknown shape as it is."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18]>
    g (float[N,C,4] x, float[2] s, float[2] b) => (float[N,C,4] y) {
      y = GroupNormalization <num_groups = 2> (x, s, b)
    }""")
    next(iter(model.graph)).name = "norm"
    with pytest.raises(PassError, match="GroupNormalization node 'norm' means something else in opset 21"):
        RaiseOpset().call(model)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ("Relu <slope = 1.0> (x)", "Relu node 'n' has the attribute 'slope', unknown in opset 21"),
        ("Relu (x, x)", "Relu node 'n' has 2 inputs and 1 outputs, not legal in 21"),
    ],
)
def test_a_node_without_a_legal_form_is_an_error(node: str, message: str) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 18]> g (float[M] x) => (float[M] y) {{ y = {node} }}'
    )
    next(iter(model.graph)).name = "n"
    with pytest.raises(PassError, match=message):
        RaiseOpset().call(model)


def test_grid_sample_modes_get_their_new_names(run_pass: Callable[..., PassResult]) -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18]>
    g (float[1,1,2,2] x) => (float[1,1,2,2] y) { y = GridSample <mode = "bilinear"> (x, x) }""")
    assert run_pass(RaiseOpset(), model, check=False).modified
    (node,) = model.graph
    assert node.attributes["mode"].as_string() == "linear"


def test_group_normalization_of_one_channel_per_group_is_kept(run_pass: Callable[..., PassResult]) -> None:
    """There a scale per group is a scale per channel, which is what opset 21 has."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18]>
    g (float[1,2,4] x, float[2] s, float[2] b) => (float[1,2,4] y) {
      y = GroupNormalization <num_groups = 2> (x, s, b)
    }""")
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    assert run_pass(RaiseOpset(), model).modified
    y = ReferenceEvaluator(ir.to_proto(model)).run(
        None, {"x": x, "s": np.ones(2, np.float32), "b": x[0, :, 0]}
    )[0]
    wanted = (x - x.mean(2, keepdims=True)) / x.std(2, keepdims=True) + x[:, :, :1]
    np.testing.assert_allclose(y, wanted, atol=1e-4)  # epsilon 1e-5 beside a variance of 1.25


@pytest.mark.parametrize(("opset", "mode"), [(13, "output_half_pixel"), (16, None)])
def test_roi_align_keeps_its_old_default(
    opset: int, mode: str | None, run_pass: Callable[..., PassResult]
) -> None:
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (float[1,1,4,4] x, float[1,4] r, int64[1] i) => (float[1,1,1,1] y) {{ y = RoiAlign (x, r, i) }}""")
    run_pass(RaiseOpset(), model)
    (node,) = model.graph
    given = node.attributes.get("coordinate_transformation_mode")
    assert (given.as_string() if given is not None else None) == mode


def test_two_versions_of_the_default_domain_are_an_error() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["ai.onnx" : 18, "" : 21]>
    g (float[M] x) => (float[M] y) { y = Relu(x) }""")
    with pytest.raises(PassError, match="imports the default opset twice, as 21 and 18"):
        RaiseOpset().call(model)


def test_a_model_of_other_domains_only_gets_a_default_opset(run_pass: Callable[..., PassResult]) -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["com.microsoft" : 1]>
    g (float[M] x) => (float[M] y) { y = com.microsoft.QuickGelu (x) }""")
    assert run_pass(RaiseOpset(), model, check=False).modified
    assert model.graph.opset_imports == {"com.microsoft": 1, "": 21}


def test_training_outputs_are_an_error() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 13]>
    g (float[N,4] x, float[4] s) => (float[N,4] y) {
      y, m, v, sm, sv = BatchNormalization (x, s, s, s, s) }""")
    with pytest.raises(PassError, match="training outputs"):
        RaiseOpset().call(model)


def test_the_default_domain_under_its_other_name(run_pass: Callable[..., PassResult]) -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["ai.onnx" : 18]>
    g (float[M] x) => (float[M] y) { y = Relu(x) }""")
    assert run_pass(RaiseOpset(), model).modified
    assert model.graph.opset_imports == {"": 21}


def test_onnx_proto_models_load(run_pass: Callable[..., PassResult]) -> None:
    node = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["M", 8])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["M"])
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    model = ir.from_proto(proto)
    run_pass(RaiseOpset(), model)
    assert model.graph.opset_imports[""] == 21
