from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from gated_layers import GATE, UP, gated
from quantizer_forms import SILUS
from rewrite_models import BETA, Case, artifact, decoded, float_model, make_plan, mixed_plan, unreadable

from passes._plugin_ops import products
from passes.fuse_quantizers import FuseQuantizers
from passes.join_quantizers import JoinQuantizers
from passes.lower_weights_plugin import LowerWeightsPlugin
from passes.remove_unused import RemoveUnused
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.kernels.packing import (
    gated_order,
    packed_sizes,
    padded_shape,
    unpack_codes,
    unpack_group_scales,
)
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import SitePrecision
from zqfp_compile.specs import check

HOSTED = Case(group_size=32)


def hosted(**changes: object) -> Case:
    return dataclasses.replace(HOSTED, **changes)


def lowered(case: Case, plan=None):
    model, plan = artifact(case, plan)
    result = LowerWeightsPlugin(plan).call(model)
    RemoveUnused().call(model)
    return model, plan, result


def by_name(model: ir.Model) -> dict[str, ir.Node]:
    return {str(node.name): node for node in model.graph}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("lower_weights_plugin", hosted(dtype=ir.DataType.FLOAT16)),
        ("lower_weights_plugin_lorc", hosted(dtype=ir.DataType.FLOAT16, lorc=True, rank=12)),
        ("lower_weights_plugin_token", hosted(per_token=True, lorc=True, lorc_fp8=True)),
        ("lower_weights_plugin_merged", hosted(dtype=ir.DataType.FLOAT16, n=64, v_n=72, lorc=True, rank=12)),
    ],
)
def test_golden(name, case, run_pass, golden):
    model, plan = artifact(case)
    assert run_pass(LowerWeightsPlugin(plan), model).modified
    RemoveUnused().call(model)
    golden(name, model)


@pytest.mark.parametrize("constraint", ["m1", "m2", "e4m3"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("k", [64, 80, 208])
def test_weights_are_exact(constraint, group_size, k):
    model, plan, result = lowered(hosted(constraint=constraint, group_size=group_size, k=k))
    assert result.declined == ()
    for layer in ("attn.q", "attn.v"):
        codes = model.graph.initializers[f"{layer}/packed_codes"].const_value
        scales = model.graph.initializers[f"{layer}/packed_scales"].const_value
        assert codes.dtype == ir.DataType.INT4 and tuple(codes.shape) == padded_shape(48, k)
        assert scales.dtype == ir.DataType.FLOAT8E4M3FN
        assert (codes.nbytes, scales.nbytes) == packed_sizes(48, k, group_size)
        packed = np.frombuffer(codes.tobytes(), np.uint8)
        weight = decoded(plan, layer)
        assert np.array_equal(unpack_codes(packed, 48, k), weight.codes[:, :k])
        stored = np.frombuffer(scales.tobytes(), np.uint8)
        assert np.array_equal(unpack_group_scales(stored, 48, k, group_size), weight.group_scales)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("fp8", [False, True])
def test_factors_are_padded_with_zeros_and_side_by_side(dtype, fp8):
    model, plan, _ = lowered(hosted(lorc=True, lorc_fp8=fp8, dtype=dtype, rank=12))
    v = model.graph.initializers["attn.q/lorc_v"].const_value
    assert v.dtype == dtype and tuple(v.shape) == (64, 32)
    for number, layer in enumerate(("attn.q", "attn.v")):
        wanted_v, wanted_u = (part.astype(dtype.numpy()) for part in plan.low_rank(site(plan, layer)))
        mine = v.numpy()[:, 16 * number : 16 * (number + 1)]
        u = model.graph.initializers[f"{layer}/lorc_u"].const_value
        assert u.dtype == dtype and tuple(u.shape) == (16, 48)
        for stored, wanted in ((mine.T, wanted_v.T), (u.numpy(), wanted_u)):
            assert np.array_equal(stored[:12], wanted) and not stored[12:].any()


MERGED = hosted(n=128, v_n=72, dtype=ir.DataType.FLOAT16)


@pytest.mark.parametrize("fp8", [False, True])
def test_layers_of_one_input_are_one_product(fp8):
    """Their tensors below each other, in the order of the outputs; v alone has a bias."""
    case = dataclasses.replace(MERGED, lorc=True, lorc_fp8=fp8, rank=12)
    model, plan, result = lowered(case)
    node = model.graph[1]
    assert result.declined == () and [item.name for item in node.outputs] == ["q", "v"]
    assert (node.name, node.op_type) == ("attn.q/MatMul+attn.v/MatMul", "PackedW4A8Linear")
    assert (node.attributes["n"].as_int(), node.attributes["output_n"].as_ints()) == (200, (128, 72))
    assert node.inputs[6] is model.graph[0].outputs[1] and node.attributes["lorc_rank"].as_int() == 32
    weights = [decoded(plan, layer) for layer in ("attn.q", "attn.v")]
    codes, scales, rows, bias, _, u = (value.const_value for value in node.inputs[2:])
    packed = (np.frombuffer(tensor.tobytes(), np.uint8) for tensor in (codes, scales))
    assert np.array_equal(unpack_codes(next(packed), 200, 64), np.concatenate([w.codes for w in weights]))
    wanted = np.concatenate([weight.group_scales for weight in weights])
    assert np.array_equal(unpack_group_scales(next(packed), 200, 64, 32), wanted)
    assert np.array_equal(rows.numpy(), np.concatenate([weight.row_scales for weight in weights]))
    own = float_model(case).graph.initializers["c"].const_value.numpy()[0] * np.float16(BETA)
    assert not bias.numpy()[:128].any() and np.array_equal(bias.numpy()[128:], own)
    blocks = [plan.low_rank(site(plan, layer))[1].astype(np.float16) for layer in ("attn.q", "attn.v")]
    assert np.array_equal(u.numpy()[:12, :128], blocks[0]) and np.array_equal(
        u.numpy()[16:28, 128:], blocks[1]
    )
    assert np.count_nonzero(u.numpy()) == sum(np.count_nonzero(block) for block in blocks)


def test_an_output_that_does_not_end_a_block_goes_last():
    model, _, _ = lowered(dataclasses.replace(MERGED, n=72, v_n=128))
    assert [item.name for item in model.graph[1].outputs] == ["v", "q"]


@pytest.mark.parametrize("rank", [0, 60])
def test_a_reader_between_two_layers_stays_behind_both(rank):
    """Also where the layer in front is the last of the product, and where x @ V is a node of its own."""
    case = dataclasses.replace(MERGED, n=72, v_n=128)
    low = {key: SitePrecision("e2m1", rank // 2) for key in "qv"} if rank else {}
    model, plan = artifact(case, mixed_plan(case, **low))
    early = ir.Node("", "Neg", [model.graph.outputs[0]], name="early")
    early.outputs[0].name = "early"
    model.graph.insert_after(by_name(model)["attn.q"], early)
    model.graph.outputs.append(early.outputs[0])
    LowerWeightsPlugin(plan).call(model)
    check(model, "engine")
    assert [node.name for node in model.graph][-2:] == ["attn.v/MatMul+attn.q/MatMul", "early"]


@pytest.mark.parametrize(
    ("changes", "precisions"),
    [
        ({"n": 72, "v_n": 136}, {}),
        ({}, {"q": SitePrecision("e2m1", 60), "v": SitePrecision("e2m1", 5)}),
        ({}, {"v": SitePrecision("e2m1", 5)}),
        ({}, {"v": SitePrecision("fp8", 0)}),
    ],
    ids=["no blocks", "rank 72", "LoRC on one", "a weight of FP8"],
)
def test_what_makes_no_product_stays_apart(changes, precisions, run_pass):
    case = dataclasses.replace(MERGED, **changes)
    model, plan = artifact(case, mixed_plan(case, **precisions))
    run_pass(LowerWeightsPlugin(plan), model)
    names = [str(node.name) for node in model.graph if node.op_type == "PackedW4A8Linear"]
    assert names == ["attn.q/MatMul", "attn.v/MatMul"][: len(names)] and all("+" not in n for n in names)


def layers(*sizes, rank=0):
    """Linears of one input, of so many rows."""
    first = make_plan(HOSTED).linears[0]
    factor = ir.Value(name="v", shape=ir.Shape([64, rank])) if rank else None
    return [
        (dataclasses.replace(first, name=f"l{i}", n=n), ir.Node("zqfp", "W4A8Linear", [None] * 7 + [factor]))
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("linears", "wanted"),
    [
        (layers(576, 192, 192), [[576, 192, 192]]),
        (layers(64, 72, 128, 136), [[64, 128, 72], [136]]),
        (layers(*[64] * 5), [[64] * 4, [64]]),
        (layers(64, 64, 64, rank=16), [[64] * 3]),
        (layers(192, 64, 128, rank=28), [[192, 64], [128]]),
    ],
)
def test_how_layers_are_divided_into_products(linears, wanted):
    assert [[item.n for item, _ in product.linears] for product in products(linears)] == wanted


def site(plan, layer):
    return next(item for item in plan.linears if item.name == layer)


def test_factors_that_fit_are_taken_as_they_are(run_pass):
    plan = mixed_plan(hosted(), q=SitePrecision("e2m1", 16))
    model, _, _ = lowered(hosted(), plan)
    nodes = by_name(model)
    assert nodes["x.quantize"].inputs[2].name == "attn.q.lorc_v"
    assert nodes["attn.q/MatMul"].inputs[5] is nodes["x.quantize"].outputs[1]
    assert nodes["attn.q/MatMul"].inputs[6].name == "attn.q.lorc_u"
    assert len(nodes["attn.v/MatMul"].inputs) == 6  # the bias
    assert "Split" not in {node.op_type for node in model.graph}


def test_more_than_rank_64_in_all_is_multiplied_by_standard_nodes():
    plan = mixed_plan(hosted(), q=SitePrecision("e2m1", 64), v=SitePrecision("e2m1", 5))
    model, _, result = lowered(hosted(), plan)
    nodes = by_name(model)
    assert result.declined == () and len(nodes["x.quantize"].outputs) == 2  # q fills it
    assert nodes["attn.v/MatMul"].inputs[6].producer() is nodes["attn.v/lorc_down"]
    assert [nodes[f"attn.{key}/MatMul"].attributes["lorc_rank"].as_int() for key in "qv"] == [64, 8]


def test_the_cast_in_front_of_the_quantiser_is_absorbed():
    model, _, _ = lowered(hosted(dtype=ir.DataType.BFLOAT16, per_token=True))
    assert [node.op_type for node in model.graph] == [
        "QuantizeTokens",
        "PackedW4A8Linear",
        "PackedW4A8Linear",
    ]
    assert model.graph[0].inputs[0] is model.graph.inputs[0]
    assert [value.name for value in model.graph[0].outputs] == ["x.x8", "x.token_scale"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_format": "e3m0"}, "the kernel has no e3m0 weights"),
        ({"weight_format": "int4"}, "the kernel has no int4 weights"),
        ({"weight_format": "fp8"}, "the kernel has no fp8 weights"),
        ({"activation": "e5m2"}, "the kernel has no e5m2 activations"),
        ({"activation": "int8"}, "the kernel has no int8 activations"),
        ({"activation": "none"}, "the kernel has no none activations"),
        ({"constraint": "none"}, "the kernel has no unconstrained group scales"),
        ({"group_size": 16}, "the kernel has no group size 16 (32, 64, 128)"),
        ({"group_size": 0}, "the kernel has no group size row (32, 64, 128)"),
        ({"k": 72}, "the kernel needs K as a multiple of 16, not 72"),
        ({"n": 44}, "the kernel needs N as a multiple of 8, not 44"),
        ({"lorc": True, "rank": 65, "k": 80}, "the kernel has no LoRC rank above 64, and this is 65"),
    ],
)
def test_what_the_kernel_does_not_take_is_lowered_to_fp8(changes, reason, run_pass):
    model, plan = artifact(hosted(**changes))
    result = run_pass(LowerWeightsPlugin(plan), model)
    assert result.modified
    assert [item.place for item in result.declined] == ["attn.q", "attn.v"]
    assert {item.reason for item in result.declined} == {f"{reason}; its weights are decoded to FP8 instead"}
    assert by_name(model)["attn.q/MatMul"].op_type == "MatMul"


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_only_half_leaves_float_layers_to_standard_nodes(dtype):
    model, plan = artifact(hosted(dtype=dtype))
    declined = LowerWeightsPlugin(plan, only_half=True).call(model).declined
    assert len(declined) == (2 if dtype == ir.DataType.FLOAT else 0)
    assert all("the kernel has no FLOAT outputs" in item.reason for item in declined)


@pytest.mark.parametrize("per_token", [False, True])
def test_layers_of_both_kinds_share_the_quantiser(per_token, run_pass):
    plan = mixed_plan(hosted(per_token=per_token), v=SitePrecision("fp8", 0))
    model, plan = artifact(hosted(per_token=per_token), plan)
    result = run_pass(LowerWeightsPlugin(plan), model)
    RemoveUnused().call(model)
    assert [item.place for item in result.declined] == ["attn.v"]
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("PackedW4A8Linear") == kinds.count("DequantizeLinear") - 1 == 1
    quantizer = model.graph[0]
    assert quantizer.domain == "zqfp"
    assert {"QuantizeLinear", "Abs", "Div"}.isdisjoint(kinds)


def test_an_activation_quantised_otherwise_is_left():
    model, plan = artifact(HOSTED)
    named = dataclasses.replace(
        plan, linears=tuple(dataclasses.replace(item, activation="elsewhere") for item in plan.linears)
    )
    result = LowerWeightsPlugin(named).call(model)
    assert "its activation is not quantised by" in result.declined[0].reason


def test_shared_tensors_are_packed_once(run_pass):
    plan = make_plan(hosted(lorc=True))
    shared = plan.replace(tensors=dict.fromkeys(plan.tensors, plan.tensors["attn.q"]))
    model, plan = artifact(hosted(lorc=True), shared)
    run_pass(LowerWeightsPlugin(plan), model)
    made = sorted(name for name in model.graph.initializers if "/" in name)
    assert made == ["attn.q/lorc_u", "attn.q/lorc_v", "attn.q/packed_codes", "attn.q/packed_scales"]


def test_nothing_to_do_without_linears(run_pass):
    assert not run_pass(LowerWeightsPlugin(make_plan(HOSTED)), float_model(HOSTED)).modified


def test_a_plan_of_another_model_is_an_error():
    model, plan = artifact(HOSTED)
    with pytest.raises(PassError, match=r"node 'attn.q': the plan does not know this W4A8Linear"):
        LowerWeightsPlugin(plan.replace(linears=())).call(model)


@pytest.mark.parametrize("fp8", [False, True])
def test_no_tensor_is_read(fp8):
    model, plan = artifact(hosted(lorc=True, lorc_fp8=fp8))
    assert LowerWeightsPlugin(unreadable(model, plan)).call(model).modified


def test_external_tensors_are_released_after_packing(tmp_path):
    model, plan = artifact(hosted(lorc=True, rank=4))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    stored = [model.graph.initializers[f"attn.q.{name}"].const_value for name in ("codes", "group_scales")]
    LowerWeightsPlugin(plan).call(model)
    for name in ("packed_codes", "packed_scales", "lorc_u"):
        model.graph.initializers[f"attn.q/{name}"].const_value.tobytes()
    assert [tensor._array for tensor in stored] == [None, None]
    ir.save(model, tmp_path / "packed.onnx", external_data="packed.data", size_threshold_bytes=0)
    again = ir.load(tmp_path / "packed.onnx").graph.initializers["attn.q/packed_codes"].const_value
    assert again.tobytes() == model.graph.initializers["attn.q/packed_codes"].const_value.tobytes()


def test_group_scales_are_the_same_numbers_below_the_free_bit():
    model, plan, _ = lowered(HOSTED)
    stored = model.graph.initializers["attn.q/packed_scales"].const_value.tobytes()
    values = E4M3FN.decode(np.frombuffer(stored, np.uint8) & 0x7F)
    assert set(decoded(plan, "attn.q").group_scales.ravel()) <= set(values)


GATED = hosted(n=72, lorc=True, rank=12, dtype=ir.DataType.FLOAT16)


def test_gated_golden(run_pass, golden):
    model, plan = gated(GATED)
    assert run_pass(LowerWeightsPlugin(plan), model).modified
    RemoveUnused().call(model)
    golden("lower_weights_plugin_gated", model)


@pytest.mark.parametrize("changes", [{}, {"dtype": ir.DataType.FLOAT, "lorc": False}, {"per_token": True}])
@pytest.mark.parametrize("form", SILUS)
def test_gate_and_up_of_every_form_are_one_layer(form, changes):
    """Whatever reads h, and without the shapes that an exporter may leave out."""
    case = dataclasses.replace(GATED, **changes)
    body = f"{SILUS[form]}\nother = Neg(h)\nsize = Neg(h)"
    model, plan = gated(case, body, outputs=("h", "other", "size"))
    for value in (value for node in model.graph for value in node.outputs if node.domain != "zqfp"):
        value.shape = None
    LowerWeightsPlugin(plan).call(model)
    RemoveUnused().call(model)
    check(model, "engine")
    *_, linear, other, size = model.graph
    assert (linear.op_type, linear.name) == ("PackedW4A8Linear", "attn.q/MatMul+attn.v/MatMul")
    attributes = {name: attr.value for name, attr in linear.attributes.items() if name != "plugin_namespace"}
    assert (attributes["gated"], attributes["n"], attributes["dtype"]) == (1, 144, int(case.dtype))
    assert "output_n" not in attributes and len(linear.outputs) == 1
    (h,) = linear.outputs
    assert (h.name, h.dtype) == ("h", case.dtype) and h is model.graph.outputs[0]
    assert other.inputs[0] is h and size.inputs[0] is h


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("swapped", [False, True], ids=["q is gate", "v is gate"])
def test_rows_of_a_gated_layer_are_by_eights_of_gate_and_up(swapped, fp8):
    """Of either order of the two in the graph; v has a bias."""
    case = dataclasses.replace(GATED, n=40, lorc_fp8=fp8, constraint="m2")
    body = "g = Sigmoid(up)\ns = Mul(up, g)\nh = Mul(s, gate)" if swapped else SILUS["sigmoid"]
    model, plan = gated(case, body)
    LowerWeightsPlugin(plan).call(model)
    layers = ["attn.v", "attn.q"] if swapped else ["attn.q", "attn.v"]
    linear = next(node for node in model.graph if node.op_type == "PackedW4A8Linear")
    assert linear.name == "+".join(f"{layer}/MatMul" for layer in layers)
    # Feature 8 i + j is row 16 i + j of gate, 16 i + 8 + j of up.
    blocks = [[slice(16 * i + 8 * part, 16 * i + 8 * part + 8) for i in range(5)] for part in (0, 1)]

    def apart(rows: np.ndarray) -> list[np.ndarray]:
        """What gate and up have, of what there is for each row."""
        return [np.concatenate([rows[block] for block in part]) for part in blocks]

    codes, scales, row_scales, bias, xv, u = (value.const_value for value in linear.inputs[2:])
    assert xv is None and (codes.shape, scales.nbytes) == (padded_shape(80, 64), packed_sizes(80, 64, 32)[1])
    packed = [np.frombuffer(tensor.tobytes(), np.uint8) for tensor in (codes, scales)]
    own = float_model(case).graph.initializers["c"].const_value.numpy()[0] * np.float16(BETA)
    found = zip(
        apart(unpack_codes(packed[0], 80, 64)),
        apart(unpack_group_scales(packed[1], 80, 64, 32)),
        apart(row_scales.numpy()),
        apart(bias.numpy()),
        apart(u.numpy().T),
        strict=True,
    )
    for number, (layer, (code, scale, row, c, column)) in enumerate(zip(layers, found, strict=True)):
        weight = decoded(plan, layer)
        assert np.array_equal(code, weight.codes) and np.array_equal(scale, weight.group_scales)
        assert np.array_equal(row, weight.row_scales)
        assert np.array_equal(c, own if layer == "attn.v" else np.zeros(40, np.float16))
        wanted = np.zeros((32, 40), np.float16)
        wanted[16 * number : 16 * number + 12] = plan.low_rank(site(plan, layer))[1].astype(np.float16)
        assert np.array_equal(column.T, wanted)
    v = by_name(model)["x.quantize"].inputs[2].const_value.numpy()
    for number, layer in enumerate(layers):
        assert np.array_equal(
            v[:, 16 * number : 16 * number + 12], plan.low_rank(site(plan, layer))[0].astype(np.float16)
        )


SIGMOID = SILUS["sigmoid"]
UNGATED: dict[str, tuple[str, tuple[str, ...], dict[str, SitePrecision]]] = {
    "gate is read": (f"{SIGMOID}\nother = Neg(gate)", ("h", "other"), {}),
    "up is read": (f"{SIGMOID}\nother = Neg(up)", ("h", "other"), {}),
    "the shape of up is read": (f"{SIGMOID}\nother = Shape(up)", ("h", "other"), {}),
    "the sigmoid is read": (f"{SIGMOID}\nother = Neg(g)", ("h", "other"), {}),
    "the silu is read": (f"{SILUS['Swish']}\nother = Neg(s)", ("h", "other"), {}),
    "gate is an output": (SIGMOID, ("h", "gate"), {}),
    "up is an output": (SIGMOID, ("h", "up"), {}),
    "the silu is an output": (SIGMOID, ("h", "s"), {}),
    "GELU": (SILUS["QuickGelu"].replace("1.0", "1.702"), ("h",), {}),
    "the sigmoid is of up": (SIGMOID.replace("Sigmoid(gate)", "Sigmoid(up)"), ("h",), {}),
    "gate is up": ("s = Swish(gate)\nh = Mul(s, gate)\nother = Neg(up)", ("h", "other"), {}),
    "up is computed": (f"w = Neg(up)\n{SIGMOID.replace('up)', 'w)')}", ("h",), {}),
    "gate is computed": (f"w = Neg(gate)\n{SIGMOID.replace('gate', 'w')}", ("h",), {}),
    "LoRC on one": (SIGMOID, ("h",), {"v": SitePrecision("e2m1", 5)}),
    "rank 72": (SIGMOID, ("h",), {"q": SitePrecision("e2m1", 60), "v": SitePrecision("e2m1", 5)}),
    "up of FP8": (SIGMOID, ("h",), {"v": SitePrecision("fp8", 0)}),
    "gate of FP8": (SIGMOID, ("h",), {"q": SitePrecision("fp8", 0)}),
}


@pytest.mark.parametrize("name", UNGATED)
def test_what_is_not_gated(name):
    body, outputs, precisions = UNGATED[name]
    case = dataclasses.replace(GATED, lorc=False)
    model, plan = gated(case, body, outputs=outputs, plan=mixed_plan(case, **precisions))
    LowerWeightsPlugin(plan).call(model)
    check(model, "engine")
    assert "gated" not in {name for node in model.graph for name in node.attributes}
    assert {"q", "v"} <= {str(value.name) for node in model.graph for value in node.outputs}


def test_a_silu_product_in_a_branch_is_not_gated():
    """Its nodes read gate and up from the graph around it."""
    model, plan = gated(GATED)
    graph = model.graph
    nodes = list(graph)[-3:]
    graph.outputs.clear()
    graph.remove(nodes)
    branches = [
        ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name="then"),
        ir.Graph([], [], nodes=[], name="else"),
    ]
    condition = ir.Value(name="condition", const_value=ir.tensor(np.array(True)))
    graph.register_initializer(condition)
    attributes = [ir.AttrGraph(f"{branch.name}_branch", branch) for branch in branches]
    graph.append(ir.Node("", "If", [condition], attributes, name="if"))
    LowerWeightsPlugin(plan).call(model)
    assert "gated" not in {name for node in graph for name in node.attributes}
    assert len(branches[0]) == 3


def test_other_layers_of_the_input_are_products_of_their_own():
    """Here q and v a second time, and what they make is an output: one product with two outputs."""
    case = dataclasses.replace(GATED, n=64)
    model, plan = gated(case)
    sites, tensors = list(plan.linears), dict(plan.tensors)
    for key in (GATE, UP):
        old = by_name(model)[f"attn.{key}"]
        new = ir.Node(old.domain, old.op_type, old.inputs, overload=old.overload, name=f"other.{key}")
        new.outputs[0].name, new.outputs[0].dtype = f"other_{key}", case.dtype
        model.graph.insert_before(old, new)
        model.graph.outputs.append(new.outputs[0])
        sites.append(dataclasses.replace(site(plan, f"attn.{key}"), name=f"other.{key}"))
        tensors[f"other.{key}"] = plan.tensors[f"attn.{key}"]
    LowerWeightsPlugin(plan.replace(linears=tuple(sites), tensors=tensors)).call(model)
    RemoveUnused().call(model)
    check(model, "engine")
    nodes = [node for node in model.graph if node.op_type == "PackedW4A8Linear"]
    assert [[value.name for value in node.outputs] for node in nodes] == [["other_q", "other_v"], ["h"]]
    apart, together = ([value.const_value for value in node.inputs[2:]] for node in nodes)
    assert len(apart) == len(together) == 6
    order = gated_order(64)  # the same numbers in another order: none is taken for the other's
    assert np.array_equal(apart[2].numpy()[order], together[2].numpy())
    assert np.array_equal(apart[3].numpy()[order], together[3].numpy())
    assert np.array_equal(apart[5].numpy()[:, order], together[5].numpy())
    assert apart[0].tobytes() != together[0].tobytes() and apart[1].tobytes() != together[1].tobytes()


def test_no_tensor_of_a_gated_layer_is_read():
    model, plan = gated(GATED)
    assert LowerWeightsPlugin(unreadable(model, plan)).call(model).modified


@pytest.mark.parametrize("per_token", [False, True])
def test_a_gated_layer_quantises_its_own_input(per_token):
    """join-quantizers behind this pass; there is nothing left to fuse."""
    model, plan = gated(dataclasses.replace(GATED, per_token=per_token))
    LowerWeightsPlugin(plan).call(model)
    RemoveUnused().call(model)
    assert not FuseQuantizers().call(model).modified
    assert JoinQuantizers().call(model).modified
    (node,) = model.graph
    assert node.op_type == "QuantizedW4A8Linear" and [value.name for value in node.outputs] == ["h"]
    assert (node.attributes["gated"].as_int(), node.attributes["source"].as_int()) == (1, 1)
