from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from rewrite_models import Case, artifact, float_model

from passes.inline_functions import InlineFunctions
from passes.lower_weights_fp4 import LowerWeightsFp4
from passes.lower_weights_fp8 import LowerWeightsFp8
from passes.lower_weights_plugin import LowerWeightsPlugin
from passes.remove_unused import RemoveUnused
from zqfp_compile.errors import ModelError
from zqfp_compile.specs import Phase, SpecError, check

CASES = [
    Case(lorc=True, dtype=ir.DataType.FLOAT16),
    Case(lorc=True, lorc_fp8=True, dtype=ir.DataType.FLOAT16),
    Case(per_token=True, k=72),
    Case(weight_format="fp8", activation="e5m2", dtype=ir.DataType.BFLOAT16),
    Case(constraint="none", activation="none"),
    Case(activation="int8"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_our_passes_make_is_legal(case: Case) -> None:
    check(float_model(case), "exported")
    model, plan = artifact(case)
    check(model, "quantized", after="remove-unused")
    lowered = model.clone()
    LowerWeightsFp8(plan).call(lowered)
    RemoveUnused().call(lowered)
    check(lowered, "engine")
    InlineFunctions().call(model)
    check(model, "engine")


@pytest.mark.parametrize("constraint", ["e4m3", "none"])
def test_the_form_for_fp4_hardware_is_legal(constraint: str) -> None:
    """Under ``none`` its block-scaled weight meets a dequantised activation directly."""
    model, plan = artifact(Case(constraint=constraint))
    LowerWeightsFp4(plan).call(model)
    check(model, "engine")


def test_of_our_nodes_only_those_of_the_kernels_hosts_are_left() -> None:
    model, plan = artifact(Case(group_size=32, lorc=True))
    with pytest.raises(SpecError, match=r"zqfp::W4A8Linear node 'attn.q' is not lowered"):
        check(model, "engine")
    LowerWeightsPlugin(plan).call(model)
    RemoveUnused().call(model)
    check(model, "engine")
    check(model, "onnxruntime")
    packed = next(node for node in model.graph if node.op_type == "PackedW4A8Linear")
    packed.replace_input_with(5, None)
    with pytest.raises(SpecError, match=r"PackedW4A8Linear node 'attn.q/MatMul' has 7 inputs, or empty ones"):
        check(model, "engine")


def parse(body: str) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "f" : 1]>{body}')
    for number, node in enumerate(model.graph):
        node.name = node.name or f"n{number}"
    return model


def linear(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "W4A8Linear")


def initializer(model: ir.Model, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    value = ir.val("extra", const_value=ir.tensor(array, dtype=dtype, name="extra"))
    model.graph.register_initializer(value)
    return value


# What a broken pass could leave behind, one sabotage each: change of the artifact, message.


def _duplicate_name(model: ir.Model) -> None:
    first, second = list(model.graph)[:2]
    second.name = first.name


def _nameless(model: ir.Model) -> None:
    linear(model).name = ""


def _use_before_definition(model: ir.Model) -> None:
    node = linear(model)
    model.graph.remove(node)
    model.graph.insert_before(next(iter(model.graph)), node)


def _lost_producer(model: ir.Model) -> None:
    model.graph.remove(next(node for node in model.graph if node.op_type == "QuantizeLinear"))


def _same_value_name(model: ir.Model) -> None:
    linear(model).outputs[0].name = "x"


def _lost_import(model: ir.Model) -> None:
    del model.graph.opset_imports["zqfp"]


def _lost_function(model: ir.Model) -> None:
    model.functions.clear()


def _other_op(model: ir.Model) -> None:
    linear(model).op_type = "W4A16Linear"


def _few_inputs(model: ir.Model) -> None:
    linear(model).resize_inputs(3)


def _replace(index: int, make: Callable[[ir.Model], ir.Value | None]) -> Callable[[ir.Model], None]:
    return lambda model: linear(model).replace_input_with(index, make(model))


SABOTAGE: dict[str, tuple[Callable[[ir.Model], None], str]] = {
    "duplicate name": (_duplicate_name, "two nodes are named"),
    "no name": (_nameless, "a W4A8Linear node has no name"),
    "order": (_use_before_definition, "which nothing before it produces"),
    "producer removed": (_lost_producer, "which nothing before it produces"),
    "value name twice": (_same_value_name, "defines the value 'x' a second time"),
    "import": (_lost_import, "domain 'zqfp', which has no opset import"),
    "function": (_lost_function, "has no function for its overload"),
    "other op": (_other_op, "is no W4A8Linear"),
    "arity": (_few_inputs, "has 3 inputs and 1 outputs"),
    "no scale for x8": (_replace(1, lambda model: None), "x8 has type FLOAT8E4M3FN and a is missing"),
    "half scale": (_replace(1, lambda model: initializer(model, np.ones((), "f2"))), "a has type FLOAT16"),
    "codes type": (
        _replace(2, lambda model: initializer(model, np.ones((48, 64), "i1"))),
        "codes has type INT8",
    ),
    "no group scales": (_replace(3, lambda model: None), "group_scales is missing"),
    "group scales": (
        _replace(3, lambda model: initializer(model, np.ones((48, 3), "f4"))),
        "group_scales (48, 3)",
    ),
    "row scales": (_replace(4, lambda model: initializer(model, np.ones(47, "f4"))), "row_scales (47,)"),
    "bias type": (_replace(5, lambda model: initializer(model, np.ones(48, "f2"))), "bias has type FLOAT16"),
    "part of LoRC": (_replace(8, lambda model: None), "not given together"),
    "LoRC rank": (
        _replace(7, lambda model: initializer(model, np.ones((64, 5), "f4"))),
        "lorc_v has shape (64, 5)",
    ),
}
FP8_SABOTAGE: dict[str, tuple[Callable[[ir.Model], None], str]] = {
    "one scale": (_replace(9, lambda model: None), "lorc_v has type FLOAT8E4M3FN, not FLOAT"),
    "the other scale": (
        _replace(10, lambda model: None),
        "lorc_v_scale and lorc_u_scale are not given together",
    ),
    "scale type": (
        _replace(9, lambda model: initializer(model, np.ones(4, "f2"))),
        "lorc_v_scale has type FLOAT16",
    ),
    "scale size": (
        _replace(10, lambda model: initializer(model, np.ones(48, "f4"))),
        "lorc_u_scale has shape (48,) for rank 4",
    ),
    "float factor": (
        _replace(8, lambda model: initializer(model, np.ones((4, 48), "f4"))),
        "lorc_u has type FLOAT, not FLOAT8E4M3FN",
    ),
}


@pytest.mark.parametrize("name", [*SABOTAGE, *FP8_SABOTAGE])
def test_sabotage_is_found(name: str) -> None:
    sabotage, message = {**SABOTAGE, **FP8_SABOTAGE}[name]
    model, _ = artifact(Case(lorc=True, lorc_fp8=name in FP8_SABOTAGE))
    check(model, "quantized")
    sabotage(model)
    with pytest.raises(SpecError) as caught:
        check(model, "quantized", after="some-pass")
    text = str(caught.value)
    assert text.startswith("internal error after pass some-pass: ")
    assert message in text
    assert "\n" not in text
    assert isinstance(caught.value, ModelError)


# Graphs that TensorRT is known to get wrong (DESIGN section 5); without a message, a legal neighbour.

ENGINE_BODY = """
g ({type}[M,4] x) => ({type}[M,2] y) <
  float a = {{1}}, float[2] rows = {{1,2}}, float16[2] half_rows = {{1,2}},
  float[2,2] blocks = {{1,2,3,4}}> {{
  {nodes}
}}"""
QDQ = "q = QuantizeLinear<output_dtype=17>(x, a)\n h = DequantizeLinear(q, a)\n"
BLOCKED = "d = DequantizeLinear<axis=1, block_size=2>(codes, blocks)\n"
TURN = "t = Transpose(d)\n"
ENGINE = {
    "blocked weight": (QDQ + BLOCKED + TURN + "y = MatMul(h, t)", "by a block-scaled weight"),
    "blocked weight per token": (
        QDQ + "r = Mul(h, a)\n" + BLOCKED + TURN + "y = MatMul(r, t)",
        "by a block-scaled weight",
    ),
    "blocked weight alone": (BLOCKED + TURN + "y = MatMul(x, t)", None),
    "blocked, then per tensor": (
        BLOCKED + "p = QuantizeLinear<output_dtype=17>(d, a)\n e = DequantizeLinear<axis=0>(p, rows)\n"
        "t = Transpose(e)\n y = MatMul(x, t)",
        "requantises a block-scaled weight with one scale",
    ),
    "blocked, then per channel": (
        QDQ + BLOCKED + "p = QuantizeLinear<axis=0, output_dtype=17>(d, rows)\n"
        "e = DequantizeLinear<axis=0>(p, rows)\n t = Transpose(e)\n y = MatMul(h, t)",
        None,
    ),
    "half row scales": (
        "b = Cast<to=1>(x)\n"
        + QDQ.replace("(x, a)", "(b, a)")
        + "i = Cast<to=10>(h)\n d = DequantizeLinear<axis=0>(w8, half_rows)\n"
        + TURN
        + "y = MatMul(i, t)",
        "an FP8 weight with row scales of type FLOAT16",
    ),
    "4 bits elsewhere": ("d = Cast<to=1>(codes)\n" + TURN + "y = MatMul(x, t)", "reads 'codes' (INT4)"),
    "FP8 made elsewhere": (
        "p = Cast<to=17>(x)\n d = DequantizeLinear(p, a)\n y = MatMul(d, k)",
        "makes 'p' (FLOAT8E4M3FN)",
    ),
    "function": ("y = f.Call(x)", "calls a function"),
}


@pytest.mark.parametrize("name", ENGINE)
def test_engine_hazards(name: str) -> None:
    nodes, message = ENGINE[name]
    model = engine_model(nodes, "float16" if "half" in name else "float")
    if message is None:
        check(model, "engine")
        return
    check(model, "quantized")
    with pytest.raises(SpecError) as caught:
        check(model, "engine")
    assert message in str(caught.value)


def engine_model(nodes: str, dtype: str) -> ir.Model:
    function = '<domain: "f", opset_import: ["" : 21]> Call (p) => (r) { r = Identity(p) }'
    model = parse(ENGINE_BODY.format(type=dtype, nodes=nodes) + function)
    packed = {
        "codes": ir.tensor(np.ones((2, 4), np.int8), dtype=ir.DataType.INT4, name="codes"),
        "w8": ir.tensor(np.ones((2, 4), ml_dtypes.float8_e4m3fn), name="w8"),
        "k": ir.tensor(np.ones((4, 2), np.float32), name="k"),
    }
    for value in {value for node in model.graph for value in node.inputs if value is not None}:
        if value.name in packed:
            tensor = packed[value.name]
            value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape([*tensor.shape])
            model.graph.register_initializer(value)
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "Cast"):
            to = node.attributes.get_int("output_dtype", node.attributes.get_int("to", 0))
            node.outputs[0].dtype = ir.DataType(to)
    return model


@pytest.mark.parametrize("phase", ["exported", "quantized", "engine"])
def test_structure_is_checked_in_every_phase_and_scope(phase: Phase) -> None:
    model = parse(
        """g (float[M] x, bool c) => (float[M] y) {
        y = If (c) <then_branch = a () => (float[M] p) { [i0] p = Relu(x) },
                    else_branch = b () => (float[M] q) { [i1] q = Neg(x) }>
        }"""
    )
    check(model, phase)
    inner = next(node for node in model.graph.all_nodes() if node.op_type == "Neg")
    inner.replace_input_with(0, next(iter(model.graph)).outputs[0])
    with pytest.raises(SpecError, match="Neg node 'i1' uses 'y', which nothing before it produces"):
        check(model, phase)


def test_exported_models_may_have_unnamed_nodes() -> None:
    text = "g (float[M] x) => (float[M] y) { z = Relu(x)\n y = Relu(z) }"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 14]> {text}')
    check(model, "exported")
    with pytest.raises(SpecError, match="has no name"):
        check(model, "quantized")
