"""What a compile will need, from the shapes of its layers: memory, disk, and roughly the time.

The constants were measured with ``tools/bench_compile.py`` (docs/size.md says on what).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from zqfp_compile.backends.ort import LOW_MEMORY_BYTES
from zqfp_compile.calibrate.statistics import BLOCK_BYTES
from zqfp_compile.plan import LinearSite, QuantPlan
from zqfp_compile.recipe import Recipe

# Bytes of an interpreter with torch and ONNX Runtime, and of a worker with torch alone.
_BASE, _WORKER = 500 << 20, 260 << 20
# Bytes per weight of the layer at hand: to quantise it (float32, its error, codes, packed tensors), and to
# compare it (ONNX Runtime decodes it in a dozen steps).
_QUANTIZE_BYTES, _CHECK_BYTES = 15, 22
# Bytes per square of the widest input: GPTQ's moments, what follows from them, their inversion in float64.
_MOMENT_BYTES = 44
# Rows of each activation that are kept for the certificate, and its energies.
_ROWS = 72
# Seconds of one core per weight (rounding; LoRC per rank; the certificate; GPTQ), and floating-point
# operations per second of one core in matrix products.
_ROUND, _LORC, _CHECK, _GPTQ = 45e-9, 0.8e-9, 35e-9, 600e-9
_FLOPS = 100e9
# The same of a GPU for GPTQ: 4.8 s for a layer of 7B on an H200, half of it for either.
_GPU_GPTQ, _GPU_FLOPS = 12e-9, 90e12


@dataclass(frozen=True)
class Estimate:
    """What a compile will need.

    Attributes:
        memory_bytes: Most anonymous memory at any time, workers included.
        disk_bytes: Most bytes on the output's disk at any time.
        seconds: Wall time on idle cores, to a factor of two; the engine builder and distillation left out.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float


def job_bytes(elements: int) -> int:
    """Return what each job adds for layers of so many weights: a worker, and later a checking thread."""
    return max(_worker_bytes(elements), _CHECK_BYTES * elements)


def _worker_bytes(elements: int) -> int:
    return _WORKER + _QUANTIZE_BYTES * elements


def estimate(
    model: ir.Model,
    plan: QuantPlan,
    recipe: Recipe,
    *,
    builds: bool,
    processes: int,
    cores: int,
    activation_room: Sequence[int] = (),
) -> Estimate:
    """Estimate a compile.

    Args:
        model: The prepared model.
        plan: Its layers and formats, before anything is quantised.
        recipe: Options.
        builds: Whether something is made to run: an engine, or a model for ONNX Runtime.
        processes: How many processes quantise; as many threads certify.
        cores: Cores there are.
        activation_room: By GPU that does GPTQ, bytes of its memory for activations; the rest lies on disk.
    """
    sizes = [site.k * site.n for site in plan.linears]
    weights = model_bytes(model)
    tokens = recipe.calibration_samples * recipe.calibration_length
    phases = [
        _calibration_bytes(weights, sizes, recipe.calibration_length),
        processes * _worker_bytes(max(sizes)) if processes > 1 else _QUANTIZE_BYTES * max(sizes),
        processes * _CHECK_BYTES * max(sizes),
    ]
    if recipe.algorithm == "gptq" and not activation_room:
        phases.append(
            _MOMENT_BYTES * max(site.k for site in plan.linears) ** 2 + _QUANTIZE_BYTES * max(sizes)
        )
    if recipe.evaluate:
        phases.append(2 * _session_bytes(weights, sizes, recipe.eval_length))
    stored = sum(_stored_bytes(plan, site) for site in plan.linears)
    artifact = weights - sum(_original_bytes(model, plan)) + stored
    lowered = artifact - stored + sum(sizes)  # with weights in FP8
    forms = [
        builds or recipe.evaluate,
        recipe.target.startswith("tensorrt") or "engine-onnx" in recipe.emit,
        "onnxruntime" in recipe.emit and recipe.target != "onnxruntime",
        "triton-repository" in recipe.emit,
    ]
    emitted = artifact if "fp4" in recipe.emit else 0
    rows = 4 * _ROWS * sum({site.activation: site.k for site in plan.linears}.values())
    return Estimate(
        memory_bytes=_BASE + rows + max(phases),
        disk_bytes=stored
        + artifact
        + sum(forms) * lowered
        + emitted
        + rows
        + max(0, _activation_bytes(weights, plan, recipe) - sum(activation_room)),
        seconds=_seconds(sum(sizes), plan, recipe, tokens, processes, cores, len(activation_room)),
    )


def model_bytes(model: ir.Model) -> int:
    """Return the bytes of a model's weights."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _calibration_bytes(weights: int, sizes: Sequence[int], length: int) -> int:
    """A session over one block of the model: its weights in float32, but of a large block one at a time."""
    block = BLOCK_BYTES + 6 * max(sizes)  # a feed-forward, of three of the widest, is not cut
    if weights < block:
        return _session_bytes(weights, sizes, length)
    held = 2 * block if block < LOW_MEMORY_BYTES else 4 * max(sizes)
    return held + _run_bytes(sizes, length)


def _session_bytes(weights: int, sizes: Sequence[int], length: int) -> int:
    """A session of ONNX Runtime: weights widened to float32, all of a small model, one of a large one."""
    held = 4 * max(sizes) if weights > LOW_MEMORY_BYTES else 3 * weights
    return held + _run_bytes(sizes, length)


def _run_bytes(sizes: Sequence[int], length: int) -> int:
    """Some activations of the widest layer, and attention's scores of a few dozen heads."""
    return length * 4 * (16 * int(max(sizes) ** 0.5) + 64 * length)


def _stored_bytes(plan: QuantPlan, site: LinearSite) -> int:
    precision, elements = plan.precision(site), site.k * site.n
    if precision.weight_format == "none":
        return 0
    factors = precision.lorc_rank * (site.k + site.n) * (1 if plan.lorc_format == "fp8" else 2)
    if precision.weight_format == "fp8":
        return elements + 4 * site.n + factors
    groups = site.n * -(-site.k // (plan.group_size or site.k))
    return elements // 2 + groups * (4 if plan.scale_constraint == "none" else 1) + 4 * site.n + factors


def _original_bytes(model: ir.Model, plan: QuantPlan) -> list[int]:
    names = {site.weight.initializer for site in plan.linears if plan.precision(site).weight_format != "none"}
    tensors = (model.graph.initializers[name].const_value for name in names)
    return [tensor.nbytes for tensor in tensors if tensor is not None]


def _activation_bytes(weights: int, plan: QuantPlan, recipe: Recipe) -> int:
    """What is kept of activations on disk, float32.

    A walk keeps them of two streams, before and after a step, with the outputs of the step's linears; the
    calibration, between two blocks, an activation and the residual.
    """
    tokens = recipe.calibration_samples * recipe.calibration_length
    if recipe.algorithm == "gptq":
        return 2 * 2 * 4 * tokens * max(site.k + site.n for site in plan.linears)
    if weights < BLOCK_BYTES:
        return 0
    return 2 * 4 * tokens * max(site.k for site in plan.linears)


def _seconds(
    elements: int, plan: QuantPlan, recipe: Recipe, tokens: int, processes: int, cores: int, gpus: int
) -> float:
    flops = _FLOPS * cores
    lorc = max((plan.precision(site).lorc_rank for site in plan.linears), default=0)
    work = elements * _CHECK / processes
    # GPTQ runs two models, and takes the moments of both.
    products = elements * tokens * (8 if recipe.algorithm == "gptq" else 2)
    if gpus:
        work += (products / _GPU_FLOPS + elements * _GPU_GPTQ) / gpus
    else:
        work += products / flops + elements * (_ROUND + _LORC * lorc) / processes
        work += elements * _GPTQ / cores if recipe.algorithm == "gptq" else 0.0
    if recipe.evaluate:
        work += 4 * elements * recipe.eval_tokens / flops
    return work
