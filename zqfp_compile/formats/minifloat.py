"""8-bit floats: E4M3FN and E5M2, rounded to nearest even and saturating (DESIGN section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MiniFloat:
    """An 8-bit float format.

    Attributes:
        name: Short name, as in ``activation_format``.
        dtype: The ml_dtypes type that stores it.
        mantissa_bits: Explicit mantissa bits.
        min_exponent: Exponent of the smallest normal number.
        max_value: Largest finite number; larger ones and infinity saturate to it.
    """

    name: str
    dtype: np.dtype[Any]
    mantissa_bits: int
    min_exponent: int
    max_value: float

    def round(self, x: npt.ArrayLike) -> FloatArray:
        """Return the nearest representable values as float32.

        Ties go to the even mantissa, NaN stays NaN, infinity saturates, -0 becomes +0.
        """
        source = np.asarray(x, dtype=np.float32)
        values = np.clip(np.atleast_1d(source), -self.max_value, self.max_value)
        power = (values.view(np.int32) & np.int32(0x7F800000)).view(np.float32)
        np.maximum(power, np.float32(2.0**self.min_exponent), out=power)
        # Adding 1.5 * 2^23 quanta leaves no bit below the quantum: the float32 adder does the rounding.
        power *= np.float32(1.5 * 2.0 ** (23 - self.mantissa_bits))
        values += power
        values -= power
        return values.reshape(source.shape)

    def encode(self, x: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the rounded values in :attr:`dtype`; ``.view(numpy.uint8)`` gives the bits."""
        return self.round(x).astype(self.dtype)

    def decode(self, encoded: npt.NDArray[Any]) -> FloatArray:
        """Return float32 values of an array in :attr:`dtype`, or of its bits as uint8."""
        return encoded.view(self.dtype).astype(np.float32)


E4M3FN = MiniFloat("e4m3", np.dtype(ml_dtypes.float8_e4m3fn), 3, -6, 448.0)
E5M2 = MiniFloat("e5m2", np.dtype(ml_dtypes.float8_e5m2), 2, -14, 57344.0)

MINI_FLOATS: dict[str, MiniFloat] = {spec.name: spec for spec in (E4M3FN, E5M2)}
