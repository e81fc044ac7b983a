"""What the planned linears compute while a model is walked, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
import torch

from zqfp_compile.plan import WeightSource
from zqfp_compile.quantize.activation import ACTIVATION_MAX, quantize_activation
from zqfp_compile.quantize.grid import decoded_w8
from zqfp_compile.quantize.layer import QuantizedLayer
from zqfp_compile.quantize.lorc import LowRank
from zqfp_compile.quantize.products import full_products, halved, product_of_halves, short_products
from zqfp_compile.torch_graph.dtypes import from_array
from zqfp_compile.weights import StoredWeight, locate_weight


def load_weight(model: ir.Model, source: WeightSource, device: str) -> torch.Tensor:
    """Return :func:`zqfp_compile.weights.read_weight` on ``device``; a GPU widens and transposes itself.

    Raises:
        ModelError: When the weight cannot be read.
    """
    weight = locate_weight(model, source)
    on_cpu = torch.device(device).type == "cpu"
    return torch.from_numpy(weight.read()) if on_cpu else read_in_torch(weight, device)


def read_in_torch(weight: StoredWeight, device: str) -> torch.Tensor:
    """Return what :meth:`StoredWeight.read` does, to the last bit, on ``device``."""
    stored = from_array(weight.stored(), device).to(torch.float32)
    stored = (stored.t() if weight.source.transposed else stored).contiguous()
    return stored if weight.source.scale == 1.0 else stored * weight.source.scale


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
    def of(cls, layer: QuantizedLayer, device: torch.device | str = "cpu") -> Replacement:
        """Return what the engine multiplies with; the weight lies on ``device``, a GPU decodes it itself."""
        rounded = layer.tensors.scale_constraint != "none" or layer.tensors.weight_format == "fp8"
        on_cpu = torch.device(device).type == "cpu"
        return cls(
            weight=torch.from_numpy(layer.weight.fp8_weight())
            if on_cpu
            else decoded_w8(layer.tensors, device),
            row_scales=layer.tensors.row_scales,
            lorc=layer.lorc,
            exact=rounded,
        )

    def to(self, device: str) -> Replacement:
        """Return it with its tensors on ``device``."""
        lorc = None if self.lorc is None else self.lorc.to(device)
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

    @property
    def rounds(self) -> bool:
        """Whether it does anything."""
        return self.activation_format in ACTIVATION_MAX

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return x8 as float32 [T, K] and a: [T, 1], or a number (1 when activations are not quantised)."""
        if not self.rounds:
            return x, 1.0
        return quantize_activation(x, self.activation_format, self.scale)


@dataclass(frozen=True)
class FloatLinear:
    """The original layer: ``y = x @ W^T + bias``, rounded once.

    In full float32, or close to it on a GPU: with products of bfloat16 factors (4 times as fast with AMX) the
    quantised model's distance to the original grew by 0.05 to 0.1 dB (SmolLM2-135M, first two layers).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    @cached_property
    def _halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return halved(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [T, K] -> [T, N] in the layer's type."""
        if self.weight.is_cuda:
            y = product_of_halves(x, self._halves)
            return (y if self.bias is None else y + self.bias).to(self.dtype)
        with full_products():
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
            with full_products():
                down = (x @ self.replacement.lorc.v).to(self.dtype).float()
                y = y + (down @ self.replacement.lorc.u).to(self.dtype)
        return y if self.bias is None else y + self.bias.to(self.dtype)

    def _product(self, x8: torch.Tensor, a: torch.Tensor | float) -> torch.Tensor:
        new = self.replacement
        if self.activation_format not in ACTIVATION_MAX:  # a float product in the layer's type
            weight = new.weight if new.row_scales is None else new.weight * new.row_scales[:, None]
            return x8 @ weight.to(self.dtype).float().t()
        with short_products(new.exact):
            y = x8 @ new.weight.t()
        if new.row_scales is None:
            return y.mul_(a)
        return y.mul_(a * new.row_scales) if isinstance(a, float) else y.mul_(a).mul_(new.row_scales)
