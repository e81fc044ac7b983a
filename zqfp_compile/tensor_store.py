"""An append-only file of ONNX tensors, so that the quantised weights of a large model never sit in memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from zqfp_compile.disk import full_disk_errors

_ALIGNMENT = 64


class TensorStore:
    """Tensors on disk in ONNX byte order, readable as soon as they are put.

    Use it as a context manager; closing removes the file and invalidates the tensors, so it must outlive
    every model that refers to them. ``tensor.release()`` drops what reading a tensor has mapped or unpacked.
    """

    def __init__(self, folder: Path) -> None:
        """Create the file in ``folder``, which must exist.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        with full_disk_errors(folder):
            descriptor, name = tempfile.mkstemp(prefix="tensors-", suffix=".bin", dir=folder)
        self._path = Path(name)
        self._file = os.fdopen(descriptor, "wb")
        self._tensors: list[ir.ExternalTensor] = []

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def put(self, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
        """Append a tensor.

        Args:
            name: Name of the tensor.
            array: The values, any shape, in any numpy or ``ml_dtypes`` type: INT4 may come as int8,
                FLOAT8E4M3FN as float32. Nothing is rounded here: what was validated is what is stored.
            dtype: Element type to store; types below 8 bits are packed, low bits first (ONNX, TensorProto).

        Returns:
            The stored tensor, of the shape of ``array``.

        Raises:
            ValueError: When a value has no exact representation in ``dtype``.
            MissingDependencyError: When the disk is full.
        """
        data = memoryview(ir.Tensor(_exact_cast(name, array, dtype), dtype=dtype).tobytes())
        with full_disk_errors(self._path):
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
            offset = self._file.tell()
            self._file.write(data)
            self._file.flush()
        tensor = ir.ExternalTensor(
            self._path.name,
            offset=offset,
            length=len(data),
            dtype=dtype,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=str(self._path.parent.absolute()),
        )
        self._tensors.append(tensor)
        return tensor

    def close(self) -> None:
        """Remove the file; the tensors raise from here on."""
        # What a failed write left in the buffer cannot be flushed to a full disk either, and is not wanted.
        with contextlib.suppress(OSError):
            self._file.close()
        for tensor in self._tensors:
            # An array still in use keeps its mapping; the kernel frees the file after it.
            with contextlib.suppress(BufferError):
                tensor.release()
            tensor.invalidate()
        self._tensors.clear()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _exact_cast(name: str, array: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """Return ``array`` in the numpy type of ``dtype``, refusing to change a value."""
    target = dtype.numpy()
    if array.dtype == target:
        return np.ascontiguousarray(array)
    # ml_dtypes integers wrap and its floats round or overflow to NaN, so the way back is compared.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(array).astype(target)
        same = cast.astype(array.dtype) == array
    if not same.all():
        worst = array[~same].flat[0]
        raise ValueError(f"tensor {name!r}: {worst} has no exact {dtype.name} form")
    return cast
