"""A quantised weight while it is worked on: in torch, on the device that works on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.quantize.copies import to_host


@dataclass(frozen=True, eq=False)
class QuantizedTensors:
    """The parts of a :class:`QuantizedWeight`, which :meth:`checked` makes of them, on one device.

    Attributes:
        codes: int8 [N, Kp], or float8_e4m3fn [N, K] for ``fp8``.
        group_scales: float32 [N, G], or ``None`` for ``fp8``.
        row_scales: float32 [N].
        k: As in :class:`QuantizedWeight`, like all that follow.
        weight_format: Likewise.
        group_size: Likewise.
        scale_constraint: Likewise.
        scale_rows: Likewise.
    """

    codes: torch.Tensor
    group_scales: torch.Tensor | None
    row_scales: torch.Tensor
    k: int
    weight_format: str
    group_size: int
    scale_constraint: str
    scale_rows: int = 1

    @classmethod
    def of(cls, weight: AnyWeight, device: torch.device | str) -> QuantizedTensors:
        """Return a weight's parts on a device; on the CPU they share an array's memory."""
        if isinstance(weight, QuantizedTensors):
            return weight.to(device)
        scales = weight.group_scales
        return cls(
            _tensor(weight.codes, device),
            None if scales is None else _tensor(scales, device),
            _tensor(weight.row_scales, device),
            *(weight.k, weight.weight_format, weight.group_size, weight.scale_constraint, weight.scale_rows),
        )

    def to(self, device: torch.device | str) -> QuantizedTensors:
        """Return it on ``device``."""
        scales = None if self.group_scales is None else self.group_scales.to(device)
        return dataclasses.replace(
            self, codes=self.codes.to(device), group_scales=scales, row_scales=self.row_scales.to(device)
        )

    def rows(self, rows: slice) -> QuantizedTensors:
        """Return some of the rows, which share memory with all."""
        scales = None if self.group_scales is None else self.group_scales[rows]
        return dataclasses.replace(
            self, codes=self.codes[rows], group_scales=scales, row_scales=self.row_scales[rows]
        )

    def checked(self) -> QuantizedWeight:
        """Return it on the host; from the CPU without a copy.

        Raises:
            ValueError: When the parts do not fit together or break the constraint.
        """
        return QuantizedWeight(
            _array(self.codes),
            None if self.group_scales is None else _array(self.group_scales),
            _array(self.row_scales),
            *(self.k, self.weight_format, self.group_size, self.scale_constraint, self.scale_rows),
        )


# What the parts of are taken wherever they are.
AnyWeight = QuantizedWeight | QuantizedTensors


def joined(parts: Sequence[QuantizedTensors], device: str) -> QuantizedTensors:
    """Return the rows of all parts as one weight on ``device``."""
    first, *others = [part.to(device) for part in parts]
    if not others:
        return first
    parts = [first, *others]
    scales = [part.group_scales for part in parts if part.group_scales is not None]
    return dataclasses.replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        group_scales=torch.cat(scales) if scales else None,
        row_scales=torch.cat([part.row_scales for part in parts]),
    )


def _tensor(array: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    if array.dtype == E4M3FN.dtype:
        return _tensor(array.view(np.uint8), device).view(torch.float8_e4m3fn)
    # Torch does not share what must not be written to, as tensors of a file are.
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.dtype == torch.float8_e4m3fn:
        return _array(tensor.view(torch.uint8)).view(E4M3FN.dtype)
    array: npt.NDArray[Any] = to_host(tensor).numpy()
    return array
