"""A W4A8 linear layer on the GPU in torch: what tests and benchmarks call libzqfp through."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zqfp_compile.kernels.library import Activation, Layer, LayerTensors, Library, LinearTensors
from zqfp_compile.kernels.packing import pack_codes, pack_group_scales

# Rounding y is at most 2^-11 or 2^-8 of each number; as a norm, and with a margin:
_ROUNDING_ERROR = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
# Of the accumulator, per step of 32 columns: the FP8 tensor core keeps about 14 bits and cuts off the rest
# (DESIGN section 7), on average half of its last place and always towards zero.
_STEP_ERROR = 2.0**-14


Output = torch.Tensor | tuple[torch.Tensor, ...]


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
        size = library.quantized_workspace_bytes(layer, max_rows)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return ``(x8, a, xv)`` of the layer's dtype x [M, K]."""
        return self.library.quantize_activation(x, self.scale, self.v)

    def multiply(
        self, x8: torch.Tensor, a: torch.Tensor, xv: torch.Tensor | None, y: Output | None = None
    ) -> Output:
        """Return y [M, N] of what :meth:`quantize` gives, or that of a gated layer or one of several outputs.

        It is written into ``y`` when given.
        """
        if y is None:
            y = self.empty(x8.shape[0])
        tensors = LinearTensors(x8=x8, a=a, xv=xv, **self._layer_tensors(y))
        self.library.linear(self.layer, tensors, self.workspace)
        return y

    def _layer_tensors(self, y: Output) -> dict[str, Any]:
        weight = self.weight
        stored = {"codes": weight.codes, "group_scales": weight.group_scales, "row_scales": weight.row_scales}
        return {**stored, "y": y, "bias": self.bias, "u": self.u}

    def quantized(self, activation: Activation, y: Output | None = None) -> Output:
        """Return y of what is not quantized yet, like :meth:`multiply`; its v and scale are the layer's."""
        if y is None:
            y = self.empty(activation.x.shape[0])
        activation = dataclasses.replace(activation, v=self.v, scale=self.scale)
        tensors = LayerTensors(**self._layer_tensors(y))
        self.library.quantized_linear(self.layer, activation, tensors, self.workspace)
        return y

    def empty(self, m: int) -> Output:
        """Return uninitialised outputs of M rows."""
        made = tuple(torch.empty((m, n), dtype=self.layer.dtype, device="cuda") for n in self.layer.widths)
        return made if self.layer.outputs else made[0]

    def __call__(self, x: torch.Tensor) -> Output:
        """Return :meth:`multiply` of x [M, K], both of the layer's dtype."""
        return self.multiply(*self.quantize(x))

    def tolerance(self, m: int) -> float:
        """Return a bound on ``||y - reference|| / ||reference||`` for M rows of random data.

        It grows with the columns that the FP8 tensor core adds up: all of a slice of K, or, in kernels whose
        names have a p, that many blocks of 128. Those with a w (strips) have sixteen slices. A wrong index
        gives 1, a lost block of K 0.1 or more.
        """
        name, _ = self.library.describe_plan(self.layer, m)
        size = {letter: int(number) for letter, number in re.findall(r"([a-z])(\d+)", name)}
        slices = 16 if "w" in size else size["s"]
        blocks = -(-self.layer.k // (128 * slices))
        steps = 4 * min(blocks, size.get("p", blocks))
        return _ROUNDING_ERROR[self.layer.dtype] + steps * _STEP_ERROR
