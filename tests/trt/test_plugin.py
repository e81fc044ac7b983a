"""The TensorRT plugin in the real TensorRT-RTX builder, on a machine without a GPU: nothing is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from compiled_models import quick
from fused_quantizers import Fused
from gated_layers import gated
from quantized_layers import Layer
from quantized_layers import model as two_nodes
from rewrite_models import Case, artifact

from passes.lower_weights_fp8 import LowerWeightsFp8
from passes.lower_weights_plugin import LowerWeightsPlugin
from passes.remove_unused import RemoveUnused
from zqfp_compile import compile_model
from zqfp_compile.backends import tensorrt
from zqfp_compile.backends.profiles import Profile
from zqfp_compile.backends.tensorrt import EngineResult, build_engine
from zqfp_compile.errors import BuilderError, MissingDependencyError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed (x86-64 Linux only)")

LINEARS = ("attn.q/MatMul", "attn.v/MatMul")
F16, BF16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


@pytest.fixture(scope="module")
def library(make) -> Path:
    return make("tensorrt-plugin") / "libzqfp_tensorrt.so"


@pytest.fixture
def build(tmp_path: Path, library: Path, monkeypatch) -> Callable[..., EngineResult]:
    """``build(model, k, **options)``: save the model and build its engine with the plugin, two profiles."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(model: ir.Model, k: int, **options: Any) -> EngineResult:
        ir.save(model, tmp_path / "m.onnx")
        profiles = [Profile("prefill", {"x": ((1, k), (512, k), (2048, k))})]
        profiles.append(Profile("decode", {"x": ((1, k), (1, k), (8, k))}))
        arguments = {"target": "tensorrt-rtx", "profiles": profiles, "timeout_s": 120, "plugin": library}
        arguments |= {"linears": LINEARS, **options}
        return build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", **arguments)

    return run


def lowered(case: Case, lowering: type = LowerWeightsPlugin) -> ir.Model:
    model, plan = artifact(case)
    lowering(plan).call(model)
    RemoveUnused().call(model)
    return model


CASES = [
    Case(group_size=64, dtype=F16, n=96, k=128),
    Case(group_size=32, dtype=F16, n=72, k=80, per_token=True),
    Case(group_size=128, dtype=BF16, n=96, k=208, lorc=True, rank=16),
    Case(group_size=64, dtype=F16, n=96, k=128, lorc=True, rank=12, per_token=True),
]


@pytest.mark.parametrize("lorc", [False, True])
def test_one_plugin_covers_the_linears_of_one_input(lorc, build):
    case = Case(group_size=64, dtype=F16, n=128, v_n=72, k=128, lorc=lorc, rank=12)
    result = build(lowered(case), case.k)
    assert result.lint.ok, result.lint.problems
    assert [(p.fp8_linears, p.fp8_gemms) for p in result.lint.profiles] == [(2, 1), (2, 1)]
    for layers in result.layers:
        (kernel,) = [layer for layer in layers if layer.is_kernel]
        assert [tensor.dims for tensor in kernel.outputs] == [(-1, 128), (-1, 72)]


def test_one_plugin_covers_gate_and_up(build):
    model, plan = gated(Case(group_size=64, dtype=F16, n=72, k=128, lorc=True, rank=12))
    LowerWeightsPlugin(plan, only_half=True).call(model)
    RemoveUnused().call(model)
    result = build(model, 128)
    assert result.lint.ok, result.lint.problems
    assert [(p.fp8_linears, p.fp8_gemms) for p in result.lint.profiles] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("rank", [0, 16])
def test_a_gated_layer_has_an_output_of_half_its_rows(rank, build):
    quantizer = Fused(plain=True, tokens=True, dtype=F16, rank=rank, k=128)
    layer = Layer(quantizer, (72,), bias=True, gated=True)
    result = build(two_nodes(layer), 128, linears=LINEARS[:1])
    assert result.lint.ok, result.lint.problems
    for layers in result.layers:
        (kernel,) = [each for each in layers if each.is_kernel]
        assert [tensor.dims for tensor in kernel.outputs] == [(-1, 72)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_linear_is_our_kernel_in_every_profile(case, build):
    result = build(lowered(case), case.k)
    assert result.lint.ok, result.lint.problems
    assert [(p.fp8_linears, p.fp8_gemms) for p in result.lint.profiles] == [(2, 2), (2, 2)]
    for layers in result.layers:
        kernels = [layer for layer in layers if layer.is_kernel]
        assert len(kernels) == 2
        for layer in kernels:
            stored = {tensor.dtype: tensor.dims for tensor in layer.constants}
            assert stored["Int4"] == (128 if case.n > 64 else 64, -(-case.k // 128) * 128)
            assert "FP8" in {tensor.dtype for tensor in layer.inputs}  # x8 crosses from plugin to plugin


def test_the_engine_has_four_bits_a_weight(build):
    """1.05 M weights: codes and one group scale in 64, then 0.1 MB that any engine has."""
    case = Case(group_size=64, dtype=F16, n=512, k=1024)
    ours = build(lowered(case), case.k).bytes
    fp8 = build(lowered(case, LowerWeightsFp8), case.k).bytes
    weights = 2 * case.n * case.k
    assert ours - weights * (1 / 2 + 1 / 64) < 100_000
    assert fp8 > weights > 1.5 * ours


def test_both_forms_in_one_engine(build):
    """A layer the kernel does not take is a GEMM of the builder's, of the same x8."""
    from rewrite_models import mixed_plan

    from zqfp_compile.plan import SitePrecision

    case = Case(group_size=64, dtype=F16, n=96, k=128)
    plan = mixed_plan(case, v=SitePrecision("fp8", 0))
    model, plan = artifact(case, plan)
    assert len(LowerWeightsPlugin(plan).call(model).declined) == 1
    RemoveUnused().call(model)
    result = build(model, case.k)
    assert result.lint.ok, result.lint.problems
    for layers in result.layers:
        assert [layer.type for layer in layers if layer.is_fp8_gemm] == ["custom_layer", "gemm"]


def test_without_the_plugin_the_node_is_named(build):
    with pytest.raises(BuilderError, match=r"cannot parse m.onnx at node 'x.quantize'"):
        build(lowered(CASES[0]), 128, plugin=None)


def test_a_file_that_is_no_plugin_is_said(build, tmp_path):
    broken = tmp_path / "libzqfp_tensorrt.so"
    broken.write_bytes(b"no library")
    with pytest.raises(MissingDependencyError, match=r"does not load the plugin .*make tensorrt-plugin"):
        build(lowered(CASES[0]), 128, plugin=broken)


def test_attributes_the_kernel_does_not_take_are_refused_by_the_parser(build):
    model = lowered(CASES[0])
    next(n for n in model.graph if n.name == LINEARS[0]).attributes["dtype"] = ir.AttrInt64("dtype", 1)
    with pytest.raises(BuilderError, match=r"at node 'attn.q/MatMul'"):
        build(model, 128)


@pytest.mark.parametrize(("name", "number"), [("n", 200), ("k", 256), ("group_size", 16), ("lorc_rank", 8)])
def test_shapes_that_do_not_fit_the_attributes_end_the_build(name, number, build):
    """They would be read as they are: the plugin says so when TensorRT tells it the shapes."""
    model = lowered(CASES[3])
    next(n for n in model.graph if n.name == LINEARS[0]).attributes[name] = ir.AttrInt64(name, number)
    with pytest.raises(BuilderError, match=r"at node 'attn.q/MatMul'"):
        build(model, 128)


def wide_model(models_folder: Path, folder: Path, dtype: str = "float16") -> Path:
    from make_large import Shape, make_large

    return make_large(folder, Shape(layers=2, hidden=128, intermediate=320, vocab=400, dtype=dtype))


def compiled(source: Path, folder: Path, **options: Any) -> dict[str, Any]:
    values = {"target": "tensorrt-rtx", "compute_capability": "89", "evaluate": False, "calibration": None}
    recipe = quick(**{**values, "weight_lowering": "plugin", **options})
    compile_model(source, recipe, output=folder)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_compile(scale, models_folder, library, tmp_path):
    source = wide_model(models_folder, tmp_path / "model")
    report = compiled(source, tmp_path / "out", activation_scale=scale, emit=["engine-onnx"])
    engine = report["engine"]
    assert engine["lint"] == {"ok": True, "problems": []}
    assert (engine["fp8_linears"], engine["fp8_gemms"]) == (14, 8)  # q/k/v and gate/up are one each
    assert (tmp_path / "out" / library.name).read_bytes() == library.read_bytes()
    nodes = onnx.load(tmp_path / "out" / "engine.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "PackedW4A8Linear" for node in nodes) == 8
    assert not any("not computed by the kernel" in text for text in report["warnings"])


@pytest.mark.parametrize(
    ("dtype", "count", "reason"),
    [("float16", 12, "multiple of 16, not 72"), ("float32", 14, "no FLOAT outputs")],
)
def test_layers_the_kernel_does_not_take_are_gemms(dtype, count, reason, tiny_model, library, tmp_path):
    options = {"calibration": __file__}
    report = compiled(tiny_model("llama", dtype=dtype), tmp_path / "out", **options)
    assert report["engine"]["lint"]["ok"] and report["engine"]["fp8_linears"] == 14
    (text,) = [text for text in report["warnings"] if reason in text]
    assert text.startswith(f"{count} of 14 layers")


SCRIPT = """
import json, sys
import tensorrt_rtx as trt
library, onnx = sys.argv[1:3]
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
registry = builder.get_plugin_registry()
assert registry.load_library(library) is not None
facts = {}
INT = trt.PluginFieldType.INT32
import numpy as np

def make(name, phase, **fields):
    creator = registry.get_creator(name, "1", "zqfp")
    arrays = {key: np.array(value, np.int32).reshape(-1) for key, value in fields.items()}
    values = [trt.PluginField(key, array, INT) for key, array in arrays.items()]
    return creator.create_plugin("p", trt.PluginFieldCollection(values), phase) is not None

linear = {"n": 64, "k": 128, "group_size": 64, "lorc_rank": 0, "per_token": 0, "bias": 0, "dtype": 10}
for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
    facts[str(phase)] = [
        make("PackedW4A8Linear", phase, **linear),
        make("QuantizeActivation", phase, lorc_rank=8),
        make("QuantizeTokens", phase, lorc_rank=0),
        make("PackedW4A8Linear", phase, **{**linear, "n": 136, "output_n": [64, 72]}),
        make("PackedW4A8Linear", phase, **{**linear, "n": 136, "output_n": [72, 64]}),
        make("PackedW4A8Linear", phase, **{**linear, "n": 0}),
        make("PackedW4A8Linear", phase, n=64),
        make("QuantizeTokens", phase),
        make("PackedW4A8Linear", phase, **{**linear, "n": 48, "gated": 1}),
        make("PackedW4A8Linear", phase, **{**linear, "n": 72, "gated": 1}),
        make("PackedW4A8Linear", phase, **{**linear, "gated": 2}),
        make("PackedW4A8Linear", phase, **{**linear, "gated": 1, "output_n": 64}),
    ]
names = registry.get_creator("PackedW4A8Linear", "1", "zqfp").field_names
facts["fields"] = [field.name for field in names]
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(onnx)
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
profile = builder.create_optimization_profile()
profile.set_shape("x", (1, 128), (8, 128), (64, 128))
config.add_optimization_profile(profile)
facts["plain"] = builder.build_serialized_network(network, config).nbytes
config.plugins_to_serialize = [library]
facts["with_plugin"] = builder.build_serialized_network(network, config).nbytes
print(json.dumps(facts))
"""


def test_creators_and_plugins_to_serialize(library, tmp_path):
    """In a process of its own: the library may end one."""
    ir.save(lowered(CASES[0]), tmp_path / "m.onnx")
    tensorrt._link_rtx_library(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), str(tmp_path / "m.onnx")],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    made = [True, True, True, True, False, False, False, False, True, False, False, False]
    assert [facts[key] for key in facts if "TensorRTPhase" in key] == [made, made]
    assert "does not divide n = 136" in result.stderr
    assert "must be positive" in result.stderr and "no attribute k" in result.stderr
    assert "of a gated layer is 72, it must be a multiple of 16" in result.stderr
    assert "gated is 2, it must be 0 or 1" in result.stderr and "one output" in result.stderr
    attributes = {"n", "k", "group_size", "lorc_rank", "per_token", "bias", "dtype", "output_n", "gated"}
    assert set(facts["fields"]) == attributes
    assert facts["with_plugin"] - facts["plain"] > 0.9 * library.stat().st_size
