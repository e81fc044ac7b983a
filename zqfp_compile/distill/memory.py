"""Whether distillation fits into memory, said before hours of work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch

from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.calibrate.linears import ActivationQuantizer
from zqfp_compile.device import free_memory
from zqfp_compile.distill.student import Student, TrainedTensors
from zqfp_compile.errors import MissingDependencyError
from zqfp_compile.plan import QuantPlan
from zqfp_compile.torch_graph import TorchGraph

# What autograd keeps grows with the square of the length at most (attention), so three lengths tell.
_LENGTHS = (8, 16, 24)
# Per LoRC value: itself, its gradient, Adam's two moments, the rounded form.
_BYTES_PER_TRAINED = 20
# Gradients on their way, temporary results, what the allocator wastes.
_MARGIN = 1.3


def check_memory(model: ir.Model, plan: QuantPlan, interface: CausalLm, length: int, device: str) -> None:
    """Refuse what does not fit.

    Args:
        model: The original.
        plan: Layers and ranks; tensors are not needed.
        interface: How to feed it.
        length: Tokens per window.
        device: ``cpu`` or ``cuda``.

    Raises:
        MissingDependencyError: With the figures and what to do.
    """
    free = free_memory(device)
    weights = _weight_bytes(model, plan)
    if free is None:
        return
    activations = 0
    if weights < free:
        activations = _activation_bytes(model, plan, interface, length, device)
    if weights + activations > free:
        detail = f"{_gib(weights)} for weights"
        detail += f" and {_gib(activations)} for {length} tokens" if activations else ""
        raise MissingDependencyError(
            f"--distill-tokens: distillation needs {detail} in float32 and {_gib(free)} of memory are free "
            f"({device}); lower --calibration-length, take a larger machine or GPU, or drop --distill-tokens"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _weight_bytes(model: ir.Model, plan: QuantPlan) -> int:
    """Return the bytes of the original in float32, the student's codes and what is trained."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    original = sum(max(4 * item.size, item.nbytes) for item in tensors if item is not None)
    student = 0
    for site in plan.rewritten:
        student += (4 if plan.scale_constraint == "none" else 2) * site.n * site.k
        student += _BYTES_PER_TRAINED * plan.precision(site).lorc_rank * (site.n + site.k)
    return original + student


def _activation_bytes(model: ir.Model, plan: QuantPlan, interface: CausalLm, length: int, device: str) -> int:
    """Return what a forward and backward pass of ``length`` tokens holds beside weights."""
    if interface.sequence_length is not None:
        return 0  # no shorter run to measure
    graph = TorchGraph(model, outputs=[interface.logits], device=device)
    student = _placeholders(plan, device)
    saved, logits = [], 0
    for tokens in _LENGTHS:
        feed = interface.make_feed(np.ones((interface.batch_size or 1, tokens), np.int64))
        storages: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(_counting(storages), lambda tensor: tensor):
            (result,) = graph.run(feed, overrides=student.overrides).values()
        saved.append(sum(storages.values()))
        logits = 4 * result.numel() // tokens
    kept = np.polynomial.Polynomial.fit(_LENGTHS, saved, deg=2).convert().coef
    # The constant part is weights. Logits: the original's, the student's, what the loss makes of them.
    growing = float(kept[1]) * length + float(kept[2]) * length**2 if len(kept) == 3 else 0.0
    return int(_MARGIN * (growing + 3 * logits * length))


def _counting(storages: dict[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a hook that notes the storages that autograd keeps: bytes by address."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    return keep


def _placeholders(plan: QuantPlan, device: str) -> Student:
    """Return a student of the right shapes without weights."""
    student = Student()
    for site in plan.rewritten:
        rank = plan.precision(site).lorc_rank
        tensors = TrainedTensors(
            weight=torch.zeros((), dtype=torch.bfloat16, device=device).expand(site.n, site.k),
            row_scales=torch.ones(site.n, device=device),
            scale_rows=1,
            factor_dtype="float32",
            multiplier=torch.zeros(site.n, device=device, requires_grad=True),
        )
        if rank:
            tensors.v = torch.zeros(site.k, rank, device=device, requires_grad=True)
            tensors.u = torch.zeros(rank, site.n, device=device, requires_grad=True)
        student.add(site, tensors, ActivationQuantizer(plan.activation_format), None)
    return student
