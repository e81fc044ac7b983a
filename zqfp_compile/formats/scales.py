"""Scale constraints: which group scales are legal, and the plain (unsearched) choice for each.

``m1`` and ``m2`` are ZeroQuant-FP's (arXiv 2307.09782, section 4), ``e4m3`` is ours (DESIGN section 2). The
real group scale is ``S[n, j] = R[n] * s[n, j]``; a constraint restricts s (``m1`` also R, to powers of two).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from zqfp_compile.formats.codebook import CodeBook

FloatArray = npt.NDArray[np.float32]

SCALE_CONSTRAINTS = ("none", "m1", "m2", "e4m3")


def legal_scales(constraint: str, book: CodeBook) -> FloatArray:
    """Return every legal group scale s in ascending order: powers of two or E4M3 numbers in the book's range.

    Raises:
        ValueError: For ``none``, which restricts nothing, and for unknown names.
    """
    low, high = round(math.log2(book.min_scale)), round(math.log2(book.max_scale))
    if constraint in ("m1", "m2"):
        return np.exp2(np.arange(low, high + 1, dtype=np.float32))
    if constraint == "e4m3":
        octave = 1 + np.arange(8, dtype=np.float32) / 8
        scales = np.exp2(np.arange(low, high, dtype=np.float32))[:, None] * octave
        return np.append(scales.reshape(-1), np.float32(book.max_scale))
    raise ValueError(f"scale constraint {constraint!r} has no table of legal scales")


def top_scale(constraint: str, book: CodeBook) -> float:
    """Return the s that a row's largest group takes before any search.

    ``e4m3`` stays below the maximum (13/16 of it) so that a search can also try larger scales.
    """
    return book.max_scale * (13 / 16 if constraint == "e4m3" else 1)


def row_scale(largest: FloatArray, constraint: str, book: CodeBook) -> FloatArray:
    """Return R for rows whose largest real group scale is ``largest`` (positive): float32, same shape."""
    if constraint == "m1":
        mantissa, exponent = np.frexp(largest)
        largest = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))  # 2^ceil(log2)
    rows: FloatArray = (largest / np.float32(top_scale(constraint, book))).astype(np.float32)
    return rows


def constrain_scales(scales: FloatArray, constraint: str, book: CodeBook) -> tuple[FloatArray, FloatArray]:
    """Split real group scales into legal ones and row scales without a search.

    Each group takes the smallest legal scale that does not saturate it; the paper's m2 as printed takes the
    next smaller one and clips the group's maximum. Groups below the range are lifted to its smallest scale.

    Args:
        scales: float32 [N, G], ``max|w| / max_magnitude`` of each group; 0 for groups of zeros.
        constraint: ``none``, ``m1``, ``m2`` or ``e4m3``.
        book: The code book.

    Returns:
        ``(s, R)``: float32 [N, G] and [N], both positive. Rows of zeros get R = 1.
    """
    scales = np.asarray(scales, dtype=np.float32)
    largest = scales.max(axis=1)
    if constraint == "none":
        return np.where(scales > 0, scales, np.float32(1)), np.ones_like(largest)
    rows: FloatArray = np.where(largest > 0, row_scale(largest, constraint, book), np.float32(1))
    table = legal_scales(constraint, book)
    legal: FloatArray = table[ceil_index(scales / rows[:, None], table)]
    return legal, rows


def ceil_index(wanted: FloatArray, table: FloatArray) -> npt.NDArray[np.int64]:
    """Return the index of the smallest table entry >= ``wanted`` (to 1e-6: R carries a rounding error)."""
    index = np.searchsorted(table, wanted * np.float32(1 - 1e-6))
    clamped: npt.NDArray[np.int64] = np.minimum(index, len(table) - 1).astype(np.int64)
    return clamped


def check_group_scales(
    group_scales: FloatArray, row_scales: FloatArray, constraint: str, book: CodeBook
) -> None:
    """Check that s and R obey the constraint.

    Raises:
        ValueError: Saying which one does not.
    """
    if constraint == "none":
        if not (np.isfinite(group_scales).all() and (group_scales > 0).all()):
            raise ValueError("group scales must be positive and finite")
        return
    if not np.isin(group_scales, legal_scales(constraint, book)).all():
        raise ValueError(
            f"group scales are not all {constraint} scales in [{book.min_scale}, {book.max_scale}]"
        )
    if constraint == "m1" and not (np.frexp(row_scales)[0] == 0.5).all():
        raise ValueError("m1 row scales must be powers of two")


def check_row_blocks(row_scales: FloatArray, constraint: str, scale_rows: int) -> None:
    """Check that each compute group, ``scale_rows`` rows from a multiple of it on, has one row scale.

    In ZeroQuant-FP (section 4) the groups of a compute group have scales ``S_max * 2^-k``: one S_max, here
    one R, for all of its rows, and twelve legal k. The last compute group may have fewer rows.

    Raises:
        ValueError: When they differ, or rows are joined under another constraint than ``m2``.
    """
    if scale_rows == 1:
        return
    if scale_rows < 1 or constraint != "m2":
        raise ValueError(f"{constraint} scales have no compute groups of {scale_rows} rows")
    leaders = row_scales[np.arange(len(row_scales)) // scale_rows * scale_rows]
    if (row_scales != leaders).any():
        raise ValueError(f"row scales differ in a compute group of {scale_rows} rows")
