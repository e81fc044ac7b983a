"""4-bit code books: eight magnitudes and a sign, stored as int8 codes -7..7."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CodeBook:
    """A sign-magnitude 4-bit format: code c stands for ``sign(c) * magnitudes[abs(c)]``.

    Attributes:
        name: The ``weight_format`` it goes by.
        magnitudes: Eight ascending values, the first 0.
        min_scale: Smallest legal group scale, a power of two: ``magnitudes[1] * min_scale`` is the
            smallest normal E4M3 number, so no decoded weight is subnormal.
        max_scale: Largest legal group scale, a power of two: ``magnitudes[7] * max_scale <= 448``.
    """

    name: str
    magnitudes: tuple[float, ...]
    min_scale: float
    max_scale: float

    @property
    def max_magnitude(self) -> float:
        """The largest value a code stands for."""
        return self.magnitudes[-1]

    def encode(self, x: npt.ArrayLike) -> npt.NDArray[np.int8]:
        """Round to the nearest code, saturating; a tie goes to the even code.

        For E2M1 an even code is an even mantissa bit, so this is IEEE round-to-nearest-even. E3M0 has no
        mantissa bit, and its code (the exponent) takes that part. INT4's code is the integer itself.

        Args:
            x: Values of any shape, compared as float32.

        Returns:
            int8 codes of the same shape.

        Raises:
            ValueError: When ``x`` holds a NaN.
        """
        values = np.asarray(x, dtype=np.float32)
        if np.isnan(values).any():
            raise ValueError(f"{self.name}: a NaN has no code")
        size = np.abs(values)
        codes = np.zeros(values.shape, dtype=np.int8)
        for low in range(7):
            midpoint = np.float32((self.magnitudes[low] + self.magnitudes[low + 1]) / 2)
            codes += (size > midpoint) if low % 2 == 0 else (size >= midpoint)
        return np.where(np.signbit(values), -codes, codes).astype(np.int8)

    def decode(self, codes: npt.NDArray[np.int8]) -> npt.NDArray[np.float32]:
        """Return the float32 values of codes -7..7; the illegal code -8 becomes NaN."""
        half = np.array(self.magnitudes, dtype=np.float32)
        # Two's complement order, so that a negative code is a negative numpy index.
        table = np.concatenate([half, np.array([np.nan], dtype=np.float32), -half[:0:-1]])
        return table[codes]


E2M1 = CodeBook("e2m1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 2.0**-5, 2.0**6)
E3M0 = CodeBook("e3m0", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0), 2.0**-4, 2.0**4)
INT4 = CodeBook("int4", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), 2.0**-6, 2.0**6)

CODE_BOOKS: dict[str, CodeBook] = {book.name: book for book in (E2M1, E3M0, INT4)}
