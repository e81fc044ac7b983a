"""Steps of a decoder in ONNX Runtime with every tensor bound, the cache written in place, nothing copied."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from decode_model import Shape

CACHE_BLOCK = 64  # tokens by which a cache grows
DEVICES = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


@dataclass(frozen=True)
class Step:
    """One run: ``sequence`` new tokens of ``batch`` sequences behind ``past`` tokens."""

    batch: int
    sequence: int
    past: int

    @property
    def phase(self) -> str:
        """The results' word for it."""
        return "decode" if self.sequence == 1 else "prefill"


def open_session(model: Path, device: str, library: Path | None, *, graph: bool, threads: int = 0) -> Any:
    """Open a session; every node that can must run on ``device``.

    Raises:
        RuntimeError: When the device's provider is not in use: ONNX Runtime falls back to the CPU in silence.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    provider = DEVICES[device]
    settings = {"enable_cuda_graph": "1"} if graph else {}
    session = ort.InferenceSession(str(model), options, providers=[(provider, settings)])
    if provider not in session.get_providers():
        raise RuntimeError(f"ONNX Runtime does not use {provider} here; it has {session.get_providers()}")
    return session


class Runner:
    """One step of a session, with its buffers.

    Attributes:
        graph: Number of the CUDA graph the session captures for this step; ``None`` captures none.
    """

    def __init__(self, session: Any, shape: Shape, step: Step, device: str, graph: int | None = None) -> None:
        self.session, self.device, self.step = session, device, step
        self.options = ort.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", "-1" if graph is None else str(graph))
        self.binding = session.io_binding()
        rng = np.random.default_rng(3)
        total = step.past + step.sequence
        ids = rng.integers(0, shape.vocab, (step.batch, step.sequence))
        self._input("input_ids", ids)
        self._input("seqlens_k", np.full(step.batch, total - 1, np.int32))
        # ONNX Runtime reads this one on the host.
        self._input("total_length", np.array(total, np.int32), "cpu")
        length = -(-total // CACHE_BLOCK) * CACHE_BLOCK
        some = (rng.standard_normal(1 << 20) * 0.1).astype(np.float16)
        values = np.resize(some, (step.batch, shape.kv_heads, length, shape.head_size))
        for i in range(shape.layers):
            for part in ("key", "value"):
                value = self._input(f"past.{i}.{part}", values)
                self.binding.bind_ortvalue_output(f"present.{i}.{part}", value)
        self.logits = self._value(np.zeros((step.batch, shape.vocab), np.float16), device)
        self.binding.bind_ortvalue_output("logits", self.logits)

    def _value(self, array: np.ndarray[Any, Any], device: str) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, device, 0)

    def _input(self, name: str, array: np.ndarray[Any, Any], device: str | None = None) -> Any:
        value = self._value(array, device or self.device)
        self.binding.bind_ortvalue_input(name, value)
        return value

    def run(self) -> None:
        """Run the step and wait for it."""
        self.session.run_with_iobinding(self.binding, self.options)
        self.binding.synchronize_outputs()

    def output(self) -> np.ndarray[Any, Any]:
        """Return the logits of the last run.

        Raises:
            RuntimeError: When they are no numbers: then the times mean nothing.
        """
        logits = np.asarray(self.logits.numpy(), np.float32)
        if not np.isfinite(logits).all() or not logits.any():
            raise RuntimeError("the logits hold NaN, Inf or nothing but zeros")
        return logits

    def milliseconds(self, repeats: int, warm_ups: int = 3) -> float:
        """Return the median time of a step."""
        for _ in range(warm_ups):
            self.run()
        self.output()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - begin)
        self.output()
        return 1e3 * statistics.median(times)
