from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import Case, artifact, float_model, make_plan, unreadable

from passes.lower_weights_fp8 import LowerWeightsFp8
from passes.qdq_to_casts import QdqToCasts
from passes.quantize_activations import QuantizeActivations
from passes.remove_unused import RemoveUnused
from zqfp_compile import specs


def lowered(case: Case) -> ir.Model:
    model, plan = artifact(case)
    LowerWeightsFp8(plan).call(model)
    RemoveUnused().call(model)
    return model


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("qdq_to_casts", Case(dtype=ir.DataType.FLOAT16)),
        ("qdq_to_casts_token", Case(per_token=True)),
    ],
)
def test_golden(name, case, run_pass, golden):
    model = lowered(case)
    assert run_pass(QdqToCasts(), model).modified
    RemoveUnused().call(model)
    golden(name, model)


def test_fp8_qdq_is_illegal_for_onnxruntime_until_the_pass_has_run():
    model = lowered(Case())
    with pytest.raises(specs.SpecError, match=r"has the FP8 value 'x\.x8'; write it as a Cast"):
        specs.check(model, "onnxruntime")
    QdqToCasts().call(model)
    specs.check(model, "onnxruntime")
    assert not operators(model) & {"QuantizeLinear", "DequantizeLinear"}


def test_layers_of_one_activation_keep_sharing_it(run_pass):
    model = lowered(Case())
    run_pass(QdqToCasts(), model)
    assert sum(node.op_type == "Neg" for node in model.graph) == 1


def test_int8_stays_with_the_optimiser_that_knows_it(run_pass):
    model = float_model(Case())
    QuantizeActivations(make_plan(Case(activation="int8"))).call(model)
    assert not run_pass(QdqToCasts(), model).modified


def scaled(scale: ir.Value, **attributes: int) -> ir.Model:
    """``y = DequantizeLinear(w8, scale)`` with w8 FLOAT8E4M3FN [4, 6]."""
    w8 = ir.Value(
        name="w8",
        type=ir.TensorType(ir.DataType.FLOAT8E4M3FN),
        shape=ir.Shape([4, 6]),
    )
    y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, 6]))
    attrs = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    node = ir.Node("", "DequantizeLinear", [w8, scale], attrs, outputs=[y], name="dq")
    known = [] if scale.const_value is None else [scale]
    inputs = [w8] if known else [w8, scale]
    graph = ir.Graph(inputs, [y], nodes=[node], initializers=known, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def constant(*shape: int, dtype: type = np.float32) -> ir.Value:
    array = np.linspace(1, 2, int(np.prod(shape)), dtype=dtype).reshape(shape)
    value = ir.Value(name="s", const_value=ir.tensor(array, name="s"), shape=ir.Shape(shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    return value


@pytest.mark.parametrize(("size", "axis"), [(4, 0), (6, 1), (6, -1)])
def test_a_vector_of_scales_follows_its_axis(size, axis, run_pass):
    from onnx.reference import ReferenceEvaluator

    model = scaled(constant(size), axis=axis)
    w8 = np.arange(24, dtype=np.uint8).reshape(4, 6).view(ir.DataType.FLOAT8E4M3FN.numpy())
    wanted = w8.astype(np.float32) * np.linspace(1, 2, size, dtype=np.float32).reshape(
        (4, 1) if axis == 0 else (1, 6)
    )
    assert run_pass(QdqToCasts(), model).modified
    assert model.graph.outputs[0].name == "y"
    assert np.array_equal(ReferenceEvaluator(ir.to_proto(model)).run(None, {"w8": w8})[0], wanted)


@pytest.mark.parametrize(
    ("scale", "attributes"),
    [
        (ir.Value(name="s", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([])), {}),
        (constant(4, 2), {"axis": 1, "block_size": 3}),
        (constant(dtype=np.float16), {}),
    ],
    ids=["computed", "blocked", "half"],
)
def test_what_it_does_not_know_it_leaves_alone(scale, attributes, run_pass):
    assert not run_pass(QdqToCasts(), scaled(scale, **attributes), check=False).modified


def test_no_weight_is_read():
    model = lowered(Case())
    unreadable(model, make_plan(Case()))
    assert QdqToCasts().call(model).modified
