"""Models and engines that run on numpy arrays, behind one small interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.backends.host_libraries import host_library, needs_host
from zqfp_compile.backends.ort import create_session, is_large, run_session
from zqfp_compile.calibrate.causal_lm import Feed, InputSpec, find_vocab_size, graph_inputs
from zqfp_compile.errors import MissingDependencyError, ModelError, UsageError, ZqfpError
from zqfp_compile.model_io import load_model
from zqfp_compile.specs import FP8

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Runner(Protocol):
    """What can be run.

    Attributes:
        path: File it came from.
        inputs: What :meth:`run` takes.
        outputs: What :meth:`run` returns.
        vocab_size: Rows of the token embedding, when the graph shows it.
        scales: What an FP8 output (KV cache) is multiplied by to give its numbers, where that is known.
    """

    path: Path
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    vocab_size: int | None
    scales: Mapping[str, float]

    def run(self, feed: Feed) -> dict[str, Array]:
        """Return every output by name.

        Raises:
            ZqfpError: When the runtime refuses the inputs or fails.
        """


class OrtRunner:
    """An ONNX model in ONNX Runtime on the CPU, model-local functions as they are.

    Raises:
        ModelError: When the file is unsafe, malformed, or refused by ONNX Runtime.
        MissingDependencyError: When ONNX Runtime is not installed, or a custom-op library the model needs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = load_model(path)
        self.inputs = graph_inputs(model)
        self.outputs = tuple(_value_spec(value) for value in model.graph.outputs)
        self.vocab_size = find_vocab_size(model)
        self.scales: Mapping[str, float] = _output_scales(model)
        try:
            # Folding a compiled model decodes every weight to float: three times the memory.
            self._session = create_session(
                path,
                fold_constants=not model.functions,
                low_memory=is_large(model),
                custom_ops=host_library("onnxruntime") if needs_host(model) else None,
            )
        except Exception as error:
            raise _runtime_error(path, "load", error) from error

    def run(self, feed: Feed) -> dict[str, Array]:
        """See :class:`Runner`."""
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, run_session(self._session, names, feed), strict=True))
        except Exception as error:
            raise _runtime_error(self.path, "run", error) from error


class EngineRunner:
    """An engine in TensorRT or TensorRT-RTX, whichever can load it. Engines hold code: load only your own.

    Raises:
        MissingDependencyError: When there is no runtime or no GPU here.
        ModelError: When no runtime here can load the engine.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vocab_size: int | None = None
        self.scales: Mapping[str, float] = {}
        runtimes = _engine_runtimes(path)
        self._torch = _torch_with_gpu(path)
        self._trt, self._runtime, self._engine = self._deserialize(runtimes)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {
            name: self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names
        }
        self.inputs = tuple(self._spec(name) for name in names if is_input[name])
        self.outputs = tuple(self._spec(name) for name in names if not is_input[name])
        self._contexts: dict[int, Any] = {}

    def run(self, feed: Feed) -> dict[str, Array]:
        """See :class:`Runner`."""
        stream = self._torch.cuda.current_stream()
        context = self._context(self._profile(feed), stream)
        buffers: list[Any] = []  # keeps device memory alive until the results are here
        for spec in self.inputs:
            value = np.ascontiguousarray(feed[spec.name])
            context.set_input_shape(spec.name, value.shape)
            context.set_tensor_address(spec.name, self._upload(spec.name, value, buffers))
        missing = context.infer_shapes()
        if missing:
            raise ModelError(f"{self.path}: the engine needs values for {', '.join(missing)}")
        results = {}
        for spec in self.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            size = int(np.prod(shape)) * spec.dtype.numpy().itemsize
            memory = self._torch.empty(max(1, size), dtype=self._torch.uint8, device="cuda")
            context.set_tensor_address(spec.name, memory.data_ptr())
            results[spec.name] = (memory, size, spec.dtype.numpy(), shape)
        if not context.execute_async_v3(stream.cuda_stream):
            raise ModelError(f"{self.path}: the engine failed to run; rebuild it for this GPU and runtime")
        stream.synchronize()
        return {
            name: memory.cpu().numpy()[:size].view(dtype).reshape(shape)
            for name, (memory, size, dtype, shape) in results.items()
        }

    def _deserialize(self, runtimes: list[Any]) -> tuple[Any, Any, Any]:
        data = self.path.read_bytes()
        for trt in runtimes:
            runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            engine = runtime.deserialize_cuda_engine(data)
            if engine is None and self._load_plugin(trt, runtime):
                engine = runtime.deserialize_cuda_engine(data)
            if engine is not None:
                return trt, runtime, engine
        tried = ", ".join(f"{trt.__name__} {trt.__version__}" for trt in runtimes)
        raise ModelError(
            f"{self.path}: cannot be loaded by {tried} on {self._torch.cuda.get_device_name()}; an engine "
            "runs only with the runtime version and the GPU it was built for: rebuild it here"
        )

    def _load_plugin(self, trt: Any, runtime: Any) -> bool:
        """Load our plugin, which the engine may need; whether there is one to load."""
        try:
            library = host_library(trt.__name__.replace("_", "-"))
        except MissingDependencyError:
            return False
        return runtime.get_plugin_registry().load_library(str(library)) is not None

    def _spec(self, name: str) -> InputSpec:
        kinds = {"HALF": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "FP8": ir.DataType.FLOAT8E4M3FN}
        kind = self._engine.get_tensor_dtype(name).name
        dtype = kinds.get(kind) or ir.DataType[kind]
        dims = tuple(None if dim < 0 else int(dim) for dim in self._engine.get_tensor_shape(name))
        return InputSpec(name, dtype, dims)

    def _on_host(self, name: str) -> bool:
        """Whether the engine reads this tensor's values as shapes, on the CPU."""
        return bool(self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST)

    def _upload(self, name: str, value: Array, buffers: list[Any]) -> int:
        if self._on_host(name):
            buffers.append(value)
            return int(value.ctypes.data)
        # As bytes: torch has no view of every dtype. One byte at least: an empty cache needs an address too.
        raw = np.frombuffer(value.tobytes() or b"\0", dtype=np.uint8).copy()
        buffers.append(self._torch.from_numpy(raw).cuda())
        return int(buffers[-1].data_ptr())

    def _profile(self, feed: Feed) -> int:
        """Return the first optimisation profile that takes these shapes."""
        for index in range(self._engine.num_optimization_profiles):
            if all(self._fits(spec.name, feed[spec.name].shape, index) for spec in self.inputs):
                return index
        shapes = ", ".join(f"{spec.name} {list(feed[spec.name].shape)}" for spec in self.inputs[:3])
        raise UsageError(
            f"{self.path}: no optimization profile takes {shapes}; use another --length, or the "
            "shapes it was built for"
        )

    def _fits(self, name: str, shape: Shape, profile: int) -> bool:
        if self._on_host(name):
            return True
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return len(low) == len(shape) and all(
            a <= dim <= b for a, dim, b in zip(low, shape, high, strict=True)
        )

    def _context(self, profile: int, stream: Any) -> Any:
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                raise MissingDependencyError(f"{self.path}: not enough GPU memory for this engine; free some")
            context.set_optimization_profile_async(profile, stream.cuda_stream)
            stream.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]


def _engine_runtimes(path: Path) -> list[Any]:
    found = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        # A stubs package imports as an empty one (DESIGN section 5).
        if hasattr(module, "Runtime"):
            found.append(module)
    if not found:
        raise MissingDependencyError(
            f"{path}: running an engine needs TensorRT or TensorRT-RTX; "
            "run: pip install 'zqfp-compile[gpu]' (or [cpu])"
        )
    return found


def _torch_with_gpu(path: Path) -> Any:
    # Asked before the runtime is touched: without a driver it can end the process.
    import torch

    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"{path}: running an engine needs an NVIDIA GPU and a PyTorch built for CUDA, which are "
            "not here; compare the .onnx files instead"
        )
    return torch


def _output_scales(model: ir.Model) -> dict[str, float]:
    """Return the scalar scale of every output that QuantizeLinear, or Div and Cast to FP8, makes."""
    scales = {}
    for value in model.graph.outputs:
        node = value.producer()
        if node is not None and node.op_type == "Cast" and node.inputs[0] is not None and value.dtype in FP8:
            node = node.inputs[0].producer()
        scale = node.inputs[1] if node is not None and node.op_type in ("QuantizeLinear", "Div") else None
        if scale is not None and scale.const_value is not None and scale.const_value.size == 1:
            scales[str(value.name)] = float(scale.const_value.numpy())
    return scales


def _value_spec(value: ir.Value) -> InputSpec:
    shape = value.shape or ()
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in shape)
    return InputSpec(value.name or "", value.dtype or ir.DataType.UNDEFINED, dims)


def _runtime_error(path: Path, verb: str, error: Exception) -> ZqfpError:
    if isinstance(error, ZqfpError):
        return error
    reason = " ".join(str(error).split())[:300]
    return ModelError(
        f"{path}: ONNX Runtime cannot {verb} it ({reason}); "
        "use a float32 or float16 model that its CPU provider runs"
    )
