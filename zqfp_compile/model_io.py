"""Model files in and out: checked before any ONNX library follows them, weights never held in memory."""

from __future__ import annotations

import difflib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from zqfp_compile.disk import format_bytes, full_disk_errors
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.hub_cache import HubLinks
from zqfp_compile.model_checks import check_model

MAX_PROTO_BYTES = (1 << 31) - 1
MIN_SAVED_IR_VERSION = 10
# Shape constants stay nodes, where shape inference and pattern matching look for them.
_LIFT_FROM_ELEMENTS = 1024

_MAGIC = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the model; run 'git lfs pull'"),
    (b"PK\x03\x04", "is a zip file or a PyTorch checkpoint; export the model with torch.onnx.export"),
    (b"GGUF", "is a GGUF file; export the model to ONNX"),
    (b"\x80\x02", "is a Python pickle; export the model with torch.onnx.export"),
    (b"\x1f\x8b", "is gzip-compressed; decompress it first"),
)


def load_model(path: str | Path) -> ir.Model:
    """Check and read a model; its external data stays on disk and is mapped when a tensor is read.

    Nodes that are out of order are sorted, and large ``Constant`` nodes become initializers, so that what
    follows meets weights in one form.

    Raises:
        ModelError: When the file is missing, no ONNX model, unsafe or malformed.
    """
    path = Path(path)
    try:
        proto = _read_proto(path)
        # The folder as it was named: a model behind a link finds its data beside the link.
        return load_proto(proto, path.absolute().parent)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from error


def load_proto(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    """Check a model that was parsed without its external data, and return it as :func:`load_model` does.

    Args:
        proto: The model. What is returned shares its data.
        folder: The folder of its file, absolute; external data lies in it.

    Raises:
        ModelError: When it is unsafe or malformed.
    """
    ordered = check_model(proto, folder)
    model = proto_to_ir(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    if not ordered:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    LiftConstantsToInitializersPass(size_limit=_LIFT_FROM_ELEMENTS)(model)
    links = HubLinks(folder)
    _follow_hub_links(model, links)
    _load_external_attributes(model, links)
    return model


def save_model(
    model: ir.Model,
    path: str | Path,
    *,
    data_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model and, beside it, one external data file.

    Nothing is flushed to the disk: whoever owns the folder does that once, when it is complete. Weights
    stream from where they are, one at a time at most in memory. ``model`` is left as it was.

    Args:
        model: The model; files get its opset and at least IR version 10 (overloads of functions).
        path: The ``.onnx`` file.
        data_name: Name of the data file, ``<path>.data`` by default. Tensors up to 256 bytes stay inline.
        progress: Called with (tensors written, tensors in all).

    Raises:
        UsageError: When the model's own weights are read from the file to be written.
        MissingDependencyError: When the disk is full.
    """
    path = Path(path)
    data = path.parent / (data_name or f"{path.name}.data")
    _check_not_source(model, data)

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if progress is not None:
            progress(info.index, info.total)

    with full_disk_errors(data), _at_least_ir_version(model, MIN_SAVED_IR_VERSION):
        ir.save(model, path, external_data=data.name, callback=report)


def _read_proto(path: Path) -> onnx.ModelProto:
    _check_file(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        kind = _other_kind(data[:4096])
        if kind is not None:
            raise ModelError(kind)
        try:
            with memoryview(data) as view:
                proto: onnx.ModelProto = onnx.ModelProto.FromString(view)
                return proto
        except DecodeError as error:
            raise ModelError(
                "is not a readable ONNX model: not ONNX, cut off or nested too deep; "
                "export or download it again"
            ) from error


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ModelError(f"no such file{_suggestion(path)}") from error
    if stat.S_ISDIR(status.st_mode):
        inside = sorted(path.glob("*.onnx"))
        example = f", for example {inside[0]}" if inside else ""
        raise ModelError(f"is a folder; give the .onnx file{example}")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("is not a regular file; give the .onnx file")
    if status.st_size == 0:
        raise ModelError("is empty; export or download the model again")
    if status.st_size > MAX_PROTO_BYTES:
        raise ModelError(
            f"has {format_bytes(status.st_size)}, protobuf ends at 2 GiB; save the weights as external data "
            "(onnx.save with save_as_external_data=True)"
        )


def _suggestion(path: Path) -> str:
    try:
        names = [file.name for file in path.parent.iterdir() if file.suffix == ".onnx"]
    except OSError:
        return f"; the folder {path.parent} does not exist or cannot be read"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    return "; give the path of an ONNX model"


def _other_kind(head: bytes) -> str | None:
    """Return what the file is when its first bytes show that it is not ONNX."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[8:10] == b'{"':
        return "is a safetensors file, weights without a graph; export the model to ONNX (torch.onnx.export)"
    if head[4:8] == b"ORTM":
        return "is in ONNX Runtime's own format (.ort); give the .onnx file it was made from"
    # An ONNX file starts with a field tag, a control character that text does not have.
    if all(byte >= 32 or byte in b"\t\n\r" for byte in head[:256]):
        return "is a text file, not an ONNX model; give the .onnx file"
    return None


def proto_to_ir(proto: onnx.ModelProto) -> ir.Model:
    """Return a sound model as an ``ir.Model``.

    Raises:
        ModelError: When it holds what onnx-ir has no form for.
    """
    try:
        return ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, NotImplementedError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200]
        raise ModelError(f"cannot be represented ({reason}); export the model again") from error


def _external_initializers(model: ir.Model) -> Iterator[tuple[ir.Value, ir.ExternalTensor]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value, value.const_value


def _follow_hub_links(model: ir.Model, links: HubLinks) -> None:
    """Read what links into a Hugging Face cache from there: no ONNX library follows these links."""
    for value, tensor in _external_initializers(model):
        value.const_value = _behind_link(tensor, links)


def _behind_link(tensor: ir.ExternalTensor, links: HubLinks) -> ir.ExternalTensor:
    blob = links.blob(str(tensor.location))
    if blob is None:
        return tensor
    return ir.ExternalTensor(
        blob.name,
        offset=tensor.offset,
        length=tensor.length,
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=str(blob.parent),
    )


def data_files(model: ir.Model) -> set[Path]:
    """Return the files that hold a loaded model's external data, of subgraphs too; functions have none."""
    return {Path(tensor.path) for _, tensor in _external_initializers(model)}


def data_folder(model: ir.Model) -> Path | None:
    """Return the real folder of a loaded model's external data; ``None`` when it has none.

    Raises:
        ModelError: When there are several: a runtime takes one.
    """
    folders = {Path(tensor.base_dir) for _, tensor in _external_initializers(model)}
    if len(folders) > 1:
        raise ModelError(
            f"weights lie in {len(folders)} folders ({', '.join(map(str, sorted(folders)))}); "
            "save the model with its data in one"
        )
    return next(iter(folders)).resolve() if folders else None


def _load_external_attributes(model: ir.Model, links: HubLinks) -> None:
    """Read the (small) tensors left in attributes: only initializers are external when a model is saved."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
                continue
            tensor = attribute.as_tensor()
            if isinstance(tensor, ir.ExternalTensor):
                tensor = _behind_link(tensor, links)
                array = tensor.numpy().copy()
                node.attributes[name] = ir.AttrTensor(
                    name, ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
                )
                tensor.release()


def _check_not_source(model: ir.Model, data: Path) -> None:
    if os.path.realpath(data) in map(os.path.realpath, data_files(model)):
        raise UsageError(f"{data}: is where the model's own weights are read from; choose another --output")


@contextmanager
def _at_least_ir_version(model: ir.Model, version: int) -> Iterator[None]:
    before = model.ir_version
    model.ir_version = max(before, version)
    try:
        yield
    finally:
        model.ir_version = before
