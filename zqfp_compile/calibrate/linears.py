"""What the planned linears compute while a model is walked, in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zqfp_compile.formats.minifloat import MINI_FLOATS
from zqfp_compile.quantize.activation import ACTIVATION_MAX, token_scales
from zqfp_compile.quantize.layer import QuantizedLayer
from zqfp_compile.quantize.lorc import LowRank
from zqfp_compile.quantize.rounding import round_minifloat


@dataclass(frozen=True)
class Replacement:
    """What a linear multiplies with from now on.

    Attributes:
        weight: float32 [N, K]: w8, or W_hat itself when there are no row scales.
        row_scales: R, float32 [N], or ``None``.
        lorc: The low-rank compensation, or ``None``.
        exact: Whether every value of ``weight`` has at most 8 significant bits, as all E4M3 numbers do.
    """

    weight: torch.Tensor
    row_scales: torch.Tensor | None = None
    lorc: LowRank | None = None
    exact: bool = False

    @classmethod
    def of(cls, layer: QuantizedLayer) -> Replacement:
        """Return what the engine multiplies with."""
        rounded = layer.weight.scale_constraint != "none" or layer.weight.weight_format == "fp8"
        return cls(
            weight=torch.from_numpy(layer.weight.fp8_weight()),
            row_scales=torch.tensor(layer.weight.row_scales),  # read back, it is read-only
            lorc=layer.lorc,
            exact=rounded,
        )

    def to(self, device: str) -> Replacement:
        """Return it with its tensors on ``device``."""
        lorc = self.lorc
        if lorc is not None:
            lorc = LowRank(lorc.v.to(device), lorc.u.to(device))
        rows = None if self.row_scales is None else self.row_scales.to(device)
        return Replacement(self.weight.to(device), rows, lorc, self.exact)


@dataclass(frozen=True)
class ActivationQuantizer:
    """How an activation is rounded: ``x ~ a * x8``.

    Attributes:
        activation_format: ``e4m3``, ``e5m2``, ``int8`` or ``none``.
        scale: a, static; ``None`` for one per token.
    """

    activation_format: str
    scale: float | None = None

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return x8 as float32 [T, K] and a: [T, 1], or a number (1 when activations are not quantised)."""
        if self.activation_format not in ACTIVATION_MAX:
            return x, 1.0
        a = token_scales(x, self.activation_format) if self.scale is None else self.scale
        if self.activation_format == "int8":
            return (x / a).round_().clamp_(-128, 127), a
        return round_minifloat(x / a, MINI_FLOATS[self.activation_format]), a


@dataclass(frozen=True)
class FloatLinear:
    """The original layer: ``y = x @ W^T + bias``, rounded once."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [T, K] -> [T, N] in the layer's type."""
        y = x @ self.weight.t() if self.bias is None else torch.addmm(self.bias, x, self.weight.t())
        return y.to(self.dtype)


@dataclass(frozen=True)
class QuantizedLinear:
    """The rewritten layer, rounded where ``zqfp::W4A8Linear`` rounds (``passes/_w4a8_function.py``)."""

    replacement: Replacement
    bias: torch.Tensor | None
    dtype: torch.dtype
    activation_format: str

    def __call__(self, x: torch.Tensor, x8: torch.Tensor, a: torch.Tensor | float) -> torch.Tensor:
        """Return y.

        Args:
            x: The activation, float32 [T, K].
            x8: Its rounded form, float32 [T, K].
            a: Its scale, a number or [T, 1].

        Returns:
            [T, N] in the layer's type.
        """
        y = self._product(x8, a).to(self.dtype)
        if self.replacement.lorc is not None:
            down = (x @ self.replacement.lorc.v).to(self.dtype).float()
            y = y + (down @ self.replacement.lorc.u).to(self.dtype)
        return y if self.bias is None else y + self.bias.to(self.dtype)

    def _product(self, x8: torch.Tensor, a: torch.Tensor | float) -> torch.Tensor:
        new = self.replacement
        if self.activation_format not in ACTIVATION_MAX:  # a float product in the layer's type
            weight = new.weight if new.row_scales is None else new.weight * new.row_scales[:, None]
            return x8 @ weight.to(self.dtype).float().t()
        with _short_products(new.exact):
            y = x8 @ new.weight.t()
        y *= a
        return y if new.row_scales is None else y.mul_(new.row_scales)


@contextmanager
def _short_products(exact: bool) -> Iterator[None]:
    """Let the matrix unit take float32 factors as bfloat16 or TF32, when that loses nothing.

    Factors of 8 significant bits are the same numbers there, and sums stay float32: the FP8 product is as
    exact as before, and four times as fast on processors with AMX.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
