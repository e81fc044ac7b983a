"""ONNX Runtime's 4-bit MatMuls on CUDA as contenders of bench_gemm.py. Needs onnxruntime-gpu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]


def available() -> str | None:
    """Return why these contenders cannot run, or ``None``."""
    try:
        import onnxruntime
    except ImportError as error:
        return str(error)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime has no CUDAExecutionProvider (needs the onnxruntime-gpu wheel)"
    return None


def _model(op_type: str, n: int, k: int, weights: Arrays, **attributes: int) -> bytes:
    node = helper.make_node(op_type, ["x", *weights], ["y"], domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["m", n])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def nbits_model(n: int, k: int, rng: np.random.Generator) -> bytes:
    """MatMulNBits: int4 in blocks of 32 with float16 scales, float16 activations."""
    codes = rng.integers(0, 256, (n, k // 32, 16), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.002, n * k // 32).astype(np.float16)
    return _model("MatMulNBits", n, k, {"w": codes, "s": scales}, K=k, N=n, bits=4, block_size=32)


def fp4_model(n: int, k: int, rng: np.random.Generator) -> bytes:
    """MatMulBlockQuantizedFp4Weight: E2M1 in blocks of 16 with E4M3 scales, float16 activations."""
    codes = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    scales = rng.integers(0x18, 0x40, (n, k // 16), dtype=np.uint8)
    weights: Arrays = {"w": codes, "s": scales, "s2": np.array([0.001], np.float32)}
    return _model("MatMulBlockQuantizedFp4Weight", n, k, weights, block_size=16)


MODELS = {"ort_nbits": nbits_model, "ort_fp4": fp4_model}


class OrtContender:
    """A session on torch's stream, so that torch's events time it."""

    def __init__(self, model: bytes) -> None:
        import onnxruntime

        handle = torch.cuda.current_stream().cuda_stream
        if handle == 0:  # ONNX Runtime would take a stream of its own, where no event of ours sees it
            raise RuntimeError("torch's current stream is the default one")
        stream = {"user_compute_stream": str(handle)}
        self._session = onnxruntime.InferenceSession(model, providers=[("CUDAExecutionProvider", stream)])
        if self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("onnxruntime fell back to the CPU")
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._n = self._session.get_outputs()[0].shape[1]

    def call(self, m: int, k: int) -> Callable[[], object]:
        """A call on M tokens, with bound inputs and outputs."""
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        y = torch.empty(m, self._n, device="cuda", dtype=torch.float16)
        binding = self._session.io_binding()
        binding.bind_input("x", "cuda", 0, np.float16, tuple(x.shape), x.data_ptr())
        binding.bind_output("y", "cuda", 0, np.float16, tuple(y.shape), y.data_ptr())
        return lambda: (self._session.run_with_iobinding(binding, self._options), x, y)
