"""Are the tensors of a model file what they say? Decided from the proto and ``stat``; no data is read."""

from __future__ import annotations

import bisect
import math
import os
import re
import stat
from pathlib import Path

import onnx
import onnx_ir as ir

from zqfp_compile.disk import format_bytes
from zqfp_compile.errors import ModelError
from zqfp_compile.hub_cache import HubLinks

MAX_RANK = 32
MAX_TENSOR_BYTES = 1 << 40
MAX_TOTAL_BYTES = 1 << 43
MAX_NAME_SHOWN = 80

_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum", "basepath"})

# The field of TensorProto that holds each type when raw_data does not; all others are in int32_data.
_TYPED_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.UINT32: "uint64_data",
}


def show(name: str) -> str:
    """Return a name from a model file so that it fits on one line of a message, in quotes."""
    text = repr(name)
    return text if len(text) <= MAX_NAME_SHOWN else text[: MAX_NAME_SHOWN - 4] + "...'"


class TensorChecker:
    """Checks tensors one by one and keeps count of their bytes; external files are looked at once each."""

    def __init__(self, folder: Path) -> None:
        """Check against ``folder``, the one the model file is in."""
        self._folder = folder
        self._real_folder = os.path.realpath(folder)
        self._links = HubLinks(folder)
        self._sizes: dict[str, int] = {}
        self._regions: dict[str, list[tuple[int, int]]] = {}  # per file: sorted (begin, end)
        self._total = 0

    def check(self, tensor: onnx.TensorProto, where: str, external: bool = True) -> None:
        """Check one tensor.

        Args:
            tensor: The proto; external data is not loaded.
            where: What holds it, for messages.
            external: Whether its data may be external.

        Raises:
            ModelError: On a bad type, shape or budget, on data that does not fit the shape, and on external
                data that is missing, too short, partly another tensor's, or anything but a regular file of
                its own inside the model's folder, or in the Hugging Face cache that this is a snapshot of.
        """
        label = f"tensor {show(tensor.name)} in {where}"
        dtype, count = _check_shape(tensor, label)
        nbytes = (count * dtype.bitwidth + 7) // 8
        self._total += nbytes
        if nbytes > MAX_TENSOR_BYTES or self._total > MAX_TOTAL_BYTES:
            raise ModelError(
                f"{label}: brings the weights to {format_bytes(self._total)}, more than any model this tool "
                "takes; the file is damaged or hostile, export it again"
            )
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            if not external:
                raise ModelError(f"{label}: cannot be external data; save it inside the model file")
            self._check_external(tensor, label, dtype, nbytes)
        else:
            _check_inline(tensor, label, dtype, count, nbytes)

    def _check_external(self, tensor: onnx.TensorProto, label: str, dtype: ir.DataType, nbytes: int) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        unknown = sorted(set(entries) - _EXTERNAL_KEYS)
        if unknown or len(entries) != len(tensor.external_data):
            fault = (
                f"unknown external data entry {show(unknown[0])}"
                if unknown
                else "repeated external data entry"
            )
            raise ModelError(f"{label}: {fault}; export the model again")
        location = entries.get("location", "")
        offset = _parse_number(entries.get("offset", "0"), "offset", label)
        length = _parse_number(entries.get("length", str(nbytes)), "length", label)
        if length != nbytes:
            raise ModelError(
                f"{label}: the external data is {length} bytes long, its shape {_show_dims(tensor)} and type "
                f"{dtype.name} need {nbytes}; export the model again"
            )
        if location not in self._sizes:
            self._sizes[location] = self._check_file(location, label)
        size = self._sizes[location]
        if offset + nbytes > size:
            raise ModelError(
                f"{label}: data ends at byte {offset + nbytes} of {show(location)}, which has only {size}; "
                "the data file is truncated or of another model, copy it again"
            )
        if nbytes:
            self._check_overlap(location, (offset, offset + nbytes), label)

    def _check_overlap(self, location: str, region: tuple[int, int], label: str) -> None:
        """Check that a region is a tensor's own, or all of another's: equal tensors may be stored once."""
        regions = self._regions.setdefault(location, [])
        place = bisect.bisect_left(regions, region)
        if place < len(regions) and regions[place] == region:
            return
        beside = regions[max(place - 1, 0) : place + 1]
        if any(begin < region[1] and region[0] < end for begin, end in beside):
            raise ModelError(
                f"{label}: its bytes {region[0]} to {region[1]} of {show(location)} overlap another "
                "tensor's; its offset or length is wrong, export the model again"
            )
        regions.insert(place, region)

    def _check_file(self, location: str, label: str) -> int:
        """Return the size of an external data file after making sure that it is safe to open."""
        outside = Path(location).is_absolute() or ".." in Path(location).parts
        if not location or outside or "\0" in location:
            raise ModelError(
                f"{label}: external data location {show(location)} is not a path inside the model's folder; "
                "put the data beside the model and export it with a relative location"
            )
        path = self._folder / location
        try:
            status = path.lstat()
        except OSError as error:
            raise ModelError(
                f"{label}: its external data file {show(location)} cannot be opened ({error.strerror}); "
                "copy it beside the model, under the name it had at export"
            ) from error
        expected = os.path.normpath(os.path.join(self._real_folder, location))  # noqa: PTH118 - plain strings
        blob = self._links.blob(location)
        if blob is not None:
            status = self._blob_status(blob, location, label)
        elif os.path.realpath(path) != expected:
            raise ModelError(
                f"{label}: its external data {show(location)} is behind a symbolic link; "
                "make a real copy of the model's folder (cp -rL) and compile that"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(
                f"{label}: its external data {show(location)} is not a regular file; copy it again"
            )
        if status.st_nlink != 1:
            raise ModelError(
                f"{label}: its external data {show(location)} has {status.st_nlink} hard links and could be "
                "another file in disguise; make a real copy of the model's folder (cp -r) and compile that"
            )
        if not os.access(path, os.R_OK):
            raise ModelError(
                f"{label}: its external data {show(location)} may not be read; change its permissions"
            )
        return status.st_size

    def _blob_status(self, blob: Path, location: str, label: str) -> os.stat_result:
        try:
            return blob.lstat()
        except OSError as error:
            raise ModelError(
                f"{label}: its external data {show(location)} is not in the Hugging Face cache "
                f"({error.strerror}); download the model again"
            ) from error


def _check_shape(tensor: onnx.TensorProto, label: str) -> tuple[ir.DataType, int]:
    """Return the element type and the number of elements."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(
            f"{label}: element type {tensor.data_type} is unknown; export the model with an older opset"
        )
    if dtype == ir.DataType.STRING:
        raise ModelError(f"{label}: holds text; export the model of numbers only, without its tokenizer")
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(
            f"{label}: shape {_show_dims(tensor)} has a negative dimension; export the model again"
        )
    # Zeros count as ones here: [huge, huge, 0] has no bytes and still breaks every reader.
    if len(tensor.dims) > MAX_RANK or math.prod(max(dim, 1) for dim in tensor.dims) > MAX_TENSOR_BYTES:
        raise ModelError(
            f"{label}: shape {_show_dims(tensor)} is larger than any model this tool takes; "
            "the file is damaged or hostile, export it again"
        )
    return dtype, math.prod(tensor.dims)


def _show_dims(tensor: onnx.TensorProto) -> str:
    shown = ", ".join(map(str, tensor.dims[:8]))
    return f"[{shown}, ...]" if len(tensor.dims) > 8 else f"[{shown}]"


def _check_inline(tensor: onnx.TensorProto, label: str, dtype: ir.DataType, count: int, nbytes: int) -> None:
    """Check that the data in the proto is as long as the shape says (readers allocate by the shape)."""
    if tensor.HasField("raw_data"):
        have, need, unit = len(tensor.raw_data), nbytes, "bytes"
    else:
        field = _TYPED_FIELDS.get(dtype, "int32_data")
        have, need, unit = len(getattr(tensor, field)), _typed_length(dtype, count), f"values of {field}"
    if have != need:
        raise ModelError(
            f"{label}: has {have} {unit}, its shape {_show_dims(tensor)} and type {dtype.name} need {need}; "
            "the file is damaged, export the model again"
        )


def _typed_length(dtype: ir.DataType, count: int) -> int:
    """Return how many values of a typed field hold ``count`` elements (ONNX, TensorProto)."""
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return 2 * count
    if dtype.bitwidth in (2, 4):
        return -(-count * dtype.bitwidth // 8)
    return count


def _parse_number(text: str, key: str, label: str) -> int:
    # 18 digits: fits 64 bits, and int() of a megabyte of digits would take minutes.
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ModelError(f"{label}: external data {key} {show(text)} is not a number; export the model again")
    return int(text)
