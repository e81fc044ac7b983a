"""The work item of round-to-nearest: one weight to packed tensors, in whatever process or machine.

An item holds everything its result depends on, and nothing of the model but where the weight lies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.plan import SitePrecision
from zqfp_compile.quantize.lorc import LowRank, low_rank_factors
from zqfp_compile.quantize.rtn import quantize_weight
from zqfp_compile.quantize.threads import one_torch_thread
from zqfp_compile.tensor_store import PackedTensor, pack
from zqfp_compile.weights import StoredWeight


@dataclass(frozen=True, eq=False)
class LayerItem:
    """One weight to quantise.

    Attributes:
        name: The layer, or the first of those that share the weight.
        weight: Where it lies.
        dtype: Element type of the layer.
        precision: Format and rank.
        group_size: Weights along K per group scale.
        scale_constraint: ``none``, ``m1``, ``m2`` or ``e4m3``.
        scale_rows: Rows that share one row scale.
        factor_dtype: Storage of LoRC's factors.
        energy: Energy of every input channel, float64 [K], for LoRC; ``None``: all alike.
        seed: Seed of the randomised SVD.
    """

    name: str
    weight: StoredWeight
    dtype: ir.DataType
    precision: SitePrecision
    group_size: int
    scale_constraint: str
    scale_rows: int = 1
    factor_dtype: str = "float16"
    energy: npt.NDArray[np.float64] | None = None
    seed: int = 0

    @property
    def key(self) -> str:
        """A digest of what the result depends on besides the model's bytes."""
        options = (self.dtype.name, self.group_size, self.scale_constraint, self.scale_rows)
        lorc = (self.factor_dtype, self.seed)
        digest = hashlib.sha256(repr(("rtn", self.name, self.weight.source, self.precision)).encode())
        digest.update(repr((options, lorc)).encode())
        if self.energy is not None:
            digest.update(self.energy.tobytes())
        return digest.hexdigest()

    @property
    def elements(self) -> int:
        """Weights in it."""
        return self.weight.shape[0] * self.weight.shape[1]


def quantize_item(item: LayerItem) -> dict[str, PackedTensor]:
    """Quantise to nearest with an error search, then compensate the rest by LoRC.

    It keeps to one torch thread, so that its bits do not depend on how many items are worked on at once.

    Returns:
        Packed tensors by field of :class:`zqfp_compile.plan.LinearTensors`.

    Raises:
        ModelError: When the weight holds NaN or Inf, or cannot be read.
    """
    with one_torch_thread():
        weight = torch.from_numpy(item.weight.read())
        quantized = quantize_weight(
            weight,
            weight_format=item.precision.weight_format,
            group_size=item.group_size,
            scale_constraint=item.scale_constraint,
            scale_rows=item.scale_rows,
            name=item.name,
        )
        lorc = None
        if item.precision.lorc_rank:
            error = weight.sub_(torch.from_numpy(quantized.dequantize()))  # the weight is not needed any more
            energy = None if item.energy is None else torch.from_numpy(item.energy)
            rank, dtype = item.precision.lorc_rank, item.factor_dtype
            lorc = low_rank_factors(error, rank, moment=energy, dtype=dtype, seed=item.seed)
    return pack_layer(item.name, quantized, lorc, item.dtype)


def pack_layer(
    name: str, quantized: QuantizedWeight, lorc: LowRank | None, dtype: ir.DataType
) -> dict[str, PackedTensor]:
    """Pack one quantised layer.

    Args:
        name: Layer name, the prefix of the tensors' names.
        quantized: The weight.
        lorc: Its compensation, factors rounded to ``dtype`` or to FP8 with scales.
        dtype: The layer's element type.

    Returns:
        Packed tensors by field of :class:`zqfp_compile.plan.LinearTensors`.
    """
    fp8 = quantized.weight_format == "fp8"
    scale_type = ir.DataType.FLOAT if quantized.scale_constraint == "none" else ir.DataType.FLOAT8E4M3FN
    arrays: dict[str, tuple[npt.NDArray[np.generic], ir.DataType]] = {
        "codes": (quantized.codes, ir.DataType.FLOAT8E4M3FN if fp8 else ir.DataType.INT4)
    }
    if quantized.group_scales is not None:
        arrays["group_scales"] = (quantized.group_scales, scale_type)
    arrays["row_scales"] = (quantized.row_scales, ir.DataType.FLOAT)
    packed = {key: pack(f"{name}.{key}", array, kind) for key, (array, kind) in arrays.items()}
    return packed if lorc is None else {**packed, **pack_factors(name, lorc, dtype)}


def pack_factors(name: str, lorc: LowRank, dtype: ir.DataType) -> dict[str, PackedTensor]:
    """Pack LoRC factors, rounded to ``dtype`` or FP8, by field of ``LinearTensors``."""
    v, u = lorc.v.cpu().numpy(), lorc.u.cpu().numpy()
    if lorc.v_scale is None or lorc.u_scale is None:
        arrays = {"lorc_v": (v, dtype), "lorc_u": (u, dtype)}
    else:
        v_scale, u_scale = lorc.v_scale.cpu().numpy(), lorc.u_scale.cpu().numpy()
        # The quotients are an ulp off E4M3 numbers at most, and encoding takes the nearest.
        e4m3 = ir.DataType.FLOAT8E4M3FN
        arrays = {
            "lorc_v": (E4M3FN.encode(v / v_scale[None, :]), e4m3),
            "lorc_u": (E4M3FN.encode(u / u_scale[:, None]), e4m3),
            "lorc_v_scale": (v_scale, ir.DataType.FLOAT),
            "lorc_u_scale": (u_scale, ir.DataType.FLOAT),
        }
    return {key: pack(f"{name}.{key}", array, kind) for key, (array, kind) in arrays.items()}
