"""A quantiser and the layer that alone reads it: two nodes, of which join-quantizers makes one.

A gated layer also as the two that it is one of, gate and up, with the product of SiLU and up behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from fused_quantizers import E4M3, F32, FUSED, Fused, inputs, variants, with_constants
from rewrite_models import NUMPY

from passes._emit import initializer_value, int_attribute
from passes._plugin_ops import LINEAR, QUANTIZE_SILU, plugin_node
from passes.join_quantizers import JoinQuantizers
from zqfp_compile.kernels.packing import gated_order, pack_codes, pack_group_scales, padded_shape

NAME = "attn.q/MatMul"
METADATA = {"zqfp.layer": "attn.q"}
SOURCES = ({"plain": True}, *FUSED)


@dataclass(frozen=True)
class Layer:
    """One pair of nodes.

    Attributes:
        quantizer: The first, whose operands are the graph's inputs.
        sizes: Columns of each output.
        bias: Whether there is one.
        group_size: Weights to a scale.
        gated: Whether the layer is gate and up in one, each with as many rows as the one output has columns.
    """

    quantizer: Fused
    sizes: tuple[int, ...] = (72,)
    bias: bool = False
    group_size: int = 64
    gated: bool = False

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return sum(self.sizes) * (1 + self.gated)

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.sizes))
        return f"{self.quantizer}-n{sizes}" + "-bias" * self.bias + "-gated" * self.gated


def layers(**fixed: Any) -> list[Layer]:
    """Every source with both scales, with and without LoRC; the other options vary with the number."""
    return [
        Layer(case, ((72,), (64, 128, 40))[number // 2 % 2], bool(number % 2), (32, 64, 128)[number % 3])
        for number, case in enumerate(variants(SOURCES, **fixed))
    ]


def gated_layers(features: Sequence[int] = (8, 24, 72), **fixed: Any) -> list[Layer]:
    """The same of gated layers with so many ``features``: less than a block of rows, or more than two."""
    made = []
    for number, layer in enumerate(layers(**fixed)):
        sizes = (features[number // 2 % len(features)],)
        made.append(replace(layer, sizes=sizes, bias=bool((number // 4 + number) % 2), gated=True))
    return made


# What our hosts are called with on the CPU.
LAYERS = layers(dtype=ir.DataType.FLOAT16, k=80)
GATED_LAYERS = gated_layers(dtype=ir.DataType.FLOAT16, k=80)


def model(layer: Layer) -> ir.Model:
    """The two nodes; outputs y.0, y.1, ... and a norm's sum."""
    made = with_constants(layer.quantizer)
    rows = gated_order(layer.n // 2) if layer.gated else np.arange(layer.n)
    linear = _add_linear(made.graph, layer, rows, layer.sizes)
    linear.name = NAME
    if layer.gated:
        linear.attributes["gated"] = ir.AttrInt64("gated", 1)
    for number, value in enumerate(linear.outputs):
        value.name = f"y.{number}"
        value.metadata_props.update(METADATA)
    made.graph.outputs[:] = [*linear.outputs, *_sums(made.graph, layer)]
    return made


def gate_and_up(layer: Layer) -> ir.Model:
    """The quantiser, gate and up of a gated ``layer`` apart, and y.0 = silu(gate) * up.

    That is the h of QuantizeSiluMul, read as its product with a V that is the identity.
    """
    made, features, dtype = with_constants(layer.quantizer), layer.n // 2, layer.quantizer.dtype
    operands = []
    for first, name in ((0, "layer.gate"), (features, "layer.up")):
        linear = _add_linear(made.graph, layer, np.arange(first, first + features), (features,), f"{name}.")
        linear.name = linear.outputs[0].name = name
        operands.append(linear.outputs[0])
    identity = initializer_value("identity", ir.tensor(np.eye(features).astype(NUMPY[dtype])))
    made.graph.register_initializer(identity)
    silu = plugin_node(QUANTIZE_SILU, [*operands, identity], {"lorc_rank": features, "tokens": 1}, 3, {})
    silu.name = "silu"
    for value, name in zip(silu.outputs, ("h8", "h.a", "y.0"), strict=True):
        value.name = name
    h = silu.outputs[2]
    h.dtype, h.shape = dtype, ir.Shape(["batch", features])
    made.graph.append(silu)
    made.graph.outputs[:] = [h, *_sums(made.graph, layer)]
    return made


def _sums(graph: ir.Graph, layer: Layer) -> list[ir.Value]:
    return [graph.node(0).outputs[-1]] * layer.quantizer.skip


def _add_linear(
    graph: ir.Graph, layer: Layer, rows: np.ndarray, sizes: tuple[int, ...], prefix: str = ""
) -> ir.Node:
    """Append a node of those ``rows`` of the layer, which reads the quantiser, the graph's first node."""
    case, quantizer = layer.quantizer, graph.node(0)
    tensors = _tensors(layer, rows)
    values = {name: initializer_value(prefix + name, tensor) for name, tensor in tensors.items()}
    for value in values.values():
        graph.register_initializer(value)
    scale = quantizer.outputs[1] if case.tokens else graph.initializers["a"]
    low = [quantizer.outputs[1 + case.tokens], values.pop("u")] if case.rank else []
    attributes: dict[str, Any] = {"n": len(rows), "k": case.k, "group_size": layer.group_size}
    attributes |= {"lorc_rank": case.rank, "per_token": int(case.tokens), "bias": int(layer.bias)}
    attributes["dtype"] = int(case.dtype)
    if len(sizes) > 1:
        attributes["output_n"] = sizes
    operands = [quantizer.outputs[0], scale, *values.values(), *low]
    linear = plugin_node(LINEAR, operands, attributes, len(sizes), dict(METADATA))
    for value, size in zip(linear.outputs, sizes, strict=True):
        value.dtype, value.shape = case.dtype, ir.Shape(["batch", size])
    graph.append(linear)
    return linear


def joined(layer: Layer) -> ir.Model:
    """The one node."""
    made = model(layer)
    assert JoinQuantizers().call(made).modified
    return made


def set_attributes(node: ir.Node, **attributes: int | Sequence[int]) -> None:
    """Give ``node`` integer attributes, also in place of those it has."""
    for name, value in attributes.items():
        node.attributes[name] = int_attribute(name, value)


def activations(layer: Layer, *shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the graph."""
    feeds = inputs(layer.quantizer, *shape, seed=seed)
    return {name: feeds[name] for name in ("x", "up", "skip") if name in feeds}


def _tensors(layer: Layer, rows: np.ndarray) -> dict[str, ir.TensorProtocol]:
    """Codes, scales, row scales, bias and u of those rows; every code, and scales around 1."""
    rng = np.random.default_rng(3)
    n, k, group, dtype = layer.n, layer.quantizer.k, layer.group_size, layer.quantizer.dtype
    codes = rng.integers(-7, 8, (n, k)).astype(np.int8)
    scales = rng.choice([0.75, 0.875, 1, 1.125, 1.25, 1.375], (n, -(-k // group))).astype(np.float32)
    packed = pack_codes(codes[rows])
    tensors: dict[str, ir.TensorProtocol] = {
        "codes": ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape(padded_shape(len(rows), k))),
        "group_scales": ir.Tensor(pack_group_scales(scales[rows], group).view(E4M3.numpy()), dtype=E4M3),
        "row_scales": ir.Tensor((rng.uniform(0.5, 2, n) * k**-0.5).astype(np.float32)[rows], dtype=F32),
    }
    if layer.bias:
        tensors["bias"] = ir.tensor(rng.standard_normal(n).astype(NUMPY[dtype])[rows])
    if layer.quantizer.rank:
        u = rng.standard_normal((layer.quantizer.rank, n)).astype(NUMPY[dtype])
        tensors["u"] = ir.tensor(np.ascontiguousarray(u[:, rows]))
    return tensors
