"""The tiny models of the tests: four families, two layers, seeded weights.

Imports only torch, transformers and tokenizers, and works with transformers 4.57 and 5, because
optimum-onnx needs the older one. Weights depend on parameter names and shapes alone, so every environment
builds the same model.
Widths are 72 and 144: groups of 64 and of 32 leave a remainder in every linear layer.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_LLAMA = {
    **_COMMON,
    "hidden_size": 72,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# family -> (config class, model class, config arguments)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **_COMMON,
            "hidden_size": 72,
            "word_embed_proj_dim": 72,
            "ffn_dim": 144,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**_COMMON, "n_embd": 72, "n_inner": 144, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
}


def make_model(family: str, dtype: str = "float32") -> Any:
    """Build the transformers model of ``family`` (a key of ``FAMILIES``), weights rounded to ``dtype``."""
    import transformers

    config_class, model_class, arguments = FAMILIES[family]
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, parameter.shape))
    return model.to(getattr(torch, dtype)).eval()


def _values(name: str, shape: torch.Size) -> torch.Tensor:
    """Seeded float32 values: std 1/sqrt(72) for matrices, 0.1 for vectors (norms around 1)."""
    noise: torch.Tensor = torch.randn(
        shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
    )
    if len(shape) > 1:
        return noise.div(72**0.5)
    is_norm_scale = name.endswith("weight")
    return noise.mul(0.1).add(float(is_norm_scale))


def write_tokenizer(path: Path) -> None:
    """Write a byte-level ``tokenizer.json``: two special tokens, the 256 bytes, and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<s>": 0, "</s>": 1}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("e", "r"), ("Ġ", "the")]
    for token in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))
