"""Initializers in the kernel's order, computed when the model is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._emit import Names, initializer_value
from passes._plugin_ops import lorc_rank, padded_rank
from passes._tensors import decoded_factor, w4a8_tensors
from passes._w4a8_function import CODES, GROUP_SCALES, INPUTS, LORC_U, LORC_V, LORC_V_SCALE
from zqfp_compile.kernels.packing import pack_codes, pack_group_scales, packed_sizes, padded_shape
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan
from zqfp_compile.weights import release

_E4M3, _INT4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4


class PackedTensors:
    """Registers the initializers of the kernel's ops, those of shared tensors once."""

    def __init__(self, graph: ir.Graph, plan: QuantPlan, names: Names) -> None:
        self._graph = graph
        self._plan = plan
        self._names = names
        self._known: dict[tuple[object, ...], ir.Value] = {}

    def weight(self, site: LinearSite, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Return codes and group scales of a linear, packed: INT4 [Np, Kp] and E4M3 [bytes]."""
        tensors, group = w4a8_tensors(node), self._plan.group_size
        shape, scale_bytes = padded_shape(site.n, site.k), packed_sizes(site.n, site.k, group)[1]
        weight = (id(node.inputs[CODES]), id(node.inputs[GROUP_SCALES]))

        def codes() -> ir.TensorProtocol:
            packed = pack_codes(_stored_codes(tensors)[:, : site.k])
            return ir.PackedTensor(packed, _INT4, shape=ir.Shape(shape))

        def scales() -> ir.TensorProtocol:
            packed = pack_group_scales(_stored_scales(tensors, site), group)
            return ir.Tensor(packed.view(_E4M3.numpy()), dtype=_E4M3)

        return (
            self._lazy(("codes", *weight), f"{site.name}/packed_codes", _INT4, shape, codes),
            self._lazy(("scales", *weight), f"{site.name}/packed_scales", _E4M3, [scale_bytes], scales),
        )

    def v(self, site: LinearSite, node: ir.Node) -> ir.Value:
        """Return V [K, rank] in y's type, padded with columns of zeros."""
        return self.side_by_side([(site, node)])

    def u(self, site: LinearSite, node: ir.Node) -> ir.Value:
        """Return U [rank, N] in y's type, padded with rows of zeros."""
        rank = lorc_rank(node)
        stored = node.inputs[LORC_U]
        if stored is not None and stored.dtype == site.dtype and rank == padded_rank(rank):
            return stored
        factor, pad = _factor(node, LORC_U, site.dtype), padded_rank(rank) - rank

        def compute() -> ir.TensorProtocol:
            return ir.Tensor(np.pad(_read(factor), ((0, pad), (0, 0))), dtype=site.dtype)

        shape = [padded_rank(rank), site.n]
        return self._lazy(("u", id(stored)), f"{site.name}/{INPUTS[LORC_U]}", site.dtype, shape, compute)

    def side_by_side(self, linears: Sequence[tuple[LinearSite, ir.Node]]) -> ir.Value:
        """Return the V of ``linears``, which share x, as one matrix [K, sum of padded ranks]."""
        site, node = linears[0]
        stored, rank = node.inputs[LORC_V], lorc_rank(node)
        fits = stored is not None and stored.dtype == site.dtype and rank == padded_rank(rank)
        if len(linears) == 1 and stored is not None and fits:
            return stored
        factors = [_factor(other, LORC_V, site.dtype) for _, other in linears]
        pads = [padded_rank(lorc_rank(other)) - lorc_rank(other) for _, other in linears]

        def compute() -> ir.TensorProtocol:
            parts = [np.pad(_read(f), ((0, 0), (0, pad))) for f, pad in zip(factors, pads, strict=True)]
            return ir.Tensor(np.concatenate(parts, axis=1), dtype=site.dtype)

        shape = [site.k, sum(padded_rank(lorc_rank(other)) for _, other in linears)]
        key = ("v", *(id(other.inputs[LORC_V]) for _, other in linears))
        return self._lazy(key, f"{site.name}/{INPUTS[LORC_V]}", site.dtype, shape, compute)

    def _lazy(
        self,
        key: tuple[object, ...],
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int],
        compute: Callable[[], ir.TensorProtocol],
    ) -> ir.Value:
        if key not in self._known:
            tensor = ir.LazyTensor(compute, dtype, ir.Shape(shape))
            self._known[key] = initializer_value(self._names.value(name), tensor)
            self._graph.register_initializer(self._known[key])
        return self._known[key]


def _stored_codes(tensors: LinearTensors) -> npt.NDArray[np.int8]:
    codes: npt.NDArray[np.int8] = tensors.codes.numpy().astype(np.int8)
    release(tensors.codes)
    return codes


def _stored_scales(tensors: LinearTensors, site: LinearSite) -> npt.NDArray[Any]:
    if tensors.group_scales is None:
        raise PassError(f"layer {site.name!r}: it has no group scales; quantise it again")
    scales: npt.NDArray[Any] = tensors.group_scales.numpy().copy()
    release(tensors.group_scales)
    return scales


def _factor(node: ir.Node, index: int, dtype: ir.DataType) -> ir.TensorProtocol:
    """A LoRC factor in ``dtype``; one in FP8 is decoded."""
    value = node.inputs[index]
    if node.inputs[LORC_V_SCALE] is not None:
        return decoded_factor(node, index, dtype)
    if value is None or value.const_value is None:
        raise PassError(f"layer {node.name!r}: its LoRC factors are no initializers; lower the artifact")
    return value.const_value


def _read(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = tensor.numpy().copy()
    release(tensor)
    return values
