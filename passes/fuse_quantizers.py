"""Pass ``fuse-quantizers``: our quantisers compute SiLU times up, and norms, in the same launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._emit import Names, int_attribute
from passes._fused_forms import Form, find_form
from passes._plugin_ops import QUANTIZE_NORM, QUANTIZE_SILU, QUANTIZE_STATIC, QUANTIZE_TOKENS
from passes._w4a8_function import DOMAIN
from zqfp_compile.pass_base import Pass, PassResult


@dataclass(frozen=True)
class FuseQuantizers(Pass):
    """Let the quantiser compute its input where that is SiLU times up, or a root mean square norm.

    Before, in any order of operands::

        gate -> Sigmoid -> Mul(gate) -> Mul(up) -> h -> QuantizeActivation(a, V) -> x8, xv
        x -> Add(skip) -> s -> [Cast] -> Pow(2) -> ReduceMean -> Add(eps) -> Sqrt -> Reciprocal -> r
             s -> [Cast] -> Mul(r) -> [Cast] -> Mul(gamma) -> h -> QuantizeActivation(a) -> x8

    After, and QuantizeTokens likewise, with the scales as an output::

        QuantizeSiluMul(gate, up, a, V) -> x8, xv
        QuantizeRmsNorm(x, gamma, skip, a) -> x8, s

    One launch in the place of several (of a norm with LoRC two), and h never goes through memory: at one
    token a decoder is bound by launches. h is computed in float32 and rounded to its type once, so it differs
    from that of the nodes by their roundings. Others that read the sum s read the quantiser's.

    Taken as well: ``QuickGelu`` (com.microsoft) and ``Swish`` with alpha 1, ``RMSNormalization``,
    ``SimplifiedLayerNormalization``, ``SkipSimplifiedLayerNormalization``; ``Mul(x, x)``, ``Div(1, root)``,
    ``Div(x, root)``; gamma before the last Cast. A norm without an Add of two equal shapes in front has no
    skip.

    ``Shape`` nodes that read h read the first operand instead, which has that shape.

    Left alone: h, or a value on the way to it, that anything else reads or that is an output of the graph; a
    norm over another axis, with a bias, with an epsilon or an exponent that is not constant, not computed in
    FLOAT, or with a gamma that is computed or not of shape [K]; operands whose types or shapes differ or are
    not recorded in the model.

    For ONNX Runtime only: TensorRT fuses such chains itself, and its plugin has no such op. Runs behind
    ``lower-weights-plugin`` and ``remove-unused``: nodes that no output depends on are readers as well.

    Where ``lower-weights-plugin`` makes gate and up one gated layer, h comes here as any activation does.
    SiLU times up is left to this pass where it does not gate them, as where their ranks do not fit together.
    """

    name: ClassVar[str] = "fuse-quantizers"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``."""
        names = Names(model.graph)
        modified = False
        for node in list(model.graph):
            form = _form(node)
            if form is not None:
                _fuse(model.graph, names, node, form)
                modified = True
        return PassResult(model, modified)


def _form(node: ir.Node) -> Form | None:
    """What computes the input of a quantiser, if it can be fused."""
    if node.domain != DOMAIN or node.op_type not in (QUANTIZE_STATIC, QUANTIZE_TOKENS):
        return None
    h, *constants = node.inputs
    form = None if h is None else find_form(h)
    if form is None or any(value is None or value.producer() is not None for value in constants):
        return None
    return form


def _fuse(graph: ir.Graph, names: Names, quantizer: ir.Node, form: Form) -> None:
    """Replace the quantiser and what makes its input; the sum's other readers read the new node's."""
    attributes = [attr for name, attr in quantizer.attributes.items() if not name.startswith("plugin_")]
    attributes.append(int_attribute("tokens", int(quantizer.op_type == QUANTIZE_TOKENS)))
    skip = len(form.operands) > 2
    for reader in form.shape_readers:
        reader.replace_input_with(0, form.operands[0])
    if form.epsilon is not None:
        attributes += [int_attribute("skip", int(skip)), ir.AttrFloat32("epsilon", form.epsilon)]
    new = ir.Node(
        DOMAIN,
        QUANTIZE_SILU if form.epsilon is None else QUANTIZE_NORM,
        [*form.operands, *quantizer.inputs[1:]],
        attributes,
        num_outputs=len(quantizer.outputs) + skip,
        name=quantizer.name,
        metadata_props=dict(quantizer.metadata_props),
    )
    old = [*quantizer.outputs]
    if form.total is not None:
        old.append(form.total)
    elif skip:
        _name_sum(names, form, new.outputs[-1])
    # There all operands are computed, and no reader of the sum or of x8 comes before it.
    place = (form.h if form.total is None else form.total).producer()
    assert place is not None
    replaced = new.outputs[: len(old)]
    ir.convenience.replace_nodes_and_values(graph, place, [quantizer, *form.nodes], [new], old, replaced)


def _name_sum(names: Names, form: Form, total: ir.Value) -> None:
    """Name the sum that nothing reads."""
    total.name = names.value(f"{form.h.name}.sum")
    total.type, total.shape = form.h.type, form.operands[0].shape
