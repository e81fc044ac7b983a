"""The exported SmolLM2-135M is the real model: it speaks, caches, and computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

ort = pytest.importorskip("onnxruntime")
tokenizers = pytest.importorskip("tokenizers")

PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
LAYERS = 30


@pytest.fixture(scope="module")
def session(smollm2: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(smollm2), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(smollm2.parent / "tokenizer.json"))


def step(session: ort.InferenceSession, ids: np.ndarray, past: list[np.ndarray]) -> list[np.ndarray]:
    """Logits [batch, sequence, vocabulary] followed by the new past; ``past`` [] means empty."""
    past = past or [np.zeros((len(ids), 3, 0, 64), np.float16)] * (2 * LAYERS)
    start, end = past[0].shape[2], past[0].shape[2] + ids.shape[1]
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((len(ids), end), np.int64),
        "position_ids": np.tile(np.arange(start, end), (len(ids), 1)),
    }
    feeds |= {f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}": value for i, value in enumerate(past)}
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


def test_answers_greedily_with_its_cache(
    session: ort.InferenceSession, tokenizer: tokenizers.Tokenizer
) -> None:
    chunk, past, answer = np.array([tokenizer.encode(PROMPT).ids]), [], []
    for _ in range(8):
        logits, *past = step(session, chunk, past)
        answer.append(int(logits[0, -1].argmax()))
        chunk = np.array([answer[-1:]])
    assert "Paris" in tokenizer.decode(answer)
    whole = np.array([[*tokenizer.encode(PROMPT).ids, *answer]])
    logits = step(session, whole, [])[0]
    assert logits[0, -len(answer) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.slow
def test_logits_agree_with_torch(
    models_folder: Path, session: ort.InferenceSession, tokenizer: tokenizers.Tokenizer
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from export_smollm2 import SOURCE
    from gguf_export import fetch_gguf
    from gguf_model import load_gguf

    ids = np.array([tokenizer.encode(PROMPT).ids] * 2)
    with torch.no_grad():
        expected = load_gguf(fetch_gguf(SOURCE), "float32").eval()(torch.from_numpy(ids)).logits.numpy()
    got = step(session, ids, [])[0].astype(np.float32)
    noise, signal = np.square(got - expected).sum(), np.square(expected).sum()
    assert 10 * np.log10(signal / noise) > 45  # float16 through 30 layers; a wrong weight gives below 20


def test_tokenizer_splits_digits_and_keeps_specials(tokenizer: tokenizers.Tokenizer) -> None:
    text = "In 2023: naïve 日本\n\n  x<|im_end|>"
    encoding = tokenizer.encode(text)
    assert encoding.tokens[1:6] == ["Ġ", "2", "0", "2", "3"]
    assert encoding.tokens[-1] == "<|im_end|>"
    assert encoding.ids[-1] == 2
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


def test_graph_has_the_210_decoder_linears_and_one_copy_of_the_embedding(smollm2: Path) -> None:
    model = onnx.load(smollm2, load_external_data=False)
    constants = {i.name for i in model.graph.initializer}
    linears = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in constants]
    assert len(linears) == 7 * LAYERS
    scopes = {p.value for n in linears for p in n.metadata_props if p.key == "pkg.torch.onnx.name_scopes"}
    assert len(scopes) == 7 * LAYERS
    assert any("'model.layers.29.mlp.down_proj'" in scope for scope in scopes)
    assert [list(i.dims) for i in model.graph.initializer].count([49152, 576]) == 1
    assert {i.data_type for i in model.graph.initializer if len(i.dims) == 2} == {onnx.TensorProto.FLOAT16}
    shapes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert shapes["attention_mask"] == ["batch", "past_sequence + sequence"]
    assert shapes["past_key_values.0.key"] == ["batch", "", "past_sequence", ""]
