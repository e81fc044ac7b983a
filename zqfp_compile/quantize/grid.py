"""The values a weight can take once its scales are fixed."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from zqfp_compile.formats.codebook import CODE_BOOKS
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.quantize.quantized_tensors import AnyWeight, QuantizedTensors
from zqfp_compile.quantize.rounding import decode_codes, nearest_level, round_minifloat
from zqfp_compile.quantize.rtn import decoded_levels


class Grid(Protocol):
    """What a weight W[N, K] may be rounded to.

    Attributes:
        table: Ascending magnitudes per group, float32 [G, N, L], when signs are symmetric and L is small.
        group_size: Columns per group of ``table``; 0 for one group.
    """

    table: torch.Tensor | None
    group_size: int

    def nearest(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """Return the grid values nearest to column ``index`` of the weight, [N] -> [N]."""


class WeightGrid:
    """The values a quantised weight can take when its scales are fixed: a :class:`Grid`."""

    def __init__(self, start: AnyWeight, device: torch.device | str) -> None:
        """Take the scales of ``start``; its codes do not matter."""
        self._start = start = QuantizedTensors.of(start, device)
        self.table: torch.Tensor | None = None
        self.group_size = start.group_size
        if start.weight_format == "fp8":
            self._rows = start.row_scales
            return
        # [G, N, 8] and [G, N, 7]: one group's table is contiguous.
        self.table = decoded_levels(start, device).permute(2, 1, 0).contiguous()
        self._middles = ((self.table[..., 1:] + self.table[..., :-1]) / 2).contiguous()

    def nearest(self, column: torch.Tensor, index: int) -> torch.Tensor:
        """Return the grid values nearest to column ``index`` of the weight, [N] -> [N]."""
        if self.table is None:
            return round_minifloat(column / self._rows, E4M3FN) * self._rows
        group = index // self.group_size if self.group_size else 0
        place = torch.searchsorted(self._middles[group], column.abs()[:, None])
        return self.table[group].gather(1, place)[:, 0].copysign_(column)

    def encode(self, values: torch.Tensor) -> QuantizedTensors:
        """Return the quantised weight with the grid values nearest to ``values`` [N, K]."""
        start = self._start
        if self.table is None:
            rounded = round_minifloat(values / self._rows[:, None], E4M3FN).to(torch.float8_e4m3fn)
            return dataclasses.replace(start, codes=rounded.contiguous())
        width = start.codes.shape[1]
        padded = torch.nn.functional.pad(values, (0, width - values.shape[1]))
        groups = padded.reshape(len(values), len(self.table), -1)
        index = nearest_level(groups.abs(), self.table.permute(2, 1, 0)[..., None]).copysign_(groups)
        # The values came as columns.
        return dataclasses.replace(start, codes=index.reshape(padded.shape).to(torch.int8).contiguous())


def decoded_w8(weight: AnyWeight, device: torch.device | str) -> torch.Tensor:
    """Return w8, float32 [N, K]: :meth:`QuantizedWeight.fp8_weight` in torch."""
    weight = QuantizedTensors.of(weight, device)
    codes, scales = weight.codes, weight.group_scales
    if scales is None:
        return codes.to(torch.float32)
    values = decode_codes(codes, CODE_BOOKS[weight.weight_format])
    values = (values.view(*scales.shape, -1) * scales[..., None]).view(codes.shape)[:, : weight.k]
    return values if weight.scale_constraint == "none" else round_minifloat(values, E4M3FN)


def decoded(weight: AnyWeight, device: torch.device | str) -> torch.Tensor:
    """Return W_hat, float32 [N, K]: :meth:`QuantizedWeight.dequantize` in torch."""
    weight = QuantizedTensors.of(weight, device)
    return decoded_w8(weight, device) * weight.row_scales[:, None]
