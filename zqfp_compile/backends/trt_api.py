"""The part of the TensorRT Python API this project uses, as types, and how it is imported.

``tensorrt`` and ``tensorrt_rtx`` share the API. Neither ships usable stubs; PyPI's ``tensorrt-stubs`` makes
``import tensorrt`` succeed as an empty package: a runtime counts as there only when it has a ``Builder``.
"""

# ruff: noqa: D102  (the members are TensorRT's, documented there)

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from zqfp_compile.errors import MissingDependencyError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LABELS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
INSTALL = {
    "tensorrt": "pip install tensorrt (needs NVIDIA's package index and a driver)",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
}


class Buffer(Protocol):
    """``IHostMemory``: bytes the library owns; ``memoryview()`` reads it."""

    nbytes: int

    def __buffer__(self, flags: int, /) -> memoryview: ...


class Tensor(Protocol):
    """``ITensor``."""

    name: str
    is_shape_tensor: bool


class NetworkLayer(Protocol):
    """``ILayer``."""

    name: str


class Network(Protocol):
    """``INetworkDefinition``."""

    num_inputs: int
    num_outputs: int
    num_layers: int

    def get_input(self, index: int, /) -> Tensor: ...
    def get_layer(self, index: int, /) -> NetworkLayer: ...


class ParserError(Protocol):
    """``IParserError``."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class Parser(Protocol):
    """``IParser`` of ONNX files."""

    num_errors: int

    def parse_from_file(self, path: str, /) -> bool: ...
    def get_error(self, index: int, /) -> ParserError: ...


class OptimizationProfile(Protocol):
    """``IOptimizationProfile``."""

    def set_shape(
        self, name: str, low: Sequence[int], best: Sequence[int], high: Sequence[int], /
    ) -> None: ...


class TimingCache(Protocol):
    """``ITimingCache``."""

    def combine(self, other: TimingCache, ignore_mismatch: bool, /) -> bool: ...
    def serialize(self) -> Buffer: ...


class BuilderConfig(Protocol):
    """``IBuilderConfig``; the two compute-capability members exist in TensorRT-RTX only."""

    profiling_verbosity: Any
    progress_monitor: Any
    num_compute_capabilities: int

    def add_optimization_profile(self, profile: OptimizationProfile, /) -> int: ...
    def set_compute_capability(self, capability: Any, index: int, /) -> bool: ...
    def create_timing_cache(self, data: bytes, /) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool, /) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    """``IBuilder``."""

    def create_network(self, flags: int, /) -> Network: ...
    def get_plugin_registry(self) -> Any: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(self, network: Network, config: BuilderConfig, /) -> Buffer | None: ...


class ExecutionContext(Protocol):
    """``IExecutionContext``."""

    def set_optimization_profile_async(self, profile: int, stream: int, /) -> bool: ...
    def set_input_shape(self, name: str, shape: Sequence[int], /) -> bool: ...
    def set_tensor_address(self, name: str, address: int, /) -> bool: ...
    def infer_shapes(self) -> Sequence[str]: ...
    def get_tensor_shape(self, name: str, /) -> Sequence[int]: ...
    def execute_async_v3(self, stream: int, /) -> bool: ...


class CudaEngine(Protocol):
    """``ICudaEngine``."""

    num_io_tensors: int
    num_optimization_profiles: int

    def get_tensor_name(self, index: int, /) -> str: ...
    def get_tensor_mode(self, name: str, /) -> Any: ...
    def get_tensor_dtype(self, name: str, /) -> Any: ...
    def get_tensor_shape(self, name: str, /) -> Sequence[int]: ...
    def get_tensor_location(self, name: str, /) -> Any: ...
    def get_tensor_profile_shape(self, name: str, profile: int, /) -> Sequence[Sequence[int]]: ...
    def create_execution_context(self) -> ExecutionContext | None: ...
    def create_engine_inspector(self) -> Any: ...


class Runtime(Protocol):
    """``IRuntime``; it must outlive its engines."""

    def deserialize_cuda_engine(self, plan: Any, /) -> CudaEngine | None: ...
    def get_plugin_registry(self) -> Any: ...


class TrtModule(Protocol):
    """The module itself. Enumerations and base classes for callbacks are ``Any``."""

    __name__: str
    __version__: str
    ILogger: Any
    Logger: Any
    IProgressMonitor: Any
    ProfilingVerbosity: Any
    NetworkDefinitionCreationFlag: Any
    LayerInformationFormat: Any
    TensorIOMode: Any
    TensorLocation: Any

    def Builder(self, logger: Any, /) -> Builder: ...  # noqa: N802
    def OnnxParser(self, network: Network, logger: Any, /) -> Parser: ...  # noqa: N802
    def Runtime(self, logger: Any, /) -> Runtime: ...  # noqa: N802


def import_runtime(target: str) -> TrtModule:
    """Import the runtime of ``target`` (``tensorrt`` or ``tensorrt-rtx``).

    Raises:
        MissingDependencyError: When it is not installed, does not load, or is the empty stubs package.
    """
    name, label, install = MODULES[target], LABELS[target], INSTALL[target]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken install raises ImportError, OSError or RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingDependencyError(f"{label} is not installed; run: {install}") from error
        reason = " ".join(str(error).split())
        raise MissingDependencyError(f"{label} does not load ({reason}); reinstall it: {install}") from error
    if not hasattr(module, "Builder"):
        raise MissingDependencyError(
            f"the installed {name!r} package has no Builder (a stubs package?); remove it and run: {install}"
        )
    runtime: Any = module
    return runtime  # type: ignore[no-any-return]
