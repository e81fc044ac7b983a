"""One attention with a KV cache, in the forms exporters write it, and ways to break it."""

from __future__ import annotations

import onnx_ir as ir

_TYPES = {"float": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}

# Grouped queries as torch.onnx writes them: 4 query heads, 2 key/value heads of size 8.
_TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
decoder ({t}[batch, 4, sequence, 8] q, {t}[batch, 2, sequence, 8] k, {t}[batch, 2, sequence, 8] v,
         {t}[batch, 1, sequence, total] mask,
         {t}[batch, 2, past_sequence, 8] past_key, {t}[batch, 2, past_sequence, 8] past_value)
     => ({t}[batch, 4, sequence, 8] y,
         {t}[batch, 2, total, 8] present_key, {t}[batch, 2, total, 8] present_value)
<int64[1] two = {{2}}, int64[5] repeat = {{1, 1, 2, 1, 1}}, int64[4] heads = {{0, 4, -1, 8}},
 {t}[1] factor = {{{factor}}}>
{{
   [n_past] past_length = Shape (past_key)
   [n_key] present_key = Concat <axis = 2> (past_key, k)
   [n_value] present_value = Concat <axis = -2> (past_value, v)
   [n_uk] k5 = Unsqueeze (present_key, two)
   [n_ek] k_repeated = Expand (k5, repeat)
   [n_rk] keys = Reshape (k_repeated, heads)
   [n_tk] keys_t = Transpose <perm = [0, 1, 3, 2]> (keys)
   [n_uv] v5 = Unsqueeze (present_value, two)
   [n_ev] v_repeated = Expand (v5, repeat)
   [n_rv] values = Reshape (v_repeated, heads)
   [n_scores] scores = MatMul (q, keys_t)
   [n_scale] scaled = Mul (scores, factor)
   [n_mask] masked = Add (scaled, mask)
   [n_float] masked_float = Cast <to = 1> (masked)
   [n_softmax] probabilities = Softmax <axis = -1> (masked_float)
   [n_back] p = Cast <to = {to}> (probabilities)
   [n_mix] y = MatMul (p, values)
}}
"""


def decoder(dtype: str = "float") -> ir.Model:
    """Return the attention in ``float`` or ``float16``; its nodes are named ``n_...``."""
    # The parser reads float16 numbers as their bits.
    factor = 0x3580 if dtype == "float16" else 0.34375
    return ir.from_onnx_text(_TEXT.format(t=dtype, to=int(_TYPES[dtype]), factor=factor))


def node(model: ir.Model, name: str) -> ir.Node:
    """Return the node called ``name``."""
    return next(item for item in model.graph if item.name == name)
