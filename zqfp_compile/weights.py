"""Reads a linear's weight and bias as float32, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.errors import ModelError
from zqfp_compile.plan import LinearSite, QuantPlan, WeightSource

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """Where a weight lies, so that any process that sees the file can read it.

    Attributes:
        source: How W[N, K] is made of the stored tensor.
        shape: Shape of the stored tensor.
        dtype: Its numpy type.
        path: The file it lies in, absolute; ``None`` when ``values`` has it.
        offset: Where in the file it starts, in bytes.
        values: The tensor itself when no external file has it.
    """

    source: WeightSource
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    path: str | None
    offset: int
    values: npt.NDArray[Any] | None

    def read(self) -> Float32Array:
        """Return the weight as the graph computes with it, see :func:`read_weight`.

        Raises:
            ModelError: When the file cannot be read, or ends too early.
        """
        array = self.stored()
        if self.source.transposed:
            array = array.T
        if self.path is None:
            weight: Float32Array = np.array(array, np.float32, order="C")
        else:  # nobody else has what was just read
            weight = np.ascontiguousarray(array, np.float32)
        if self.source.scale != 1.0:
            weight *= np.float32(self.source.scale)
        return weight

    def stored(self) -> npt.NDArray[Any]:
        """Return the tensor in its own shape and, casts done, its own type; not to be written to.

        Raises:
            ModelError: When the file cannot be read, or ends too early.
        """
        array = self._bytes()
        with np.errstate(over="ignore"):  # a cast that overflows gives Inf, which the quantizer reports
            for dtype in self.source.casts:
                array = array.astype(dtype.numpy())
        return array

    def _bytes(self) -> npt.NDArray[Any]:
        if self.path is None:
            assert self.values is not None
            return self.values
        count = self.shape[0] * self.shape[1]
        try:
            # Read, not mapped: a file mapping counts as this process's memory for as long as it is there.
            raw = np.fromfile(self.path, np.uint8, count * self.dtype.itemsize, offset=self.offset)
        except OSError as error:
            raise ModelError(
                f"{self.path}: cannot be read ({error.strerror or error}); it must stay where it is, and be "
                "there for every worker, until the compile ends"
            ) from error
        if raw.size < count * self.dtype.itemsize:
            raise ModelError(f"{self.path}: became shorter while it was read; export the model again")
        return raw.view(self.dtype).reshape(self.shape)


def locate_weight(model: ir.Model, source: WeightSource) -> StoredWeight:
    """Return where a linear's weight lies; nothing is read from external data.

    Raises:
        ModelError: When the model has no such initializer, or it is no matrix.
    """
    tensor = _initializer(model, source.initializer)
    if len(tensor.shape) != 2:
        raise ModelError(f"initializer {source.initializer!r} has shape {tensor.shape}; a weight is a matrix")
    rows, columns = (int(size) for size in tensor.shape.numpy())
    external = isinstance(tensor, ir.ExternalTensor)
    return StoredWeight(
        source,
        (rows, columns),
        tensor.dtype.numpy(),
        str(Path(tensor.path).absolute()) if isinstance(tensor, ir.ExternalTensor) else None,
        (tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else 0,
        None if external else tensor.numpy(),
    )


def read_weight(model: ir.Model, source: WeightSource) -> Float32Array:
    """Return the weight as the graph computes with it.

    float16 and bfloat16 become float32 exactly; ``source.casts`` round to nearest even as ONNX Cast does; the
    transpose and ``source.scale`` are applied. The result is a copy, and no file stays mapped.

    Returns:
        W, float32 [N, K], C-contiguous.

    Raises:
        ModelError: When the model has no such initializer, or it is no matrix.
    """
    return locate_weight(model, source).read()


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
