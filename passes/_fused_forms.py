"""Recognises SiLU times up, and a root mean square norm: what usually comes before a quantiser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes._weight_chain import FLOATS, constant_tensor

_CONTRIB = "com.microsoft"
_FLOAT = ir.DataType.FLOAT
# Norms that exporters and ONNX Runtime's tools write as one node, with the epsilon that they have by default.
_SKIP_NORM, _SUM = (_CONTRIB, "SkipSimplifiedLayerNormalization"), 3
_NORMS = {
    ("", "RMSNormalization"): 1e-5,
    ("", "SimplifiedLayerNormalization"): 1e-5,
    (_CONTRIB, "SimplifiedLayerNormalization"): 1e-5,
    _SKIP_NORM: 1e-12,
}


@dataclass(frozen=True)
class Form:
    """How a value h is computed, as zqfp.h defines it.

    Attributes:
        h: The value.
        operands: gate and up of ``silu(gate) * up``; x, gamma and, where it norms x + skip, skip of a norm.
        epsilon: The norm's; ``None`` for SiLU.
        total: x + skip, which others may read as well.
    """

    h: ir.Value
    operands: tuple[ir.Value, ...]
    epsilon: float | None = None
    total: ir.Value | None = None

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes between the operands and h, h's first."""
        found: list[ir.Node] = []
        pending = [self.h]
        while pending:
            value = pending.pop()
            node = None if value in self.operands else value.producer()
            if node is not None and node.op_type != "Constant" and node not in found:
                found.append(node)
                pending.extend(operand for operand in node.inputs if operand is not None)
        return found

    @property
    def inner(self) -> list[ir.Value]:
        """What the nodes make, h among it, but for the sum."""
        return [value for node in self.nodes for value in node.outputs if value is not self.total]

    @property
    def shape_readers(self) -> list[ir.Node]:
        """The nodes that read the shape of h, which is that of the first operand."""
        return [node for node, _ in self.h.uses() if (node.domain, node.op_type) == ("", "Shape")]


def find_form(h: ir.Value) -> Form | None:
    """Return what computes ``h``, when one other node reads h (not its shape) or a value before it."""
    form = _silu_mul(h) or _rms_norm(h)
    if form is None or not _fits(form):
        return None
    readers = _readers(form.inner).difference(form.nodes, form.shape_readers)
    private = len(readers) == 1 and not any(value.is_graph_output() for value in form.inner)
    return form if private else None


def find_gated(h: ir.Value) -> Form | None:
    """Return the SiLU times up that computes ``h``, when gate, up and what lies between are read for h only.

    What reads h does not matter.
    """
    form = _silu_mul(h)
    if form is None:
        return None
    hidden = [*form.operands, *(value for value in form.inner if value is not h)]
    private = _readers(hidden) <= set(form.nodes) and not any(value.is_graph_output() for value in hidden)
    return form if private else None


def _readers(values: Iterable[ir.Value]) -> set[ir.Node]:
    return {user for value in values for user, _ in value.uses()}


def _fits(form: Form) -> bool:
    """Whether the operands have the type of h and one shape, gamma that of the last dimension."""
    activations = list(form.operands)
    gamma = None if form.epsilon is None else activations.pop(1)
    shape = activations[0].shape
    if form.h.dtype not in FLOATS or any(value.dtype != form.h.dtype for value in form.operands):
        return False
    if shape is None or len(shape) == 0 or not all(_equal(shape, value.shape) for value in activations[1:]):
        return False
    stored = gamma is None or (gamma.producer() is None and gamma.shape == ir.Shape([shape[-1]]))
    return stored and isinstance(shape[-1], int)


def _equal(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Whether two shapes are known to be equal."""
    if a is None or b is None:
        return False
    return a == b and all(isinstance(dim, int) or dim.value is not None for dim in a)


def _silu_mul(h: ir.Value) -> Form | None:
    for silu, up in _orders(_made_by(h, "Mul")):
        gate = _silu_of(silu)
        if gate is not None:
            return Form(h, (gate, up))
    return None


def _silu_of(value: ir.Value) -> ir.Value | None:
    """The g of ``g * sigmoid(g)``."""
    for node, alpha in ((_made_by(value, "Swish"), 1.0), (_made_by(value, "QuickGelu", _CONTRIB), 1.702)):
        if node is not None and node.attributes.get_float("alpha", alpha) == 1:
            return node.inputs[0]
    for gate, gated in _orders(_made_by(value, "Mul")):
        sigmoid = _made_by(gated, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is gate:
            return gate
    return None


def _rms_norm(h: ir.Value) -> Form | None:
    form = _one_node(h) or _written_out(h)
    if form is None or form.total is not None:
        return form
    x, gamma, *skip = form.operands
    for left, right in () if skip else _orders(_made_by(x, "Add")):
        if all(value.dtype == x.dtype and _equal(x.shape, value.shape) for value in (left, right)):
            return Form(h, (left, gamma, right), form.epsilon, x)
    return form


def _one_node(h: ir.Value) -> Form | None:
    node = h.producer()
    kind = ("", "") if node is None else (node.domain, node.op_type)
    if node is None or kind not in _NORMS or node.outputs[0] is not h:
        return None
    operands = [value for value in node.inputs if value is not None]
    wanted = 3 if kind == _SKIP_NORM else 2  # with a bias there is one more
    if len(operands) != wanted or not _last_axis(node.attributes.get_int("axis", -1), operands[0]):
        return None
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:_SUM]):  # mean and deviation
        return None
    epsilon = node.attributes.get_float("epsilon", _NORMS[kind])
    if kind != _SKIP_NORM:
        return Form(h, tuple(operands), epsilon)
    x, skip, gamma = operands
    return Form(h, (x, gamma, skip), epsilon, node.outputs[_SUM] if len(node.outputs) > _SUM else None)


def _written_out(h: ir.Value) -> Form | None:
    """The form of exported models: ``Mul(gamma, Cast(normalised))``, or ``Cast(Mul(gamma, normalised))``."""
    for gamma, normalised in _orders(_made_by(_uncast(h), "Mul")):
        found = _normalised(_uncast(normalised))
        if found is not None:
            x, epsilon = found
            return Form(h, (x, _uncast(gamma) if gamma.dtype == _FLOAT else gamma), epsilon)
    return None


def _normalised(value: ir.Value) -> tuple[ir.Value, float] | None:
    """x and epsilon of ``x / sqrt(mean(x * x) + epsilon)``, computed in FLOAT."""
    if value.dtype != _FLOAT:
        return None
    pairs = [(x, _inverse_of(factor)) for x, factor in _orders(_made_by(value, "Mul"))]
    pairs += list(_orders(_made_by(value, "Div")))[:1]
    for x, root in pairs:
        epsilon = _epsilon(root, x)
        if epsilon is not None:
            return _uncast(x), epsilon
    return None


def _inverse_of(value: ir.Value) -> ir.Value | None:
    """The r of ``1 / r``."""
    node = _made_by(value, "Reciprocal")
    if node is not None:
        return node.inputs[0]
    node = _made_by(value, "Div")
    return node.inputs[1] if node is not None and _scalar(node.inputs[0]) == 1 else None


def _epsilon(root: ir.Value | None, x: ir.Value) -> float | None:
    """The epsilon of ``sqrt(mean(x * x) + epsilon)`` over the last axis."""
    sqrt = _made_by(root, "Sqrt")
    for mean, constant in _orders(None if sqrt is None else _made_by(sqrt.inputs[0], "Add")):
        reduced, epsilon = _made_by(mean, "ReduceMean"), _scalar(constant)
        if reduced is None or epsilon is None or len(reduced.inputs) != 2:
            continue
        kept = reduced.attributes.get_int("keepdims", 1) == 1
        if kept and _last_axis(_scalar(reduced.inputs[1]), x) and _is_square(reduced.inputs[0], x):
            return epsilon
    return None


def _is_square(value: ir.Value | None, x: ir.Value) -> bool:
    product, power = _made_by(value, "Mul"), _made_by(value, "Pow")
    if product is not None:
        return all(operand is x for operand in product.inputs)
    return power is not None and power.inputs[0] is x and _scalar(power.inputs[1]) == 2


def _last_axis(axis: float | None, x: ir.Value) -> bool:
    return axis == -1 or (axis is not None and x.shape is not None and axis == len(x.shape) - 1)


def _scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element."""
    tensor = None if value is None or value.is_graph_input() else constant_tensor(value)
    return float(np.asarray(tensor.numpy()).reshape(())) if tensor is not None and tensor.size == 1 else None


def _uncast(value: ir.Value) -> ir.Value:
    """``value``, or what a Cast makes it from."""
    cast = _made_by(value, "Cast")
    source = None if cast is None else cast.inputs[0]
    return value if source is None else source


def _made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == (domain, op_type) else None


def _orders(node: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two operands of a node in both orders."""
    left, right = (None, None) if node is None else node.inputs
    if left is not None and right is not None:
        yield left, right
        yield right, left
