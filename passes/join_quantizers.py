"""Pass ``join-quantizers``: a quantiser that one linear layer reads becomes a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._emit import int_attribute, replace_nodes
from passes._plugin_ops import (
    LINEAR,
    QUANTIZE_NORM,
    QUANTIZE_SILU,
    QUANTIZE_STATIC,
    QUANTIZE_TOKENS,
    QUANTIZED_LINEAR,
)
from passes._w4a8_function import DOMAIN
from zqfp_compile.pass_base import Pass, PassResult

# zqfpSource in zqfp.h: what the quantiser computes its input from.
SOURCES = {QUANTIZE_STATIC: 1, QUANTIZE_TOKENS: 1, QUANTIZE_SILU: 2, QUANTIZE_NORM: 3}


@dataclass(frozen=True)
class JoinQuantizers(Pass):
    """Let a linear layer quantise its own input where no other layer reads that.

    Before, with a static scale::

        QuantizeActivation(x, a, V) -> x8, xv
        QuantizeSiluMul(gate, up, a, V) -> x8, xv
        QuantizeRmsNorm(x, gamma, skip, a, V) -> x8, xv, s
        PackedW4A8Linear(x8, a, codes, group_scales, row_scales, bias, xv, U) -> y, ...

    After, one of::

        QuantizedW4A8Linear(x, a, V, codes, group_scales, row_scales, bias, U) -> y, ...
        QuantizedW4A8Linear(gate, up, a, V, codes, group_scales, row_scales, bias, U) -> y, ...
        QuantizedW4A8Linear(x, gamma, skip, a, V, codes, group_scales, row_scales, bias, U) -> y, ..., s

    ``QuantizeTokens``, and the others per token, likewise without a. ``source`` says which quantiser it was.

    One call, in which libzqfp may do both at once: a decoder at one token is bound by launches, and by what
    they wait for each other. On the CPU every number is that of the two nodes. Others that read the sum s
    read the new node's. It stands where the quantiser was, and has the name of the layer.

    Left alone: a quantiser whose x8, a or xv have another reader, or are outputs of the graph; a layer whose
    weight, bias or U is computed, which may be behind the quantiser; one in a branch of an If; one whose
    scale or xv is not the quantiser's.

    For ONNX Runtime only, as ``fuse-quantizers``, behind which it runs: what that fuses is joined as well.
    """

    name: ClassVar[str] = "join-quantizers"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``."""
        modified = False
        for quantizer in list(model.graph):
            linear = _linear_of(quantizer)
            if linear is not None:
                _join(model.graph, quantizer, linear)
                modified = True
        return PassResult(model, modified)


def _linear_of(quantizer: ir.Node) -> ir.Node | None:
    """The layer that alone reads what a quantiser makes, if they can be joined."""
    if quantizer.domain != DOMAIN or quantizer.op_type not in SOURCES:
        return None
    made = _quantized(quantizer)
    readers = {node for value in made for node, _ in value.uses()}
    if len(readers) != 1 or any(value.is_graph_output() for value in made):
        return None
    linear = readers.pop()
    if (linear.domain, linear.op_type) != (DOMAIN, LINEAR) or linear.graph is not quantizer.graph:
        return None
    x8, a, *stored = linear.inputs
    lorc = _rank(linear) > 0
    xv = stored.pop(-2) if lorc else None
    scale = quantizer.outputs[1] if _is_per_token(quantizer) else quantizer.inputs[_operands(quantizer)]
    fits = x8 is made[0] and a is scale and xv is (made[-1] if _rank(quantizer) > 0 else None)
    constant = all(value is not None and value.producer() is None for value in stored)
    return linear if fits and constant else None


def _rank(node: ir.Node) -> int:
    return node.attributes.get_int("lorc_rank", 0)


def _is_per_token(quantizer: ir.Node) -> bool:
    return bool(quantizer.attributes.get_int("tokens", int(quantizer.op_type == QUANTIZE_TOKENS)))


def _skip(quantizer: ir.Node) -> bool:
    return bool(quantizer.attributes.get_int("skip", 0))


def _operands(quantizer: ir.Node) -> int:
    """How many inputs a quantiser computes h from."""
    return 1 if SOURCES[quantizer.op_type] == 1 else 2 + _skip(quantizer)


def _quantized(quantizer: ir.Node) -> Sequence[ir.Value]:
    """x8, a and xv, those that there are: all outputs but a norm's sum."""
    return quantizer.outputs[: len(quantizer.outputs) - _skip(quantizer)]


def _join(graph: ir.Graph, quantizer: ir.Node, linear: ir.Node) -> None:
    """Put one node in the place of the quantiser, behind which every reader of the sum and of y is."""
    stored = list(linear.inputs[2:])
    if _rank(linear) > 0:
        del stored[-2]  # xv
    attributes = [attr for name, attr in linear.attributes.items() if not name.startswith("plugin_")]
    attributes.append(int_attribute("source", SOURCES[quantizer.op_type]))
    attributes += [quantizer.attributes[name] for name in ("skip", "epsilon") if name in quantizer.attributes]
    old = [*linear.outputs, *quantizer.outputs[len(_quantized(quantizer)) :]]
    new = ir.Node(
        DOMAIN,
        QUANTIZED_LINEAR,
        [*quantizer.inputs, *stored],
        attributes,
        num_outputs=len(old),
        name=linear.name,
        metadata_props=dict(linear.metadata_props),
    )
    replace_nodes(graph, quantizer, [quantizer, linear], [new], old, new.outputs)
