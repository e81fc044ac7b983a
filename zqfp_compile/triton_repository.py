"""``--emit triton-repository``: the compiled model as NVIDIA Triton Inference Server loads it.

    triton/NAME/config.pbtxt
    triton/NAME/1/model.onnx, onnxruntime.onnx.data    or model.plan

The server keeps nothing between requests: the KV cache is part of each. All tensors have the batch first, so
requests of equal shapes may be batched. The fields are those of Triton's ``model_config.proto``;
``docs/serving.md`` has the server's and the client's side.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from zqfp_compile.backends.host_libraries import HOSTS, needs_host
from zqfp_compile.backends.profiles import Profile
from zqfp_compile.calibrate.causal_lm import Dim, InputSpec, graph_inputs, graph_outputs
from zqfp_compile.errors import UsageError
from zqfp_compile.recipe import Recipe

FOLDER = "triton"
_VERSION = "1"
_FLAG = "--emit triton-repository"
# Requests of equal shapes that ONNX Runtime may get at once; an engine's profiles have their own limit.
_ORT_BATCH = 8
# Triton's table of data types; bfloat16 is there for TensorRT only, FP8 not at all.
_TYPES = {
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.FLOAT: "TYPE_FP32",
}
_ENGINE_TYPES = {**_TYPES, ir.DataType.BFLOAT16: "TYPE_BF16"}


@dataclass(frozen=True)
class Served:
    """What a repository serves.

    Attributes:
        graph: ONNX file whose inputs and outputs it has.
        file: The file to serve: ``graph`` itself, or the engine that was built from it.
        profiles: Optimisation profiles of the engine; empty for ONNX Runtime.
    """

    graph: Path
    file: Path
    profiles: tuple[Profile, ...] = ()


def check(recipe: Recipe, target: str, inputs: Sequence[InputSpec]) -> None:
    """Refuse what Triton cannot serve, before any work is done.

    Raises:
        UsageError: Triton has no backend for the target, or no type for an input.
    """
    if target in ("tensorrt-rtx", "none") and "onnxruntime" not in recipe.emit:
        what = "engines of TensorRT-RTX" if target == "tensorrt-rtx" else "what --target none makes"
        raise UsageError(
            f"{_FLAG}: Triton does not load {what}; add --emit onnxruntime, or use --target onnxruntime or "
            "tensorrt"
        )
    if recipe.kv_cache_dtype == "fp8":
        raise UsageError(
            f"{_FLAG}: Triton has no FP8 tensors, which the cache would be; use --kv-cache-dtype auto"
        )
    types = _ENGINE_TYPES if target == "tensorrt" else _TYPES
    for spec in inputs:
        _type(spec, types)


def write_repository(folder: Path, name: str, served: Served) -> Path:
    """Write the repository of one model; the model's files are copied.

    Hard links would save the room, but loaders of external data refuse a file with two names, and copies of
    the folder would not keep the links.

    Args:
        folder: Folder of the compile, to write ``triton`` into.
        name: The model's name.
        served: What to serve.

    Raises:
        UsageError: Triton has no type for an input or output.
    """
    repository = folder / FOLDER
    version = repository / name / _VERSION
    config = config_text(name, served)
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    shutil.copyfile(served.file, version / ("model.plan" if served.profiles else "model.onnx"))
    data = served.file.with_name(f"{served.file.name}.data")
    if data.is_file():
        shutil.copyfile(data, version / data.name)  # the model refers to it by this name
    return repository


def config_text(name: str, served: Served) -> str:
    """Return ``config.pbtxt``: a ``ModelConfig`` in protobuf's text format.

    Raises:
        UsageError: Triton has no type for an input or output.
    """
    model = ir.load(served.graph)
    inputs, outputs = graph_inputs(model), graph_outputs(model)
    batched = _batch_is_first([*inputs, *outputs])
    batch = (_profile_batch(served.profiles) if served.profiles else _ORT_BATCH) if batched else 0
    lines = [
        f"name: {_quoted(name)}",
        f"backend: {_quoted('tensorrt' if served.profiles else 'onnxruntime')}",
        f"max_batch_size: {batch}",
        *(["dynamic_batching { }"] if batch > 1 else []),
        *_instances(served.profiles),
    ]
    if needs_host(model) and not served.profiles:
        # Found by its name in LD_LIBRARY_PATH: where the folder will lie is not known here.
        library, _ = HOSTS["onnxruntime"]
        lines.append(f"model_operations {{ op_library_filename: {_quoted(library)} }}")
    types = _ENGINE_TYPES if served.profiles else _TYPES
    for kind, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            lines += _tensor(kind, spec, types, batched)
    return "\n".join(lines) + "\n"


def _batch_is_first(specs: Sequence[InputSpec]) -> bool:
    """Whether all tensors begin with the batch and go on: Triton then leaves it out of their dims."""
    firsts: set[Dim] = {spec.dims[0] if len(spec.dims) > 1 else None for spec in specs}
    return len(firsts) == 1 and isinstance(firsts.pop(), str)


def _profile_batch(profiles: Sequence[Profile]) -> int:
    """The largest batch that every profile takes: Triton may batch prompts as well as single tokens."""
    return min(high[0] for profile in profiles for _, _, high in profile.shapes.values())


def _instances(profiles: Sequence[Profile]) -> Iterator[str]:
    if profiles:  # Triton uses the first profile only, unless told
        indices = ", ".join(_quoted(str(index)) for index in range(len(profiles)))
        yield f"instance_group {{ kind: KIND_GPU count: 1 profile: [{indices}] }}"


def _tensor(kind: str, spec: InputSpec, types: dict[ir.DataType, str], batched: bool) -> Iterator[str]:
    dims = [dim if isinstance(dim, int) else -1 for dim in spec.dims[1 if batched else 0 :]]
    yield f"{kind} {{"
    yield f"  name: {_quoted(spec.name)}"
    yield f"  data_type: {_type(spec, types)}"
    yield f"  dims: {dims or [1]}"
    if not dims:  # Triton has no scalars
        yield "  reshape { }"
    yield "}"


def _type(spec: InputSpec, types: dict[ir.DataType, str]) -> str:
    if spec.dtype not in types:
        raise UsageError(
            f"{_FLAG}: Triton's backend has no type for {spec.name!r}, which is {spec.dtype.name}; serve a "
            "float16 or float32 export"
        )
    return types[spec.dtype]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
