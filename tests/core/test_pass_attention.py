"""select-attention, quantize-kv-cache, quantize-attention: goldens, what they leave alone, and why."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from attention_models import decoder, node

from passes.quantize_attention import QuantizeAttention
from passes.quantize_kv_cache import QuantizeKvCache
from passes.select_attention import SelectAttention
from zqfp_compile import specs
from zqfp_compile.errors import UsageError
from zqfp_compile.pass_base import Declined, PassError
from zqfp_compile.plan import AttentionSite, CacheSite, QuantPlan

SCALES = {"q": 0.5, "k": 0.25, "v": 0.125}
FP8 = ir.DataType.FLOAT8E4M3FN


def select(model: ir.Model, kv_cache: bool = True, attention: bool = True) -> QuantPlan:
    plan = SelectAttention(QuantPlan(), kv_cache, attention).call(model).plan
    assert plan is not None
    return plan.replace(attention_scales=SCALES)


def declined(model: ir.Model, **options: bool) -> tuple[Declined, ...]:
    return SelectAttention(QuantPlan(), **options).call(model).declined


# What is found


def test_the_plan_names_caches_and_products(run_pass):
    model = decoder("float16")
    result = run_pass(SelectAttention(QuantPlan(group_size=32), True, True), model)
    assert not result.modified and not result.declined and result.plan is not None
    half = ir.DataType.FLOAT16
    assert result.plan.caches == (
        CacheSite("past_key", "present_key", "k", "n_key", half),
        CacheSite("past_value", "present_value", "v", "n_value", half),
    )
    # Keys and values take the range of what is appended, so that cache and attention share one scale.
    assert result.plan.attentions == (AttentionSite("n_softmax", "n_scores", "n_mix", "q", "k", "v", half),)
    assert result.plan.attention_values == ("k", "v", "q")
    assert result.plan.group_size == 32  # extended, not replaced


def test_only_what_was_asked_for_is_planned():
    assert select(decoder(), attention=False).attentions == ()
    plan = select(decoder(), kv_cache=False)
    assert plan.caches == () and plan.attention_values == ("q", "k", "v")


def test_a_type_the_graph_does_not_say_comes_from_the_operators_before(run_pass):
    """optimum's graphs have no types on inner values."""
    model = decoder("float16")
    identity = ir.node("Identity", [model.graph.inputs[0]], name="n_identity")
    identity.outputs[0].name = "q_inner"
    model.graph.insert_before(model.graph[0], identity)
    node(model, "n_scores").replace_input_with(0, identity.outputs[0])
    plan = select(model, kv_cache=False)
    assert plan.attentions[0].dtype == ir.DataType.FLOAT16 and plan.attentions[0].q == "q"


# Rewrites


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_kv_cache_golden(dtype, run_pass, golden):
    model = decoder(dtype)
    assert run_pass(QuantizeKvCache(select(model)), model).modified
    specs.check(model, "engine")
    golden(f"quantize_kv_cache_{dtype}", model)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_attention_golden(dtype, run_pass, golden):
    model = decoder(dtype)
    assert run_pass(QuantizeAttention(select(model)), model).modified
    specs.check(model, "engine")
    golden(f"quantize_attention_{dtype}", model)


def test_both_on_one_model(run_pass, golden):
    model = decoder("float16")
    plan = select(model)
    assert run_pass(QuantizeKvCache(plan), model).modified
    assert run_pass(QuantizeAttention(plan), model).modified
    golden("quantize_kv_cache_attention", model)


def test_only_the_cache_changes_type():
    model = decoder("float16")
    QuantizeKvCache(select(model)).call(model)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    narrow = {name for name, dtype in types.items() if dtype == FP8}
    assert narrow == {"past_key", "past_value", "present_key", "present_value"}
    assert {dtype for name, dtype in types.items() if name not in narrow} == {ir.DataType.FLOAT16}
    assert [value.name for value in model.graph.outputs] == ["y", "present_key", "present_value"]


def test_nothing_planned_nothing_changed(run_pass):
    assert not run_pass(QuantizeKvCache(QuantPlan()), decoder()).modified
    assert not run_pass(QuantizeAttention(QuantPlan()), decoder()).modified


# What is left alone


def _read_cache_by(op_type: str, domain: str = "") -> ir.Model:
    model = decoder()
    past = model.graph.inputs[4]
    extra = ir.Node(domain, op_type, [past], name="n_extra")
    extra.outputs[0].name = "extra"
    model.graph.append(extra)
    return model


def _swapped() -> ir.Model:
    model = decoder()
    concat = node(model, "n_key")
    old, new = concat.inputs
    concat.replace_input_with(0, new)
    concat.replace_input_with(1, old)
    return model


def _hidden_present() -> ir.Model:
    model = decoder()
    model.graph.outputs.pop(1)
    return model


def _integer_cache() -> ir.Model:
    model = decoder()
    model.graph.inputs[4].type = ir.TensorType(ir.DataType.INT8)
    return model


def _branch() -> ir.Model:
    model = decoder()
    past = model.graph.inputs[4]
    inner = ir.node("Identity", [past], name="n_inner")
    inner.outputs[0].name = "inner"
    body = ir.Graph([], inner.outputs, nodes=[inner], name="body")
    condition = ir.val("condition", const_value=ir.tensor([True], name="condition"))
    model.graph.register_initializer(condition)
    attributes = [ir.AttrGraph(name, body) for name in ("then_branch",)]
    model.graph.append(ir.Node("", "If", [condition], attributes, name="n_if"))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: _read_cache_by("GroupQueryAttention", "com.microsoft"),
            "it is read by com.microsoft::GroupQueryAttention 'n_extra'; "
            "only a Concat that appends the new tokens is known",
        ),
        (
            lambda: _read_cache_by("Relu"),
            "it is read by Relu 'n_extra'; only a Concat that appends the new tokens is known",
        ),
        (_swapped, "it is not appended to by one Concat(past, new), but by Concat 'n_key'"),
        (_hidden_present, "the result of Concat 'n_key' is no graph output"),
        (_integer_cache, "it has type INT8; only FLOAT, FLOAT16 and BFLOAT16 caches become FP8"),
        (_branch, "it is read inside a subgraph (by Identity 'n_inner'); export without branches"),
    ],
)
def test_a_cache_left_alone_says_why(make, reason):
    model = make()
    assert declined(model, kv_cache=True) == (Declined("past_key", reason),)
    assert [site.past for site in select(model, attention=False).caches] == ["past_value"]


def test_without_the_option_a_cache_is_nobodys_business():
    assert declined(_swapped(), attention=True) == ()


def test_an_unused_cache_says_so():
    model = _integer_cache()
    past = model.graph.inputs[4]
    past.type = ir.TensorType(ir.DataType.FLOAT)
    past.replace_all_uses_with(model.graph.inputs[5])
    reasons = {item.place: item.reason for item in _no_cache(model)}
    assert reasons["past_key"] == "nothing reads it"


def _no_cache(model: ir.Model) -> tuple[Declined, ...]:
    from passes._attention_forms import find_caches

    return tuple(find_caches(model.graph)[1])


def _add_softmax(model: ir.Model, source: ir.Value) -> ir.Model:
    softmax = ir.node("Softmax", [source], name="n_other")
    softmax.outputs[0].name = "other"
    model.graph.append(softmax)
    return model


def _two_products() -> ir.Model:
    model = decoder()
    q, keys = node(model, "n_scores").inputs
    assert q is not None and keys is not None
    more = ir.node("MatMul", [q, keys], name="n_more")
    total = ir.node("Add", [node(model, "n_scores").outputs[0], more.outputs[0]], name="n_total")
    more.outputs[0].name, total.outputs[0].name = "more", "total"
    for item in (more, total):
        model.graph.append(item)
    return _add_softmax(model, total.outputs[0])


def _linear_softmax() -> ir.Model:
    model = decoder()
    weight = ir.val("weight", const_value=ir.tensor([[0.5] * 8] * 8, dtype=ir.DataType.FLOAT))
    model.graph.register_initializer(weight)
    router = ir.node("MatMul", [model.graph.inputs[0], weight], name="n_router")
    router.outputs[0].name = "router"
    model.graph.append(router)
    return _add_softmax(model, router.outputs[0])


def _probabilities_only() -> ir.Model:
    model = decoder()
    return _add_softmax(model, node(model, "n_scale").outputs[0])


def _constant_values() -> ir.Model:
    model = _two_products()
    total = node(model, "n_total")
    total.replace_input_with(1, total.inputs[0])  # one product again
    weight = ir.val("weight", const_value=ir.tensor([[0.5] * 8] * 8, dtype=ir.DataType.FLOAT))
    model.graph.register_initializer(weight)
    mix = ir.node("MatMul", [node(model, "n_other").outputs[0], weight], name="n_constant")
    mix.outputs[0].name = "constant"
    model.graph.append(mix)
    return model


def _inner_softmax() -> ir.Model:
    model = decoder()
    softmax = ir.node("Softmax", [node(model, "n_scale").outputs[0]], name="n_other")
    softmax.outputs[0].name = "other"
    body = ir.Graph([], softmax.outputs, nodes=[softmax], name="body")
    condition = ir.val("condition", const_value=ir.tensor([True], name="condition"))
    model.graph.register_initializer(condition)
    model.graph.append(ir.Node("", "If", [condition], [ir.AttrGraph("then_branch", body)], name="n_if"))
    return model


def _fused(domain: str) -> ir.Model:
    model = decoder()
    fused = ir.Node(domain, "Attention", model.graph.inputs[:3], name="n_other")
    fused.outputs[0].name = "other"
    model.graph.append(fused)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_two_products, "2 products of two activations make the scores of its Softmax, not one"),
        (_linear_softmax, "no products of two activations make the scores of its Softmax, not one"),
        (_probabilities_only, "no single MatMul multiplies its probabilities with values"),
        (_constant_values, "an operand of its products is constant"),
        (_inner_softmax, "it is inside a subgraph; only the main graph is compiled"),
        *(
            (
                lambda domain=domain: _fused(domain),
                "Attention holds both products in one operator; export with attention decomposed",
            )
            for domain in ("", "com.microsoft")
        ),
    ],
)
def test_an_attention_left_alone_says_why(make, reason):
    model = make()
    assert declined(model, attention=True) == (Declined("n_other", reason),)
    assert [site.name for site in select(model, kv_cache=False).attentions] == ["n_softmax"]


# Errors


def test_a_model_without_a_cache_or_attention_is_the_users_error():
    model = decoder()
    for value in model.graph.inputs[4:]:
        value.name = f"before.{value.name[5:]}"
    with pytest.raises(UsageError, match=r"--kv-cache-dtype fp8: the model has no KV cache input; leave"):
        select(model)
    node(model, "n_softmax").op_type = "LogSoftmax"
    with pytest.raises(
        UsageError, match=r"--attention fp8: the model has no attention; leave the option out"
    ):
        select(model, kv_cache=False)


def test_when_everything_is_declined_the_first_reason_is_told():
    model = decoder()
    for name in ("n_key", "n_value"):
        concat = node(model, name)
        concat.replace_input_with(1, concat.inputs[0])
    with pytest.raises(UsageError, match=r"no KV cache input .* such as 'past_key': it is not appended to"):
        select(model)


@pytest.mark.parametrize("pass_", [QuantizeKvCache, QuantizeAttention])
def test_a_plan_of_another_model_or_without_scales_is_an_error(pass_):
    plan = select(decoder())
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PassError, match="no positive calibrated scale"):
            pass_(plan.replace(attention_scales=dict.fromkeys(SCALES, bad))).call(decoder())
    other = decoder()
    for item in other.graph:
        item.name = f"renamed_{item.name}"
    with pytest.raises(PassError, match="is not in the graph; use this model's plan"):
        pass_(plan).call(other)
    old = decoder()
    old.graph.opset_imports[""] = 20
    with pytest.raises(PassError, match="opset is below 21; run raise-opset first"):
        pass_(plan).call(old)


def test_nothing_is_inserted_when_a_scale_is_missing():
    """No half-rewritten product is left behind by the error above."""
    plan = select(decoder()).replace(attention_scales={"q": 1.0})
    with pytest.raises(PassError, match=r"value 'k': no positive calibrated scale"):
        QuantizeAttention(plan).call(decoder())
