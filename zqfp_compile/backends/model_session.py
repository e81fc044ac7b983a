"""A model file in ONNX Runtime: with our custom ops if it needs them, in float32 if bfloat16 cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from zqfp_compile.backends.host_libraries import host_library, needs_host
from zqfp_compile.backends.ort import create_session
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.device import CPU_PROVIDER
from zqfp_compile.model_io import data_folder


def open_model_session(
    path: Path,
    model: ir.Model,
    *,
    providers: Sequence[str] = (CPU_PROVIDER,),
    widen: bool = False,
    **options: Any,
) -> Any:
    """Open an ``onnxruntime.InferenceSession``.

    Args:
        path: The model's file.
        model: Its content. On the CPU alone, of whose provider bfloat16 has no kernels, a model that uses it
            is widened to float32 in place: what the session takes and returns is what ``model`` then says.
        providers: As for :func:`zqfp_compile.backends.ort.create_session`.
        widen: Do that on any provider, as who reads outputs as numpy arrays needs it.
        options: Likewise.

    Raises:
        ModelError: When the weights of a model to be widened lie in several folders.
        MissingDependencyError: When ONNX Runtime, a provider, or a custom-op library the model needs is not
            there.
    """
    options["custom_ops"] = host_library("onnxruntime") if needs_host(model) else None
    widen = widen or list(providers) == [CPU_PROVIDER]
    if not (widen and uses_bfloat16(model)):
        return create_session(path, providers=providers, **options)
    widen_bfloat16(model)
    content = ir.to_proto(model).SerializeToString()
    return create_session(content, providers=providers, external_data=data_folder(model), **options)
