"""The plugin's run-time half without TensorRT or a GPU: its calls arrive at a libzqfp of host code."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fused_quantizers import run, session_of
from quantized_layers import GATED_LAYERS, activations
from quantized_layers import model as two_nodes
from rewrite_models import HOST_CASES, Case, artifact, float_model, reference

from passes.lower_weights_plugin import LowerWeightsPlugin
from passes.remove_unused import RemoveUnused

ROWS = 5


@pytest.fixture(scope="module")
def harness(make, repo_root: Path, tmp_path_factory) -> Path:
    """A folder with the harness, libzqfp_tensorrt.so, and the fakes of libzqfp and of the driver."""
    make("onnxruntime-ops")  # the fake takes its number formats from there
    library = make("tensorrt-plugin") / "libzqfp_tensorrt.so"
    folder = tmp_path_factory.mktemp("plugin")
    kernels, support = repo_root / "zqfp_compile" / "kernels", repo_root / "tests" / "support"
    headers = repo_root / "build" / "headers"
    ort, trt = (
        ["-isystem", os.environ.get(variable, str(headers / name))]
        for variable, name in (("ORT_INCLUDE", "onnxruntime"), ("TENSORRT_INCLUDE", "tensorrt"))
    )
    includes = [f"-I{kernels / name}" for name in ("include", "hosts", "onnxruntime")]
    fake = [
        *includes,
        *ort,
        "-fPIC",
        "-shared",
        support / "fake_cuda.cpp",
        kernels / "onnxruntime/decode.cpp",
    ]
    calls = [*trt, "-idirafter", kernels / "tensorrt/cuda_types", support / "plugin_calls.cpp", "-ldl"]
    for name, arguments in (("libzqfp.so", fake), ("plugin_calls", calls)):
        command = ["g++", "-std=c++17", "-O1", *map(str, arguments), "-o", str(folder / name)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    (folder / "libcuda.so.1").symlink_to("libzqfp.so")
    (folder / library.name).write_bytes(library.read_bytes())
    return folder


@pytest.fixture
def enqueue(harness: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``enqueue(model, layer, x)``: run the layer's two plugins; y is ``tmp_path / "y.bin"``."""

    def run(
        model: ir.Model, layer: str, x: np.ndarray, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        write_inputs(model, layer, x, tmp_path)
        return subprocess.run(
            [harness / "plugin_calls", harness / "libzqfp_tensorrt.so", tmp_path],
            env={**os.environ, "LD_LIBRARY_PATH": str(harness), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def write_inputs(model: ir.Model, layer: str, x: np.ndarray, folder: Path) -> None:
    """Write attributes and tensors of the product a layer is in, its own part of V."""
    products = [node for node in model.graph if node.op_type == "PackedW4A8Linear"]
    linear = next(node for node in products if f"{layer}/MatMul" in str(node.name).split("+"))
    quantizer = next(node for node in model.graph if node.op_type.startswith("Quantize"))
    numbers = {a.name: a.as_int() for a in linear.attributes.values() if a.type == ir.AttributeType.INT}
    outputs = linear.attributes["output_n"].as_ints() if "output_n" in linear.attributes else ()
    rank, bias = numbers["lorc_rank"], numbers["bias"]
    lines = {**{name: [number] for name, number in numbers.items()}, "m": [ROWS], "output_n": outputs}
    (folder / "attributes").write_text(
        "".join(f"{name} {' '.join(map(str, values))}\n" for name, values in lines.items() if values)
    )
    tensors = dict(zip(("codes", "scales", "rows"), linear.inputs[2:5], strict=True))
    if bias:
        tensors["bias"] = linear.inputs[5]
    if rank:
        tensors["u"] = linear.inputs[-1]
    if not numbers["per_token"]:
        tensors["a"] = linear.inputs[1]
    for name, value in tensors.items():
        (folder / f"{name}.bin").write_bytes(value.const_value.tobytes())
    (folder / "x.bin").write_bytes(x.tobytes())
    if rank:
        v = quantizer.inputs[-1].const_value.numpy()
        first = rank * products.index(linear)
        (folder / "v.bin").write_bytes(np.ascontiguousarray(v[:, first : first + rank]).tobytes())


def lowered(case: Case) -> tuple[ir.Model, object]:
    model, plan = artifact(case)
    LowerWeightsPlugin(plan, only_half=True).call(model)
    RemoveUnused().call(model)
    return model, plan


@pytest.mark.parametrize("layer", ["attn.q", "attn.v"])  # without and with a bias
@pytest.mark.parametrize("case", HOST_CASES, ids=str)
def test_tensors_arrive_where_they_belong(case, layer, enqueue, tmp_path):
    model, plan = lowered(case)
    x = np.random.default_rng(0).standard_normal((ROWS, case.k)).astype(np.float16)
    result = enqueue(model, layer, x)
    assert result.returncode == 0, result.stderr
    y = np.frombuffer((tmp_path / "y.bin").read_bytes(), np.float16)
    if case.v_n:  # one output after the other
        before = ROWS * case.n
        y = y[:before] if layer == "attn.q" else y[before:]
    y = y.reshape(ROWS, case.rows(layer.removeprefix("attn.")))
    exact = reference(case, plan, float_model(case), layer, x)
    assert np.abs(y - exact).max() <= 2**-10 * np.abs(exact).max()


@pytest.mark.parametrize("layer", [each for each in GATED_LAYERS if each.quantizer.plain], ids=str)
def test_a_gated_layer_is_one_after_an_engine_was_saved(layer, enqueue, make, tmp_path):
    """Against the custom op on the CPU; gate, up and h are rounded to half."""
    pytest.importorskip("onnxruntime")
    model, feeds = two_nodes(layer), activations(layer, ROWS)
    result = enqueue(model, "attn.q", feeds["x"])
    assert result.returncode == 0, result.stderr
    y = np.frombuffer((tmp_path / "y.bin").read_bytes(), np.float16).reshape(ROWS, *layer.sizes)
    wanted = run(session_of(model, make("onnxruntime-ops") / "libzqfp_onnxruntime.so"), feeds)["y.0"]
    assert np.abs(y - wanted).max() <= 3 * 2**-10 * np.abs(wanted).max()


def test_a_refusal_is_said_and_ends_the_run(enqueue):
    model, _ = lowered(HOST_CASES[0])
    x = np.zeros((ROWS, 80), np.float16)
    result = enqueue(model, "attn.q", x, FAKE_REFUSAL="not today")
    assert (result.returncode, result.stderr) == (1, "PackedW4A8Linear: zqfp: launch: not today\n")


def test_missing_kernels_are_named(enqueue, tmp_path):
    model, _ = lowered(HOST_CASES[0])
    result = enqueue(
        model, "attn.q", np.zeros((ROWS, 80), np.float16), ZQFP_LIBRARY=str(tmp_path / "none.so")
    )
    assert result.returncode == 1 and "make kernels" in result.stderr
