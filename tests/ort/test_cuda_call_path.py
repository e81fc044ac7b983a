"""The custom ops' CUDA kernels without a GPU: in the CPU provider, over a libzqfp and a driver of host code.

What runs is everything of ours between ONNX Runtime and libzqfp: attributes, arguments, sizes, the workspace
that is zeroed once and shared by all layers of a stream, and the errors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fused_quantizers import Fused, variants, with_constants
from quantized_layers import GATED_LAYERS, LAYERS, joined
from quantized_layers import model as two_nodes
from rewrite_models import HOST_CASES, Case, artifact

from passes.lower_weights_plugin import LowerWeightsPlugin
from passes.remove_unused import RemoveUnused

pytest.importorskip("onnxruntime")


# argv: library, model, K; the device library's folder is on LD_LIBRARY_PATH. Batches grow, then shrink.
SCRIPT = """
import json, sys
import numpy as np
import onnxruntime as ort
library, model, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = ort.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(library)
try:
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((4, 40, k)).astype(np.float16)
    names = [item.name for item in session.get_inputs()]
    ys = [session.run(None, {name: x[i, :m] for i, name in enumerate(names)}) for m in (0, 1, 3, 40, 2)]
    print(json.dumps({"y": [[y.astype(float).tolist() for y in pair] for pair in ys]}))
except Exception as error:
    print(json.dumps({"error": str(error), "type": type(error).__module__}))
"""


@pytest.fixture(scope="module")
def fakes(make, repo_root: Path, tmp_path_factory) -> Path:
    """A folder with ops.so, libzqfp.so beside it, and libcuda.so.1."""
    make("onnxruntime-ops")  # fetches the headers
    folder = tmp_path_factory.mktemp("fakes")
    kernels, support = repo_root / "zqfp_compile" / "kernels", repo_root / "tests" / "support"
    includes = [f"-I{kernels / name}" for name in ("include", "hosts", "onnxruntime")]
    flags = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", *includes]
    flags += ["-isystem", os.environ.get("ORT_INCLUDE", str(repo_root / "build/headers/onnxruntime"))]
    sources = [path for path in (kernels / "onnxruntime").glob("*.cpp") if path.name != "register.cpp"]
    sources += [*(kernels / "hosts").glob("*.cpp"), support / "cuda_ops_on_cpu.cpp"]
    hidden = ["-fvisibility=hidden", "-ldl"]
    fake = [support / "fake_cuda.cpp", kernels / "onnxruntime" / "decode.cpp"]
    for name, inputs, more in (("ops.so", sources, hidden), ("libzqfp.so", fake, [])):
        command = [*flags, *map(str, inputs), "-o", str(folder / name), *more]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    (folder / "libcuda.so.1").symlink_to("libzqfp.so")
    return folder


def lowered(case: Case) -> ir.Model:
    model, plan = artifact(case)
    assert LowerWeightsPlugin(plan).call(model).declined == ()
    RemoveUnused().call(model)
    return model


def run(library: Path, model: ir.Model, k: int, tmp_path: Path, **environment: str) -> dict[str, Any]:
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), str(path), str(k)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", HOST_CASES, ids=str)
def test_arguments_arrive_where_they_belong(case, fakes, make, tmp_path):
    model = lowered(case)
    got = run(fakes / "ops.so", model, case.k, tmp_path, LD_LIBRARY_PATH=str(fakes))
    assert "error" not in got, got
    wanted = run(make("onnxruntime-ops") / "libzqfp_onnxruntime.so", model, case.k, tmp_path)
    assert [len(pair[0]) for pair in got["y"]] == [0, 1, 3, 40, 2]
    same(got, wanted, 2**-10)


def same(got: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    """Every output of every batch, relative to its largest value."""
    for mine, cpu in zip(got["y"], wanted["y"], strict=True):
        for y, exact in zip(mine, cpu, strict=True):
            if y:
                assert np.abs(np.array(y) - np.array(exact)).max() <= tolerance * np.abs(exact).max()


def readable(case: Fused) -> ir.Model:
    """The operator with x8 as FLOAT."""
    graph = with_constants(case).graph
    cast = ir.Node("", "Cast", [graph.outputs[0]], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name="codes")
    cast.outputs[0].name, cast.outputs[0].dtype = "codes", ir.DataType.FLOAT
    graph.append(cast)
    graph.outputs[0] = cast.outputs[0]
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("case", variants(dtype=ir.DataType.FLOAT16, k=80), ids=str)
def test_arguments_of_fused_quantizers_arrive(case, fakes, make, tmp_path):
    """Codes may be a step apart, 1/14 of the largest, where h lay at a boundary."""
    model, cpu = readable(case), make("onnxruntime-ops") / "libzqfp_onnxruntime.so"
    got = run(fakes / "ops.so", model, case.k, tmp_path, LD_LIBRARY_PATH=str(fakes))
    assert "error" not in got, got
    same(got, run(cpu, model, case.k, tmp_path), 1 / 14)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_arguments_of_layers_that_quantize_arrive(layer, fakes, make, tmp_path):
    model, cpu = joined(layer), make("onnxruntime-ops") / "libzqfp_onnxruntime.so"
    got = run(fakes / "ops.so", model, layer.quantizer.k, tmp_path, LD_LIBRARY_PATH=str(fakes))
    assert "error" not in got, got
    same(got, run(cpu, model, layer.quantizer.k, tmp_path), 2**-10)


@pytest.mark.parametrize("form", [two_nodes, joined], ids=["PackedW4A8Linear", "QuantizedW4A8Linear"])
@pytest.mark.parametrize("layer", GATED_LAYERS[::5], ids=str)
def test_gated_layers_arrive_as_such(layer, form, fakes, make, tmp_path):
    """gate and up are rounded in between, to half: three roundings instead of one."""
    model, cpu = form(layer), make("onnxruntime-ops") / "libzqfp_onnxruntime.so"
    got = run(fakes / "ops.so", model, layer.quantizer.k, tmp_path, LD_LIBRARY_PATH=str(fakes))
    assert "error" not in got, got
    assert {len(y[0][0]) for y in got["y"] if y[0]} == {*layer.sizes}
    same(got, run(cpu, model, layer.quantizer.k, tmp_path), 3 * 2**-10)


def refused(says: str, *arguments: Any, **environment: str) -> None:
    got = run(*arguments, **environment)
    assert says in got["error"] and got["type"].startswith("onnxruntime")


def test_a_layer_of_floats_is_refused_when_the_session_opens(fakes, tmp_path):
    case = Case(group_size=64, n=72, k=80)
    refused("this layer is FLOAT", fakes / "ops.so", lowered(case), 80, tmp_path, LD_LIBRARY_PATH=str(fakes))


def test_the_missing_kernels_are_named(fakes, tmp_path):
    alone = tmp_path / "ops.so"
    alone.write_bytes((fakes / "ops.so").read_bytes())
    refused("make kernels", alone, lowered(HOST_CASES[0]), 80, tmp_path)
    elsewhere = {"ZQFP_LIBRARY": str(fakes / "libzqfp.so"), "LD_LIBRARY_PATH": str(fakes)}
    assert "y" in run(alone, lowered(HOST_CASES[0]), 80, tmp_path, **elsewhere)


def test_no_driver_is_an_error_of_the_run(fakes, tmp_path):
    library = tmp_path / "fakes"
    library.mkdir()
    for name in ("ops.so", "libzqfp.so"):
        (library / name).write_bytes((fakes / name).read_bytes())
    got = run(library / "ops.so", lowered(HOST_CASES[0]), 80, tmp_path)
    assert "no CUDA driver" in got.get("error", "there is a driver here: no CUDA driver")


def test_a_workspace_does_not_grow_inside_a_captured_graph(fakes, tmp_path):
    environment = {"LD_LIBRARY_PATH": str(fakes), "FAKE_CAPTURING": "1"}
    refused("run once with", fakes / "ops.so", lowered(HOST_CASES[0]), 80, tmp_path, **environment)


def test_streams_that_may_run_at_once_share_no_workspace(fakes, repo_root, tmp_path):
    hosts, program = repo_root / "zqfp_compile" / "kernels" / "hosts", tmp_path / "workspaces_test"
    sources = [hosts / "workspaces.cpp", repo_root / "tests" / "support" / "workspaces_test.cpp"]
    includes = [f"-I{hosts}", f"-I{hosts.parent / 'include'}"]
    command = ["g++", "-std=c++17", *includes, *map(str, sources), "-o", str(program), "-ldl", "-pthread"]
    subprocess.run(command, check=True)
    subprocess.run([program], env={**os.environ, "LD_LIBRARY_PATH": str(fakes)}, check=True, timeout=60)


def test_what_libzqfp_refuses_is_said_in_its_words(fakes, tmp_path):
    environment = {"LD_LIBRARY_PATH": str(fakes), "FAKE_REFUSAL": "not today"}
    fused = [readable(Fused(norm=norm, dtype=ir.DataType.FLOAT16, k=80)) for norm in (False, True)]
    operators = ("PackedW4A8Linear", "QuantizeSiluMul", "QuantizeRmsNorm", "QuantizedW4A8Linear")
    models = (lowered(HOST_CASES[0]), *fused, joined(LAYERS[0]))
    for operator, model in zip(operators, models, strict=True):
        refused(f"zqfp: {operator}: not today", fakes / "ops.so", model, 80, tmp_path, **environment)
