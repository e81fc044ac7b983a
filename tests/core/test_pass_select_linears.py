from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from passes.raise_opset import RaiseOpset
from passes.select_linears import LM_HEAD_REASON, SelectLinears
from passes.strip_metadata import NAME_SCOPES, StripMetadata
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.pass_base import PassResult
from zqfp_compile.plan import LinearSite, QuantPlan
from zqfp_compile.weights import read_bias, read_weight

K, N = 6, 4
WEIGHTS = {"w": (K, N), "v": (N, K), "c": (N,), "d1": (1, N), "w3": (2, K, N)}


def parse(body: str, extra: str = "") -> ir.Model:
    """A model from the text of its graph; the names of WEIGHTS in it are initializers with seeded values."""
    imports = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "local" : 1]>'
    proto = onnx.parser.parse_model(imports + body + extra)
    generator = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        array = generator.standard_normal(shape).astype(np.float32)
        if re.search(rf"\b{name}\b", body):
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def graph(nodes: str, signature: str = "(float[M,6] x) => (float[M,4] y)") -> str:
    return f"g {signature} {{ {nodes} }}"


def plan_of(result: PassResult) -> QuantPlan:
    assert result.plan is not None
    return result.plan


def only(result: PassResult) -> LinearSite:
    (site,) = plan_of(result).linears
    return site


# Each form of one linear: nodes, then what the plan says about the weight and the bias.
FORMS = {
    "matmul": ("y = MatMul(x, w)", "w", True, 1.0, None, 1.0),
    "transposed": ("t = Transpose<perm=[1,0]>(v) y = MatMul(x, t)", "v", False, 1.0, None, 1.0),
    "transposed by default": ("t = Transpose(v) y = MatMul(x, t)", "v", False, 1.0, None, 1.0),
    "not really transposed": ("t = Transpose<perm=[0,1]>(w) y = MatMul(x, t)", "w", True, 1.0, None, 1.0),
    "identities": ("i = Identity(w) j = Identity(i) y = MatMul(x, j)", "w", True, 1.0, None, 1.0),
    "gemm": ("y = Gemm(x, w)", "w", True, 1.0, None, 1.0),
    "gemm transB": ("y = Gemm<transB=1>(x, v)", "v", False, 1.0, None, 1.0),
    "gemm of a transpose": ("t = Transpose(w) y = Gemm<transB=1>(x, t)", "w", True, 1.0, None, 1.0),
    "gemm bias": ("y = Gemm<transB=1>(x, v, c)", "v", False, 1.0, "c", 1.0),
    "gemm factors": ("y = Gemm<alpha=0.5, beta=0.25>(x, w, c)", "w", True, 0.5, "c", 0.25),
    "gemm beta 0": ("y = Gemm<beta=0.0>(x, w, c)", "w", True, 1.0, None, 1.0),
    "shared bias": ("i = Identity(c) y = Gemm(x, w, i)", "w", True, 1.0, "c", 1.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, run_pass: Callable[..., PassResult]) -> None:
    nodes, weight, transposed, scale, bias, bias_scale = FORMS[form]
    model = parse(graph(nodes.replace(") ", ")\n")))
    x = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    wanted = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    site = only(run_pass(SelectLinears(), model))
    assert (site.k, site.n, site.dtype) == (K, N, ir.DataType.FLOAT)
    assert (site.weight.initializer, site.weight.transposed, site.weight.scale) == (weight, transposed, scale)
    assert (site.bias, site.bias_scale) == (bias, bias_scale)
    assert (site.activation, site.output) == ("x", "y")
    offset = read_bias(model, site)
    result = x @ read_weight(model, site.weight).T + (0 if offset is None else offset)
    # Sums of 6 products of order 1 in another order: a few units of float32 rounding.
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)


STEPS = ("Identity", "Transpose", "Transpose [0,1]", "Cast FLOAT", "Cast FLOAT16", "Cast BFLOAT16")


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sampled_from(STEPS), max_size=6),
    stored=st.sampled_from(["FLOAT", "FLOAT16", "BFLOAT16"]),
    in_constant_node=st.booleans(),
)
def test_any_chain_gives_the_weight_the_graph_computes_with(
    steps: list[str], stored: str, in_constant_node: bool
) -> None:
    """Bit for bit: rounding casts in the chain are part of the weight."""
    array = np.random.default_rng(len(steps)).standard_normal((K, N))
    tensor = onnx.helper.make_tensor("w", getattr(onnx.TensorProto, stored), (K, N), array.ravel())
    nodes = [onnx.helper.make_node("Constant", [], ["w"], value=tensor)] if in_constant_node else []
    last, dtype, k, n = "w", stored, K, N
    for number, step in enumerate(steps):
        op, _, detail = step.partition(" ")
        attributes = {}
        if op == "Cast":
            dtype, attributes = detail, {"to": getattr(onnx.TensorProto, detail)}
        elif op == "Transpose" and detail:
            attributes = {"perm": [0, 1]}
        elif op == "Transpose":
            k, n = n, k
        nodes.append(onnx.helper.make_node(op, [last], [f"step_{number}"], **attributes))
        last = f"step_{number}"
    nodes.append(onnx.helper.make_node("MatMul", ["x", last], ["y"]))
    nodes.append(onnx.helper.make_node("Cast", [last], ["seen"], to=onnx.TensorProto.FLOAT))
    element_type = getattr(onnx.TensorProto, dtype)
    inputs = [onnx.helper.make_tensor_value_info("x", element_type, ["M", k])]
    outputs = [
        onnx.helper.make_tensor_value_info("y", element_type, ["M", n]),
        onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, [k, n]),
    ]
    body = onnx.helper.make_graph(nodes, "g", inputs, outputs, [] if in_constant_node else [tensor])
    imports = [onnx.helper.make_opsetid("", 21)]
    proto = onnx.helper.make_model(body, opset_imports=imports, ir_version=10)
    x = np.zeros((1, k), onnx.helper.tensor_dtype_to_np_dtype(element_type))
    (seen,) = ReferenceEvaluator(proto).run(["seen"], {"x": x})

    model = ir.from_proto(proto)
    site = only(SelectLinears().call(model))
    assert (site.dtype.name, site.k, site.n) == (dtype, k, n)
    assert list(model.graph.initializers) == ["w"]  # a Constant node was lifted
    np.testing.assert_array_equal(read_weight(model, site.weight), seen.T)


DECLINED = {
    "left": ("y = MatMul(w, z)", "the constant is the left operand"),
    "batched": ("y = MatMul(x, w3)", "rank 3"),
    "both constant": ("y = MatMul(v, w)", "both operands are constant"),
    "computed": ("a = Add(w, w)\n y = MatMul(x, a)", "computed in the graph (by Add"),
    "reshaped": ("s = Shape(w)\n r = Reshape(w, s)\n y = MatMul(x, r)", "computed in the graph (by Reshape"),
    "quantised": (
        "q = Cast<to=3>(w)\n s = Constant<value=float {1}>()\n d = DequantizeLinear(q, s)\n y = MatMul(x, d)",
        "already quantised",
    ),
    "cast from int": ("i = Cast<to=6>(w)\n f = Cast<to=1>(i)\n y = MatMul(x, f)", "type INT32"),
    "double": ("d = Cast<to=11>(w)\n y = MatMul(z, d)", "type DOUBLE"),
    "fp8": ("e = Cast<to=17>(w)\n f = Cast<to=1>(e)\n y = MatMul(x, f)", "already quantised (FLOAT8E4M3FN)"),
    "transA": ("y = Gemm<transA=1>(z, w)", "transA=1"),
    "activation as C": ("n = Neg(x)\n y = Gemm(x, w, n)", "C is an activation"),
    "matrix as C": ("y = Gemm(x, w, w)", "C has shape [6, 4]"),
    "computed C": ("n = Neg(c)\n y = Gemm(x, w, n)", "no plain initializer"),
    "vector activation": ("y = MatMul(h, w)", "activation is a vector"),
    "vector weight": ("y = MatMul(x, c)", "rank 1"),
    "n bits": ("y = com.microsoft.MatMulNBits<K=6,N=4,bits=4,block_size=32>(x, w, c)", "already quantised"),
    "runtime fusion": ("y = com.microsoft.FusedMatMul<alpha=2.0>(x, w)", "specific to ONNX Runtime"),
    "in a branch": (
        "y = If(flag) <then_branch = a () => (p) { p = MatMul(x, w) }, "
        "else_branch = b () => (q) { q = Identity(x) }>",
        "inside If 'y'",
    ),
    "dead": ("b = MatMul(x, w)\n d = Neg(b)\n y = Neg(x)", "no output depends on it"),
    "dead but for a dead node of a branch": (
        "b = MatMul(x, w)\n y = If(flag) <then_branch = a () => (p) { d = Neg(b) p = Neg(x) }, "
        "else_branch = b () => (q) { q = Identity(x) }>",
        "no output depends on it",
    ),
    "in a function, from outside": ("y = local.Linear(x, w)", "inside the function local::Linear"),
}
LINEAR_FUNCTION = """
<domain: "local", opset_import: ["" : 21]>
Linear (a, b) => (r) { r = MatMul(a, b) }
"""


@pytest.mark.parametrize("case", DECLINED)
def test_declined_with_a_reason(case: str, run_pass: Callable[..., PassResult]) -> None:
    """One good linear beside each, since a model without any is an error."""
    nodes, reason = DECLINED[case]
    signature = "(float[M,6] x, float[6,M] z, float[6] h, bool flag) => (float y, float[M,4] good)"
    model = parse(graph(f"{nodes}\n good = Gemm(x, w)", signature), extra=LINEAR_FUNCTION)
    result = run_pass(SelectLinears(), model, check=False)
    assert only(result).output == "good"
    (skipped,) = plan_of(result).skipped
    assert reason in skipped.reason
    assert [(entry.place, entry.reason) for entry in result.declined] == [(skipped.name, skipped.reason)]


def test_products_of_activations_are_no_linears(run_pass: Callable[..., PassResult]) -> None:
    model = parse(graph("t = Transpose(x)\n s = MatMul(x, t)\n p = MatMul(s, x)\n y = MatMul(p, w)"))
    result = run_pass(SelectLinears(), model)
    assert only(result).activation == "p"
    assert plan_of(result).skipped == ()


def test_a_weight_that_is_also_a_graph_input_is_declined() -> None:
    signature = "(float[M,6] x, float[4,6] v) => (float[M,4] y, float[M,4] z)"
    result = SelectLinears().call(parse(graph("y = Gemm<transB=1>(x, v)\n z = MatMul(x, w)", signature)))
    assert only(result).output == "z"
    assert "also a graph input" in plan_of(result).skipped[0].reason


def test_a_shared_weight_serves_each_of_its_linears(run_pass: Callable[..., PassResult]) -> None:
    nodes = "a = MatMul(x, w)\n t = Transpose(w)\n b = Gemm<transB=1>(x, t)\n y = Add(a, b)"
    result = run_pass(SelectLinears(), parse(graph(nodes)))
    assert [site.weight.initializer for site in plan_of(result).linears] == ["w", "w"]
    assert plan_of(result).linears[0].weight == plan_of(result).linears[1].weight


def test_a_linear_that_only_a_branch_reads(run_pass: Callable[..., PassResult]) -> None:
    nodes = (
        "b = MatMul(x, w)\n y = If(flag) <then_branch = a () => (p) { p = Neg(b) }, "
        "else_branch = b () => (q) { q = Neg(z) }>"
    )
    model = parse(graph(nodes, "(float[M,6] x, float[M,4] z, bool flag) => (float[M,4] y)"))
    assert only(run_pass(SelectLinears(), model)).output == "b"


def test_a_shared_constant_node_is_lifted_once(run_pass: Callable[..., PassResult]) -> None:
    constant = "k = Constant<value = float[6,1] {1,2,3,4,5,6}>()"
    nodes = f"{constant}\n a = MatMul(x, k)\n y = MatMul(a, d1)\n z = MatMul(x, k)"
    model = parse(graph(nodes, "(float[M,6] x) => (float[M,4] y, float[M,1] z)"))
    result = run_pass(SelectLinears(), model, check=False)
    assert result.modified
    assert [site.weight.initializer for site in plan_of(result).linears] == ["k", "d1", "k"]
    assert not any(node.op_type == "Constant" for node in model.graph)


def test_higher_rank_activations(run_pass: Callable[..., PassResult]) -> None:
    model = parse(graph("y = MatMul(x, w)", "(float[B,S,6] x) => (float[B,S,4] y)"))
    assert only(run_pass(SelectLinears(), model)).k == K


# Names


@pytest.mark.parametrize(
    ("node", "scopes", "wanted"),
    [
        ("n", "['', 'model.layers.0', 'model.layers.0.q_proj', 'linear']", "model.layers.0.q_proj"),
        ("/model/layers.0/q_proj/MatMul", None, "model.layers.0.q_proj"),
        ("/model/layers.0/q_proj/MatMul_3", None, "model.layers.0.q_proj"),
        ("/model/layers.0/q_proj/MatMul", "['', 'linear']", "model.layers.0.q_proj"),
        ("/model/layers.0/q_proj/MatMul", "not a list(", "model.layers.0.q_proj"),
        ("node_MatMul_7", None, "node_MatMul_7"),
        ("MatMul_7", None, "MatMul_7"),
        (None, None, "y"),
    ],
)
def test_layer_names(node: str | None, scopes: str | None, wanted: str) -> None:
    model = parse(graph("y = MatMul(x, w)"))
    matmul = next(iter(model.graph))
    matmul.name = node
    if scopes is not None:
        matmul.metadata_props[NAME_SCOPES] = scopes
    assert only(SelectLinears().call(model)).name == wanted


def test_names_are_made_unique_and_stay_so(run_pass: Callable[..., PassResult]) -> None:
    model = parse(
        graph("a = MatMul(x, w)\n b = MatMul(x, w)\n d = MatMul(x, w)\n e = Add(a, b)\n y = Add(e, d)")
    )
    for node, name in zip(model.graph, ("/l/MatMul", "/l/MatMul", "/l/MatMul_2", None, ""), strict=True):
        node.name = name
    result = run_pass(SelectLinears(), model)
    assert result.modified
    assert [node.name for node in model.graph] == ["/l/MatMul", "/l/MatMul_3", "/l/MatMul_2", "e", "y"]
    assert [site.name for site in plan_of(result).linears] == ["l", "l_2", "l_3"]
    assert plan_of(SelectLinears().call(model)).linears == plan_of(result).linears


def test_no_layer_is_called_like_another_node(run_pass: Callable[..., PassResult]) -> None:
    """The node that replaces a linear takes the layer's name, and plans find other nodes by theirs."""
    model = parse(graph("h = Relu(x)\n y = MatMul(h, w)"))
    relu, matmul = model.graph
    relu.name, matmul.name = "l", "/l/MatMul"
    assert only(run_pass(SelectLinears(), model)).name == "l_2"
    matmul.name = "l_2"
    assert only(SelectLinears().call(model)).name == "l_2"


# The output projection

LM = """g (int64[B,S] input_ids) => (float[B,S,5] {output}) <
  float[5,6] table = {{1,2,3,4,5,6, 1,2,3,4,5,6, 1,2,3,4,5,6, 1,2,3,4,5,6, 1,2,3,4,5,6}},
  float[5] bias = {{1,2,3,4,5}}, float two = {{2}}> {{
  x = Gather(table, input_ids)
  h = MatMul(x, w)
  o = MatMul(h, v)
  t = Transpose(table)
  raw = MatMul(o, t)
  {tail}
}}"""
TAILS = {
    "plain": "{output} = Identity(raw)",
    "bias": "{output} = Add(raw, bias)",
    "cast": "{output} = Cast<to=1>(raw)",
    "soft cap": "a = Div(raw, two)\n b = Tanh(a)\n {output} = Mul(b, two)",
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("output", ["logits", "scores"])
def test_lm_head(tail: str, output: str, run_pass: Callable[..., PassResult]) -> None:
    text = LM.format(output=output, tail=TAILS[tail].format(output=output))
    result = run_pass(SelectLinears(), parse(text))
    assert [site.output for site in plan_of(result).linears] == ["h", "o"]
    (skipped,) = plan_of(result).skipped
    assert (skipped.reason, skipped.k, skipped.n) == (LM_HEAD_REASON, 6, 5)

    result = run_pass(SelectLinears(quantize_lm_head=True), parse(text))
    assert [(site.output, site.is_lm_head) for site in plan_of(result).linears] == [
        ("h", False),
        ("o", False),
        ("raw", True),
    ]
    assert plan_of(result).linears[2].weight.initializer == "table"


def test_other_outputs_are_no_logits(run_pass: Callable[..., PassResult]) -> None:
    """k_proj reaches the KV-cache output, and the last layer of an encoder its hidden state."""
    signature = "(float[M,6] x) => (float[M,4] present_key, float[M,6] last_hidden_state)"
    nodes = "present_key = MatMul(x, w)\n o = MatMul(present_key, v)\n last_hidden_state = Add(o, x)"
    result = run_pass(SelectLinears(), parse(graph(nodes, signature)))
    assert len(plan_of(result).linears) == 2


# Options and errors

TWO = "q = MatMul(x, w)\n o = MatMul(q, v)\n y = MatMul(o, w)"


def two() -> ir.Model:
    model = parse(graph(TWO))
    for node, name in zip(model.graph, ("q_proj", "o_proj", "score"), strict=True):
        node.name = f"/layers.0/{name}/MatMul"
    return model


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"include": ("q_proj", "score$")}, ["layers.0.q_proj", "layers.0.score"]),
        ({"exclude": ("_proj",)}, ["layers.0.score"]),
        ({"include": ("proj",), "exclude": (r"layers\.0\.o",)}, ["layers.0.q_proj"]),
    ],
)
def test_include_and_exclude(
    options: dict[str, tuple[str, ...]], kept: list[str], run_pass: Callable[..., PassResult]
) -> None:
    result = run_pass(SelectLinears(**options), two())
    assert [site.name for site in plan_of(result).linears] == kept
    assert len(plan_of(result).skipped) == 3 - len(kept)
    for skipped in plan_of(result).skipped:
        assert "--exclude" in skipped.reason or "--include" in skipped.reason
        assert skipped.k is not None


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_names_what_is_near(option: str) -> None:
    with pytest.raises(
        UsageError, match=rf"--{option} 'layers.0.qproj' matches no layer; .*layers\.0\.q_proj"
    ):
        SelectLinears(**{option: ("layers.0.qproj",)}).call(two())


def test_everything_excluded_is_an_error() -> None:
    with pytest.raises(UsageError, match="leave no linear layer to rewrite"):
        SelectLinears(exclude=("",)).call(two())


def test_only_an_lm_head_says_which_option() -> None:
    with pytest.raises(UsageError, match="use --quantize-lm-head"):
        SelectLinears().call(parse(graph("logits = MatMul(x, w)", "(float[M,6] x) => (float[M,4] logits)")))


def test_no_linears_says_what_was_seen() -> None:
    model = parse(graph("t = Transpose(x)\n y = MatMul(x, t)"))
    with pytest.raises(ModelError, match=r"no linear layers: .*1 Transpose, 1 MatMul"):
        SelectLinears().call(model)


def test_only_declined_linears_says_why() -> None:
    with pytest.raises(ModelError, match=r"1 found and declined, such as 'y' .*rank 3"):
        SelectLinears().call(parse(graph("y = MatMul(x, w3)")))


def test_weights_on_disk_are_not_read(tmp_path: Path, run_pass: Callable[..., PassResult]) -> None:
    ir.save(two(), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    assert len(plan_of(run_pass(SelectLinears(), model, check=False)).linears) == 3


# A real export


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 8)
        self.o_proj = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x)
        return x + self.o_proj(torch.softmax(q @ q.transpose(-1, -2), -1) @ q)


class TinyLm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 8)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(8, 16, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.mark.parametrize("optimize", [True, False])
def test_a_torch_export(optimize: bool, tmp_path: Path, run_pass: Callable[..., PassResult]) -> None:
    torch.manual_seed(0)
    module = TinyLm().eval()
    program = torch.onnx.export(
        module,
        (torch.zeros(2, 5, dtype=torch.int64),),
        dynamo=True,
        optimize=optimize,
        opset_version=18,
        input_names=["input_ids"],
        output_names=["logits"],
        verbose=False,
    )
    program.save(tmp_path / "m.onnx")
    model = ir.load(tmp_path / "m.onnx")
    run_pass(StripMetadata(), model)
    run_pass(RaiseOpset(), model)
    result = run_pass(SelectLinears(), model)
    names = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "o_proj")]
    assert [site.name for site in plan_of(result).linears] == names
    assert [(entry.name, entry.reason) for entry in plan_of(result).skipped] == [("lm_head", LM_HEAD_REASON)]
    for site in plan_of(result).linears:
        weight = module.get_submodule(site.name).weight.detach().numpy()
        np.testing.assert_array_equal(read_weight(model, site.weight), weight)


LINEARS_PER_LAYER = {"llama": 7, "qwen2": 7, "opt": 6, "gpt2": 4}


@pytest.mark.parametrize("exporter", ["torch", "optimum"])
@pytest.mark.parametrize("family", LINEARS_PER_LAYER)
def test_families_and_exporters(
    family: str,
    exporter: str,
    tiny_model: Callable[..., Path],
    models_folder: Path,
    run_pass: Callable[..., PassResult],
) -> None:
    """Every linear of the network is found under its module's name, with its module's weight."""
    model = ir.load(tiny_model(family, exporter, "float16"))
    for pass_ in (StripMetadata(), RaiseOpset()):
        run_pass(pass_, model)
    plan = plan_of(run_pass(SelectLinears(), model))
    from tiny_models import make_model

    network = make_model(family, "float16")
    assert len(plan.linears) == LINEARS_PER_LAYER[family] * network.config.num_hidden_layers
    assert [skipped.reason for skipped in plan.skipped] == [LM_HEAD_REASON]
    for site in plan.linears:
        # optimum drops OPT's outermost "model"
        prefix = "model." if (family, exporter) == ("opt", "optimum") else ""
        weight = network.get_submodule(prefix + site.name).weight.detach().numpy()
        wanted = weight.T if family == "gpt2" else weight  # Conv1D stores [in, out]
        np.testing.assert_array_equal(read_weight(model, site.weight), wanted)
        assert site.dtype == ir.DataType.FLOAT16
