"""Causal language models in torch for accuracy experiments: loading, tokens, perplexity (DESIGN 8)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).resolve().parents[1]
Tokens = npt.NDArray[np.int64]

# Logits held at once, in elements: 1 GiB of float32 on a GPU, 64 MiB on a CPU.
CUDA_LOGITS = 1 << 28
CPU_LOGITS = 1 << 24


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer.

    Attributes:
        name: For tables: the file's or folder's name without suffixes.
        model: transformers causal LM in eval mode, on its device.
        tokenizer: ``tokenizers.Tokenizer`` without truncation or padding.
    """

    name: str
    model: Any
    tokenizer: Any

    def tokens(self, text: Path, *, wikitext: bool = True) -> Tokens:
        """Return the tokens of a UTF-8 text file, int64 [T], special ones as the tokenizer adds them."""
        from zqfp_compile.calibrate.samples import detokenize_wikitext

        content = text.read_text(encoding="utf-8")
        ids = self.tokenizer.encode(detokenize_wikitext(content) if wikitext else content).ids
        return np.asarray(ids, dtype=np.int64)


def load(path: Path, *, device: str = "cpu", dtype: str = "float32") -> LoadedModel:
    """Load a ``.gguf`` file (``models/gguf_model.py``) or a Hugging Face folder with a ``tokenizer.json``.

    Args:
        path: The file or folder.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """
    if not path.exists():
        sys.exit(f"error: {path} does not exist; models/README.md says how to get the models")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # TF32 keeps 10 bits of the inputs: enough to move a perplexity in the third digit.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if path.suffix == ".gguf":
        model = _load_gguf(path, dtype)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True)
    model.config.use_cache = False
    model.requires_grad_(False)
    return LoadedModel(path.stem if path.is_file() else path.name, model.eval().to(device), _tokenizer(path))


def _load_gguf(path: Path, dtype: str) -> Any:
    sys.path.insert(0, str(ROOT / "models"))
    from gguf_model import load_gguf

    return load_gguf(path, dtype)


def _tokenizer(path: Path) -> Any:
    if path.suffix == ".gguf":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """Return the decoder's layers: the longest module list below the language model's head."""
    lists = [module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


@torch.inference_mode()
def perplexity(model: Any, tokens: Tokens, *, length: int = 2048, batch: int | None = None) -> float:
    """Return exp(mean negative log likelihood), every token but a window's first scored.

    Windows of ``length`` tokens follow each other, each with an empty cache; a shorter last one counts.

    Args:
        model: transformers causal LM whose logits are ``lm_head(last hidden state)``.
        tokens: int64 [T].
        length: Tokens per window.
        batch: Windows run together; by default 16 on a GPU, 1 on a CPU.
    """
    device = model.device
    total, count = 0.0, 0
    for windows in _batches(tokens, length, batch or (16 if device.type == "cuda" else 1)):
        ids = torch.from_numpy(windows).to(device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        total += _nll(model, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def _batches(tokens: Tokens, length: int, batch: int) -> Iterator[Tokens]:
    """Yield int64 [b, L]: full windows by ``batch``, then the shorter rest."""
    full = tokens[: tokens.size // length * length].reshape(-1, length)
    for start in range(0, len(full), batch):
        yield full[start : start + batch]
    rest = tokens[full.size :]
    if rest.size >= 2:
        yield rest[None]


def _nll(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the summed negative log likelihood of targets [P] given hidden states [P, D]."""
    head = model.get_output_embeddings()
    budget = CUDA_LOGITS if hidden.is_cuda else CPU_LOGITS
    step = max(1, budget // head.weight.shape[0])
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(hidden), step):
        logits = head(hidden[start : start + step]).float()
        losses = torch.nn.functional.cross_entropy(logits, targets[start : start + step], reduction="none")
        total += losses.double().sum()
    return float(total)
