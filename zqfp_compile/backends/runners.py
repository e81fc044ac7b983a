"""Models and engines that run on numpy arrays, behind one small interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.backends.model_session import open_model_session
from zqfp_compile.backends.ort import check_memory, is_large, run_session
from zqfp_compile.backends.trt_session import TrtSession
from zqfp_compile.calibrate.causal_lm import Feed, InputSpec, find_vocab_size, graph_inputs
from zqfp_compile.errors import ModelError, ZqfpError
from zqfp_compile.model_io import load_model
from zqfp_compile.specs import FP8

Array = npt.NDArray[Any]


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
    """An ONNX model in ONNX Runtime on the CPU, model-local functions as they are, bfloat16 as float32.

    Raises:
        ModelError: When the file is unsafe, malformed, or refused by ONNX Runtime.
        MissingDependencyError: When ONNX Runtime is not installed, or a custom-op library the model needs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = load_model(path)
        self.vocab_size = find_vocab_size(model)
        self.scales: Mapping[str, float] = _output_scales(model)
        try:
            # Folding a compiled model decodes every weight to float: three times the memory.
            self._session = open_model_session(
                path, model, fold_constants=not model.functions, low_memory=is_large(model)
            )
        except Exception as error:
            raise runtime_error(path, "load", error) from error
        self.inputs = graph_inputs(model)
        self.outputs = tuple(value_spec(value) for value in model.graph.outputs)

    def run(self, feed: Feed) -> dict[str, Array]:
        """See :class:`Runner`."""
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, run_session(self._session, names, feed), strict=True))
        except Exception as error:
            raise runtime_error(self.path, "run", error) from error


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
        self._session = TrtSession(path)
        self.inputs, self.outputs = self._session.inputs, self._session.outputs

    def run(self, feed: Feed) -> dict[str, Array]:
        """See :class:`Runner`."""
        session = self._session
        values = {spec.name: session.take(spec, feed[spec.name]) for spec in self.inputs}
        results = session.execute(values, [spec.name for spec in self.outputs])
        return {spec.name: session.to_numpy(spec, results[spec.name]) for spec in self.outputs}


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


def value_spec(value: ir.Value) -> InputSpec:
    """Return name, type and dimensions of a graph's output."""
    shape = value.shape or ()
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in shape)
    return InputSpec(value.name or "", value.dtype or ir.DataType.UNDEFINED, dims)


def runtime_error(path: Path, verb: str, error: Exception) -> ZqfpError:
    """Return the diagnosed form of what ONNX Runtime raised; ``verb`` is what it was to do."""
    if isinstance(error, ZqfpError):
        return error
    check_memory(error)
    reason = " ".join(str(error).split())[:300]
    return ModelError(
        f"{path}: ONNX Runtime cannot {verb} it ({reason}); "
        "use a float32 or float16 model that its CPU provider runs"
    )
