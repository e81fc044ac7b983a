"""Pass names and where their classes live. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from zqfp_compile.errors import UsageError

if TYPE_CHECKING:
    from zqfp_compile.pass_base import Pass

PASSES: dict[str, str] = {
    "strip-metadata": "passes.strip_metadata:StripMetadata",
    "raise-opset": "passes.raise_opset:RaiseOpset",
    "select-linears": "passes.select_linears:SelectLinears",
    "select-attention": "passes.select_attention:SelectAttention",
    "select-embedding": "passes.select_embedding:SelectEmbedding",
    "quantize-activations": "passes.quantize_activations:QuantizeActivations",
    "quantize-weights": "passes.quantize_weights:QuantizeWeights",
    "add-lorc": "passes.add_lorc:AddLoRC",
    "quantize-embedding": "passes.quantize_embedding:QuantizeEmbedding",
    "quantize-kv-cache": "passes.quantize_kv_cache:QuantizeKvCache",
    "quantize-attention": "passes.quantize_attention:QuantizeAttention",
    "remove-unused": "passes.remove_unused:RemoveUnused",
    "lower-weights-fp8": "passes.lower_weights_fp8:LowerWeightsFp8",
    "lower-weights-fp4": "passes.lower_weights_fp4:LowerWeightsFp4",
    "infer-shapes": "passes.infer_shapes:InferShapes",
    "lower-weights-plugin": "passes.lower_weights_plugin:LowerWeightsPlugin",
    "fuse-quantizers": "passes.fuse_quantizers:FuseQuantizers",
    "join-quantizers": "passes.join_quantizers:JoinQuantizers",
    "inline-functions": "passes.inline_functions:InlineFunctions",
    "qdq-to-casts": "passes.qdq_to_casts:QdqToCasts",
}


def create_pass(name: str, **options: object) -> Pass:
    """Import and construct the pass called ``name``.

    Raises:
        UsageError: When no pass has that name.
    """
    if name not in PASSES:
        raise UsageError(f"no pass is called {name!r}; the passes are {', '.join(PASSES)}")
    from zqfp_compile.pass_base import Pass  # names alone, for shell completion, need no onnx_ir

    module, _, class_name = PASSES[name].partition(":")
    cls = getattr(importlib.import_module(module), class_name)
    instance = cls(**options)
    if not isinstance(instance, Pass):
        raise TypeError(f"{PASSES[name]} is not a Pass")
    return instance
