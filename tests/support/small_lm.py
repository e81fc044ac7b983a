"""The smallest causal language model: embedding, one linear, lm_head. Hostile inputs are damaged copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, WIDTH = 320, 64
WORDS = "The engine reads four bit weights and multiplies them in eight bit floating point. "


def small_lm(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """``input_ids`` int64 [batch, sequence] -> ``logits`` [batch, sequence, 320] in ``dtype``, opset 18."""
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCABULARY, WIDTH), "proj": (WIDTH, WIDTH), "head": (WIDTH, VOCABULARY)}
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) / 8).astype(numpy_type), f"{name}.weight")
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Gather", ["embed.weight", "input_ids"], ["e"], name="/model/embed/Gather"),
        helper.make_node("MatMul", ["e", "proj.weight"], ["h"], name="/model/layers.0/proj/MatMul"),
        helper.make_node("MatMul", ["h", "head.weight"], ["logits"], name="/lm_head/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", dtype, ["batch", "sequence", VOCABULARY])],
        weights,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def write_model_folder(folder: Path) -> Path:
    """Write the model, its ``tokenizer.json``, ``config.json`` and ``text.txt``; return the model."""
    from tiny_models import write_tokenizer  # in models/, whoever calls has it on the path

    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(small_lm().SerializeToString())
    write_tokenizer(folder / "tokenizer.json")
    (folder / "config.json").write_text('{"max_position_embeddings": 256, "eos_token_id": 1}', "utf-8")
    (folder / "text.txt").write_text(WORDS * 20, encoding="utf-8")
    return folder / "model.onnx"
