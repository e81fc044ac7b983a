"""``--emit triton-repository``, read with Triton's own schema, and requests made by Triton's own client.

The server itself does not run here: what it does with the files is not tested.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from compiled_models import quick

from zqfp_compile import Engine, compile_model
from zqfp_compile.backends.profiles import default_profiles
from zqfp_compile.errors import UsageError
from zqfp_compile.triton_repository import Served, config_text, write_repository

onnxruntime = pytest.importorskip("onnxruntime")
triton = pytest.importorskip("tritonclient.grpc")

from google.protobuf import text_format  # noqa: E402  (comes with tritonclient)
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype  # noqa: E402

TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float16)": "TYPE_FP16", "tensor(float)": "TYPE_FP32"}
Infer = Callable[[Sequence[Any]], Any]


@pytest.fixture(scope="module")
def client(repo_root: Path) -> Any:
    """tools/triton_client.py."""
    sys.path.insert(0, str(repo_root / "tools"))
    import triton_client

    return triton_client


def parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(encoding="utf-8"), triton.model_config_pb2.ModelConfig())


def described(tensors: Sequence[Any]) -> dict[str, tuple[str, list[int]]]:
    names = triton.model_config_pb2.DataType.Name
    return {tensor.name: (names(tensor.data_type), list(tensor.dims)) for tensor in tensors}


def of_session(args: Sequence[Any]) -> dict[str, tuple[str, list[int]]]:
    """What Triton has to be told of a session's inputs or outputs, the batch left out."""
    shapes = {arg.name: [dim if isinstance(dim, int) else -1 for dim in arg.shape] for arg in args}
    assert all(shape[0] == -1 for shape in shapes.values())
    return {arg.name: (TYPES[arg.type], shapes[arg.name][1:]) for arg in args}


def infer_with(session: Any) -> Infer:
    """Answer the client's requests from a session, as bytes that go over the wire."""

    def infer(inputs: Sequence[Any]) -> Any:
        request = triton._utils._get_inference_request(
            "m", inputs, "", "", None, 0, False, False, 0, None, None
        )
        request = triton.service_pb2.ModelInferRequest.FromString(request.SerializeToString())
        names = [output.name for output in session.get_outputs()]
        feed = {
            item.name: np.frombuffer(raw, triton_to_np_dtype(item.datatype)).reshape(item.shape)
            for item, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        response = triton.service_pb2.ModelInferResponse()
        for name, value in zip(names, session.run(names, feed), strict=True):
            output = response.outputs.add(name=name, datatype=np_to_triton_dtype(value.dtype))
            output.shape.extend(value.shape)
            response.raw_output_contents.append(value.tobytes())
        return triton.InferResult(response)

    return infer


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float16"), ("gpt2", "float32")])
def test_onnxruntime(
    client: Any, tiny_model: Callable[..., Path], tmp_path: Path, family: str, dtype: str
) -> None:
    recipe = quick(target="onnxruntime", evaluate=False, emit=["triton-repository"])
    result = compile_model(tiny_model(family, dtype=dtype), recipe, output=tmp_path / 'a "b".zqfp')
    folder = result.folder / "triton" / 'a "b"'
    assert result.report.engine.repository == "triton"
    made = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert made == ["1/model.onnx", "1/onnxruntime.onnx.data", "config.pbtxt"]
    manifest = json.loads((result.folder / "manifest.json").read_text())["files"]
    assert all(f"triton/{folder.name}/{name}" in manifest for name in made)

    config = parsed(folder / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == (folder.name, "onnxruntime", 8)
    assert config.HasField("dynamic_batching") and not config.HasField("model_operations")
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert described(config.input) == of_session(session.get_inputs())
    assert described(config.output) == of_session(session.get_outputs())

    prompt = [0, 17, 200]
    wanted = list(Engine.load(result.folder, device="cpu").generate_tokens(prompt, max_new_tokens=12))
    assert list(islice(client.generate(infer_with(session), config, prompt), len(wanted))) == wanted


def test_the_model_for_onnxruntime_beside_no_engine(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = quick(target="none", evaluate=False, emit=["onnxruntime", "triton-repository"])
    result = compile_model(tiny_model("llama"), recipe, output=tmp_path / "out")
    served = result.folder / "triton" / "out" / "1" / "model.onnx"
    assert served.read_bytes() == (result.folder / "onnxruntime.onnx").read_bytes()


def test_our_custom_ops(make: Callable[[str], Path], tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    make("onnxruntime-ops")
    options = {"weight_lowering": "plugin", "emit": ["triton-repository"], "evaluate": False}
    recipe = quick(target="onnxruntime", **options)
    result = compile_model(tiny_model("llama", dtype="float16"), recipe, output=tmp_path / "out")
    config = parsed(result.folder / "triton" / "out" / "config.pbtxt")
    assert list(config.model_operations.op_library_filename) == ["libzqfp_onnxruntime.so"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "none"}, "Triton does not load what --target none makes; add --emit onnxruntime, or use"),
        ({"target": "tensorrt-rtx"}, "Triton does not load engines of TensorRT-RTX; add --emit onnxruntime"),
        (
            {"kv_cache_dtype": "fp8"},
            "Triton has no FP8 tensors, which the cache would be; use --kv-cache-dtype",
        ),
        ({}, "no type for 'past_key_values.0.key', which is BFLOAT16; serve a float16 or float32 export"),
    ],
)
def test_what_triton_cannot_serve(
    tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, str], says: str
) -> None:
    """It is refused before any work."""
    if options.get("target") == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx")
    recipe = quick(**{"target": "onnxruntime", "emit": ["triton-repository"], "evaluate": False, **options})
    with pytest.raises(UsageError, match=f"^--emit triton-repository: .*{says}"):
        compile_model(tiny_model("llama", dtype="bfloat16"), recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def graph(tmp_path: Path, **tensors: tuple[int, list[int | str]]) -> Path:
    """Write a graph with these inputs, each an output too."""
    values = [onnx.helper.make_tensor_value_info(name, *facts) for name, facts in tensors.items()]
    outputs = [onnx.helper.make_tensor_value_info(f"{name}.out", *facts) for name, facts in tensors.items()]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}.out"]) for name in tensors]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values, outputs))
    onnx.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


IDS = (onnx.TensorProto.INT64, ["batch", "sequence"])
KEY = (onnx.TensorProto.BFLOAT16, ["batch", 2, "past", 18])


def test_tensorrt(tmp_path: Path) -> None:
    """The engine's profiles have names, its largest batch is what all of them take."""
    path = graph(tmp_path, input_ids=IDS, **{"past_key_values.0.key": KEY})
    inputs = [("input_ids", IDS[1]), ("past_key_values.0.key", KEY[1])]
    (tmp_path / "tensorrt.engine").write_bytes(b"a plan")
    served = Served(path, tmp_path / "tensorrt.engine", default_profiles(inputs))
    write_repository(tmp_path, "m", served)
    assert (tmp_path / "triton" / "m" / "1" / "model.plan").read_bytes() == b"a plan"
    config = parsed(tmp_path / "triton" / "m" / "config.pbtxt")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)  # prefill: 4, decode: 8
    (group,) = config.instance_group
    assert group.kind == triton.model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == ["0", "1"]
    assert described(config.input) == {
        "input_ids": ("TYPE_INT64", [-1]),
        "past_key_values.0.key": ("TYPE_BF16", [2, -1, 18]),
    }


@pytest.mark.parametrize(
    ("name", "dims", "wanted"),
    [
        ("past_key_values.0.key", [1, 2, "past", 18], [1, 2, -1, 18]),  # a batch that the export fixed
        ("cache_position", ["sequence"], [-1]),
        ("logits_to_keep", [], [1]),
    ],
)
def test_without_batching(tmp_path: Path, name: str, dims: list[int | str], wanted: list[int]) -> None:
    path = graph(tmp_path, input_ids=IDS, **{name: (onnx.TensorProto.INT64, dims)})
    config = text_format.Parse(config_text("m", Served(path, path)), triton.model_config_pb2.ModelConfig())
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert described(config.input) == {"input_ids": ("TYPE_INT64", [-1, -1]), name: ("TYPE_INT64", wanted)}
    assert config.input[1].HasField("reshape") == (dims == [])


def test_the_documented_client(client: Any, repo_root: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (repo_root / "docs" / "serving.md").read_text(), re.DOTALL)
    setup, _, loop = code.partition("client = ")
    names: dict[str, Any] = {}
    exec(setup, names)
    assert names["generate"] is client.generate and names["triton"] is triton
    compile(f"client = {loop}", "docs/serving.md", "exec")


def test_the_client_without_a_server(repo_root: Path, tiny_model: Callable[..., Path]) -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{bound.getsockname()[1]}"
        client = [sys.executable, str(repo_root / "tools" / "triton_client.py")]
        command = [*client, str(tiny_model("llama").parent), "m", "the engine", "--url", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 6 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"triton_client: error: {url}: [StatusCode.UNAVAILABLE]")


def test_the_clients_end_tokens(client: Any, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert client.end_tokens(path) == []
    for content, wanted in (("{}", []), ('{"eos_token_id": 2}', [2]), ('{"eos_token_id": [0, 2]}', [0, 2])):
        path.write_text(content)
        assert client.end_tokens(path) == wanted


def test_the_clients_empty_cache(client: Any, tmp_path: Path) -> None:
    for batch in ("batch", 1):
        key = (onnx.TensorProto.FLOAT16, [batch, 2, "past", 18])
        path = graph(tmp_path, input_ids=IDS, **{"past_key_values.0.key": key})
        text = config_text("m", Served(path, path))
        config = text_format.Parse(text, triton.model_config_pb2.ModelConfig())
        (value,) = client.empty_cache(config).values()
        assert value.shape == (1, 2, 0, 18) and value.dtype == np.float16
