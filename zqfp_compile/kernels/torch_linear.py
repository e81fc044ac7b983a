"""A W4A8 linear layer on the GPU in torch: what tests and benchmarks call libzqfp through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zqfp_compile.kernels.library import Layer, Library, LinearTensors
from zqfp_compile.kernels.packing import pack_codes, pack_group_scales


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernel's order, on the GPU.

    Attributes:
        codes: uint8, ``packing.pack_codes``.
        group_scales: uint8, ``packing.pack_group_scales``.
        row_scales: float32 [N].
    """

    codes: torch.Tensor
    group_scales: torch.Tensor
    row_scales: torch.Tensor

    @classmethod
    def pack(
        cls,
        codes: npt.NDArray[np.int8],
        group_scales: npt.NDArray[Any],
        row_scales: npt.NDArray[np.float32],
        group_size: int,
    ) -> PackedWeight:
        """Pack int8 codes [N, K padded to groups], group scales [N, K padded / g] and float32 row scales [N].

        Raises:
            ValueError: When they are not legal (``packing``).
        """
        arrays = (pack_codes(codes), pack_group_scales(group_scales, group_size), row_scales)
        return cls(*(torch.from_numpy(array).cuda() for array in arrays))


class TorchLinear:
    """One layer with its weights, and workspace for a number of rows, on the current CUDA device.

    Args:
        library: Of ``load_library()``.
        layer: The layer.
        weight: Its weight.
        max_rows: The most rows that a call will have.
        bias: [N], or ``None``.
        v: [K, r], or ``None``.
        u: [r, N], or ``None``.
        scale: The static activation scale of a layer that is not ``per_token``.

    Raises:
        KernelError: When no kernel computes the layer.
    """

    def __init__(
        self,
        library: Library,
        layer: Layer,
        weight: PackedWeight,
        *,
        max_rows: int,
        bias: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        u: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        self.library, self.layer, self.weight = library, layer, weight
        self.bias, self.v, self.u = (
            None if factor is None else factor.to("cuda", layer.dtype).contiguous() for factor in (bias, v, u)
        )
        self.scale = None if scale is None else torch.tensor([scale], device="cuda", dtype=torch.float32)
        size = library.workspace_bytes(layer, max_rows)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return ``(x8, a, xv)`` of the layer's dtype x [M, K]."""
        return self.library.quantize_activation(x, self.scale, self.v)

    def multiply(
        self, x8: torch.Tensor, a: torch.Tensor, xv: torch.Tensor | None, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y [M, N] of what :meth:`quantize` gives; it is written into ``y`` when given."""
        if y is None:
            y = torch.empty((x8.shape[0], self.layer.n), dtype=self.layer.dtype, device=x8.device)
        tensors = LinearTensors(
            x8=x8,
            a=a,
            codes=self.weight.codes,
            group_scales=self.weight.group_scales,
            row_scales=self.weight.row_scales,
            y=y,
            bias=self.bias,
            xv=xv,
            u=self.u,
        )
        self.library.linear(self.layer, tensors, self.workspace)
        return y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [M, N] for x [M, K], both of the layer's dtype."""
        return self.multiply(*self.quantize(x))
