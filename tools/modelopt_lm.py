"""NVIDIA Model Optimizer's presets on a causal LM in torch, with the bits a weight takes in each.

Bits per weight are those of a checkpoint's linear weights: the element's bits plus every scale divided by the
weights it serves, groups at the end of a row being shorter when K is no multiple of them.

    preset                     element  scale                      bits per weight
    FP8_DEFAULT_CFG            8        float32 per tensor         8 + 32 / (N K)
    INT8_SMOOTHQUANT_CFG       8        float16 per row            8 + 16 / K
    INT4_AWQ_CFG               4        float16 per 128            4 + 16 ceil(K / 128) / K
    W4A8_AWQ_BETA_CFG          4        float16 per 128            4 + 16 ceil(K / 128) / K
    W4A8_MXFP4_FP8_CFG         4        E8M0 per 32                4 + 8 ceil(K / 32) / K
    W4A8_NVFP4_FP8_CFG         4        E4M3 per 32                4 + 8 ceil(K / 32) / K
    W4A16_NVFP4_CFG, NVFP4 AWQ 4        E4M3 per 16                4 + 8 ceil(K / 16) / K

Not counted, in Model Optimizer's favour: AWQ's and SmoothQuant's float16 scale per input channel, and the
second, per-tensor scale of W4A8_AWQ and NVFP4. ``lm_head`` and the embedding stay as they are everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch_models import decoder_layers

VERSION = "0.47.0"
INSTALL = "pip install -r tools/requirements-compare.txt"
# Integer presets name no type for their scales; TensorRT-LLM's checkpoints hold float16.
INTEGER_SCALE_BITS = 16
TENSOR_SCALE_BITS = 32


@dataclass(frozen=True)
class Preset:
    """One of Model Optimizer's configurations.

    Attributes:
        config: Name of the constant in ``modelopt.torch.quantization``.
        weights: For the table.
        activations: For the table.
        packed: Evaluate the packed weights (``mtq.compress``), as a checkpoint holds them. Model Optimizer's
            simulation of these formats needs CUDA kernels, and its NVFP4 kernel takes blocks of 16 whatever
            the preset says.
        weight_only: Switch the preset's activation quantisers off.
        cuda: Why calibration needs a GPU, else "".
    """

    config: str
    weights: str
    activations: str
    packed: bool = False
    weight_only: bool = False
    cuda: str = ""


PRESETS = {
    "fp8": Preset("FP8_DEFAULT_CFG", "fp8-e4m3", "fp8-e4m3 per tensor"),
    "int8-smoothquant": Preset("INT8_SMOOTHQUANT_CFG", "int8", "int8 per tensor"),
    "int4-awq": Preset("INT4_AWQ_CFG", "int4", "none"),
    "w4a8-awq": Preset("W4A8_AWQ_BETA_CFG", "int4", "fp8-e4m3 per tensor"),
    "w4a8-mxfp4": Preset("W4A8_MXFP4_FP8_CFG", "mxfp4", "fp8-e4m3 per tensor, dynamic", packed=True),
    "w4a8-nvfp4": Preset("W4A8_NVFP4_FP8_CFG", "nvfp4", "fp8-e4m3 per tensor", packed=True),
    "w4a16-nvfp4": Preset("W4A16_NVFP4_CFG", "nvfp4", "none", packed=True),
    "w4a16-nvfp4-awq": Preset(
        "NVFP4_AWQ_LITE_CFG",
        "nvfp4",
        "none",
        packed=True,
        weight_only=True,
        cuda="AWQ's search rounds to NVFP4 in a Triton kernel",
    ),
}


@dataclass(frozen=True)
class Storage:
    """How a linear's weight [N, K] is stored.

    Attributes:
        element_bits: Bits per weight.
        scale_bits: Bits per scale.
        group: Weights along K per scale; 0 is a whole row, ``None`` the whole tensor.
    """

    element_bits: int
    scale_bits: int
    group: int | None

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of a weight [N, K] with its scales."""
        n, k = shape
        scales = 1 if self.group is None else n * -(-k // (self.group or k))
        return self.element_bits * n * k + self.scale_bits * scales


def weight_storage(config: Mapping[str, Any]) -> Storage:
    """Read from a preset's dictionary how it stores weights (see the module's docstring)."""
    found = [e["cfg"] for e in config["quant_cfg"] if e["quantizer_name"] == "*weight_quantizer"]
    cfg = found[-1]
    # W4A8_AWQ lists two quantisers: INT4 is what is stored, FP8 what the tensor cores are given.
    first = cfg[0] if isinstance(cfg, list) else cfg
    bits = _format_bits(first["num_bits"])
    blocks = first.get("block_sizes")
    if blocks:
        scale = blocks.get("scale_bits")
        return Storage(bits, sum(scale) + (scale[1] > 0) if scale else INTEGER_SCALE_BITS, blocks[-1])
    if first.get("axis") is None:
        return Storage(bits, TENSOR_SCALE_BITS, None)
    return Storage(bits, INTEGER_SCALE_BITS, 0)


def _format_bits(num_bits: int | tuple[int, int]) -> int:
    """Return the width of an integer, or of a float given as (exponent, mantissa) with a sign."""
    return num_bits if isinstance(num_bits, int) else 1 + sum(num_bits)


def load_modelopt() -> Any:
    """Return ``modelopt.torch.quantization``; end the program with one line without the right version."""
    try:
        version = importlib.metadata.version("nvidia-modelopt")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"error: nvidia-modelopt is not installed; {INSTALL}, or --methods zqfp for ours alone")
    if version != VERSION:
        sys.exit(
            f"error: nvidia-modelopt {version} is installed, this comparison is for {VERSION}; {INSTALL}"
        )
    import modelopt.torch.quantization as mtq

    return mtq


def preset_config(mtq: Any, preset: Preset) -> dict[str, Any]:
    """Return the preset's dictionary, a copy."""
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, preset.config))
    if preset.weight_only:
        config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    return config


@dataclass(frozen=True)
class PresetResult:
    """A quantised copy of the model.

    Attributes:
        model: Takes the same calls as the original.
        bits_per_weight: Mean over the decoder's linears.
        algorithm: What Model Optimizer calls its calibration.
        group_size: Weights along K per scale; ``None`` where a scale serves a row or more.
        dynamic: Activation scales come from each call's batch, the preset has no calibration.
    """

    model: Any
    bits_per_weight: float
    algorithm: str
    group_size: int | None
    dynamic: bool


def quantized_copy(
    mtq: Any, model: Any, preset: Preset, batches: Iterable[npt.NDArray[np.int64]]
) -> PresetResult:
    """Quantise a copy of ``model`` with a preset.

    Args:
        mtq: What :func:`load_modelopt` returned.
        model: transformers causal LM; it is not changed.
        preset: What to apply.
        batches: Calibration windows, int64 [b, L] each.

    Raises:
        RuntimeError: When the preset quantised other modules than the decoder's linears.
    """
    shapes = decoder_linears(model)
    config = preset_config(mtq, preset)
    quantized = copy.deepcopy(model)
    batches = list(batches)

    def feed(module: Any) -> None:
        for windows in batches:
            module.base_model(input_ids=torch.from_numpy(windows).to(model.device), use_cache=False)

    # Model Optimizer talks on stdout, where our table goes.
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        quantized = mtq.quantize(quantized, config, feed)
        _check_coverage(quantized, shapes, preset)
        if preset.packed:
            mtq.compress(quantized, mtq.config.CompressConfig(quant_gemm=False))
        else:
            mtq.fold_weight(quantized)
    storage = weight_storage(config)
    bits = sum(storage.bits(shape) for shape in shapes.values()) / sum(n * k for n, k in shapes.values())
    algorithm = config["algorithm"]
    name = algorithm["method"] if isinstance(algorithm, dict) else algorithm or "none"
    dynamic = algorithm is None and preset.activations != "none"
    return PresetResult(quantized, bits, name, storage.group or None, dynamic)


def decoder_linears(model: Any) -> dict[str, tuple[int, int]]:
    """Return the weight shape (N, K) of every linear in the decoder's layers, by its name in the model."""
    layers = decoder_layers(model)
    inside = {id(module) for module in layers.modules()}
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    }


def _check_coverage(quantized: Any, shapes: Mapping[str, Any], preset: Preset) -> None:
    """Make sure that a preset covered the linears ours cover, no fewer and no more."""
    enabled = {
        name
        for name, module in quantized.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }
    if enabled != set(shapes):
        differing = sorted(enabled ^ set(shapes))
        raise RuntimeError(
            f"{preset.config} does not cover the decoder's linears alone: {differing[:4]} differ"
        )
