"""The quantised layers, differentiable in what may still change: row scales and LoRC factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from zqfp_compile.calibrate.linears import ActivationQuantizer
from zqfp_compile.layer_item import pack_factors
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan
from zqfp_compile.quantize.grid import decoded_w8
from zqfp_compile.quantize.lorc import LowRank, round_factor
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import read_bias, release

Override = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
Rounded = tuple[torch.Tensor, torch.Tensor | float]


@dataclass(eq=False)
class TrainedTensors:
    """What one quantised weight multiplies with; layers that share the weight share it.

    Attributes:
        weight: w8 [N, K], bfloat16, which holds E4M3 numbers exactly; float32 under the constraint ``none``.
        row_scales: R before training, float32 [N].
        scale_rows: Rows that share a row scale.
        factor_dtype: Storage type of the LoRC factors.
        multiplier: Logarithm of what R is multiplied with, one per row or block of rows; ``None`` where R
            must stay as it is (``m1``: a power of two).
        v: LoRC's V [K, r] before rounding, or ``None``.
        u: LoRC's U [r, N] before rounding, or ``None``.
    """

    weight: torch.Tensor
    row_scales: torch.Tensor
    scale_rows: int
    factor_dtype: str
    multiplier: torch.Tensor | None = None
    v: torch.Tensor | None = None
    u: torch.Tensor | None = None

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        """V and U, where there are any."""
        return () if self.v is None or self.u is None else (self.v, self.u)

    def factor(self) -> torch.Tensor:
        """Return what R is multiplied with, float32 [N]."""
        if self.multiplier is None:
            return torch.ones_like(self.row_scales)
        return self.multiplier.exp().repeat_interleave(self.scale_rows)[: len(self.row_scales)]

    def low_rank(self) -> LowRank | None:
        """Return the factors as they are stored."""
        if self.v is None or self.u is None:
            return None
        v, v_scale = round_factor(self.v.detach(), self.factor_dtype, axis=0)
        u, u_scale = round_factor(self.u.detach(), self.factor_dtype, axis=1)
        return LowRank(v, u, v_scale, u_scale)


class _Product(torch.autograd.Function):
    """``a * (x8 @ w8^T)``; the gradient takes ``a * x8`` for x (straight through).

    The weight stays in its short type between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rounded: Rounded) -> torch.Tensor:
        ctx.save_for_backward(weight)
        x8, a = rounded
        return (x8 @ weight.to(torch.float32).t()).mul_(a)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(torch.float32), None, None


def _straight_through(factor: torch.Tensor, dtype: str, axis: int) -> torch.Tensor:
    """Return a factor rounded for storage, with the gradient of the factor itself."""
    rounded, _ = round_factor(factor.detach(), dtype, axis)
    return factor + (rounded - factor.detach())


@dataclass(eq=False)
class _Activations:
    """Rounds activations; what several layers read in a row is rounded once."""

    last: torch.Tensor | None = None
    rounded: Rounded | None = None

    def __call__(self, x: torch.Tensor, quantizer: ActivationQuantizer) -> Rounded:
        if self.last is not x or self.rounded is None:
            with torch.no_grad():
                self.last, self.rounded = x, quantizer.split(x.detach())
        return self.rounded

    def forget(self) -> None:
        self.last = self.rounded = None


@dataclass(eq=False)
class _Layer:
    """One layer of the student: an override of :class:`TorchGraph`."""

    site: LinearSite
    tensors: TrainedTensors
    quantizer: ActivationQuantizer
    bias: torch.Tensor | None
    activations: _Activations

    def __call__(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        x, own = values[self.site.activation], self.tensors
        y: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, own.weight, self.activations(x, self.quantizer)
        )
        y = y * (own.row_scales * own.factor())
        if own.v is not None and own.u is not None:
            v = _straight_through(own.v, own.factor_dtype, axis=0)
            u = _straight_through(own.u, own.factor_dtype, axis=1)
            y = y + (x @ v) @ u
        return y if self.bias is None else y + self.bias


@dataclass
class Student:
    """The quantised layers of a model.

    Attributes:
        overrides: By the layer's output: what computes it in a :class:`TorchGraph` of the original.
        tensors: By layer name.
    """

    overrides: dict[str, Override] = field(default_factory=dict)
    tensors: dict[str, TrainedTensors] = field(default_factory=dict)
    _activations: _Activations = field(default_factory=_Activations)

    def add(
        self,
        site: LinearSite,
        tensors: TrainedTensors,
        quantizer: ActivationQuantizer,
        bias: torch.Tensor | None,
    ) -> None:
        """Let ``tensors`` compute a layer."""
        self.tensors[site.name] = tensors
        self.overrides[site.output] = _Layer(site, tensors, quantizer, bias, self._activations)

    def forget_activations(self) -> None:
        """Drop what the last run left behind."""
        self._activations.forget()

    def parameters(self, scale_rate: float, factor_rate: float) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield what is trained with its learning rate; ``factor_rate`` is relative to a factor's size."""
        for tensors in {id(item): item for item in self.tensors.values()}.values():
            if tensors.multiplier is not None:
                yield tensors.multiplier, scale_rate
            for factor in tensors.factors:
                yield factor, factor_rate * float(factor.detach().square().mean().sqrt())

    def state(self) -> list[torch.Tensor]:
        """Return a copy of what is trained."""
        return [parameter.detach().clone() for parameter, _ in self.parameters(1, 1)]

    def load(self, state: list[torch.Tensor]) -> None:
        """Go back to an earlier :meth:`state`."""
        for (parameter, _), value in zip(self.parameters(1, 1), state, strict=True):
            parameter.data.copy_(value)


def build_student(model: ir.Model, plan: QuantPlan, device: str) -> Student:
    """Read the plan's tensors back for training.

    Args:
        model: The original, for biases.
        plan: With ``tensors`` and, for static activations, ``activation_scales``. Layers without tensors are
            left to the original.
        device: ``cpu`` or ``cuda``.
    """
    student = Student()
    shared: dict[int, TrainedTensors] = {}
    for site in plan.linears:
        stored = plan.tensors.get(site.name)
        if stored is None:
            continue
        if id(stored) not in shared:
            shared[id(stored)] = _trained(plan, site, stored, device)
        scale = None if plan.per_token else plan.activation_scales.get(site.activation)
        bias = read_bias(model, site)
        row = None if bias is None else torch.from_numpy(bias.copy()).to(device)
        quantizer = ActivationQuantizer(plan.activation_format, scale)
        student.add(site, shared[id(stored)], quantizer, row)
    return student


def store_student(plan: QuantPlan, student: Student, store: TensorStore) -> QuantPlan:
    """Return the plan with what was trained, written to ``store``; everything else is kept."""
    done: dict[int, LinearTensors] = {}
    tensors = dict(plan.tensors)
    for site in plan.linears:
        trained = student.tensors.get(site.name)
        if trained is None:
            continue
        if id(trained) not in done:
            done[id(trained)] = _stored(plan, site, trained, store)
        tensors[site.name] = done[id(trained)]
    return plan.replace(tensors=tensors)


def is_trainable(plan: QuantPlan) -> bool:
    """Whether there is anything to train in the plan's tensors."""
    return any(
        plan.tensors[site.name].lorc_u is not None or _scales_are_free(plan, site)
        for site in plan.linears
        if site.name in plan.tensors
    )


def _scales_are_free(plan: QuantPlan, site: LinearSite) -> bool:
    """Whether a layer's row scales may take any positive value."""
    return plan.scale_constraint != "m1" or plan.precision(site).weight_format == "fp8"


def _trained(plan: QuantPlan, site: LinearSite, stored: LinearTensors, device: str) -> TrainedTensors:
    quantized = plan.quantized_weight(site)
    weight = decoded_w8(quantized, device)
    exact = quantized.weight_format == "fp8" or quantized.scale_constraint != "none"
    rows = 1 if quantized.weight_format == "fp8" else quantized.scale_rows
    result = TrainedTensors(
        weight=weight.to(torch.bfloat16) if exact else weight,
        row_scales=torch.tensor(quantized.row_scales, device=device),
        scale_rows=rows,
        factor_dtype=plan.factor_dtype(site),
    )
    if _scales_are_free(plan, site):
        result.multiplier = torch.zeros(-(-quantized.n // rows), device=device, requires_grad=True)
    factors = plan.low_rank(site)
    if factors is not None:
        result.v, result.u = (torch.from_numpy(factor).to(device).requires_grad_() for factor in factors)
    release(stored.codes, stored.group_scales, stored.row_scales, stored.lorc_v, stored.lorc_u)
    return result


@torch.no_grad()
def _stored(plan: QuantPlan, site: LinearSite, trained: TrainedTensors, store: TensorStore) -> LinearTensors:
    old, changes = plan.tensors[site.name], {}
    if trained.multiplier is not None:
        changes.update(_stored_scales(plan, site, trained, store))
    lorc = trained.low_rank()
    if lorc is not None:
        factors = pack_factors(site.name, lorc, site.dtype)
        changes.update({field: store.put_packed(packed) for field, packed in factors.items()})
    return dataclasses.replace(old, **changes)


def _stored_scales(
    plan: QuantPlan, site: LinearSite, trained: TrainedTensors, store: TensorStore
) -> dict[str, ir.TensorProtocol]:
    factor = trained.factor()
    scales = plan.tensors[site.name].group_scales
    if scales is not None and plan.scale_constraint == "none":  # R is 1
        moved = scales.numpy() * factor.cpu().numpy()[:, None]
        return {"group_scales": store.put(f"{site.name}.group_scales", moved, ir.DataType.FLOAT)}
    rows = (trained.row_scales * factor).cpu().numpy()
    return {"row_scales": store.put(f"{site.name}.row_scales", rows, ir.DataType.FLOAT)}
