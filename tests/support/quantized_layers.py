"""A quantiser and the layer that alone reads it: two nodes, of which join-quantizers makes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from fused_quantizers import E4M3, F32, FUSED, Fused, inputs, variants, with_constants
from rewrite_models import NUMPY

from passes._emit import initializer_value
from passes._plugin_ops import LINEAR, plugin_node
from passes.join_quantizers import JoinQuantizers
from zqfp_compile.kernels.packing import pack_codes, pack_group_scales, padded_shape

NAME = "attn.q/MatMul"
METADATA = {"zqfp.layer": "attn.q"}
SOURCES = ({"plain": True}, *FUSED)


@dataclass(frozen=True)
class Layer:
    """One pair of nodes.

    Attributes:
        quantizer: The first, whose operands are the graph's inputs.
        sizes: N of each output.
        bias: Whether there is one.
        group_size: Weights to a scale.
    """

    quantizer: Fused
    sizes: tuple[int, ...] = (72,)
    bias: bool = False
    group_size: int = 64

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.sizes))
        return f"{self.quantizer}-n{sizes}" + "-bias" * self.bias


def layers(**fixed: Any) -> list[Layer]:
    """Every source with both scales, with and without LoRC; the other options vary with the number."""
    return [
        Layer(case, ((72,), (64, 128, 40))[number // 2 % 2], bool(number % 2), (32, 64, 128)[number % 3])
        for number, case in enumerate(variants(SOURCES, **fixed))
    ]


# What our hosts are called with on the CPU.
LAYERS = layers(dtype=ir.DataType.FLOAT16, k=80)


def model(layer: Layer) -> ir.Model:
    """The two nodes; outputs y.0, y.1, ... and a norm's sum."""
    case, n = layer.quantizer, sum(layer.sizes)
    made = with_constants(case)
    graph, quantizer = made.graph, made.graph.node(0)
    values = {name: initializer_value(name, tensor) for name, tensor in _tensors(layer).items()}
    for value in values.values():
        graph.register_initializer(value)
    scale = quantizer.outputs[1] if case.tokens else graph.initializers["a"]
    low = [quantizer.outputs[1 + case.tokens], values.pop("u")] if case.rank else []
    attributes: dict[str, Any] = {"n": n, "k": case.k, "group_size": layer.group_size, "lorc_rank": case.rank}
    attributes |= {"per_token": int(case.tokens), "bias": int(layer.bias), "dtype": int(case.dtype)}
    if len(layer.sizes) > 1:
        attributes["output_n"] = layer.sizes
    operands = [quantizer.outputs[0], scale, *values.values(), *low]
    linear = plugin_node(LINEAR, operands, attributes, len(layer.sizes), dict(METADATA))
    linear.name = NAME
    for number, (value, size) in enumerate(zip(linear.outputs, layer.sizes, strict=True)):
        value.name, value.dtype, value.shape = f"y.{number}", case.dtype, ir.Shape(["batch", size])
        value.metadata_props.update(METADATA)
    graph.append(linear)
    sums = [quantizer.outputs[-1]] * case.skip
    graph.outputs[:] = [*linear.outputs, *sums]
    return made


def joined(layer: Layer) -> ir.Model:
    """The one node."""
    made = model(layer)
    assert JoinQuantizers().call(made).modified
    return made


def activations(layer: Layer, *shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of the graph."""
    feeds = inputs(layer.quantizer, *shape, seed=seed)
    return {name: feeds[name] for name in ("x", "up", "skip") if name in feeds}


def _tensors(layer: Layer) -> dict[str, ir.TensorProtocol]:
    """Codes, scales, rows, bias and u; every code, and scales around 1."""
    rng = np.random.default_rng(3)
    n, k, group, dtype = sum(layer.sizes), layer.quantizer.k, layer.group_size, layer.quantizer.dtype
    codes = pack_codes(rng.integers(-7, 8, (n, k)).astype(np.int8))
    scales = rng.choice([0.75, 0.875, 1, 1.125, 1.25, 1.375], (n, -(-k // group))).astype(np.float32)
    tensors: dict[str, ir.TensorProtocol] = {
        "codes": ir.PackedTensor(codes, ir.DataType.INT4, shape=ir.Shape(padded_shape(n, k))),
        "group_scales": ir.Tensor(pack_group_scales(scales, group).view(E4M3.numpy()), dtype=E4M3),
        "row_scales": ir.Tensor((rng.uniform(0.5, 2, n) * k**-0.5).astype(np.float32), dtype=F32),
    }
    if layer.bias:
        tensors["bias"] = ir.tensor(rng.standard_normal(n).astype(NUMPY[dtype]))
    if layer.quantizer.rank:
        tensors["u"] = ir.tensor(rng.standard_normal((layer.quantizer.rank, n)).astype(NUMPY[dtype]))
    return tensors
