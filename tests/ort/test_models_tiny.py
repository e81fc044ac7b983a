"""The tiny models compute in ONNX Runtime what transformers computes in torch, by every exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

FAMILIES = ("llama", "qwen2", "opt", "gpt2")
# Logits are of order 1 to 10. float32: summation order only. float16: 11-bit significands through two layers.
TOLERANCE = {"float32": 2e-4, "float16": 6e-2}


class CachedModel:
    """Feeds an exported model token by token chunks, keeping present as past."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.past: dict[str, np.ndarray] = {}

    def step(self, ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Run ids [batch, sequence] after everything before; attention_mask is [batch, all so far]."""
        positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": positions}
        for name, value in self.inputs.items():
            if name.startswith("past_key_values."):
                feeds[name] = self.past.get(name, self._empty(value, len(ids)))
        names = [o.name for o in self.session.get_outputs()]
        outputs = self.session.run(None, {n: v for n, v in feeds.items() if n in self.inputs})
        by_name = dict(zip(names, outputs, strict=True))
        self.past = {
            n.replace("present.", "past_key_values."): v for n, v in by_name.items() if n != "logits"
        }
        return by_name["logits"].astype(np.float32)

    @staticmethod
    def _empty(value: Any, batch: int) -> np.ndarray:
        dtype = np.float16 if value.type == "tensor(float16)" else np.float32
        return np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype)


def reference(family: str, ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """Logits of the plain transformers model in float32, the whole sequence at once."""
    from tiny_models import make_model

    mask = torch.from_numpy(attention_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model = make_model(family)
        return model(
            input_ids=torch.from_numpy(ids), attention_mask=mask, position_ids=positions
        ).logits.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("exporter", ["torch", "optimum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_agree_with_torch(
    tiny_model: Callable[..., Path], family: str, exporter: str, dtype: str
) -> None:
    path = tiny_model(family, exporter, dtype)
    ids = np.random.default_rng(0).integers(2, 320, (2, 12))
    mask = np.ones_like(ids)
    mask[1, :3] = 0  # the second sequence is padded on the left
    expected = reference(family, ids, mask)
    model = CachedModel(path)
    steps = [model.step(ids[:, a:b], mask[:, :b]) for a, b in ((0, 7), (7, 8), (8, 12))]
    got = np.concatenate(steps, axis=1)
    assert np.abs(expected).max() > 1  # a comparison of near-zero logits would show nothing
    np.testing.assert_allclose(got[mask == 1], expected[mask == 1], rtol=0, atol=TOLERANCE[dtype])
    assert np.isfinite(got).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_export_is_valid_and_keeps_its_weights_bfloat16(
    tiny_model: Callable[..., Path], family: str
) -> None:
    """ONNX Runtime's CPU provider has no bfloat16 MatMul, so the graph is only checked."""
    model = onnx.load(tiny_model(family, dtype="bfloat16"))
    onnx.checker.check_model(model, full_check=True)
    matrices = [i for i in model.graph.initializer if len(i.dims) == 2]
    assert len(matrices) >= 9
    assert all(i.data_type == onnx.TensorProto.BFLOAT16 for i in matrices)


def test_tiny_tokenizer_covers_the_vocabulary_and_round_trips(tiny_model: Callable[..., Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_model("llama").parent / "tokenizer.json"))
    text = "the weather in Bern, 21 °C\n"
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids) == text
    assert max(encoding.ids) < 320
    assert encoding.tokens[0] == "the"
