"""Reads a linear's weight and bias as float32, one tensor in memory at a time."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.errors import ModelError
from zqfp_compile.plan import LinearSite, QuantPlan, WeightSource

Float32Array = npt.NDArray[np.float32]


def read_weight(model: ir.Model, source: WeightSource) -> Float32Array:
    """Return the weight as the graph computes with it.

    float16 and bfloat16 become float32 exactly; ``source.casts`` round to nearest even as ONNX Cast does; the
    transpose and ``source.scale`` are applied. The result is a copy: the file mapping behind an external
    tensor is closed again.

    Returns:
        W, float32 [N, K], C-contiguous.

    Raises:
        ModelError: When the model has no such initializer, or it is no matrix.
    """
    tensor = _initializer(model, source.initializer)
    if len(tensor.shape) != 2:
        raise ModelError(f"initializer {source.initializer!r} has shape {tensor.shape}; a weight is a matrix")
    array = tensor.numpy()
    with np.errstate(over="ignore"):  # a cast that overflows gives Inf, which the quantizer reports by name
        for dtype in source.casts:
            array = array.astype(dtype.numpy())
    if source.transposed:
        array = array.T
    weight = np.empty(array.shape, np.float32)
    weight[...] = array
    del array
    release(tensor)
    if source.scale != 1.0:
        weight *= np.float32(source.scale)
    return weight


def read_bias(model: ir.Model, site: LinearSite) -> Float32Array | None:
    """Return ``site``'s own bias (Gemm ``beta * C``) as float32 [N], or ``None`` when it has none.

    Raises:
        ModelError: When the model has no such initializer, or it does not broadcast to [N].
    """
    if site.bias is None:
        return None
    tensor = _initializer(model, site.bias)
    row = tensor.numpy().astype(np.float32).reshape(-1)
    release(tensor)
    if row.size not in (1, site.n):
        raise ModelError(
            f"layer {site.name!r}: bias {site.bias!r} has {row.size} values for {site.n} outputs"
        )
    bias: Float32Array = np.broadcast_to(row, (site.n,)) * np.float32(site.bias_scale)
    return bias


def original_weight_bytes(model: ir.Model, plan: QuantPlan) -> int:
    """Return the stored bytes of the planned linears' weights, each shared initializer counted once."""
    names = {site.weight.initializer for site in plan.linears}
    return sum(_initializer(model, name).nbytes for name in sorted(names))


def find_nonfinite(model: ir.Model, plan: QuantPlan) -> str | None:
    """Return what holds NaN (or, as a planned weight, infinity), as text, or ``None``.

    Infinity elsewhere is no fault: attention masks are made of it. Reads every tensor, one at a time.
    """
    layers = {site.weight.initializer: site.name for site in plan.linears}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
            continue
        array = tensor.numpy()
        bad = np.isnan(array).any() if name not in layers else not np.isfinite(array).all()
        del array
        release(tensor)
        if bad:
            return f"tensor {name!r}" + (f" of layer {layers[name]}" if name in layers else "")
    return None


def release(*tensors: ir.TensorProtocol | None) -> None:
    """Drop what reading external tensors has mapped and unpacked.

    Each maps its whole file, and a 4-bit one keeps a byte per value.
    """
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            with contextlib.suppress(BufferError):  # someone else still holds a view of it
                tensor.release()


def _initializer(model: ir.Model, name: str) -> ir.TensorProtocol:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise ModelError(f"the model has no initializer {name!r}; the plan was made for another model")
    return value.const_value
