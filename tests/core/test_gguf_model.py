"""models/gguf_model.py: a tiny model written as GGUF comes back with the same weights and logits."""

from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="reads GGUF files")
pytest.importorskip("transformers")


def write_gguf(path: Path, model, architecture: str, **extra: float) -> None:
    """Write float32 tensors under llama.cpp's names, LLaMA's q and k rows in its interleaved order."""
    from gguf_model import LAYER_TENSORS

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_eos_token_id(1)
    for name, value in extra.items():
        writer.add_float32(f"{architecture}.{name.replace('__', '.')}", value)
    layer_names = {theirs: ours for ours, theirs in LAYER_TENSORS.items()}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        if module in top:
            target = top[module]
        else:
            _, _, index, inner = module.split(".", 3)
            target = f"blk.{index}.{layer_names[inner]}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if architecture == "llama" and layer_names[inner] in heads:
                halves = weight.reshape(heads[layer_names[inner]], 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{target}.{kind}", weight.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_round_trip(models_folder: Path, tmp_path: Path, family: str) -> None:
    from gguf_model import load_gguf
    from tiny_models import make_model

    model = make_model(family)
    write_gguf(tmp_path / "m.gguf", model, family)
    loaded = load_gguf(tmp_path / "m.gguf", "float32").eval()
    wanted, state = model.state_dict(), loaded.state_dict()
    assert set(state) == set(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    ids = torch.arange(12)[None]
    with torch.no_grad():
        # GGUF keeps the norms' epsilon and the rotary base in float32
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_know_is_named(models_folder: Path, tmp_path: Path) -> None:
    from gguf_model import load_gguf, tensor_name
    from tiny_models import make_model

    model = make_model("llama")
    write_gguf(tmp_path / "gemma.gguf", model, "gemma")
    with pytest.raises(ValueError, match="gemma"):
        load_gguf(tmp_path / "gemma.gguf", "float32")
    write_gguf(tmp_path / "scaled.gguf", model, "llama", rope__scaling__factor=4.0)
    with pytest.raises(ValueError, match="rotary scaling"):
        load_gguf(tmp_path / "scaled.gguf", "float32")
    with pytest.raises(ValueError, match="ffn_gate_inp"):
        tensor_name("blk.0.ffn_gate_inp.weight")
