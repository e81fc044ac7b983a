from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
from quantizer_forms import EPSILON, EXPORTED, FORMS, NORM, NORMS, SILU, SILUS, SKIP_NORM, SKIPS, Block

from passes.fuse_quantizers import FuseQuantizers
from passes.remove_unused import RemoveUnused
from zqfp_compile.specs import check

ADDED = SKIPS["Add"]


def fused(block: Block, run_pass) -> ir.Model:
    """The block after the pass, and whether the rest of it is in order."""
    model = block.model()
    run_pass(FuseQuantizers(), model, check=False)  # the checker does not know our operators
    RemoveUnused().call(model)
    check(model, "engine")
    return model


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_one_node(form, tokens, dtype, run_pass):
    model = fused(Block(FORMS[form], dtype, tokens), run_pass)
    node = model.graph.node(0)
    assert kinds(model) == [SILU if form in SILUS else NORM]
    operands = ["gate", "up"] if form in SILUS else ["x", "gamma", *["skip"] * (form in SKIPS)]
    names = [str(value.name) for value in node.inputs]
    assert sorted(names[: len(operands)]) == sorted(operands) and names[1] == operands[1]
    assert names[len(operands) :] == ([] if tokens else ["a"])
    attributes = {name: attr.value for name, attr in node.attributes.items()}
    norm = {"skip": int(form in SKIPS), "epsilon": pytest.approx(EPSILON)}
    assert attributes == {"lorc_rank": 0, "tokens": int(tokens), **({} if form in SILUS else norm)}
    assert [value.name for value in node.outputs] == ["x8", *["t"] * tokens, *["s"] * (form in SKIPS)]
    types = [ir.DataType.FLOAT8E4M3FN, *[ir.DataType.FLOAT] * tokens, *[dtype] * (form in SKIPS)]
    assert [value.dtype for value in node.outputs] == types


@pytest.mark.parametrize("name", ["silu", "norm"])
def test_golden(name, run_pass, golden):
    block = (
        Block(SILUS["sigmoid"], lorc=True) if name == "silu" else Block(ADDED, tokens=True, outputs=("s",))
    )
    golden(f"fuse_quantizers_{name}", fused(block, run_pass))


@pytest.mark.parametrize("form", ["Add", "SkipSimplifiedLayerNormalization"])
def test_other_readers_of_the_sum_read_the_quantizers(form, run_pass):
    """In the graph, where one of them may come right behind the Add, and as an output."""
    lines = FORMS[form].splitlines()
    behind = next(number for number, line in enumerate(lines) if "s = " in line) + 1
    lines[behind:behind] = ["early = Neg(s)"]
    model = fused(Block("\n".join([*lines, "late = Add(early, s)"]), outputs=("late", "s")), run_pass)
    assert kinds(model) == [NORM, "Neg", "Add"]
    total = model.graph.node(0).outputs[-1]
    assert total.name == "s" and total in model.graph.outputs
    assert {node.op_type for node, _ in total.uses()} == {"Neg", "Add"}


@pytest.mark.parametrize("form", FORMS)
def test_shapes_of_h_are_read_from_an_operand(form, run_pass):
    model = Block(FORMS[form]).model()
    h = next(value for node in model.graph for value in node.outputs if value.name == "h")
    shape = ir.Node("", "Shape", [h], name="shape")
    shape.outputs[0].name, shape.outputs[0].type = "dims", ir.TensorType(ir.DataType.INT64)
    shape.outputs[0].shape = ir.Shape([2])
    model.graph.append(shape)
    model.graph.outputs.append(shape.outputs[0])
    run_pass(FuseQuantizers(), model, check=False)
    assert kinds(model) == [SILU if form in SILUS else NORM, "Shape"]
    assert shape.inputs[0] is model.graph.node(0).inputs[0]


def test_a_sum_that_is_not_kept_gets_a_name(run_pass):
    body = SKIP_NORM.replace("h, mean32_1, deviation32_1, s =", "h =")
    node = fused(Block(body), run_pass).graph.node(0)
    assert node.outputs[-1].name == "h.sum" and node.outputs[-1].shape == node.inputs[0].shape


@pytest.mark.parametrize(
    "body",
    [
        "s = Add(x, gamma)\nh = RMSNormalization <epsilon=0.25> (s, gamma)",
        "w32 = Cast <to=1> (x)\ns = Cast <to=10> (w32)\nh = RMSNormalization <epsilon=0.25> (s, gamma)",
    ],
    ids=["a bias", "no Add"],
)
def test_what_is_no_residual_stays_in_front(body, run_pass):
    node = fused(Block(body), run_pass).graph.node(-1)
    assert (node.op_type, node.attributes.get_int("skip")) == (NORM, 0)
    assert [value.name for value in node.inputs] == ["s", "gamma", "a"]


REFUSED = {
    "h is read": (f"{SILUS['sigmoid']}\nother = Neg(h)", ("other",)),
    "h is an output": (SILUS["sigmoid"], ("h",)),
    "the sigmoid is read": (f"{SILUS['sigmoid']}\nother = Neg(g)", ("other",)),
    "the silu is an output": (SILUS["QuickGelu"], ("s",)),
    "the cast is read": (f"{EXPORTED}\nother32 = Neg(c32)", ("other32",)),
    "the deviation is read": (f"{SKIP_NORM}\nother = Neg(deviation32_1)", ("other",)),
    "GELU": (SILUS["QuickGelu"].replace("1.0", "1.702"), ()),
    "sigmoid of another": (SILUS["sigmoid"].replace("Sigmoid(gate)", "Sigmoid(x)"), ()),
    "up is broadcast": (SILUS["sigmoid"].replace("up)", "gamma)"), ()),
    "a layer norm": (EXPORTED.replace("Pow(c32, two)", "Pow(c32, one)"), ()),
    "a mean of another": (f"z32 = Cast <to=1> (skip)\n{EXPORTED.replace('Pow(c32', 'Pow(z32')}", ()),
    "two over root": (NORMS["one over root"].replace("Div(one", "Div(two"), ()),
    "root over x": (NORMS["x over root"].replace("Div(c32, q32_1)", "Div(q32_1, c32)"), ()),
    "eps is computed": (EXPORTED.replace("Add(m32_1, eps)", "Add(m32_1, m32_1)"), ()),
    "another axis": (NORMS["RMSNormalization"].replace("axis=1", "axis=0"), ()),
    "a mean over another axis": (NORMS["exported"].replace("axes", "zero"), ()),
    "a bias": (SKIP_NORM.replace("gamma)", "gamma, gamma)"), ()),
    "gamma is computed": (EXPORTED.replace("h = Mul(gamma", "w = Neg(gamma)\nh = Mul(w"), ()),
    "gamma is an activation": (EXPORTED.replace("gamma", "up"), ()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_alone(name, run_pass):
    body, outputs = REFUSED[name]
    assert outputs or body not in FORMS.values()
    model = Block(body, outputs=outputs).model()
    assert not run_pass(FuseQuantizers(), model, check=False).modified


@pytest.mark.parametrize("form", FORMS)
def test_unknown_shapes_and_other_types_are_left_alone(form, run_pass):
    operand = "gate" if form in SILUS else "x"
    for change in ("shape", "dtype", "dims"):
        model = Block(FORMS[form]).model()
        value = next(value for value in model.graph.inputs if value.name == operand)
        if change == "dtype":
            value.dtype = ir.DataType.DOUBLE
        else:
            value.shape = None if change == "shape" else ir.Shape(["batch", None])
        modified = run_pass(FuseQuantizers(), model, check=False).modified
        # Of a sum the norm itself is still fused.
        assert not modified or (form.startswith("Add") and kinds(model)[0] == "Add")


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_computed_in_half_precision_it_is_another_norm(dtype, run_pass):
    body = EXPORTED.replace("32", "w").replace(
        "to=1", "to=T"
    )  # by their names, values now have the type of x
    modified = run_pass(FuseQuantizers(), Block(body, dtype).model(), check=False).modified
    assert modified == (dtype == ir.DataType.FLOAT)


def test_lorc(run_pass):
    block = Block(ADDED, lorc=True)
    assert fused(block, run_pass).graph.node(-1).op_type == NORM
    silu = fused(dataclasses.replace(block, body=SILUS["sigmoid"]), run_pass).graph.node(0)
    assert [value.name for value in silu.inputs] == ["gate", "up", "a", "v"]
    assert [value.name for value in silu.outputs] == ["x8", "xv"]


def test_a_computed_scale_stays_in_order(run_pass):
    """The quantiser's other inputs may be made behind the sum; then nothing moves."""
    model = Block(ADDED).model()
    scale = ir.Node("", "Neg", [model.graph.initializers["a"]], name="computed")
    scale.outputs[0].name = "b"
    model.graph.insert_before(model.graph.node(-1), scale)
    model.graph.node(-1).replace_input_with(1, scale.outputs[0])
    assert not run_pass(FuseQuantizers(), model, check=False).modified


def test_no_quantiser_nothing_to_do(run_pass):
    model = Block(ADDED).model()
    model.graph.node(-1).op_type = "PackedW4A8Linear"
    assert not run_pass(FuseQuantizers(), model, check=False).modified
