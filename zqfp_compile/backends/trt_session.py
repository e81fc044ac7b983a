"""A TensorRT or TensorRT-RTX engine whose tensors are torch tensors on the GPU.

Not run yet: this project is developed without a GPU that either runtime here supports. It deserialises, binds
torch's memory and runs on torch's current stream; everything else in here is bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from zqfp_compile.backends.arrays import Array, as_torch, check_fits, to_numpy, torch_dtype
from zqfp_compile.backends.host_libraries import host_library
from zqfp_compile.backends.trt_api import (
    MODULES,
    CudaEngine,
    ExecutionContext,
    Runtime,
    TrtModule,
    import_runtime,
)
from zqfp_compile.calibrate.causal_lm import InputSpec
from zqfp_compile.errors import MissingDependencyError, ModelError, UsageError

# TensorRT's names of the types that ONNX calls otherwise.
_KINDS = {"HALF": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "FP8": ir.DataType.FLOAT8E4M3FN}


class TrtSession:
    """See :class:`zqfp_compile.backends.session.Session`. Engines hold code: load only your own.

    Raises:
        MissingDependencyError: When there is no runtime or no GPU here.
        ModelError: When no runtime here can load the engine.
    """

    device = "cuda"

    def __init__(self, path: Path) -> None:
        self.path = path
        # Asked before a runtime is touched: without a driver it can end the process.
        if not torch.cuda.is_available():
            raise MissingDependencyError(
                f"{path}: running an engine needs an NVIDIA GPU and a PyTorch built for CUDA, which are "
                "not here; run the .onnx file beside it instead"
            )
        self._trt, self._runtime, self._engine = _deserialize(path)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._is_input(name)]
        self.inputs = tuple(self._spec(name) for name in inputs)
        self.outputs = tuple(self._spec(name) for name in names if name not in inputs)
        self._contexts: dict[int, ExecutionContext] = {}
        # An empty cache needs an address too.
        self._nothing = torch.empty(1, dtype=torch.uint8, device=self.device)

    def take(self, spec: InputSpec, array: Any) -> torch.Tensor:
        """See :class:`Session`; values the engine reads as shapes stay on the host."""
        tensor = as_torch(spec.name, array)
        check_fits(spec, tensor)
        return tensor.contiguous().to("cpu" if self._on_host(spec.name) else self.device)

    def largest(self, spec: InputSpec, axis: int) -> int | None:
        """See :class:`Session`: the profiles limit it."""
        profiles = range(self._engine.num_optimization_profiles)
        return max(
            int(self._engine.get_tensor_profile_shape(spec.name, index)[2][axis]) for index in profiles
        )

    def execute(self, feed: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """See :class:`Session`; the results are ready for whatever torch's current stream does next."""
        stream = torch.cuda.current_stream()
        context = self._context(self._profile(feed), stream)
        for spec in self.inputs:
            value = feed[spec.name]
            context.set_input_shape(spec.name, tuple(value.shape))
            self._bind(context, spec.name, value)
        missing = context.infer_shapes()
        if missing:
            raise ModelError(f"{self.path}: the engine needs values for {', '.join(missing)}")
        results = {}
        for spec in self.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            results[spec.name] = torch.empty(shape, dtype=torch_dtype(spec.dtype), device=self.device)
            self._bind(context, spec.name, results[spec.name])
        if not context.execute_async_v3(stream.cuda_stream):
            raise ModelError(f"{self.path}: the engine failed to run; rebuild it for this GPU and runtime")
        return {name: results[name] for name in names}

    def to_numpy(self, spec: InputSpec, value: torch.Tensor) -> Array:
        """See :class:`Session`."""
        return to_numpy(value)

    def to_torch(self, spec: InputSpec, value: torch.Tensor) -> torch.Tensor:
        """See :class:`Session`."""
        return value

    def _bind(self, context: ExecutionContext, name: str, value: torch.Tensor) -> None:
        context.set_tensor_address(name, value.data_ptr() or self._nothing.data_ptr())

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _spec(self, name: str) -> InputSpec:
        kind = self._engine.get_tensor_dtype(name).name
        dtype = _KINDS.get(kind) or ir.DataType[kind]
        dims = tuple(None if dim < 0 else int(dim) for dim in self._engine.get_tensor_shape(name))
        return InputSpec(name, dtype, dims)

    def _on_host(self, name: str) -> bool:
        """Whether the engine reads this tensor's values as shapes, on the CPU."""
        return bool(self._engine.get_tensor_location(name) == self._trt.TensorLocation.HOST)

    def _profile(self, feed: Mapping[str, torch.Tensor]) -> int:
        """Return the optimisation profile that takes these shapes and is tuned for the nearest ones.

        The first input tells: a decoding step fits the prefill profile too, which is tuned for long prompts.
        """
        found = [
            index
            for index in range(self._engine.num_optimization_profiles)
            if all(self._fits(spec.name, feed[spec.name].shape, index) for spec in self.inputs)
        ]
        if found:
            first = self.inputs[0].name
            return min(found, key=lambda index: self._distance(first, feed[first].shape, index))
        shapes = ", ".join(f"{spec.name} {list(feed[spec.name].shape)}" for spec in self.inputs[:3])
        raise UsageError(
            f"{self.path}: no optimization profile takes {shapes}; use the shapes it was built for, or build "
            "it with other --min/opt/max-shapes"
        )

    def _fits(self, name: str, shape: Sequence[int], profile: int) -> bool:
        if self._on_host(name):
            return True
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return len(low) == len(shape) and all(
            a <= dim <= b for a, dim, b in zip(low, shape, high, strict=True)
        )

    def _distance(self, name: str, shape: Sequence[int], profile: int) -> float:
        """How far a shape is from the one the profile is tuned for."""
        if self._on_host(name):
            return 0.0
        best = self._engine.get_tensor_profile_shape(name, profile)[1]
        return sum(abs(math.log((dim + 1) / (tuned + 1))) for dim, tuned in zip(shape, best, strict=True))

    def _context(self, profile: int, stream: torch.cuda.Stream) -> ExecutionContext:
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                raise MissingDependencyError(f"{self.path}: not enough GPU memory for this engine; free some")
            context.set_optimization_profile_async(profile, stream.cuda_stream)
            stream.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]


def _deserialize(path: Path) -> tuple[TrtModule, Runtime, CudaEngine]:
    """Load the engine with the first runtime that can."""
    data = path.read_bytes()
    tried = _runtimes(path)
    for trt in tried:
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None and _load_plugin(trt, runtime):
            engine = runtime.deserialize_cuda_engine(data)
        if engine is not None:
            return trt, runtime, engine
    raise ModelError(
        f"{path}: cannot be loaded by {', '.join(f'{trt.__name__} {trt.__version__}' for trt in tried)} on "
        f"{torch.cuda.get_device_name()}; an engine runs only with the runtime version and the GPU it was "
        "built for: rebuild it here"
    )


def _load_plugin(trt: TrtModule, runtime: Runtime) -> bool:
    """Load our plugin, which the engine may need; whether there is one to load."""
    try:
        library = host_library(trt.__name__.replace("_", "-"))
    except MissingDependencyError:
        return False
    return runtime.get_plugin_registry().load_library(str(library)) is not None


def _runtimes(path: Path) -> list[TrtModule]:
    found, why = [], []
    for target in MODULES:
        try:
            found.append(import_runtime(target))
        except MissingDependencyError as error:
            why.append(str(error))
    if not found:
        raise MissingDependencyError(f"{path}: running an engine needs one of two runtimes: {'; '.join(why)}")
    return found
