"""A model file in ONNX Runtime on the CPU, to be measured: as it is, or in float32 when it is bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from zqfp_compile.backends.host_libraries import host_library, needs_host
from zqfp_compile.backends.ort import create_session, is_large
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.model_io import data_folder


def open_on_cpu(path: Path, model: ir.Model, *, fold_constants: bool = True, arena: bool = True) -> Any:
    """Open an ``onnxruntime.InferenceSession``; weights of more than a GiB stay on the disk.

    Args:
        path: The model's file.
        model: Its content. One that uses bfloat16, of which the CPU provider has no kernels, is widened to
            float32 in place: what the session takes and returns is what ``model`` then says.
        fold_constants: As for :func:`zqfp_compile.backends.ort.create_session`.
        arena: Likewise.

    Raises:
        ModelError: When the weights of a bfloat16 model lie in several folders.
        MissingDependencyError: When ONNX Runtime is not installed, or a custom-op library the model needs.
    """
    options: dict[str, Any] = {
        "fold_constants": fold_constants,
        "arena": arena,
        "low_memory": is_large(model),
        "custom_ops": host_library("onnxruntime") if needs_host(model) else None,
    }
    if not uses_bfloat16(model):
        return create_session(path, **options)
    widen_bfloat16(model)
    content = ir.to_proto(model).SerializeToString()
    return create_session(content, external_data=data_folder(model), **options)
