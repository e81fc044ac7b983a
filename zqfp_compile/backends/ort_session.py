"""A model in ONNX Runtime whose tensors never pass through Python: ``OrtValue`` and I/O binding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils.dlpack import from_dlpack

from zqfp_compile.backends.arrays import Array, as_torch, check_fits, from_numpy, to_numpy
from zqfp_compile.backends.model_session import open_model_session
from zqfp_compile.backends.ort import import_onnxruntime
from zqfp_compile.backends.runners import runtime_error, value_spec
from zqfp_compile.calibrate.causal_lm import InputSpec, graph_inputs
from zqfp_compile.device import CUDA_PROVIDER, free_memory
from zqfp_compile.model_io import load_model

# Peak memory of opening a session over the bytes of the weights, rounded up. Measured on SmolLM2: decoding
# FP8 or widening half (9 times 174 MB), decoding four-bit weights in a function's body (44 times 122 MB).
_PEAK, _PEAK_FUNCTIONS = 10, 45


class OrtSession:
    """See :class:`zqfp_compile.backends.session.Session`; values are ``onnxruntime.OrtValue``.

    Weights are decoded to float once, when the session opens; where that does not fit into free memory, in
    every run, which is many times slower (SmolLM2 on two cores: 22 and 0.8 tokens per second). On the CPU
    bfloat16 is float32, inputs and outputs too.

    With ONNX Runtime's CUDA provider values are on the GPU. That part has not been run: this project is
    developed without ``onnxruntime-gpu``.

    Raises:
        ModelError: When the file is unsafe, malformed, or refused by ONNX Runtime.
        MissingDependencyError: When ONNX Runtime, a provider, or a custom-op library it needs is not there.
    """

    def __init__(self, path: Path, providers: Sequence[str]) -> None:
        self.path = path
        self.device = "cuda" if CUDA_PROVIDER in providers else "cpu"
        model = load_model(path)
        self._ort = import_onnxruntime()
        try:
            self._session = open_model_session(path, model, providers=providers, low_memory=not _fits(model))
        except Exception as error:
            raise runtime_error(path, "load", error) from error
        self.inputs = graph_inputs(model)
        self.outputs = tuple(value_spec(value) for value in model.graph.outputs)

    def take(self, spec: InputSpec, array: Any) -> Any:
        """See :class:`Session`."""
        tensor = as_torch(spec.name, array)
        check_fits(spec, tensor)
        if tensor.device.type != "cpu" and self.device == "cuda":
            return self._ort.OrtValue.from_dlpack(tensor.contiguous())
        content = to_numpy(tensor.contiguous())
        # As bytes with a type: ONNX Runtime takes no array of ml_dtypes' types.
        raw = content.view(f"u{content.dtype.itemsize}")
        return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, int(spec.dtype))

    def largest(self, spec: InputSpec, axis: int) -> int | None:
        """See :class:`Session`: the runtime sets no limit."""
        return None

    def execute(self, feed: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """See :class:`Session`."""
        binding = self._session.io_binding()
        try:
            for name, value in feed.items():
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(name, self.device)
            self._session.run_with_iobinding(binding)
            return dict(zip(names, binding.get_outputs(), strict=True))
        except Exception as error:
            raise runtime_error(self.path, "run", error) from error

    def to_numpy(self, spec: InputSpec, value: Any) -> Array:
        """See :class:`Session`."""
        array: Array = value.numpy()
        return array.view(spec.dtype.numpy())

    def to_torch(self, spec: InputSpec, value: Any) -> torch.Tensor:
        """See :class:`Session`."""
        if self.device == "cuda":
            return from_dlpack(value)
        return from_numpy(self.to_numpy(spec, value))


def _fits(model: ir.Model) -> bool:
    """Whether free memory takes all weights decoded at once."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    stored = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    free = free_memory("cpu")
    return free is None or stored * (_PEAK_FUNCTIONS if model.functions else _PEAK) < free
