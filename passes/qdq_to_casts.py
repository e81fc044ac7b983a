"""Pass ``qdq-to-casts``: FP8 without QuantizeLinear and DequantizeLinear, for ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes._emit import Emitter, Names, replace_node, shared_initializer
from zqfp_compile.pass_base import Pass, PassResult

_FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class QdqToCasts(Pass):
    """Write FP8 quantisation as Div and Cast, which ONNX Runtime's Q/DQ optimiser leaves alone.

    Before::

        x -> QuantizeLinear(a) -> x8 -> DequantizeLinear(a) -> x_hat
        w8 -> DequantizeLinear(R, axis) -> w_hat

    After, bit for bit the same (Cast to FP8 saturates and rounds as QuantizeLinear does)::

        x -> Div(a) -> Cast -> x8 -> Cast -> Mul(-a) -> Neg -> x_hat
        w8 -> Cast -> Mul(Unsqueeze(R)) -> w_hat

    With its default options ONNX Runtime refuses FP8 Q/DQ graphs, or computes something else (DESIGN section
    5). The sign goes to and fro because its optimiser moves a scalar factor on a MatMul's input behind the
    sum, which rounds differently. A scale of 1 needs only the Cast.

    Left alone: INT8 and INT4, whose Q/DQ it handles; scales that are computed, blocked or not FLOAT, and zero
    points. No weight is loaded.
    """

    name: ClassVar[str] = "qdq-to-casts"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``."""
        rewrite = _Rewrite(model.graph, Names(model.graph))
        modified = False
        for node in list(model.graph):
            if _is_fp8(node):
                rewrite.replace(node)
                modified = True
        return PassResult(model, modified)


def _is_fp8(node: ir.Node) -> bool:
    """Whether ``node`` quantises to FP8, or dequantises from it, with constant FLOAT scales."""
    if node.domain or node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) > 2:
        return False
    value, scale = node.inputs[0], node.inputs[1]
    stored = value if node.op_type == "DequantizeLinear" else node.outputs[0]
    if stored is None or stored.dtype not in _FP8 or scale is None or scale.const_value is None:
        return False
    if scale.dtype != _FLOAT or bool(node.attributes.get_int("block_size", 0)):
        return False
    rank = len(scale.const_value.shape)
    return rank == 0 or (rank == 1 and node.op_type == "DequantizeLinear" and _rank(value) is not None)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


@dataclass(frozen=True)
class _Rewrite:
    graph: ir.Graph
    names: Names

    def replace(self, node: ir.Node) -> None:
        """Put the casts in the place of one Q or DQ node; its value keeps name, type and shape."""
        emit = Emitter(self.graph, self.names, f"{node.name}/", node.metadata_props)
        output = node.outputs[0]
        result = self._quantize(emit, node) if node.op_type == "QuantizeLinear" else self._decode(emit, node)
        result.shape = output.shape
        replace_node(self.graph, node, emit.nodes, result)

    def _quantize(self, emit: Emitter, node: ir.Node) -> ir.Value:
        value, scale, fp8 = node.inputs[0], node.inputs[1], node.outputs[0].dtype
        assert fp8 is not None
        if not _is_one(scale):
            value = emit.op("Div", [value, scale], "scaled", _FLOAT)
        return emit.op("Cast", [value], "cast", fp8, to=int(fp8))

    def _decode(self, emit: Emitter, node: ir.Node) -> ir.Value:
        stored, scale = node.inputs[0], node.inputs[1]
        assert scale is not None and scale.const_value is not None
        value = emit.op("Cast", [stored], "cast", _FLOAT, to=int(_FLOAT))
        if len(scale.const_value.shape):
            rank = _rank(stored)
            assert rank is not None
            axis = node.attributes.get_int("axis", 1) % rank
            others = emit.constant(f"all_axes_but_{axis}_of_{rank}", np.delete(np.arange(rank), axis))
            spread = emit.op("Unsqueeze", [scale, others], "scale", _FLOAT)
            return emit.op("Mul", [value, spread], "scaled", _FLOAT)
        if _is_one(scale):
            return value
        negative = emit.op("Mul", [value, self._negative(scale)], "negative", _FLOAT)
        return emit.op("Neg", [negative], "scaled", _FLOAT)

    def _negative(self, scale: ir.Value) -> ir.Value:
        assert scale.const_value is not None
        tensor = ir.tensor(-scale.const_value.numpy())
        return shared_initializer(self.graph, self.names, f"zqfp.minus.{scale.name}", tensor)


def _is_one(scale: ir.Value | None) -> bool:
    assert scale is not None and scale.const_value is not None
    return bool((scale.const_value.numpy() == 1).all())
