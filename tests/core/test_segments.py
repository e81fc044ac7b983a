"""Cutting graphs at their planned linears: order, what is kept between segments, and for how long."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from square_linears import square_linears

from zqfp_compile.calibrate.segments import Partition, partition, segment_model
from zqfp_compile.errors import ModelError
from zqfp_compile.plan import LinearSite, QuantPlan


def cut(body: str) -> tuple[ir.Model, Partition]:
    """Partition a graph of x [b, 4] with square weights W<a..e>, planned as select-linears does."""
    model, plan = square_linears(body)
    return model, checked(model, plan)


def checked(model: ir.Model, plan: QuantPlan) -> Partition:
    """Partition, and check what holds for every graph."""
    parts = partition(model.graph, plan.rewritten)
    visited = [site.name for step in parts.steps for site in step.sites]
    assert sorted(visited) == sorted(site.name for site in plan.rewritten)
    assert len(parts.segments) == len(parts.steps)
    planned = {site.node for site in plan.rewritten}
    kept = {value.name for value in model.graph.inputs}
    once: set[str] = set()
    for index, (segment, step) in enumerate(zip(parts.segments, parts.steps, strict=True)):
        assert not planned & {node.name for node in segment.nodes}
        assert set(segment.inputs) <= kept, "a segment reads what is not there yet"
        assert once.isdisjoint(segment.outputs), "a value is computed twice"
        once |= set(segment.outputs)
        kept |= set(segment.outputs)
        assert step.activation in kept
        kept |= step.computed
        gone = {name for name, last in parts.last_use.items() if last == index}
        kept -= gone - step.computed
    return parts


def ops(parts: Partition) -> list[list[str]]:
    return [[node.op_type for node in segment.nodes] for segment in parts.segments]


def test_chain() -> None:
    _, parts = cut("h = MatMul(x, Wa)  r = Relu(h)  y = MatMul(r, Wb)")
    assert [step.activation for step in parts.steps] == ["x", "r"]
    assert [step.computed for step in parts.steps] == [{"h"}, set()]  # nothing needs the last output
    assert ops(parts) == [[], ["Relu"]]
    assert parts.segments[1].inputs == ("h",) and parts.segments[1].outputs == ("r",)
    assert parts.last_use == {"x": 1, "r": 2, "h": 1}


def test_linears_of_one_activation_are_one_step() -> None:
    _, parts = cut(
        "q = MatMul(x, Wa)  k = MatMul(x, Wb)  s = Add(q, k)  v = MatMul(x, Wc)  t = Mul(s, v)"
        "  y = MatMul(t, Wd)"
    )
    assert [[site.output for site in step.sites] for step in parts.steps] == [["q", "k", "v"], ["y"]]
    assert ops(parts) == [[], ["Add", "Mul"]]


def test_parallel_attention_and_mlp_share_their_input() -> None:
    _, parts = cut(
        "n = Relu(x)  q = MatMul(n, Wa)  f = MatMul(n, Wb)  o_in = Tanh(q)  d_in = Gelu(f)"
        "  o = MatMul(o_in, Wc)  d = MatMul(d_in, Wd)  s = Add(o, d)  t = Add(s, x)  y = MatMul(t, We)"
    )
    assert [step.activation for step in parts.steps] == ["n", "o_in", "d_in", "t"]
    assert parts.segments[1].outputs == ("o_in", "d_in")  # both come from the same step
    assert parts.segments[2].outputs == () and parts.last_use["d_in"] == 3
    assert parts.last_use["o"] == 3  # made at step 1, kept until the sum


def test_a_weight_may_serve_several_steps() -> None:
    _, parts = cut("h = MatMul(x, Wa)  r = Relu(h)  y = MatMul(r, Wa)")
    assert [len(step.sites) for step in parts.steps] == [1, 1]


def test_values_live_until_their_last_reader() -> None:
    """The residual r0 is read by two later segments, as across layers."""
    _, parts = cut(
        "r0 = MatMul(x, Wa)  a = Relu(r0)  h = MatMul(a, Wb)  r1 = Add(r0, h)  b = Relu(r1)"
        "  i = MatMul(b, Wc)  s = Add(r0, i)  r2 = Add(s, r1)  c = Relu(r2)  y = MatMul(c, Wd)"
    )
    assert [step.activation for step in parts.steps] == ["x", "a", "b", "c"]
    assert parts.last_use["r0"] == 3 and parts.last_use["r1"] == 3
    assert "r2" not in parts.last_use  # only read where it is computed


def test_linear_into_linear_needs_no_segment() -> None:
    _, parts = cut("h = MatMul(x, Wa)  y = MatMul(h, Wb)")
    assert [step.activation for step in parts.steps] == ["x", "h"]
    assert ops(parts) == [[], []] and parts.last_use["h"] == 2


def test_cheap_values_are_computed_wherever_they_are_read() -> None:
    _, parts = cut(
        "m = Neg(x)  a = Add(x, m)  h = MatMul(a, Wa)  b = Mul(h, m)  i = MatMul(b, Wb)  c = Mul(i, m)"
        "  y = MatMul(c, Wc)"
    )
    assert ops(parts) == [["Neg", "Add"], ["Neg", "Mul"], ["Neg", "Mul"]]
    assert "m" not in parts.last_use


def test_expensive_values_are_computed_once() -> None:
    """A layer that is left alone runs in the segment before the first step, not in every one."""
    model, parts = cut("e = MatMul(x, Wa)  a = Relu(e)  h = MatMul(a, Wb)  b = Add(h, e)  y = MatMul(b, Wc)")
    first = parts.steps[0].sites[0]
    plan = QuantPlan(linears=tuple(site for step in parts.steps for site in step.sites if site != first))
    parts = checked(model, plan)
    assert ops(parts) == [["MatMul", "Relu"], ["Add"]]
    assert parts.segments[0].outputs == ("e", "a") and parts.last_use["e"] == 1


def test_what_nothing_planned_needs_is_left_out() -> None:
    _, parts = cut("a = Relu(x)  h = MatMul(a, Wa)  t = Tanh(h)  y = Softmax(t)")
    assert len(parts.steps) == 1 and ops(parts) == [["Relu"]] and not parts.steps[0].computed


def test_values_inside_subgraphs_count_as_read() -> None:
    model, parts = cut(
        "h = MatMul(x, Wa)  c = Constant <value_int = 1> ()  w = Cast <to = 9> (c)"
        "  r = If (w) <then_branch = t () => (float[b, 4] u) { u = Relu(h) },"
        " else_branch = e () => (float[b, 4] v) { v = Neg(h) }>  y = MatMul(r, Wb)"
    )
    assert "h" in parts.segments[1].inputs and parts.segments[1].outputs == ("r",)
    segment = segment_model(model, parts.segments[1], {"h": (ir.DataType.FLOAT, 2)})
    assert [value.name for value in segment.graph.inputs] == ["h"]


def test_a_segment_is_a_model_with_only_the_weights_it_reads() -> None:
    model, parts = cut("h = MatMul(x, Wa)  b = Add(h, We)  y = MatMul(b, Wb)")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    segment = segment_model(model, parts.segments[1], {"h": (ir.DataType.FLOAT, 2)})
    assert list(segment.graph.initializers) == ["We"]
    assert [value.name for value in segment.graph.outputs] == ["b"]
    assert [node.op_type for node in segment.graph] == ["Add"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_unreachable_layers_are_named() -> None:
    model, parts = cut("h = MatMul(x, Wa)  r = Relu(h)  y = MatMul(r, Wb)")
    sites = [site for step in parts.steps for site in step.sites]
    with pytest.raises(ModelError, match="depends on a layer that comes after it") as caught:
        partition(model.graph, sites[::-1])
    assert "\n" not in str(caught.value)
    lost = LinearSite(**{**vars(sites[0]), "node": "elsewhere"})
    with pytest.raises(ModelError, match="'elsewhere' is not in the graph"):
        partition(model.graph, [lost])
    other = LinearSite(**{**vars(sites[1]), "activation": "h"})
    with pytest.raises(ModelError, match="does not read 'h'"):
        partition(model.graph, [sites[0], other])
