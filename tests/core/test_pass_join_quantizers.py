from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from fused_quantizers import EPSILON, Fused
from quantized_layers import GATED_LAYERS, LAYERS, METADATA, NAME, Layer, layers, model
from rewrite_models import HOST_CASES, artifact

from passes.join_quantizers import JoinQuantizers
from passes.lower_weights_plugin import LowerWeightsPlugin
from passes.remove_unused import RemoveUnused
from zqfp_compile.specs import check

F32 = ir.DataType.FLOAT
NORM = Layer(Fused(norm=True, skip=True, tokens=True, rank=16, k=80), (64, 72), bias=True)


def joined(layer: Layer, run_pass) -> ir.Graph:
    """The graph after the pass, which is in order."""
    made = model(layer)
    run_pass(JoinQuantizers(), made, check=False)  # the checker does not know our operators
    check(made, "engine")
    return made.graph


def kinds(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def described(values: Sequence[ir.Value]) -> list[tuple[object, ...]]:
    return [(value.name, value.dtype, value.shape, dict(value.metadata_props)) for value in values]


@pytest.mark.parametrize("layer", [*LAYERS, *layers(dtype=F32, k=80), *GATED_LAYERS], ids=str)
def test_every_quantiser_and_its_layer_become_one_node(layer, run_pass):
    case, wanted = layer.quantizer, model(layer).graph
    outputs = described(wanted.outputs)
    quantizer, linear = wanted
    graph = joined(layer, run_pass)
    (node,) = graph
    stored = ["codes", "group_scales", "row_scales", *["bias"] * layer.bias, *["u"] * (case.rank > 0)]
    assert [value.name for value in node.inputs] == [*(value.name for value in quantizer.inputs), *stored]
    assert described(node.outputs) == outputs
    assert list(graph.outputs) == list(node.outputs)
    source = 3 if case.norm else 1 if case.plain else 2
    norm = {"skip": int(case.skip), "epsilon": pytest.approx(EPSILON)} if case.norm else {}
    kept = {name: attr.value for name, attr in linear.attributes.items() if not name.startswith("plugin_")}
    assert {name: attr.value for name, attr in node.attributes.items()} == {
        **kept,
        "source": source,
        **norm,
    }
    assert (node.domain, node.op_type, node.name) == ("zqfp", "QuantizedW4A8Linear", NAME)
    assert dict(node.metadata_props) == METADATA


def test_golden(run_pass, golden):
    made = model(NORM)
    run_pass(JoinQuantizers(), made, check=False)
    golden("join_quantizers", made)


def test_other_readers_of_the_sum_read_the_layers(run_pass):
    """One of them may stand between the two nodes."""
    made = model(NORM)
    reader = ir.Node("", "Neg", [made.graph.node(0).outputs[-1]], name="early")
    reader.outputs[0].name, reader.outputs[0].dtype = "early", ir.DataType.FLOAT
    made.graph.insert_after(made.graph.node(0), reader)
    made.graph.outputs.append(reader.outputs[0])
    run_pass(JoinQuantizers(), made, check=False)
    check(made, "engine")
    assert kinds(made.graph) == ["QuantizedW4A8Linear", "Neg"]
    assert reader.inputs[0] is made.graph.node(0).outputs[-1]


@pytest.mark.parametrize("case", HOST_CASES, ids=str)
def test_layers_that_share_a_quantiser_keep_it(case, run_pass):
    """q and v are one product where n is a multiple of 64, and are joined then."""
    made, plan = artifact(case)
    LowerWeightsPlugin(plan).call(made)
    RemoveUnused().call(made)
    shared = case.n % 64 > 0
    assert run_pass(JoinQuantizers(), made, check=False).modified != shared
    assert kinds(made.graph).count("PackedW4A8Linear") == 2 * shared
    assert [node.name for node in made.graph] == ["attn.q/MatMul+attn.v/MatMul"] or shared


def add_reader(graph: ir.Graph, value: ir.Value) -> None:
    node = ir.Node("", "Identity", [value], name="reader")
    node.outputs[0].name = "read"
    graph.append(node)
    graph.outputs.append(node.outputs[0])


def second_layer(graph: ir.Graph) -> None:
    """Another layer of the same x8."""
    old = graph.node(1)
    new = ir.Node(old.domain, old.op_type, old.inputs, [*old.attributes.values()], num_outputs=2, name="v")
    for number, value in enumerate(new.outputs):
        value.name = f"v.{number}"
    graph.append(new)
    graph.outputs.extend(new.outputs)


def projection(graph: ir.Graph) -> None:
    """The layer's LoRC product is a node of its own, the quantiser's nobody's."""
    quantizer, linear = graph
    low = ir.Node("", "MatMul", [quantizer.inputs[0], graph.initializers["v"]], name="low")
    low.outputs[0].name = "low"
    graph.insert_before(linear, low)
    linear.replace_input_with(len(linear.inputs) - 2, low.outputs[0])


def computed(graph: ir.Graph) -> None:
    """Row scales that a node makes behind the quantiser."""
    linear = graph.node(1)
    node = ir.Node("", "Neg", [graph.initializers["row_scales"]], name="computed")
    node.outputs[0].name = "rows"
    graph.insert_before(linear, node)
    linear.replace_input_with(4, node.outputs[0])


def another_x8(graph: ir.Graph) -> None:
    """The layer reads the scales only."""
    other = ir.Value(name="other", type=ir.TensorType(ir.DataType.FLOAT8E4M3FN))
    graph.inputs.append(other)
    graph.node(1).replace_input_with(0, other)


def branch(graph: ir.Graph) -> None:
    """The layer is in a branch of an If."""
    linear = graph.node(1)
    graph.outputs[:] = graph.outputs[-1:]
    graph.remove(linear)
    inner = [
        ir.Graph([], linear.outputs, nodes=[linear], name="then"),
        ir.Graph([], [], nodes=[], name="else"),
    ]
    condition = ir.Value(name="condition", const_value=ir.tensor(np.array(True)))
    graph.register_initializer(condition)
    attributes = [ir.AttrGraph(f"{each.name}_branch", each) for each in inner]
    graph.append(ir.Node("", "If", [condition], attributes, name="if"))


LEFT_ALONE = {
    "two layers": second_layer,
    "x8 is read": lambda graph: add_reader(graph, graph.node(0).outputs[0]),
    "a is read": lambda graph: add_reader(graph, graph.node(0).outputs[1]),
    "xv is read": lambda graph: add_reader(graph, graph.node(0).outputs[2]),
    "x8 is an output": lambda graph: graph.outputs.append(graph.node(0).outputs[0]),
    "xv is an output": lambda graph: graph.outputs.append(graph.node(0).outputs[2]),
    "another LoRC product": projection,
    "row scales are computed": computed,
    "in a branch": branch,
    "another x8": another_x8,
    "no quantiser of ours": lambda graph: setattr(graph.node(0), "domain", "com.example"),
    "no layer of ours": lambda graph: setattr(graph.node(1), "op_type", "W4A8Linear"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone(name, run_pass):
    made = model(NORM)
    LEFT_ALONE[name](made.graph)
    assert not run_pass(JoinQuantizers(), made, check=False).modified


def test_another_static_scale_is_left_alone(run_pass):
    """It would be a layer of another quantiser."""
    layer = dataclasses.replace(NORM, quantizer=dataclasses.replace(NORM.quantizer, tokens=False))
    made = model(layer)
    other = ir.Value(name="b", const_value=ir.tensor(np.float32(1)))
    made.graph.register_initializer(other)
    made.graph.node(1).replace_input_with(1, other)
    assert not run_pass(JoinQuantizers(), made, check=False).modified
