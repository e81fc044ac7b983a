"""A quantised weight, and the one definition of the values it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zqfp_compile.formats.codebook import CODE_BOOKS
from zqfp_compile.formats.minifloat import E4M3FN
from zqfp_compile.formats.scales import SCALE_CONSTRAINTS, check_group_scales, check_row_blocks

FloatArray = npt.NDArray[np.float32]

# Elements decoded at once.
_BLOCK = 1 << 17

# The group size that stands for one group per row, whatever K.
WHOLE_ROW = 0


def group_width(k: int, group_size: int) -> int:
    """Return the weights per group of rows of ``k``: the group size, or all of the row for ``WHOLE_ROW``."""
    return k if group_size == WHOLE_ROW else group_size


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """W[N, K] in 4 bits with group and row scales, or in FP8 with row scales.

    Attributes:
        codes: int8 [N, Kp] in -7..7, Kp being K rounded up to whole groups, padding 0; for weight format
            ``fp8`` the values w8 themselves, ml_dtypes.float8_e4m3fn [N, K].
        group_scales: float32 [N, Kp / g], legal under the constraint; ``None`` for ``fp8``.
        row_scales: float32 [N], positive; all 1 under the constraint ``none``.
        k: Columns of W.
        weight_format: ``e2m1``, ``e3m0``, ``int4`` or ``fp8``.
        group_size: Weights g per group scale, 0 for one scale per row (g = K); meaningless for ``fp8``.
        scale_constraint: ``none``, ``m1``, ``m2`` or ``e4m3``; meaningless for ``fp8``.
        scale_rows: Rows of a compute group of ``m2``: each run of so many rows, from row 0, has one R.

    Raises:
        ValueError: When the parts do not fit together or break the constraint.
    """

    codes: npt.NDArray[Any]
    group_scales: FloatArray | None
    row_scales: FloatArray
    k: int
    weight_format: str
    group_size: int
    scale_constraint: str
    scale_rows: int = 1

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.row_scales.shape != (self.n,):
            raise ValueError(f"codes {self.codes.shape} and row scales {self.row_scales.shape} do not match")
        if self.row_scales.dtype != np.float32:
            raise ValueError(f"row scales are {self.row_scales.dtype}, not float32")
        if not (np.isfinite(self.row_scales).all() and (self.row_scales > 0).all()):
            raise ValueError("row scales must be positive and finite")
        if self.weight_format == "fp8":
            self._check_fp8()
        else:
            self._check_codes()
            self._check_scales()

    def _check_fp8(self) -> None:
        if self.group_scales is not None:
            raise ValueError("fp8 weights have no group scales")
        if self.codes.dtype != E4M3FN.dtype or self.codes.shape[1] != self.k:
            raise ValueError(
                f"fp8 weights are {self.codes.dtype} {self.codes.shape}, not float8_e4m3fn [N, K]"
            )
        if (self.codes.view(np.uint8) & 0x7F == 0x7F).any():
            raise ValueError("fp8 weights hold a NaN")

    def _check_codes(self) -> None:
        if self.weight_format not in CODE_BOOKS:
            raise ValueError(f"unknown weight format {self.weight_format!r}")
        width = group_width(self.k, self.group_size)
        padded = -(-self.k // width) * width
        if self.codes.dtype != np.int8 or self.codes.shape[1] != padded:
            raise ValueError(f"codes are {self.codes.dtype} {self.codes.shape}, not int8 [N, {padded}]")
        if self.codes.size and (self.codes.min() < -7 or self.codes.max() > 7):
            raise ValueError("codes leave -7..7")
        if self.codes[:, self.k :].any():
            raise ValueError("padding codes are not 0")

    def _check_scales(self) -> None:
        if self.scale_constraint not in SCALE_CONSTRAINTS:
            raise ValueError(f"unknown scale constraint {self.scale_constraint!r}")
        groups = self.codes.shape[1] // group_width(self.k, self.group_size)
        scales = self.group_scales
        if scales is None or scales.dtype != np.float32 or scales.shape != (self.n, groups):
            raise ValueError(f"group scales are not float32 [{self.n}, {groups}]")
        check_group_scales(scales, self.row_scales, self.scale_constraint, CODE_BOOKS[self.weight_format])
        check_row_blocks(self.row_scales, self.scale_constraint, self.scale_rows)
        if self.scale_constraint == "none" and (self.row_scales != 1).any():
            raise ValueError("unconstrained weights have row scales of 1")

    @property
    def n(self) -> int:
        """Rows of W."""
        return int(self.codes.shape[0])

    def fp8_weight(self) -> FloatArray:
        """Return w8, float32 [N, K]: what the FP8 tensor core multiplies, every value an E4M3 number.

        Under the constraint ``none`` it is ``decode(c) * S`` unrounded.
        """
        weight: FloatArray = np.empty((self.n, self.k), np.float32)
        # Blocks of rows: the intermediate values stay in the cache, and one weight's worth in memory.
        step = max(1, _BLOCK // max(1, self.codes.shape[1]))
        for start in range(0, self.n, step):
            weight[start : start + step] = self._fp8_rows(slice(start, start + step))
        return weight

    def _fp8_rows(self, rows: slice) -> FloatArray:
        if self.group_scales is None:
            return E4M3FN.decode(self.codes[rows])
        values = CODE_BOOKS[self.weight_format].decode(self.codes[rows])
        grouped = values.reshape(len(values), -1, group_width(self.k, self.group_size))
        grouped *= self.group_scales[rows, :, None]
        values = values[:, : self.k]
        return values if self.scale_constraint == "none" else E4M3FN.round(values)

    def dequantize(self) -> FloatArray:
        """Return W_hat = R * w8, float32 [N, K], one float32 multiply as in ONNX DequantizeLinear."""
        weight = self.fp8_weight()
        weight *= self.row_scales[:, None]
        return weight

    def bits_per_weight(self) -> float:
        """Return stored bits per weight of W: codes, group scales (8; 32 for ``none``), row scales (32)."""
        code_bits = 8 if self.weight_format == "fp8" else 4
        scale_bits = 32 if self.scale_constraint == "none" else 8
        groups = 0 if self.group_scales is None else self.group_scales.size
        total = code_bits * self.codes.size + scale_bits * groups + 32 * self.n
        return total / (self.n * self.k)
