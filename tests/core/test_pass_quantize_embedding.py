"""select-embedding and quantize-embedding: what is taken, what is left alone and why, what is written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from passes.quantize_embedding import QuantizeEmbedding
from passes.quantize_weights import QuantizeWeights
from passes.remove_unused import RemoveUnused
from passes.select_embedding import SelectEmbedding
from passes.select_linears import SelectLinears
from zqfp_compile import specs
from zqfp_compile.errors import UsageError
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import LinearTensors, QuantPlan, SitePrecision

V, D = 40, 16
IDS = np.array([[0, 39, 7], [7, 1, 20]])
FP8 = ml_dtypes.float8_e4m3fn

UNTIED = "h = Gather(table, input_ids)  logits = MatMul(h, head)"
TIED = "h = Gather(table, input_ids)  t = Transpose<perm=[1, 0]>(table)  logits = MatMul(h, t)"


def _model(body: str, dtype: str = "float", **initializers: np.ndarray) -> ir.Model:
    outputs = f"{dtype}[B,S,{V}] logits"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (int64[B,S] input_ids) => ({outputs}) {{ {body} }}'
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    numpy_type = np.float16 if dtype == "float16" else np.float32
    arrays = {
        "table": random.standard_normal((V, D)).astype(numpy_type),
        "head": random.standard_normal((D, V)).astype(numpy_type),
        **initializers,
    }
    for name, array in arrays.items():
        users = [
            (node, index)
            for node in model.graph
            for index, value in enumerate(node.inputs)
            if value is not None and value.name == name
        ]
        if users:
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            model.graph.register_initializer(value)
            for node, index in users:
                node.replace_input_with(index, value)
    return model


def _plan(model: ir.Model, *, lm_head: bool = True) -> QuantPlan:
    """The plan of the linears; without ``lm_head`` there are none."""
    if not lm_head:
        return QuantPlan()
    plan = SelectLinears(quantize_lm_head=True).call(model).plan
    assert plan is not None
    return plan.replace(activation_format="none")


def _select(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    found = SelectEmbedding(plan).call(model).plan
    assert found is not None
    return found


def _with_tensors(plan: QuantPlan) -> QuantPlan:
    """Random tables; tied linears share them."""
    random = np.random.default_rng(1)
    tables, layers = {}, {}
    for site in plan.embeddings:
        codes = random.uniform(-448, 448, (site.rows, site.width)).astype(FP8)
        rows = random.uniform(1e-3, 2e-3, site.rows).astype(np.float32)
        tables[site.name] = LinearTensors(ir.tensor(codes), None, ir.tensor(rows))
        layers.update(dict.fromkeys(site.linears, tables[site.name]))
    return plan.replace(embedding_tensors=tables, tensors=layers)


def _decoded(plan: QuantPlan) -> np.ndarray:
    (tensors,) = plan.embedding_tensors.values()
    rows = tensors.row_scales.numpy()
    return QuantizedWeight(tensors.codes.numpy(), None, rows, D, "fp8", 0, "e4m3").dequantize()


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_golden(dtype: str, run_pass, golden) -> None:
    model = _model(UNTIED, dtype)
    result = run_pass(SelectEmbedding(_plan(model, lm_head=False)), model)
    plan = _with_tensors(result.plan)
    (site,) = plan.embeddings
    assert (site.rows, site.width, site.output, site.linears) == (V, D, "h", ())
    assert run_pass(QuantizeEmbedding(plan), model).modified
    specs.check(model, "quantized")
    specs.check(model, "engine")
    golden(f"quantize_embedding_{dtype}", model)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_gathered_rows_are_codes_times_scales_rounded_once(dtype: str, run_pass) -> None:
    model = _model("h = Gather(table, input_ids)  logits = Identity(h)", dtype)
    model.graph.outputs[0].shape = ir.Shape(["B", "S", D])
    plan = _with_tensors(_select(model, QuantPlan()))
    run_pass(QuantizeEmbedding(plan), model)
    run_pass(RemoveUnused(), model)
    assert "table" not in model.graph.initializers
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"input_ids": IDS})
    numpy_type = np.float16 if dtype == "float16" else np.float32
    assert found.dtype == numpy_type
    assert np.array_equal(found, _decoded(plan).astype(numpy_type)[IDS])


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_the_gathered_value_may_be_a_graph_output(dtype: str, run_pass) -> None:
    model = _model("logits = Gather(table, input_ids)", dtype)
    model.graph.outputs[0].shape = ir.Shape(["B", "S", D])
    plan = _with_tensors(_select(model, QuantPlan()))
    assert run_pass(QuantizeEmbedding(plan), model).modified
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert ReferenceEvaluator(ir.to_proto(model)).run(None, {"input_ids": IDS})[0].shape == (2, 3, D)


def test_a_tied_lm_head_and_the_embedding_read_one_tensor(run_pass) -> None:
    model = _model(TIED, "float16")
    plan = _plan(model)
    result = run_pass(SelectEmbedding(plan), model)
    plan = result.plan
    (site,), (linear,) = plan.embeddings, plan.linears
    assert site.linears == (linear.name,) and plan.tied == {linear.name}
    assert plan.precision(linear) == SitePrecision("fp8", 0)
    plan = _with_tensors(plan)
    QuantizeWeights(plan).call(model)
    run_pass(QuantizeEmbedding(plan), model)
    run_pass(RemoveUnused(), model)
    stored = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT8E4M3FN]
    assert len(stored) == 1 and "table" not in model.graph.initializers
    readers = {node.op_type for node, _ in stored[0].uses()}
    assert readers == {"DequantizeLinear", "W4A8Linear"}


def test_a_table_that_mixed_precision_keeps_in_float_stays(run_pass) -> None:
    model = _model(TIED)
    plan = _with_tensors(_select(model, _plan(model)))
    kept = plan.replace(precisions={plan.linears[0].name: SitePrecision("none", 0)})
    assert kept.stored_embeddings == () and plan.stored_embeddings == plan.embeddings
    assert not run_pass(QuantizeEmbedding(kept), model).modified


@pytest.mark.parametrize(
    ("body", "lm_head", "reason"),
    [
        (TIED, False, "stays in float: FP8 next to it would be a second copy; see --quantize-lm-head"),
        (
            "h = Gather(table, input_ids)  t = Transpose<perm=[1, 0]>(table)"
            "  p = MatMul(h, head)  q = Gemm<alpha=0.5>(h2, t)  z = Reshape(q, s)  logits = Add(p, z)",
            True,
            "scales or rounds it differently",
        ),
        ("n = Neg(table)  h = Gather(n, input_ids)  logits = MatMul(h, head)", True, "computed in the graph"),
        (
            "t = Transpose<perm=[1, 0]>(table)  h = Gather(t, input_ids)  logits = MatMul(h, wide)",
            True,
            "no matrix with one row per token",
        ),
        (
            "h = Gather(table, input_ids)  e = Exp(table)  r = ReduceSum(e)  m = MatMul(h, head)"
            "  logits = Mul(m, r)",
            True,
            "is also read by",
        ),
        (
            "f = Cast<to=1>(input_ids)  h = Gather(f, input_ids)  logits = MatMul(h, head)",
            True,
            "its table is no constant",
        ),
    ],
)
def test_declined_with_a_reason(body: str, lm_head: bool, reason: str, run_pass) -> None:
    extra = {
        "wide": np.zeros((V, V), np.float32),
        "h2": np.ones((1, D), np.float32),
        "s": np.array([1, 1, V]),
    }
    if "h2" in body:  # an activation that is a row of ones plus what was gathered
        body = body.replace("q = Gemm", "r2 = ReduceMean<keepdims=0>(h, ax)  a2 = Add(r2, h2)  q = Gemm")
        body = body.replace("(h2, t)", "(a2, t)")
        extra["ax"] = np.array([0, 1])
    model = _model(body, **extra)
    result = run_pass(SelectEmbedding(_plan(model, lm_head=lm_head)), model)
    assert result.plan.embeddings == () and result.plan.precisions == {}
    (declined,) = result.declined
    assert reason in declined.reason


def test_tokens_may_be_cast_and_reshaped_on_the_way(run_pass) -> None:
    body = "i = Cast<to=6>(input_ids)  j = Identity(i)  h = Gather(table, j)  logits = MatMul(h, head)"
    model = _model(body)
    (site,) = run_pass(SelectEmbedding(_plan(model)), model).plan.embeddings
    assert (site.rows, site.width, site.source.initializer) == (V, D, "table")


def test_a_table_that_is_an_output_stays(run_pass) -> None:
    model = _model(UNTIED)
    table = model.graph.initializers["table"]
    table.type, table.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([V, D])
    model.graph.outputs.append(table)
    result = run_pass(SelectEmbedding(_plan(model)), model)
    assert result.plan.embeddings == () and result.declined[0].reason == "its table is a graph output"


def test_weights_none_keeps_a_tied_table(run_pass) -> None:
    model = _model(TIED)
    result = run_pass(SelectEmbedding(_plan(model).replace(weight_format="none")), model)
    assert result.plan.embeddings == () and "stays in float" in result.declined[0].reason


def test_rows_that_no_output_depends_on(run_pass) -> None:
    model = _model("h = Gather(table, input_ids)  f = Cast<to=1>(input_ids)  logits = MatMul(f, head)")
    result = run_pass(SelectEmbedding(QuantPlan()), model, check=False)
    assert result.plan.embeddings == ()
    assert [entry.reason for entry in result.declined] == ["no output depends on it"]


def test_positions_are_no_token_embedding() -> None:
    model = _model(UNTIED)
    model.graph.inputs[0].name = "position_ids"
    with pytest.raises(UsageError, match=r"--quantize-embedding: .*leave the option out"):
        SelectEmbedding(QuantPlan()).call(model)


def test_a_table_in_a_constant_node_is_lifted(run_pass) -> None:
    values = ", ".join(str(index / 8) for index in range(6))
    body = f"t = Constant<value = float[3,2] {{{values}}}>()  logits = Gather(t, input_ids)"
    model = _model(body)
    model.graph.outputs[0].shape = ir.Shape(["B", "S", 2])
    result = run_pass(SelectEmbedding(QuantPlan()), model)
    assert result.modified and "t" in model.graph.initializers
    assert result.plan.embeddings[0].rows == 3


def test_what_is_missing_is_said() -> None:
    model = _model(UNTIED)
    plan = _select(model, QuantPlan())
    with pytest.raises(PassError, match="has no quantised table"):
        QuantizeEmbedding(plan).call(model)
    plan = _with_tensors(plan)
    model.graph.opset_imports[""] = 20
    with pytest.raises(PassError, match="below 21"):
        QuantizeEmbedding(plan).call(model)
    with pytest.raises(PassError, match="is not in the graph"):
        QuantizeEmbedding(plan).call(
            _model(
                "h = Gather(other, input_ids)  logits = MatMul(h, head)", other=np.zeros((V, D), np.float32)
            )
        )
