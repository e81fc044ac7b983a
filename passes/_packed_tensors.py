"""Initializers in the kernel's order, computed when the model is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from passes._emit import Names, initializer_value
from passes._plugin_ops import Linears, Product, lorc_rank, padded_rank
from passes._tensors import decoded_factor, w4a8_tensors
from passes._w4a8_function import (
    BIAS,
    CODES,
    GROUP_SCALES,
    INPUTS,
    LORC_U,
    LORC_V,
    LORC_V_SCALE,
    ROW_SCALES,
)
from zqfp_compile.kernels.packing import (
    gated_order,
    pack_codes,
    pack_group_scales,
    packed_sizes,
    padded_shape,
)
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

    def weight(self, product: Product) -> tuple[ir.Value, ir.Value]:
        """Return codes and group scales of a product, packed: INT4 [Np, Kp] and E4M3 [bytes]."""
        linears, group = product.linears, self._plan.group_size
        n, k = product.n, linears[0][0].k
        tensors = [w4a8_tensors(node) for _, node in linears]
        shape, scale_bytes = padded_shape(n, k), packed_sizes(n, k, group)[1]

        def codes() -> ir.TensorProtocol:
            packed = pack_codes(_rows(product, [_stored_codes(part)[:, :k] for part in tensors]))
            return ir.PackedTensor(packed, _INT4, shape=ir.Shape(shape))

        def scales() -> ir.TensorProtocol:
            stored = [_stored_scales(part, site) for part, (site, _) in zip(tensors, linears, strict=True)]
            packed = pack_group_scales(_rows(product, stored), group)
            return ir.Tensor(packed.view(_E4M3.numpy()), dtype=_E4M3)

        ids = [(id(node.inputs[CODES]), id(node.inputs[GROUP_SCALES])) for _, node in linears]
        key = (product.gated is not None, *ids)
        return (
            self._lazy(("codes", *key), f"{product.name}/packed_codes", _INT4, shape, codes),
            self._lazy(("scales", *key), f"{product.name}/packed_scales", _E4M3, [scale_bytes], scales),
        )

    def row_scales(self, product: Product) -> ir.Value | None:
        """Return the row scales of a product, FLOAT [N]."""
        return self._by_row(product, ROW_SCALES, ir.DataType.FLOAT)

    def bias(self, product: Product) -> ir.Value | None:
        """Return the bias of a product in y's type, [N], zeros for layers without; or ``None``."""
        if all(node.inputs[BIAS] is None for _, node in product.linears):
            return None
        return self._by_row(product, BIAS, product.linears[0][0].dtype)

    def _by_row(self, product: Product, index: int, dtype: ir.DataType) -> ir.Value | None:
        linears = product.linears
        values = [node.inputs[index] for _, node in linears]
        if len(linears) == 1:
            return values[0]
        factors = [
            None if value is None else _factor(node, index, dtype)
            for value, (_, node) in zip(values, linears, strict=True)
        ]

        def compute() -> ir.TensorProtocol:
            parts = [
                np.zeros(site.n, dtype.numpy()) if factor is None else _read(factor)
                for factor, (site, _) in zip(factors, linears, strict=True)
            ]
            return ir.Tensor(_rows(product, parts), dtype=dtype)

        ids = [(id(value), site.n) for value, (site, _) in zip(values, linears, strict=True)]
        key = (INPUTS[index], product.gated is not None, *ids)
        return self._lazy(key, f"{product.name}/{INPUTS[index]}", dtype, [product.n], compute)

    def u(self, product: Product) -> ir.Value:
        """Return U [rank, N] of a product in y's type: block-diagonal, ranks padded with rows of zeros."""
        linears = product.linears
        (site, node), stored = linears[0], linears[0][1].inputs[LORC_U]
        dtype, padded = site.dtype, padded_rank(lorc_rank(node)) != lorc_rank(node)
        if len(linears) == 1 and stored is not None and stored.dtype == dtype and not padded:
            return stored
        factors = [_factor(other, LORC_U, dtype) for _, other in linears]
        ranks, shape = [lorc_rank(other) for _, other in linears], (product.rank, product.n)

        def compute() -> ir.TensorProtocol:
            parts, row = [], 0
            for factor, rank, (part, _) in zip(factors, ranks, linears, strict=True):
                block = np.zeros((part.n, shape[0]), dtype.numpy())
                block[:, row : row + rank] = _read(factor).T
                parts.append(block)
                row += padded_rank(rank)
            return ir.Tensor(np.ascontiguousarray(_rows(product, parts).T), dtype=dtype)

        key = ("u", product.gated is not None, *(id(other.inputs[LORC_U]) for _, other in linears))
        return self._lazy(key, f"{product.name}/{INPUTS[LORC_U]}", dtype, shape, compute)

    def v(self, linears: Linears) -> ir.Value:
        """Return the V of ``linears``, which share x, side by side in y's type, ranks padded with zeros."""
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

        key = ("v", *(id(other.inputs[LORC_V]) for _, other in linears))
        shape = [site.k, Product(linears).rank]
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


def _rows(product: Product, parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """What the layers have for each row, in the order of the product's rows."""
    below = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return below[gated_order(product.n // 2)] if product.gated else below


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
    """An input of ``node`` in ``dtype``; a LoRC factor in FP8 is decoded."""
    value = node.inputs[index]
    if index in (LORC_V, LORC_U) and node.inputs[LORC_V_SCALE] is not None:
        return decoded_factor(node, index, dtype)
    if value is None or value.const_value is None:
        raise PassError(f"layer {node.name!r}: {INPUTS[index]} is no initializer; lower the artifact")
    return value.const_value


def _read(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = tensor.numpy().copy()
    release(tensor)
    return values
