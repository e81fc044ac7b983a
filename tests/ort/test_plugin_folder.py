"""``--weight-lowering plugin --target onnxruntime``: a folder that a session with our custom ops runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled_models import TOKENS, quick, sqnr

from zqfp_compile import Engine, compile_model
from zqfp_compile.backends import host_libraries
from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.compare import Gates, compare_models
from zqfp_compile.errors import MissingDependencyError

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def library(make) -> Path:
    return make("onnxruntime-ops") / "libzqfp_onnxruntime.so"


@pytest.fixture(scope="module")
def wide_model(models_folder, tmp_path_factory):
    """``wide_model(dtype)``: a LLaMA all of whose linears the kernel takes (the tiny ones have K = 72)."""
    from make_large import Shape, make_large

    def write(dtype: str) -> Path:
        shape = Shape(layers=2, hidden=128, intermediate=320, vocab=400, dtype=dtype)
        return make_large(tmp_path_factory.mktemp("wide") / dtype, shape)

    return write


def compiled(source: Path, folder: Path, **options: Any) -> dict[str, Any]:
    # Without a tokenizer random tokens calibrate.
    recipe = quick(target="onnxruntime", evaluate=False, calibration=None, **options)
    compile_model(source, recipe, output=folder)
    return json.loads((folder / "report.json").read_text())


def logits(path: Path, **options: Any) -> np.ndarray:
    session = create_session(path, **options)
    interface = CausalLm.from_session(session)
    return session.run([interface.logits], interface.make_feed(TOKENS))[0].astype(np.float32)


def sources(path: Path) -> list[int]:
    """How many of our linears quantise what they are given, a SiLU product, a norm, and how many are gated.

    No other node is ours.
    """
    nodes = [n for n in onnx.load(path, load_external_data=False).graph.node if n.domain == "zqfp"]
    assert {node.op_type for node in nodes} == {"QuantizedW4A8Linear"}
    attributes = [{attr.name: attr.i for attr in node.attribute} for node in nodes]
    found = [attribute["source"] for attribute in attributes]
    return [*(found.count(source) for source in (1, 2, 3)), sum(a.get("gated", 0) for a in attributes)]


def test_an_export_without_shapes_is_fused_as_well(wide_model, library, tmp_path):
    """As Optimum's are."""
    source = wide_model("float16")
    model = onnx.load(source, load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, source)
    compiled(source, tmp_path / "plugin", weight_lowering="plugin")
    assert sources(tmp_path / "plugin" / "onnxruntime.onnx") == [4, 0, 4, 2]


@pytest.mark.parametrize("scale", ["tensor", "token"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lorc_rank", [0, 12])
def test_logits_agree_with_the_fp8_lowering(dtype, scale, lorc_rank, wide_model, library, tmp_path):
    options = {"activation_scale": scale, "lorc_rank": lorc_rank}
    source = wide_model(dtype)
    report = compiled(source, tmp_path / "plugin", weight_lowering="plugin", **options)
    compiled(source, tmp_path / "fp8", **options)
    path = tmp_path / "plugin" / "onnxruntime.onnx"
    # q/k/v and gate/up are one each, both with the norm in front of them; gate/up make their SiLU product.
    assert sources(path) == [4, 0, 4, 2]
    assert not [text for text in report["warnings"] if "not computed by the kernel" in text]
    copied = tmp_path / "plugin" / library.name
    assert copied.read_bytes() == library.read_bytes()
    ours = logits(path, custom_ops=copied)
    # Rounding differences move activations into other FP8 buckets (DESIGN section 9: 21 to 25 dB at least).
    assert sqnr(logits(tmp_path / "fp8" / "onnxruntime.onnx"), ours) > 25


def test_engine_finds_the_custom_ops_itself(wide_model, library, tmp_path):
    compiled(wide_model("float16"), tmp_path / "out", weight_lowering="plugin")
    engine = Engine.load(tmp_path / "out", device="cpu")
    feed = CausalLm.from_inputs(engine.inputs, engine.outputs).make_feed(TOKENS)
    wanted = logits(tmp_path / "out" / "onnxruntime.onnx", custom_ops=library)
    assert np.array_equal(engine.run(feed)["logits"].astype(np.float32), wanted)


def test_a_plain_session_gives_our_results(wide_model, library, tmp_path):
    compiled(wide_model("float16"), tmp_path / "out", weight_lowering="plugin")
    path = tmp_path / "out" / "onnxruntime.onnx"
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(tmp_path / "out" / library.name))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    interface = CausalLm.from_session(session)
    plain = session.run([interface.logits], interface.make_feed(TOKENS))[0]
    assert np.array_equal(plain.astype(np.float32), logits(path, custom_ops=library))


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_layers_the_kernel_does_not_take_are_named_in_the_report(dtype, tiny_model, library, tmp_path):
    recipe = quick(target="onnxruntime", weight_lowering="plugin")
    report = compile_model(tiny_model("llama", dtype=dtype), recipe, output=tmp_path / "out").report
    (text,) = [text for text in report.warnings if "not computed by the kernel" in text]
    assert text.startswith("12 of 14 layers") and "multiple of 16, not 72" in text
    assert sources(tmp_path / "out" / "onnxruntime.onnx") == [0, 2, 0, 0]
    assert report.perplexity is not None


def test_validate_runs_the_folders_model(wide_model, library, tmp_path):
    source = wide_model("float16")
    compiled(source, tmp_path / "out", weight_lowering="plugin")
    result = compare_models(
        tmp_path / "out",
        tmp_path / "out" / "onnxruntime.onnx",
        samples=1,
        length=16,
        gates=Gates(25, None, None, None),
    )
    assert result.failures == ()


def test_a_missing_library_is_said_before_any_work(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv(host_libraries.FOLDER_VARIABLE, str(tmp_path))
    recipe = quick(target="onnxruntime", weight_lowering="plugin")
    with pytest.raises(MissingDependencyError, match=r"plugin: libzqfp_onnxruntime.so.*make onnxruntime-ops"):
        compile_model(tiny_model("llama"), recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_library_beside_a_model_is_not_loaded(wide_model, library, tmp_path, monkeypatch):
    """Only the library that was built here is: a model must not bring its own code."""
    compiled(wide_model("float32"), tmp_path / "out", weight_lowering="plugin")
    monkeypatch.setenv(host_libraries.FOLDER_VARIABLE, str(tmp_path))
    path = tmp_path / "out" / "onnxruntime.onnx"
    with pytest.raises(MissingDependencyError, match=r"libzqfp_onnxruntime\.so"):
        compare_models(path, path, samples=1, length=8)


def test_the_kernels_are_copied_where_they_are_built(wide_model, library, tmp_path, monkeypatch):
    built = tmp_path / "built"
    built.mkdir()
    (built / library.name).symlink_to(library)
    monkeypatch.setenv(host_libraries.FOLDER_VARIABLE, str(built))
    report = compiled(wide_model("float16"), tmp_path / "without", weight_lowering="plugin")
    assert any("libzqfp.so is not built" in text for text in report["warnings"])
    (built / "libzqfp.so").write_bytes(b"kernels")
    report = compiled(wide_model("float16"), tmp_path / "with", weight_lowering="plugin")
    assert not any("libzqfp.so is not built" in text for text in report["warnings"])
    assert (tmp_path / "with" / "libzqfp.so").read_bytes() == b"kernels"
    manifest = json.loads((tmp_path / "with" / "manifest.json").read_text())
    assert {library.name, "libzqfp.so"} <= set(manifest["files"])


def test_without_cuda_and_libzqfp_nothing_but_the_cpu_is_needed(library):
    """The library loads in a process that has neither, and needs the C library only."""
    code = (
        "import onnxruntime as ort, sys\n"
        "options = ort.SessionOptions()\n"
        "options.register_custom_ops_library(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(library)], check=True, timeout=60)
    needed = subprocess.run(["ldd", str(library)], check=True, capture_output=True, text=True).stdout
    assert "not found" not in needed and "cuda" not in needed and "libzqfp" not in needed
