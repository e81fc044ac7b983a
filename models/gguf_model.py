"""Builds a transformers model from a GGUF file of a LLaMA or Qwen2 architecture, weights dequantised.

transformers has a GGUF reader of its own, which needs accelerate and holds the model several times in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CLASSES = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen2": ("Qwen2Config", "Qwen2ForCausalLM")}
TOP_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp reorders the rows of q and k for LLaMA, not for Qwen2.
PERMUTED = {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}, "qwen2": {}}


def read_config(fields: dict[str, Any], architecture: str, tied: bool) -> dict[str, Any]:
    """Translate the GGUF metadata into arguments of the transformers config.

    Raises:
        ValueError: When the file asks for rotary scaling, which this reader does not translate.
    """
    scaled = [name for name in fields if name.startswith(f"{architecture}.rope.scaling")]
    if scaled:
        raise ValueError(f"{scaled[0]}: rotary scaling is not supported by this reader")

    def of(name: str) -> Any:
        return fields[f"{architecture}.{name}"]

    return {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": of("rope.freq_base")},
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": tied,
    }


def tensor_name(name: str) -> str | None:
    """Return the transformers name of a GGUF tensor; ``None`` for tables that the model computes itself.

    Raises:
        ValueError: When the tensor is unknown.
    """
    parts = name.split(".")
    if parts[0] == "rope_freqs":
        return None
    if parts[0] == "blk" and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"
    if parts[0] in TOP_TENSORS:
        return f"{TOP_TENSORS[parts[0]]}.{parts[1]}"
    raise ValueError(f"GGUF tensor {name}: this reader does not know it")


def undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Invert llama.cpp's reordering of q/k rows [heads * D, K] (interleaved to half-split rotary pairs)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def load_gguf(path: Path, dtype: str) -> Any:
    """Return the causal LM in ``dtype`` (``float32``, ``float16``, ``bfloat16``), on the CPU.

    Raises:
        ValueError: When the architecture, a tensor or a setting is unknown.
    """
    import gguf
    import torch
    import transformers

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields["general.architecture"]
    if architecture not in CLASSES:
        raise ValueError(f"{path}: architecture {architecture!r}; this reader knows {', '.join(CLASSES)}")
    heads = {part: fields[f"{architecture}.{key}"] for part, key in PERMUTED[architecture].items()}
    state = {}
    for tensor in reader.tensors:
        name = tensor_name(tensor.name)
        if name is None:
            continue
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = undo_permutation(weight, heads[part])
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32)).to(getattr(torch, dtype))
    tied = "lm_head.weight" not in state
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[architecture])
    config = config_class(**read_config(fields, architecture, tied))
    with torch.device("meta"):
        model = model_class(config)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the state
    return model


def write_tokenizer(path: Path, folder: Path) -> None:
    """Convert the GGUF's tokenizer to ``tokenizer.json`` in ``folder``, with ``chat_template.jinja``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.save_pretrained(str(folder))
