"""make_large.py writes a real LLaMA (transformers agrees on the same weights) without holding the weights."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")


def torch_logits(path: Path, ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """Logits of transformers' LLaMA in float32 with the weights of the ONNX file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    weights = {i.name: numpy_helper.to_array(i).astype(np.float32) for i in onnx.load(path).graph.initializer}
    model = LlamaForCausalLM(config)
    state = {
        name: torch.from_numpy(
            weights[name].T if name.endswith(("proj.weight", "head.weight")) else weights[name]
        )
        for name in model.state_dict()
    }
    model.load_state_dict(state)
    mask = torch.from_numpy(attention_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(ids), attention_mask=mask, position_ids=positions
        ).logits.numpy()


# float32: summation order only. float16: 11-bit significands through two layers, logits of order 3.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 3e-2)])
def test_agrees_with_transformers_on_the_same_weights(
    models_folder: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    from make_large import Shape, make_large

    path = make_large(
        tmp_path / "large", Shape(layers=2, hidden=128, intermediate=200, vocab=300, dtype=dtype)
    )
    onnx.checker.check_model(str(path), full_check=True)
    ids = np.random.default_rng(0).integers(0, 300, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    expected = torch_logits(path, ids, mask)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], rtol=0, atol=tolerance)


def test_weights_are_streamed(models_folder: Path, tmp_path: Path) -> None:
    """Two tensors of 26 MB; blocks of 4 MB are in memory, in two or three copies."""
    from make_large import Shape, make_large

    tracemalloc.start()
    path = make_large(tmp_path / "large", Shape(layers=1, hidden=64, intermediate=64, vocab=200_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (path.parent / "model.onnx.data").stat().st_size
    assert size > 50_000_000
    assert peak < 16_000_000, f"{peak} bytes"
