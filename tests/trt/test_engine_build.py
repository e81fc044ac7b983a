"""Engines built by the real TensorRT-RTX, on a machine without a GPU, from the forms the lowerings write."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from zqfp_compile.backends import tensorrt
from zqfp_compile.backends.equal_products import equal_products
from zqfp_compile.backends.profiles import Profile, default_profiles
from zqfp_compile.backends.tensorrt import EngineResult, build_engine
from zqfp_compile.errors import BuilderError, MissingDependencyError, UsageError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")

K, N, GROUP = 64, 48, 32
F32, F16, F8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN
PROFILES = (
    Profile("prefill", {"x": ((1, 1, K), (1, 512, K), (8, 2048, K))}),
    Profile("decode", {"x": ((1, 1, K), (1, 1, K), (8, 1, K))}),
)


class Graph:
    """A graph under construction: ``op`` adds a node named after its output and returns that output."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def op(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))
        return output

    def const(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(ir.to_proto(ir.Tensor(array, name=name)))
        return name

    def row_scales(self, name: str, dtype: type = np.float32) -> str:
        return self.const(name, (self.random.random(N) * 0.1 + 0.01).astype(dtype))

    def codes(self, name: str, shape: tuple[int, ...], dtype: type) -> str:
        return self.const(name, self.random.integers(-7, 8, shape).astype(dtype))

    def model(self, outputs: list[str], dtype: int = F16) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", dtype, ["batch", "sequence", K])],
            [helper.make_tensor_value_info(name, dtype, ["batch", "sequence", N]) for name in outputs],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def static_activation(g: Graph) -> str:
    """x f16 -> f32 -> Q -> DQ with one static scale."""
    a = g.const("a", np.float32(0.02))
    x8 = g.op("QuantizeLinear", [g.op("Cast", ["x"], "xf", to=F32), a], "x8", output_dtype=F8)
    return g.op("DequantizeLinear", [x8, a], "xd")


def fp8_weight(g: Graph, name: str) -> str:
    """The ``fp8`` lowering: E4M3 [N, K], row scales, Transpose."""
    w8 = g.codes(f"{name}_w", (N, K), ml_dtypes.float8_e4m3fn)
    wd = g.op("DequantizeLinear", [w8, g.row_scales(f"{name}_r")], f"{name}_wd", axis=0)
    return g.op("Transpose", [wd], f"{name}_wt", perm=[1, 0])


def int4_weight(g: Graph, name: str) -> str:
    """The ``int4`` lowering, as the inlined function body writes it (DESIGN section 3)."""
    one = g.const(f"{name}_one", np.float32(1))
    limits = {f"{v}": g.const(f"{name}_lim{v}", np.float32(v)) for v in (-6, -4, 4, 6)}
    codes = g.codes(f"{name}_codes", (N, K), ml_dtypes.int4)
    c = g.op("DequantizeLinear", [codes, one], f"{name}_c")
    clip4 = g.op("Clip", [c, limits["-4"], limits["4"]], f"{name}_clip4")
    half = g.op("Mul", [clip4, g.const(f"{name}_half", np.float32(0.5))], f"{name}_half4")
    clip6 = g.op("Clip", [c, limits["-6"], limits["6"]], f"{name}_clip6")
    low = g.op("Sub", [g.op("Add", [c, c], f"{name}_c2"), half], f"{name}_low")
    e2m1 = g.op("Sub", [low, clip6], f"{name}_e2m1")
    by_group = g.op("Reshape", [e2m1, g.const(f"{name}_s3", np.array([0, -1, GROUP]))], f"{name}_e3")
    exponents = g.random.integers(-3, 3, (N, K // GROUP)).astype(np.float32)
    s8 = g.const(f"{name}_s", (np.float32(2) ** exponents).astype(ml_dtypes.float8_e4m3fn))
    sf = g.op("DequantizeLinear", [s8, one], f"{name}_sf")
    s3 = g.op("Unsqueeze", [sf, g.const(f"{name}_ax", np.array([-1]))], f"{name}_sf3")
    flat = g.const(f"{name}_s2", np.array([0, -1]))
    ws = g.op("Reshape", [g.op("Mul", [by_group, s3], f"{name}_ws3"), flat], f"{name}_ws")
    ones = g.const(f"{name}_ones", np.ones(N, np.float32))
    w8 = g.op("QuantizeLinear", [ws, ones], f"{name}_w8", axis=0, output_dtype=F8)
    wd = g.op("DequantizeLinear", [w8, g.row_scales(f"{name}_r")], f"{name}_wd", axis=0)
    return g.op("Transpose", [wd], f"{name}_wt", perm=[1, 0])


def linears(names: str, weight: Callable[[Graph, str], str] = fp8_weight) -> onnx.ModelProto:
    """Linears that share one statically quantised activation."""
    g = Graph()
    xd = static_activation(g)
    for name in names:
        g.op("Cast", [g.op("MatMul", [xd, weight(g, name)], f"{name}_f")], name, to=F16)
    return g.model(list(names))


def per_token(names: str) -> onnx.ModelProto:
    """Dynamic scales: Div by the row's scale, Q(1), DQ(1), MatMul, Mul by the row's scale."""
    g = Graph()
    xf = g.op("Cast", ["x"], "xf", to=F32)
    top = g.op("ReduceMax", [g.op("Abs", [xf], "xa"), g.const("ax", np.array([-1]))], "top", keepdims=1)
    safe = g.op("Max", [top, g.const("tiny", np.float32(1e-6))], "safe")
    a = g.op("Mul", [safe, g.const("inverse", np.float32(1 / 448))], "a")
    one = g.const("one", np.float32(1))
    x8 = g.op("QuantizeLinear", [g.op("Div", [xf, a], "xs"), one], "x8", output_dtype=F8)
    xd = g.op("DequantizeLinear", [x8, one], "xd")
    for name in names:
        y = g.op("MatMul", [xd, fp8_weight(g, name)], f"{name}_f")
        g.op("Cast", [g.op("Mul", [y, a], f"{name}_m")], name, to=F16)
    return g.model(list(names))


def matmuls(names: str) -> list[str]:
    return [f"{name}_f/MatMul" for name in names]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineResult]:
    """``build(model, **options)``: save the model and build its engine; failed logs stay in ``tmp_path``."""
    logs = tmp_path / "tmp"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))

    def run(model: onnx.ModelProto | Path, **options: object) -> EngineResult:
        path = model if isinstance(model, Path) else tmp_path / "model.onnx"
        if not isinstance(model, Path):
            onnx.save(model, path)
        arguments = {"target": "tensorrt-rtx", "profiles": PROFILES, "timeout_s": 120, **options}
        return build_engine(path, tmp_path / "model.engine", **arguments)

    return run


def leftovers(tmp_path: Path) -> list[str]:
    """What a failed build left: nothing but the model and the log its error names."""
    return sorted(
        path.name
        for path in tmp_path.rglob("*")
        if path.is_file()
        and path.suffix not in (".onnx", ".data")
        and not path.name.startswith("zqfp-build-")
    )


def workers() -> list[str]:
    """Command lines of builder processes started by this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if parent == os.getpid() and "tensorrt_worker" in command:
            found.append(command)
    return found


@pytest.mark.parametrize(
    ("model", "gemms"),
    [
        pytest.param(linears("qkv"), 1, id="fp8-merged"),
        pytest.param(linears("qkv", int4_weight), 1, id="int4-merged"),
        pytest.param(per_token("qkv"), 1, id="per-token"),
        pytest.param(linears("q"), 1, id="fp8-single"),
        pytest.param(linears("q", int4_weight), 1, id="int4-single"),
    ],
)
def test_every_form_is_an_fp8_gemm_in_both_profiles(model, gemms, build, tmp_path) -> None:
    names = "".join(output.name for output in model.graph.output)
    result = build(model, linears=matmuls(names))
    assert result.lint.ok, result.lint.problems
    assert result.lint.fp8_linears == len(names)
    assert [profile.fp8_gemms for profile in result.lint.profiles] == [gemms, gemms]
    assert result.path.stat().st_size == result.bytes > 0
    assert (result.compute_capability, result.target) == ("89", "tensorrt-rtx")
    assert len(result.layers) == 2 and all(result.layers)
    assert leftovers(tmp_path) == ["model.engine", "model.engine.log"]


def test_sm120_builds_and_unknown_architectures_are_refused(build) -> None:
    result = build(linears("qk"), linears=matmuls("qk"), compute_capability="120")
    assert result.lint.ok, result.lint.problems
    assert result.compute_capability == "120"
    with pytest.raises(UsageError, match=r"--compute-capability 90: .*builds for .*89"):
        build(linears("q"), compute_capability="90")


def test_int4_codes_stay_four_bits_in_the_plan(build) -> None:
    result = build(linears("q", int4_weight))
    stored = {t.dtype for layers in result.layers for layer in layers for t in layer.constants}
    assert "Int4" in stored


def test_lint_fails_on_a_float_matmul(build) -> None:
    g = Graph()
    weight = g.const("w", g.random.standard_normal((K, N)).astype(np.float16))
    g.op("MatMul", ["x", weight], "y")
    result = build(g.model(["y"]), linears=["y/MatMul"])
    assert result.lint.fp8_linears == 0
    assert result.lint.missing == ("y/MatMul",)
    assert "it runs as gemm of Half x Half" in result.lint.problems[0]


def test_lint_fails_on_an_unscaled_half_accumulator(build) -> None:
    """The fp16 hazard of DESIGN section 5: Q/DQ in half with per-channel weights."""
    g = Graph()
    a = g.const("a", np.float16(0.02))
    xd = g.op("DequantizeLinear", [g.op("QuantizeLinear", ["x", a], "x8", output_dtype=F8), a], "xd")
    w8 = g.codes("w", (N, K), ml_dtypes.float8_e4m3fn)
    wd = g.op("DequantizeLinear", [w8, g.row_scales("r", np.float16)], "wd", axis=0)
    g.op("MatMul", [xd, g.op("Transpose", [wd], "wt", perm=[1, 0])], "y")
    result = build(g.model(["y"]), linears=["y/MatMul"])
    assert result.lint.fp8_linears == 1
    assert len(result.lint.problems) == 2, "one per profile"
    assert "unscaled FP8 accumulator as half" in result.lint.problems[0]


def test_lint_fails_where_fp8_is_decoded_before_the_multiply(build) -> None:
    """A weight scale along K cannot be moved behind the MatMul: FP8 goes in, a float GEMM runs."""
    g = Graph()
    w8 = g.codes("w", (N, K), ml_dtypes.float8_e4m3fn)
    scales = g.const("r", (g.random.random(K) * 0.1 + 0.01).astype(np.float32))
    wt = g.op("Transpose", [g.op("DequantizeLinear", [w8, scales], "wd", axis=1)], "wt", perm=[1, 0])
    g.op("Cast", [g.op("MatMul", [static_activation(g), wt], "y_f")], "y", to=F16)
    result = build(g.model(["y"]), linears=matmuls("y"))
    assert result.lint.missing == ("y_f/MatMul",)
    assert not result.lint.ok


def test_a_node_that_is_not_in_the_plan_is_missing(build) -> None:
    result = build(linears("q"), linears=[*matmuls("q"), "model/layers.7/mlp/MatMul"])
    assert result.lint.missing == ("model/layers.7/mlp/MatMul",)
    assert result.lint.fp8_linears == 1


def test_the_model_is_read_again_only_for_linears_that_the_plan_lacks(build, monkeypatch) -> None:
    def read(path: Path, names: list[str]) -> list[list[str]]:
        asked.append(names)
        return equal_products(path, names)

    asked: list[list[str]] = []
    monkeypatch.setattr(tensorrt, "equal_products", read)
    assert build(linears("q"), linears=matmuls("q")).lint.ok and not asked
    assert not build(linears("q"), linears=matmuls("qk")).lint.ok and asked == [matmuls("qk")]


def test_external_data_is_found_beside_the_model(build, tmp_path) -> None:
    path = tmp_path / "external.onnx"
    onnx.save(linears("qk"), path, save_as_external_data=True, location="external.data", size_threshold=64)
    assert build(path, linears=matmuls("qk")).lint.ok
    (tmp_path / "external.data").unlink()
    with pytest.raises(
        BuilderError, match=r"cannot parse external.onnx: Failed to open file: .*external.data"
    ):
        build(path)


def recursive() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("loc", 1)]
    body = [helper.make_node("F", ["x"], ["y"], domain="loc", name="again")]
    function = helper.make_function("loc", "F", ["x"], ["y"], body, opsets)
    x, y = (helper.make_tensor_value_info(name, F32, [1, 4]) for name in "xy")
    call = helper.make_node("F", ["x"], ["y"], domain="loc", name="call")
    graph = helper.make_graph([call], "g", [x], [y])
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def unsupported() -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", F32, [4, 4])
    y = helper.make_tensor_value_info("y", F32, [])
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"], name="my_det")], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def blocked() -> onnx.ModelProto:
    """Block-scaled weights beside a quantised activation: refused by this builder (wrong in others)."""
    g = Graph()
    w8 = g.codes("w", (N, K), ml_dtypes.float8_e4m3fn)
    scales = g.const("r", (g.random.random((N, K // GROUP)) + 0.01).astype(np.float32))
    wd = g.op("DequantizeLinear", [w8, scales], "wd", axis=1, block_size=GROUP)
    wt = g.op("Transpose", [wd], "wt", perm=[1, 0])
    g.op("Cast", [g.op("MatMul", [static_activation(g), wt], "y_f")], "y", to=F16)
    return g.model(["y"])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        pytest.param(recursive(), {"profiles": ()}, r"crashed \(SIGSEGV\).*recursive function", id="crash"),
        pytest.param(unsupported(), {"profiles": ()}, r"at node 'my_det' \(Det\): the parser does", id="op"),
        pytest.param(blocked(), {}, r"cannot build model.onnx: Error Code 1: Myelin", id="builder"),
        pytest.param(linears("q"), {"timeout_s": 0}, r"did not finish model.onnx within 0 s", id="timeout"),
        pytest.param(linears("q"), {"memory_gb": 0.1}, r"ran out of memory of 0.1 GiB while", id="memory"),
        pytest.param(linears("q"), {"memory_gb": 0.02}, r"ran out of memory of 0.02 GiB while", id="import"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(model, options, message, build, tmp_path) -> None:
    (tmp_path / "model.engine").write_bytes(b"old engine")
    with pytest.raises(BuilderError, match=message) as caught:
        build(model, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert (tmp_path / "model.engine").read_bytes() == b"old engine"
    assert leftovers(tmp_path) == ["model.engine"]
    assert workers() == []
    logs = list((tmp_path / "tmp").glob("zqfp-build-*.log"))
    assert all(str(log) in text for log in logs)


def test_any_bytes_are_no_model(build, tmp_path) -> None:
    """The parser itself reports success on these."""
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"hello" * 100)
    with pytest.raises(BuilderError, match="is no ONNX model"):
        build(path, profiles=())
    with pytest.raises(UsageError, match="there is no such file"):
        build(tmp_path / "nothing.onnx")


def test_an_interrupt_takes_the_builder_along(build, tmp_path) -> None:
    def interrupt(phase: str) -> None:
        if phase == "building the engine":
            assert len(workers()) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(linears("q"), on_progress=interrupt)
    assert workers() == []
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_an_environment_error(build, tmp_path) -> None:
    """A file-size limit stands in for the full disk: the log (some 40 kB) fits, the engine does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(MissingDependencyError, match="File too large while writing the engine"):
            build(linears("q"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == []


def test_progress_is_told_and_a_timing_cache_is_not_faked(build, tmp_path) -> None:
    told: list[str] = []
    build(linears("q"), timing_cache=tmp_path / "cache.bin", on_progress=told.append)
    assert told[0] == "loading the builder"
    assert {"parsing the model", "building the engine", "writing the engine"} <= set(told)
    assert any("timing cache not used" in text for text in told)
    assert not (tmp_path / "cache.bin").exists()


def test_tensorrt_itself_is_diagnosed_where_it_is_missing(build) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match="TensorRT is not installed"):
            build(linears("q"), target="tensorrt")
    else:
        pytest.skip("TensorRT itself is installed here")


REAL_MODEL = Path(__file__).parents[2] / "build/models/smollm2-135m/model.onnx"


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL_MODEL.exists(), reason="build/models/smollm2-135m is not exported yet (make demo)"
)
def test_real_llm_builds_with_the_default_profiles(build) -> None:
    graph = onnx.load(REAL_MODEL, load_external_data=False).graph
    shapes = [
        (v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in graph.input
    ]
    planned = [node.name for node in graph.node if node.name.startswith("node_linear")]
    result = build(REAL_MODEL, profiles=default_profiles(shapes), linears=planned, timeout_s=600)
    assert [profile.name for profile in result.profiles] == ["prefill", "decode"]
    assert all(len(layers) > 200 for layers in result.layers)
    # Nothing is quantised: the lint has to say so for all 211 linears, in both profiles.
    assert result.lint.missing == tuple(planned)
    assert len(planned) == 211
    assert result.peak_bytes < 4 * 2**30
