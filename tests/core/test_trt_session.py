"""The bookkeeping around a TensorRT engine, against a stand-in for the library that computes on the CPU.

What the real library does with the calls is not tested here: that needs a GPU.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from zqfp_compile import Engine
from zqfp_compile.backends.trt_session import TrtSession
from zqfp_compile.errors import ModelError, UsageError

VOCABULARY = 50
# Name -> is an input, TensorRT's type, shape; then per profile (min, opt, max).
TENSORS: dict[str, tuple[bool, str, tuple[int, ...]]] = {
    "input_ids": (True, "INT64", (1, -1)),
    "past_key_values.0.key": (True, "HALF", (1, 1, -1, 1)),
    "logits": (False, "FLOAT", (1, -1, VOCABULARY)),
    "present.0.key": (False, "HALF", (1, 1, -1, 1)),
}
PREFILL = {
    "input_ids": ((1, 1), (1, 16), (1, 32)),
    "past_key_values.0.key": ((1, 1, 0, 1),) * 2 + ((1, 1, 64, 1),),
}
DECODE = {"input_ids": ((1, 1),) * 3, "past_key_values.0.key": ((1, 1, 0, 1), (1, 1, 16, 1), (1, 1, 90, 1))}


class FakeContext:
    """Reads and writes at the addresses it is given; the next token is the sum of all so far."""

    def __init__(self, used: list[int]) -> None:
        self.used = used
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address != 0
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        new, old = self.shapes["input_ids"][1], self.shapes["past_key_values.0.key"][2]
        self.shapes |= {"logits": (1, new, VOCABULARY), "present.0.key": (1, 1, old + new, 1)}
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def _array(self, name: str, dtype: type) -> np.ndarray:
        size = int(np.prod(self.shapes[name])) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(self.shapes[name])

    def execute_async_v3(self, stream: int) -> bool:
        self.used.append(self.profile)
        ids, past = self._array("input_ids", np.int64), self._array("past_key_values.0.key", np.float16)
        everything = np.concatenate([past.reshape(-1), ids.reshape(-1).astype(np.float16)])
        self._array("present.0.key", np.float16)[:] = everything.reshape(1, 1, -1, 1)
        logits = self._array("logits", np.float32)
        logits[:] = 0
        logits[0, -1, int(everything.sum()) % VOCABULARY] = 1
        return True


class FakeEngine:
    num_io_tensors = len(TENSORS)
    num_optimization_profiles = 2

    def __init__(self) -> None:
        self.used: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return list(TENSORS)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if TENSORS[name][0] else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=TENSORS[name][1])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return TENSORS[name][2]

    def get_tensor_location(self, name: str) -> str:
        return "DEVICE"

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return (PREFILL, DECODE)[profile][name]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self.used)


class FakeRuntime:
    """Loads ``ftrt...``; ``plug...`` only after somebody loaded a plugin library."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.plugins: list[str] = []

    def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
        return self.engine if data[:4] == b"ftrt" or (data[:4] == b"plug" and self.plugins) else None

    def get_plugin_registry(self) -> SimpleNamespace:
        return SimpleNamespace(load_library=lambda path: self.plugins.append(path) or "handle")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """A ``tensorrt`` on a machine where torch sees a GPU; our own libraries are looked for in ``kernels``."""
    engine = FakeEngine()
    runtime = FakeRuntime(engine)
    monkeypatch.setenv("ZQFP_KERNELS", str(tmp_path / "kernels"))
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    fake = SimpleNamespace(
        __name__="tensorrt",
        __version__="11.0",
        Builder=object,
        Logger=logger,
        Runtime=lambda logger: runtime,
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        TensorLocation=SimpleNamespace(HOST="HOST"),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretend GPU")
    monkeypatch.setattr(TrtSession, "device", "cpu")
    return engine


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tensorrt.engine").write_bytes(b"ftrt")
    return tmp_path / "tensorrt.engine"


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % VOCABULARY)
    return tokens[len(prompt) :]


def test_tokens_through_the_cache(library: FakeEngine, file: Path) -> None:
    """Addresses, shapes, an empty cache, and the profile that is tuned for each step."""
    engine = Engine.load(file)
    prompt = [3, 1, 4, 1, 5, 9, 2]
    assert list(engine.generate_tokens(prompt, max_new_tokens=20)) == expected(prompt, 20)
    assert library.used == [0] + [1] * 19


def test_a_prompt_longer_than_the_profiles_goes_in_pieces(library: FakeEngine, file: Path) -> None:
    prompt = [3, 1, 4, 1, 5] * 15
    assert list(Engine.load(file).generate_tokens(prompt, max_new_tokens=3)) == expected(prompt, 3)
    assert library.used[:3] == [0, 0, 0]


def test_run_takes_and_gives_arrays_of_a_kind(library: FakeEngine, file: Path) -> None:
    engine = Engine.load(file)
    past = np.array([7, 8], np.float16).reshape(1, 1, 2, 1)
    feed = {"input_ids": np.array([[5, 6]]), "past_key_values.0.key": past}
    found = engine.run(feed)
    assert found["present.0.key"].ravel().tolist() == [7, 8, 5, 6]
    assert found["logits"].shape == (1, 2, VOCABULARY) and found["logits"][0, -1].argmax() == 26
    tensors = engine.run({name: torch.from_numpy(array) for name, array in feed.items()})
    assert tensors["present.0.key"].dtype == torch.float16
    assert tensors["logits"][0, -1].argmax() == 26


def test_what_does_not_fit_is_said(library: FakeEngine, file: Path) -> None:
    engine = Engine.load(file)
    with pytest.raises(
        UsageError,
        match=r"no optimization profile takes input_ids \[1, 4\], past_key_values.0.key \[1, 1, 96, 1\]",
    ) as caught:
        list(engine.generate_tokens([1] * 100))
    assert "--min/opt/max-shapes" in str(caught.value)
    file.write_bytes(b"other")
    with pytest.raises(ModelError, match=r"cannot be loaded by tensorrt 11\.0 on Pretend GPU"):
        Engine.load(file)


def test_an_engine_with_our_plugin_loads_the_library_that_was_built(library: FakeEngine, file: Path) -> None:
    """Never one that lies beside the engine."""
    file.write_bytes(b"plug")
    (file.parent / "libzqfp_tensorrt.so").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded by tensorrt"):
        Engine.load(file)
    (file.parent / "kernels").mkdir()
    (file.parent / "kernels" / "libzqfp_tensorrt.so").write_bytes(b"")
    engine = Engine.load(file)
    assert list(engine.generate_tokens([3], max_new_tokens=3)) == expected([3], 3)
