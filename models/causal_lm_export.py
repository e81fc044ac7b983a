"""Export of a transformers causal LM to ONNX with a KV cache, shared by the scripts of this folder.

The names of the inputs and outputs are those optimum uses (L layers, H key/value heads, D head size):

    input_ids                     int64 [batch, sequence]
    attention_mask                int64 [batch, past_sequence + sequence], 1 = attend
    position_ids                  int64 [batch, sequence]
    past_key_values.{i}.key/value float [batch, H, past_sequence, D]; past_sequence may be 0
    logits                        float [batch, sequence, vocabulary]
    present.{i}.key/value         float [batch, H, past_sequence + sequence, D]
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

OPSET = 21
PastLayers = list[tuple[torch.Tensor, torch.Tensor]]


class _PastCache:
    """The part of transformers' cache that decoder layers use: append new keys and values, return all."""

    is_compileable = False

    def __init__(self, past: PastLayers) -> None:
        self.layers = list(past)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached positions."""
        return self.layers[layer_idx][0].shape[-2]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, H, sequence, D] to layer ``layer_idx``; return [batch, H, past + sequence, D]."""
        old_keys, old_values = self.layers[layer_idx]
        both = torch.cat([old_keys, keys], dim=-2), torch.cat([old_values, values], dim=-2)
        self.layers[layer_idx] = both
        return both


def causal_mask(attention_mask: torch.Tensor, sequence: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [batch, 1, sequence, total] of ``dtype`` from ``attention_mask`` [batch, total].

    Masked entries are half the type's minimum, so that adding a score cannot overflow to -inf and a fully
    masked row (left padding) stays finite.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    queries = torch.arange(total - sequence, total, device=attention_mask.device)
    visible = (keys[None, :] <= queries[:, None])[None, None] & attention_mask.to(torch.bool)[
        :, None, None, :
    ]
    return torch.where(visible, 0.0, torch.finfo(dtype).min / 2).to(dtype)


class _CachedForward:
    """Mixed in front of a model class, so that the module paths in the graph stay the model's own."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: PastLayers,
    ) -> tuple[torch.Tensor, PastLayers]:
        """One step; shapes as in the module's docstring."""
        cache = _PastCache(past_key_values)
        out = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=causal_mask(attention_mask, input_ids.shape[1], past_key_values[0][0].dtype),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return out.logits, cache.layers


def prepare_for_export(model: Any) -> Any:
    """Give ``model`` (transformers causal LM, changed in place) the forward of the exported graph."""
    model.config._attn_implementation = "eager"  # decomposes into MatMul, Add, Softmax for any opset
    model.__class__ = type(type(model).__name__, (_CachedForward, type(model)), {})
    return model.eval()


def empty_past(config: Any, batch: int, length: int, dtype: torch.dtype) -> PastLayers:
    """Zero-filled past of ``length`` positions, one (key, value) pair [batch, H, length, D] per layer."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, heads, length, size)
    return [
        (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
        for _ in range(config.num_hidden_layers)
    ]


def export(model: Any, path: Path, external_data: bool = True) -> None:
    """Export ``prepare_for_export(model)`` to ``path`` (weights in ``path``.data if ``external_data``)."""
    layers, dtype = model.config.num_hidden_layers, model.dtype
    batch, sequence, past = 2, 5, 3  # any values but 0 and 1, which torch.export would specialise on
    example = {
        "input_ids": torch.ones(batch, sequence, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + sequence, dtype=torch.int64),
        "position_ids": torch.arange(past, past + sequence).expand(batch, -1).contiguous(),
        "past_key_values": empty_past(model.config, batch, past, dtype),
    }
    dims = {name: torch.export.Dim(name, min=0) for name in ("batch", "sequence", "past_sequence")}
    new = {0: dims["batch"], 1: dims["sequence"]}
    layer = {0: dims["batch"], 2: dims["past_sequence"]}
    shapes = {
        "input_ids": new,
        "attention_mask": {0: dims["batch"], 1: torch.export.Dim.DYNAMIC},
        "position_ids": new,
        "past_key_values": [(layer, layer)] * layers,
    }
    pairs = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{p}" for p in pairs),
            ],
            output_names=["logits", *(f"present.{p}" for p in pairs)],
            verbose=False,
        )
    assert program is not None
    _name_total_length(program.model)
    _softmax_in_float(program.model)
    program.save(str(path), external_data=external_data)


def _name_total_length(model: Any) -> None:
    """Call the attention mask's length what the present keys call theirs, not the exporter's ``s53``."""
    import onnx_ir as ir

    old = next(value for value in model.graph.inputs if value.name == "attention_mask").shape[1].value
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value == old:
                value.shape[axis] = ir.SymbolicDim("past_sequence + sequence")


def _softmax_in_float(model: Any) -> None:
    """Compute attention's Softmax in float32, as the torch model does.

    The exporter casts after the Softmax instead of before it and then drops the casts; ONNX Runtime's CPU
    also has no half Softmax and would run five slower operators in its place.
    """
    import onnx_ir as ir

    for node in [node for node in model.graph if node.op_type == "Softmax"]:
        x, y = node.inputs[0], node.outputs[0]
        if x is None or x.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            continue
        to_float = ir.node("Cast", [x], attributes={"to": ir.DataType.FLOAT}, name=f"{node.name}_float")
        back = ir.node("Cast", [y], attributes={"to": x.dtype}, name=f"{node.name}_back")
        for cast, dtype in ((to_float, ir.DataType.FLOAT), (back, x.dtype)):
            cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = cast.name, y.shape, dtype
            cast.metadata_props.update(node.metadata_props)
        node.replace_input_with(0, to_float.outputs[0])
        for user, index in y.uses():
            if user is not back:
                user.replace_input_with(index, back.outputs[0])
        y.dtype = ir.DataType.FLOAT
        model.graph.insert_before(node, to_float)
        model.graph.insert_after(node, back)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's deprecation warnings and progress; errors still raise."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        yield
