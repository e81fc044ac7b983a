"""An append-only file of ONNX tensors, so that the quantised weights of a large model never sit in memory.

A journal beside it says which work items are complete: a compile that was killed finds them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.disk import full_disk_errors, read_chunks

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A tensor in ONNX byte order, as it goes from a worker to the store.

    Attributes:
        name: Name of the tensor.
        dtype: ONNX element type.
        shape: Its shape.
        data: The bytes, uint8 [B]; types below 8 bits are packed, low bits first (ONNX, TensorProto).
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


def pack(name: str, array: np.ndarray, dtype: ir.DataType) -> PackedTensor:
    """Pack an array.

    Args:
        name: Name of the tensor.
        array: The values, any shape, in any numpy or ``ml_dtypes`` type: INT4 may come as int8, FLOAT8E4M3FN
            as float32. Nothing is rounded here: what was validated is what is stored.
        dtype: Element type to store.

    Raises:
        ValueError: When a value has no exact representation in ``dtype``.
    """
    if dtype == ir.DataType.INT4 and array.dtype == np.int8:
        data = _pack_int4(name, array)
    else:
        data = np.frombuffer(ir.Tensor(_exact_cast(name, array, dtype), dtype=dtype).tobytes(), np.uint8)
    return PackedTensor(name, dtype, tuple(array.shape), data)


class TensorStore:
    """Tensors on disk in ONNX byte order, readable as soon as they are put.

    Use it as a context manager; closing invalidates the tensors, so it must outlive every model that refers
    to them. ``tensor.release()`` drops what reading a tensor has mapped or unpacked. The files belong to
    whoever owns the folder: a store in a folder with an earlier one's files has that one's finished items.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the files in ``folder``, which must exist and belong to nobody else.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        self._path = folder / "tensors.bin"
        self._journal = folder / "tensors.jsonl"
        self._tensors: list[ir.ExternalTensor] = []
        with full_disk_errors(folder):
            self._items = _intact_items(self._journal, self._path)
            self._file = self._path.open("r+b" if self._items else "wb")
            self._file.truncate(max((entry["end"] for entry in self._items.values()), default=0))
            self._file.seek(0, os.SEEK_END)
            lines = [json.dumps(entry) + "\n" for entry in self._items.values()]
            fresh = self._journal.with_suffix(".new")
            fresh.write_text("".join(lines), encoding="utf-8")
            fresh.replace(self._journal)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def finished(self) -> int:
        """Number of complete items."""
        return len(self._items)

    def put(self, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
        """Append a tensor that belongs to no item; see :func:`pack`.

        Returns:
            The stored tensor, of the shape of ``array``.

        Raises:
            ValueError: When a value has no exact representation in ``dtype``.
            MissingDependencyError: When the disk is full.
        """
        return self.put_packed(pack(name, array, dtype))

    def put_packed(self, packed: PackedTensor) -> ir.ExternalTensor:
        """Append a packed tensor that belongs to no item.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        with full_disk_errors(self._path):
            entry = self._append(packed)
            self._file.flush()
        return self._tensor(entry)

    def add(self, key: str, tensors: Mapping[str, PackedTensor]) -> dict[str, ir.ExternalTensor]:
        """Append the tensors of one work item, and note that it is complete.

        Args:
            key: What the tensors depend on; :meth:`get` finds them by it, also in a later process.
            tensors: By any names, which the result has as well.

        Raises:
            MissingDependencyError: When the disk is full.
        """
        with full_disk_errors(self._path):
            entries = {field: self._append(tensor) for field, tensor in tensors.items()}
            self._file.flush()
            digest = hashlib.sha256()
            for tensor in tensors.values():
                digest.update(tensor.data.data)
            item = {"key": key, "sha256": digest.hexdigest(), "end": self._file.tell()}
            item["tensors"] = entries
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(item) + "\n")
        self._items[key] = item
        return {field: self._tensor(entry) for field, entry in entries.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def get(self, key: str) -> dict[str, ir.ExternalTensor] | None:
        """Return the tensors of a finished item, or ``None``."""
        item = self._items.get(key)
        return None if item is None else {f: self._tensor(entry) for f, entry in item["tensors"].items()}

    def close(self) -> None:
        """Close the files; the tensors raise from here on."""
        # What a failed write left in the buffer cannot be flushed to a full disk either, and is not wanted.
        with contextlib.suppress(OSError):
            self._file.close()
        for tensor in self._tensors:
            # An array still in use keeps its mapping; the kernel frees a removed file after it.
            with contextlib.suppress(BufferError):
                tensor.release()
            tensor.invalidate()
        self._tensors.clear()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, packed: PackedTensor) -> dict[str, Any]:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        entry = {
            "name": packed.name,
            "dtype": packed.dtype.name,
            "shape": list(packed.shape),
            "offset": self._file.tell(),
            "length": len(packed.data),
        }
        self._file.write(packed.data.data)
        return entry

    def _tensor(self, entry: Mapping[str, Any]) -> ir.ExternalTensor:
        tensor = ir.ExternalTensor(
            self._path.name,
            offset=entry["offset"],
            length=entry["length"],
            dtype=ir.DataType[entry["dtype"]],
            shape=ir.Shape(entry["shape"]),
            name=entry["name"],
            base_dir=str(self._path.parent.absolute()),
        )
        self._tensors.append(tensor)
        return tensor


def _intact_items(journal: Path, data: Path) -> dict[str, dict[str, Any]]:
    """Return the journal's items up to the first whose bytes are not what they were.

    Nothing is flushed to the disk while a compile runs: after a power cut the digests tell what got there.
    """
    items: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a line that was being written
        lines = journal.read_text(encoding="utf-8").splitlines()
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            for item in pool.map(partial(_intact, data), lines):
                if item is None:
                    break
                items[item["key"]] = item
    return items


def _intact(data: Path, line: str) -> dict[str, Any] | None:
    """Return the item of a line of the journal; ``None`` when its bytes are others."""
    item: dict[str, Any] = json.loads(line)
    digest = hashlib.sha256()
    for entry in item["tensors"].values():
        for chunk in read_chunks(data, entry["offset"], entry["length"]):
            digest.update(chunk)
    return item if digest.hexdigest() == item["sha256"] else None


def _pack_int4(name: str, array: np.ndarray) -> npt.NDArray[np.uint8]:
    """Return what a tensor of INT4 would, in a tenth of the time.

    As an array: making bytes of it would copy while no other thread runs, such as those that launch on GPUs.
    """
    if array.size and (array.min() < -8 or array.max() > 7):
        _exact_cast(name, array, ir.DataType.INT4)  # raises
    nibbles = array.reshape(-1).view(np.uint8)
    packed: npt.NDArray[np.uint8] = nibbles[0::2] & np.uint8(0x0F)
    packed[: nibbles.size // 2] |= nibbles[1::2] << 4
    return packed


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
