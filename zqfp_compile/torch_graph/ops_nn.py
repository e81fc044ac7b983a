"""Normalisation, rotary embedding, attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812

from zqfp_compile.torch_graph.call import Call, Function, Result

Tensor = torch.Tensor


def _layer_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Result:
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    epsilon = call.get("epsilon", 1e-5)
    if (
        call.outputs == 1
        and scale.shape == x.shape[axes[0] :]
        and (bias is None or bias.shape == scale.shape)
    ):
        return F.layer_norm(x, scale.shape, scale, bias, epsilon)
    mean = x.mean(axes, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    y = (x - mean) * inverse * scale
    return (y if bias is None else y + bias, mean, inverse)[: call.outputs]


def _rms_normalization(call: Call, x: Tensor, scale: Tensor) -> Result:
    """ONNX RMSNormalization, and SimplifiedLayerNormalization, which can also return the factor."""
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    inverse = torch.rsqrt(x.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5))
    return (x * inverse * scale, inverse)[: call.outputs]


def _skip_simplified(
    call: Call, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None
) -> Result:
    total = x + skip if bias is None else x + skip + bias
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + call.get("epsilon", 1e-12))
    return (total * inverse * gamma, total.mean(-1, keepdim=True), inverse, total)[: call.outputs]


def _skip_layer(
    call: Call,
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
) -> Result:
    total = x + skip if bias is None else x + skip + bias
    mean = total.mean(-1, keepdim=True)
    inverse = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + call.get("epsilon", 1e-12))
    y = (total - mean) * inverse * gamma
    return (y if beta is None else y + beta, mean, inverse, total)[: call.outputs]


def _heads(x: Tensor, count: int) -> Tensor:
    """[..., heads * D] -> [..., heads, D]."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def _rotary(call: Call, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """ONNX RotaryEmbedding 23: x [B, heads, S, D] or [B, S, heads * D]; tables [..., D' / 2]."""
    flat = x.ndim == 3
    heads = _heads(x, call.get("num_heads")) if flat else x.transpose(1, 2)
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    width = call.get("rotary_embedding_dim", 0) or heads.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    if call.get("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((cos * a - sin * b, sin * a + cos * b), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((cos * a - sin * b, sin * a + cos * b), -1)
    y = torch.cat((turned, rest), -1)
    return y.flatten(-2) if flat else y.transpose(1, 2)


def _attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Result:
    """ONNX Attention 23 and 24, by its function body: [B, heads, S, D] or [B, S, heads * D]."""
    flat = q.ndim == 3
    if flat:
        q = _heads(q, call.get("q_num_heads")).transpose(1, 2)
        k, v = (_heads(x, call.get("kv_num_heads")).transpose(1, 2) for x in (k, v))
    before = 0 if past_key is None else past_key.shape[2]
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    present = (k, v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(call.get("scale") or 1.0 / math.sqrt(q.shape[-1]))
    scores = (q * root) @ (k * root).transpose(-1, -2)
    raw = scores
    if call.get("softcap", 0.0):
        scores = torch.tanh(scores / call.get("softcap")) * call.get("softcap")
    bias = _attention_bias(call, scores, mask, before, lengths)
    probabilities = torch.softmax(scores if bias is None else scores + bias, -1)
    if bias is not None:  # a query that may attend nothing gets zeros
        nothing = torch.isneginf(bias).all(-1, keepdim=True)
        probabilities = probabilities.masked_fill(nothing, 0.0)
    y = probabilities @ v
    y = y.transpose(1, 2).flatten(-2) if flat else y
    if call.outputs > 3 and call.get("qk_matmul_output_mode", 0):
        raise call.unsupported(f"qk_matmul_output_mode={call.get('qk_matmul_output_mode')}")
    return (y, *present, raw)[: call.outputs]


def _scaled_attention(
    call: Call,
    q: Tensor,
    k_t: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
) -> Result:
    """What ``attention.py`` found: ``softmax(q @ k_t * scale + mask) @ v``, divided instead if so said."""
    one = scale is None or scale.numel() == 1
    whole = q.ndim == 4 and q.shape[:2] == k_t.shape[:2] == v.shape[:2]
    if one and whole and (mask is None or (mask.ndim == 4 and mask.dtype == q.dtype)):
        factor = 1.0 if scale is None else float(scale)
        factor = 1.0 / factor if call.get("divides") else factor
        return F.scaled_dot_product_attention(q, k_t.transpose(-1, -2), v, attn_mask=mask, scale=factor)
    scores = q @ k_t
    if scale is not None:
        scores = scores / scale if call.get("divides") else scores * scale
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def _attention_bias(
    call: Call, scores: Tensor, mask: Tensor | None, before: int, lengths: Tensor | None
) -> Tensor | None:
    """Return what is added to the scores [B, heads, S, T], or ``None``."""
    queries, keys = scores.shape[-2:]
    position = torch.arange(keys, device=scores.device)
    allowed = None
    if mask is not None:
        if mask.shape[-1] < keys:
            fill = False if mask.dtype == torch.bool else -math.inf
            mask = F.pad(mask, (0, keys - mask.shape[-1]), value=fill)
        if mask.dtype == torch.bool:
            allowed, mask = mask, None
    if call.get("is_causal", 0):
        offset: Tensor | int = before
        if lengths is not None and before == 0:
            offset = (lengths.reshape(-1, 1, 1, 1) - queries).to(scores.device)
        row = torch.arange(queries, device=scores.device).unsqueeze(-1)
        allowed = _both(allowed, position <= row + offset)
    if lengths is not None:
        allowed = _both(allowed, position < lengths.reshape(-1, 1, 1, 1).to(scores.device))
    if allowed is None:
        return mask
    bias = torch.zeros(allowed.shape, dtype=scores.dtype, device=scores.device)
    bias = bias.masked_fill(~allowed, -math.inf)
    return bias if mask is None else bias + mask


def _both(allowed: Tensor | None, more: Tensor) -> Tensor:
    return more if allowed is None else allowed & more


def _rotary_microsoft(call: Call, x: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """com.microsoft RotaryEmbedding: one position for all (the offset of the first), or [B, S]."""
    flat = x.ndim == 3
    length = x.shape[1] if flat else x.shape[2]
    if position_ids.numel() == 1 and length > 1:
        position_ids = position_ids.reshape(1, 1) + torch.arange(length, device=position_ids.device)
        position_ids = position_ids.expand(x.shape[0], -1)
    if flat and not call.get("num_heads", 0):
        width = 2 * cos.shape[-1]
        if call.get("rotary_embedding_dim", 0):
            raise call.unsupported("rotary_embedding_dim and no num_heads")
        x4 = _heads(x, x.shape[-1] // width).transpose(1, 2)
        return _rotary(call, x4, cos, sin, position_ids).transpose(1, 2).flatten(-2)
    return _rotary(call, x, cos, sin, position_ids)


OPS: dict[str, Function] = {
    "Attention": _attention,
    "LayerNormalization": _layer_normalization,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary,
    # ONNX Runtime's own; the first without a domain.
    "SimplifiedLayerNormalization": _rms_normalization,
    "com.microsoft::RotaryEmbedding": _rotary_microsoft,
    "com.microsoft::SkipLayerNormalization": _skip_layer,
    "zqfp.torch::ScaledAttention": _scaled_attention,
    "com.microsoft::SkipSimplifiedLayerNormalization": _skip_simplified,
}
