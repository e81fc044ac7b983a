"""Greedy text from a model that NVIDIA Triton Inference Server serves out of ``--emit triton-repository``.

    pip install 'tritonclient[grpc]' tokenizers
    python triton_client.py smollm2.zqfp smollm2 "The sea is" --url localhost:8001

The server keeps nothing between requests: the cache that a response holds goes into the next request. Where
client and server share a machine, shared memory (``tritonclient.utils``) saves the way over the network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

PAST, PRESENT = "past_key_values.", "present."
Cache = dict[str, np.ndarray]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the compiled folder, for its tokenizer")
    parser.add_argument("model", help="the folder's name below triton/")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="localhost:8001", help="the server's gRPC address")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    prompt = tokenizer.encode(options.prompt).ids
    client = triton.InferenceServerClient(options.url)
    try:
        config = client.get_model_config(options.model).config
        tokens = generate(partial(client.infer, options.model), config, prompt)
        ends = end_tokens(options.folder / "generation_config.json")
        text = list(takewhile(lambda token: token not in ends, islice(tokens, options.max_new_tokens)))
    except InferenceServerException as error:
        parser.exit(6, f"triton_client: error: {options.url}: {' '.join(str(error).split())}\n")
    print(tokenizer.decode(text))


def end_tokens(path: Path) -> list[int]:
    """Return the tokens that end a text by ``generation_config.json``; none without it."""
    end = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", []) if path.is_file() else []
    return end if isinstance(end, list) else [end]


def generate(
    infer: Callable[[Sequence[triton.InferInput]], Any], config: Any, prompt: Sequence[int]
) -> Iterator[int]:
    """Yield the likeliest tokens, without end.

    Args:
        infer: From a request's inputs to its ``InferResult``.
        config: The model's ``ModelConfig``.
        prompt: Token numbers, at least one.
    """
    cache, cached, tokens = empty_cache(config), 0, list(prompt)
    while True:
        result = infer(request_inputs(config, tokens, cache, cached))
        cached += len(tokens)
        cache = {name: result.as_numpy(name.replace(PAST, PRESENT)) for name in cache}
        tokens = [int(result.as_numpy("logits")[0, -1].argmax())]
        yield tokens[0]


def empty_cache(config: Any) -> Cache:
    """Return the cache's inputs without a token, for a batch of 1."""
    cache = {}
    for spec in config.input:
        if spec.name.startswith(PAST):
            dims = [0 if dim < 0 else dim for dim in spec.dims]
            # With max_batch_size 0 the batch is one of the dims.
            shape = [1, *dims] if config.max_batch_size else [1, *dims[1:]]
            cache[spec.name] = np.zeros(shape, triton_to_np_dtype(_type(spec)))
    return cache


def request_inputs(config: Any, tokens: list[int], cache: Cache, cached: int) -> list[triton.InferInput]:
    """Return the inputs of a request for ``tokens`` that follow ``cached`` ones."""
    values = {
        "input_ids": np.array([tokens]),
        "attention_mask": np.ones((1, cached + len(tokens)), np.int64),
        "position_ids": np.arange(cached, cached + len(tokens))[None],
        **cache,
    }
    inputs = []
    for spec in config.input:
        value = values[spec.name].astype(triton_to_np_dtype(_type(spec)), copy=False)
        item = triton.InferInput(spec.name, value.shape, np_to_triton_dtype(value.dtype))
        inputs.append(item.set_data_from_numpy(value))
    return inputs


def _type(spec: Any) -> str:
    """Return a tensor's type as the protocol calls it, ``FP16`` for ``TYPE_FP16``."""
    return str(triton.model_config_pb2.DataType.Name(spec.data_type)).removeprefix("TYPE_")


if __name__ == "__main__":
    main()
