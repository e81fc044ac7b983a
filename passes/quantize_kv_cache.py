"""Pass ``quantize-kv-cache``: the KV cache goes in and out as FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._emit import Emitter, Names, insert_after
from passes._static_scales import register_scale
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import CacheSite, QuantPlan

_FP8 = ir.DataType.FLOAT8E4M3FN
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """Hold the KV cache in FLOAT8E4M3FN: half the memory and bandwidth of float16.

    Before::

        present = Concat(past, new);    attention reads present

    After, s the static scale of this layer's keys or values (``plan.attention_scales[new]``)::

        past (FP8) -> DequantizeLinear(s) ----------------------------------+
        new -> [Cast to float] -> QuantizeLinear(s) -> DequantizeLinear(s) -+-> Concat -> QuantizeLinear(s)
            -> present (FP8) -> DequantizeLinear(s) -> [Cast back] -> attention

    Concat is not defined for FP8 in ONNX, so it runs on the dequantised numbers; quantising them again by the
    same scale in FLOAT gives back the same codes, and builders fold the three into an FP8 copy. Attention
    reads ``present``, so that a token sees the same keys and values whether they are new or cached. Inputs
    and outputs keep their names; a caller feeds back what came out, and never needs the scale.

    Nothing happens for a cache that is FP8 already.

    Attributes:
        plan: Cache tensors and scales.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a cache of the plan is not in the graph, has no scale, or the opset is below 21.
        """
        if self.plan.caches and model.graph.opset_imports.get("", 0) < 21:
            raise PassError("quantize-kv-cache: the model's opset is below 21; run raise-opset first")
        names = Names(model.graph)
        inputs = {value.name: value for value in model.graph.inputs}
        nodes = {node.name: node for node in model.graph}
        modified = False
        for site in self.plan.caches:
            past, concat = inputs.get(site.past), nodes.get(site.concat)
            if past is None or concat is None or concat.op_type != "Concat":
                raise PassError(
                    f"cache {site.past!r}: it or its Concat is not in the graph; use this model's plan"
                )
            if past.dtype != _FP8:
                self._rewrite(model.graph, names, site, past, concat)
                modified = True
        return PassResult(model, modified)

    def _rewrite(
        self, graph: ir.Graph, names: Names, site: CacheSite, past: ir.Value, concat: ir.Node
    ) -> None:
        new = concat.inputs[1]
        if new is None:
            raise PassError(f"cache {site.past!r}: its Concat appends nothing; use this model's plan")
        scale = register_scale(graph, names, f"{site.past}.scale", self.plan, site.new)
        emit = Emitter(graph, names, prefix=f"{site.past}.")
        cached = emit.op("DequantizeLinear", [past, scale], "dequantized", _FLOAT)
        cached.shape = past.shape
        past.type = ir.TensorType(_FP8)
        past.replace_all_uses_with(cached)
        emit.nodes[0].replace_input_with(0, past)
        insert_after(graph, past, emit.nodes)
        concat.replace_input_with(1, _appended(graph, names, site, new, scale))
        _present(graph, names, site, concat, scale)


def _appended(graph: ir.Graph, names: Names, site: CacheSite, new: ir.Value, scale: ir.Value) -> ir.Value:
    """The new tokens as attention will see them once they are cached."""
    emit = Emitter(graph, names, prefix=f"{site.past}.new.")
    value = new
    if site.dtype != _FLOAT:
        value = emit.op("Cast", [new], "float", _FLOAT, to=int(_FLOAT))
    x8 = emit.op("QuantizeLinear", [value, scale], "x8", _FP8, output_dtype=int(_FP8))
    result = emit.op("DequantizeLinear", [x8, scale], "dequantized", _FLOAT)
    insert_after(graph, new, emit.nodes)
    return result


def _present(graph: ir.Graph, names: Names, site: CacheSite, concat: ir.Node, scale: ir.Value) -> None:
    """Make ``present`` the FP8 form of the Concat's result, and let everything else read it dequantised."""
    both = concat.outputs[0]
    uses = list(both.uses())
    emit = Emitter(graph, names, prefix=f"{site.present}.")
    both.name = emit.value_name("float")
    both.type = ir.TensorType(_FLOAT)
    present = emit.op("QuantizeLinear", [both, scale], "quantized", _FP8, output_dtype=int(_FP8))
    present.name, present.shape = site.present, both.shape
    result = emit.op("DequantizeLinear", [present, scale], "dequantized", _FLOAT)
    if site.dtype != _FLOAT:
        result = emit.op("Cast", [result], "restored", site.dtype, to=int(site.dtype))
    result.shape = both.shape
    for node, index in uses:
        node.replace_input_with(index, result)
    for position, output in enumerate(graph.outputs):
        if output is both:
            graph.outputs[position] = present
    insert_after(graph, both, emit.nodes)
