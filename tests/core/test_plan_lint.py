"""The plan lint on layer lists as TensorRT-RTX 1.7.1 logs them (shortened; the shapes are real)."""

from __future__ import annotations

from zqfp_compile.backends.plan_lint import lint, parse_layers

LINEAR = "Strides: [1], StrideOrder: [0], "


def tensor(name: str, dims: str, dtype: str) -> str:
    return f"{{ Name: {name}, Dimensions: [{dims}], {LINEAR}Datatype: {dtype}, Format: (Linear) Row major }}"


def layer(name, type_, inputs, constants, outputs, nodes=()):
    lists = (", ".join(tensor(*operand) for operand in group) for group in (inputs, constants, outputs))
    listed = "Inputs: [ {}], Constants: [ {}], Outputs: [ {}]".format(*lists)
    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return f"Name: {name}, LayerType: {type_}, {listed}, TacticName: , StreamId: 0, Metadata: {metadata}"


def fp8_gemm(names, group=0, mark="", out="Float", n=96, alpha="q_alpha"):
    joined = "+".join(name + mark for name in names)
    return layer(
        f"{joined}_myl{group}_2",
        "gemm",
        [(f"x8{mark}.1_myl{group}", "-1,64", "FP8")],
        [(f"__w_dconst_myl{group}", f"64,{n}", "FP8"), (f"__mye5{alpha}_myl{group}", "1", "Float")],
        [(f"__acc_myl{group}", f"-1,{n}", out)],
        names,
    )


def scale(name, group=0, size="1,48", view="-1,48"):
    return layer(
        f"__myl_Mul_myl{group}_3",
        "kgen",
        [(f"__acc_myl{group}", view, "Float")],
        [(f"__mye6_folded_matmul_myl{group}", size, "Float")],
        [(f"{name}_out_myl{group}", view, "Float")],
        [name],
    )


def log(*lines):
    return "[I] building\n[V] Layers:\n" + "\n".join(lines) + "\n\nI/O Tensors:\n Name: x, IOMode: Input\n"


def check(text, linears, profiles=1, **options):
    return lint(parse_layers(text, profiles), linears, **options)


def test_operands_are_read_with_dtype_and_dims() -> None:
    (layers,) = parse_layers(log(fp8_gemm(["q", "k"])), 1)
    assert layers[0].type == "gemm"
    assert layers[0].nodes == ("q", "k")
    assert [(t.dims, t.dtype) for t in layers[0].inputs] == [((-1, 64), "FP8")]
    assert layers[0].constants[0].dims == (64, 96)


def plugin(name, group=0, mark="", codes="Int4"):
    return layer(
        f"{name}{mark}_myl{group}_2",
        "custom_layer",
        [(f"x8{mark}_myl{group}", "-1,64", "FP8")],
        [(f"{name}_codes", "64,128", codes), ("__scales", "256", "FP8"), ("__rows", "48", "Float")],
        [(f"{name}{mark}_out", "-1,48", "Half")],
        [name],
    )


def test_our_plugin_covers_its_linear_and_its_half_output_is_scaled() -> None:
    result = check(
        log(plugin("q/MatMul"), plugin("k/MatMul", 1, " [profile 1]")), ["q/MatMul", "k/MatMul"], 2
    )
    assert [profile.missing for profile in result.profiles] == [("k/MatMul",), ("q/MatMul",)]
    result = check(log(plugin("q/MatMul"), fp8_gemm(["k/MatMul"])), ["q/MatMul", "k/MatMul"])
    assert result.ok and (result.fp8_linears, result.fp8_gemms) == (2, 2)


def test_another_plugin_covers_nothing() -> None:
    result = check(log(plugin("q/MatMul", codes="Half")), ["q/MatMul"])
    assert not result.ok and "it runs as custom_layer of FP8" in result.problems[0]


def test_merged_linears_count_once_as_gemm_and_each_as_linear() -> None:
    result = check(log(fp8_gemm(["q", "k"]), scale("q"), scale("k")), ["q", "k"])
    assert result.ok, result.problems
    assert (result.fp8_gemms, result.fp8_linears) == (1, 2)


def test_every_profile_must_cover_a_linear() -> None:
    both = log(fp8_gemm(["q", "k"]), scale("q"), fp8_gemm(["q", "k"], 1, " [profile 1]"), scale("q", 1))
    assert check(both, ["q", "k"], 2).ok
    half = log(fp8_gemm(["q", "k"]), fp8_gemm(["k"], 1, " [profile 1]", n=48))
    result = check(half, ["q", "k"], 2)
    assert not result.ok
    assert result.missing == ("q",)
    assert result.fp8_linears == 1
    assert result.problems == ("profile 1: linear 'q' is not an FP8 GEMM (no layer names it)",)
    assert [profile.fp8_linears for profile in result.profiles] == [2, 1]


def test_a_name_that_only_begins_like_a_linear_does_not_cover_it() -> None:
    assert check(log(fp8_gemm(["node_linear_10"])), ["node_linear_1"]).missing == ("node_linear_1",)


def test_numbered_names_of_larger_graphs_are_found() -> None:
    """Names get a ``_U<number>`` there; the node list tells it from a name that ends so."""
    numbered = fp8_gemm(["v", "q_U5"]).replace("v+q_U5_myl", "v_U562+q_U5_U9_myl")
    assert check(log(numbered), ["q_U5", "v"]).ok
    assert check(log(numbered), ["q_U5_U9", "v_U562", "v"]).missing == ("q_U5_U9", "v_U562")


def test_names_with_plus_and_brackets_are_found() -> None:
    name = "a+b, c: {d} [e] q/MatMul"
    assert check(log(fp8_gemm(["k", name, "v"], n=48)), [name, "k"]).ok


def test_equal_products_are_computed_once() -> None:
    """One of them keeps its name, in each profile another; no layer names the rest."""
    text = log(fp8_gemm(["q", "v"]), fp8_gemm(["k", "v"], 1, " [profile 1]"))
    result = check(text, ["q", "k", "v"], 2, equal=[["q", "k"], ["v"]])
    assert result.ok and (result.fp8_linears, result.fp8_gemms) == (3, 1)
    assert not check(text, ["q", "k", "v"], 2, equal=[["q", "v"], ["k"]]).ok
    assert not check(log(fp8_gemm(["v"])), ["q", "k", "v"], equal=[["q", "k"], ["v"]]).ok


def test_an_equal_product_that_runs_otherwise_is_not_covered() -> None:
    text = log(fp8_gemm(["q"]), layer("k_myl0_1", "kgen", [("x", "-1,64", "Half")], [], [], ["k"]))
    assert check(text, ["q", "k"], equal=[["q", "k"]]).missing == ("k",)


def test_a_linear_without_a_gemm_of_its_own() -> None:
    """As one with the FP8 codes of another weight and other scales, or in the decode profile a small one."""
    text = log(fp8_gemm(["k"]), layer("__myl_MulMul_myl0_3", "kgen", [("x", "-1,8", "Float")], [], [], ["q"]))
    assert "'q' is not an FP8 GEMM (element-wise layers name it, no GEMM)" in check(text, ["q"]).problems[0]


def test_names_may_carry_the_branch_they_are_in() -> None:
    """So do those behind an If whose condition is constant."""
    text = log(fp8_gemm(["q"]).replace("Layer: q]", "Layer: q | else_1 (else_branch) | a (If)]"))
    assert check(text, ["q"]).ok
    half = layer("g_myl0_1", "gemm", [("x", "-1,64", "Half")], [], [], ["q | a (If)"])
    assert "it runs as gemm of Half" in check(log(half), ["q"]).problems[0]


def test_float_gemm_is_named_as_what_it_is() -> None:
    text = log(
        layer(
            "q_myl0_1",
            "gemm",
            [("x", "-1,64", "Half")],
            [("w", "64,48", "Half"), ("q_alpha_myl0", "1", "Float")],
            [("y", "-1,48", "Half")],
            ["q"],
        )
    )
    result = check(text, ["q"])
    assert result.fp8_gemms == 0
    assert result.problems == ("profile 0: linear 'q' is not an FP8 GEMM (it runs as gemm of Half x Half)",)


def test_fusion_that_reads_fp8_but_multiplies_in_float_does_not_count() -> None:
    text = log(
        layer(
            "__myl_CastMulCastMulCastFc_myl0_2",
            "runtime_fusion",
            [("x8", "-1,64", "FP8")],
            [("s", "64,1", "Float"), ("w", "64,64", "FP8")],
            [("y", "-1,64", "Float")],
            ["q"],
        )
    )
    result = check(text, ["q"])
    assert result.missing == ("q",)
    assert "it runs as runtime_fusion of FP8 x Float x FP8" in result.problems[0]


def test_unscaled_half_accumulator_is_a_problem() -> None:
    unscaled = check(log(fp8_gemm(["q"], out="Half", n=48), scale("q")), ["q"])
    assert "stores its unscaled FP8 accumulator as half" in unscaled.problems[0]
    scaled_inside = check(log(fp8_gemm(["q"], out="Half", n=48, alpha="_folded")), ["q"])
    assert scaled_inside.ok, scaled_inside.problems


def test_scale_of_the_wrong_size_is_a_problem() -> None:
    for size, good in (("1,48", True), ("1", True), ("1,96", False), ("48,2", False)):
        result = check(log(fp8_gemm(["q", "k"]), scale("q", size=size)), ["q", "k"])
        assert result.ok == good, (size, result.problems)
    merged = log(fp8_gemm(["q", "k"]), scale("q", size="1,96", view="-1,96"))
    assert check(merged, ["q", "k"]).ok


def test_a_log_without_layers_or_with_unknown_ones_does_not_pass() -> None:
    assert "holds no layer list" in check("[I] nothing here\n", []).problems[0]
    assert "holds no layer list" in check(log(fp8_gemm(["q"])), ["q"], profiles=2).problems[0]
    assert "form this lint does not know" in check(log("Name: q, Kind: gemm"), []).problems[0]
    assert not lint([], []).ok
