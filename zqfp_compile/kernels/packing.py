"""The order in which libzqfp reads 4-bit weights, in numpy: packing needs neither the library nor a GPU.

A weight W[N, K] is cut into blocks of 64 rows by 128 columns, stored one after another (all blocks of the
first 64 rows, then of the next). N and K are padded to whole blocks: codes with 0, group scales with 1.

**Codes.** A block is 4096 bytes. One warpgroup (128 threads) multiplies it in four FP8 ``wgmma`` steps of 32
columns, the weight being operand A in registers. By the PTX ISA (register fragment of A, ``wgmma.m64nNk32``),
thread ``t = 32*w + 4*q + c`` holds of each step rows ``16*w + q`` and ``16*w + q + 8``, columns ``4*c + e``
and ``16 + 4*c + e``, e = 0..3. So, with

    row    n = 64*nb + 16*w + 8*h + q               w, c = 0..3   h, j, s, b = 0..1   q = 0..7   e = 0..3
    column k = 128*kb + 64*j + 32*s + 16*b + 4*c + e

code (n, k) lies in the 32-bit little-endian word number

    ((((nb * (Kp/128) + kb) * 2 + j) * 128 + 32*w + 4*q + c) * 2 + s) * 2 + h

which holds eight codes of one row: the magnitude ``abs(code)`` in bits ``4*(4*b + e)`` to ``+2`` (selectors
of two PRMT instructions), the sign of code b, e in bit ``8*e + 7 - 4*b`` (so ``word & 0x80808080`` and
``word << 4 & 0x80808080`` are the signs of the two results). A thread's 16 bytes of two steps are adjacent,
and a warpgroup reads 2048 at once.

**Group scales.** One byte each, ``64 * 128/g`` bytes per block; group ``j`` of the block's ``128/g`` is byte

    ((nb * (Kp/128) + kb) * 32 + 8*w + q) * (2 * 128/g) + 2*j + h

Bits 0 to 6 are the E4M3 number, in [2^-5, 2^6] (``formats.scales``). Bit 7, the free sign, is set when 1.5
times the number rounds up to five, not four, steps above it (mantissa 1 to 5): then ``byte & 0x7f``, plus 4,
plus bit 7 is the E4M3 number nearest to 1.5 times the scale, and a thread makes the eight values of a group
by additions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.minifloat import E4M3FN

BLOCK_ROWS = 64
# A gated layer's rows are so many of gate, then as many of up: a thread has rows q and q + 8, one of each.
GATED_ROWS = 8
BLOCK_COLUMNS = 128
GROUP_SIZES = (32, 64, 128)

# E4M3 of 1: what pads group scales.
_ONE = 0x38
_LOWEST, _HIGHEST = (int(b) for b in E4M3FN.encode([E2M1.min_scale, E2M1.max_scale]).view(np.uint8))
# Shift of the magnitude, and of the sign, of code [b, e] in its word.
_MAGNITUDE_SHIFT = (4 * np.arange(8, dtype=np.uint32)).reshape(2, 4)
_SIGN_SHIFT = (8 * np.arange(4, dtype=np.uint32) + 7) - np.array([[0], [4]], dtype=np.uint32)


def padded_shape(n: int, k: int) -> tuple[int, int]:
    """Return N and K rounded up to whole blocks; the packed codes are INT4 of that many elements."""
    return -(-n // BLOCK_ROWS) * BLOCK_ROWS, -(-k // BLOCK_COLUMNS) * BLOCK_COLUMNS


def gated_order(features: int) -> npt.NDArray[np.int64]:
    """Return where each row of a gated layer is among gate's rows with up's below them: int64 [2 F].

    Raises:
        ValueError: When F is no multiple of GATED_ROWS.
    """
    if features % GATED_ROWS:
        raise ValueError(f"{features} features are no multiple of {GATED_ROWS}")
    order: npt.NDArray[np.int64] = (
        np.arange(2 * features).reshape(2, -1, GATED_ROWS).swapaxes(0, 1).reshape(-1)
    )
    return order


def packed_sizes(n: int, k: int, group_size: int) -> tuple[int, int]:
    """Return the bytes of packed codes and of packed group scales.

    Raises:
        ValueError: When the kernel does not know the group size.
    """
    _check_group_size(group_size)
    rows, columns = padded_shape(n, k)
    return rows * columns // 2, rows * columns // group_size


def pack_codes(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack E2M1 codes into the kernel's order.

    Args:
        codes: int8 [N, K or K padded to groups], ``sign * index`` in -7..7.

    Returns:
        uint8 [Np * Kp / 2]: the bytes of an INT4 tensor of ``padded_shape``, opaque as such.

    Raises:
        ValueError: When codes are not a matrix of -7..7.
    """
    if codes.ndim != 2 or codes.dtype != np.int8:
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, not int8 [N, K]")
    if codes.size and (codes.min() < -7 or codes.max() > 7):
        raise ValueError("codes leave -7..7")
    rows, columns = padded_shape(*codes.shape)
    words = np.empty((rows // BLOCK_ROWS, columns // 2 * BLOCK_ROWS // 4), dtype="<u4")
    for block in range(len(words)):
        part = codes[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
        padding = ((0, BLOCK_ROWS - part.shape[0]), (0, columns - part.shape[1]))
        words[block] = _pack_rows(np.pad(part, padding))
    return words.reshape(-1).view(np.uint8)


def _pack_rows(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint32]:
    """Pack int8 [64, Kp] to words [8 * Kp]."""
    split = codes.reshape(4, 2, 8, -1, 2, 2, 2, 4, 4)  # w h q | kb j s b c e
    ordered = split.transpose(3, 4, 0, 2, 7, 5, 1, 6, 8)  # kb j w q c s h | b e
    bits = np.abs(ordered).astype(np.uint32) << _MAGNITUDE_SHIFT
    bits |= (ordered < 0).astype(np.uint32) << _SIGN_SHIFT
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(bits, axis=(-2, -1)).reshape(-1)
    return words


def unpack_codes(packed: npt.NDArray[np.uint8], n: int, k: int) -> npt.NDArray[np.int8]:
    """Return the int8 codes [n, k] of :func:`pack_codes`, without padding.

    Raises:
        ValueError: When the number of bytes does not match the shape.
    """
    rows, columns = padded_shape(n, k)
    if packed.dtype != np.uint8 or packed.size != rows * columns // 2:
        raise ValueError(f"{packed.dtype} {packed.shape} is not {rows * columns // 2} bytes of packed codes")
    codes = np.empty((rows, columns), dtype=np.int8)
    words = np.ascontiguousarray(packed).view("<u4").reshape(rows // BLOCK_ROWS, -1)
    for block, row_words in enumerate(words):
        codes[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS] = _unpack_rows(row_words)
    return codes[:n, :k]


def _unpack_rows(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.int8]:
    """Unpack words [8 * Kp] to int8 [64, Kp]."""
    split = words.reshape(-1, 2, 4, 8, 4, 2, 2, 1, 1)  # kb j w q c s h | b e
    magnitude = (split >> _MAGNITUDE_SHIFT & np.uint32(7)).astype(np.int8)
    negative = (split >> _SIGN_SHIFT & np.uint32(1)).astype(bool)
    ordered = np.where(negative, -magnitude, magnitude)
    codes: npt.NDArray[np.int8] = ordered.transpose(2, 6, 3, 0, 1, 5, 7, 4, 8).reshape(BLOCK_ROWS, -1)
    return codes


def pack_group_scales(scales: npt.NDArray[Any], group_size: int) -> npt.NDArray[np.uint8]:
    """Pack group scales into the kernel's order.

    Args:
        scales: [N, ceil(K / g)] legal scales under ``m1``, ``m2`` or ``e4m3``: ml_dtypes.float8_e4m3fn, its
            bits as uint8, or the same numbers in float32.
        group_size: g: 32, 64 or 128.

    Returns:
        uint8 [Np * Kp / g].

    Raises:
        ValueError: When a scale is not an E4M3 number in [2^-5, 2^6], or the kernel does not know g.
    """
    _check_group_size(group_size)
    bits = _scale_bits(scales)
    if bits.ndim != 2 or (bits.size and (bits.min() < _LOWEST or bits.max() > _HIGHEST)):
        raise ValueError(f"group scales are not all E4M3 numbers in [{E2M1.min_scale}, {E2M1.max_scale}]")
    rows, columns = padded_shape(bits.shape[0], bits.shape[1] * group_size)
    padding = ((0, rows - bits.shape[0]), (0, columns // group_size - bits.shape[1]))
    padded = np.pad(bits, padding, constant_values=_ONE)
    mantissa = padded & np.uint8(7)
    padded |= np.where((mantissa >= 1) & (mantissa <= 5), 0x80, 0).astype(np.uint8)
    split = padded.reshape(rows // BLOCK_ROWS, 4, 2, 8, -1, BLOCK_COLUMNS // group_size)  # nb w h q kb j
    return np.ascontiguousarray(split.transpose(0, 4, 1, 3, 5, 2)).reshape(-1)  # nb kb w q j h


def unpack_group_scales(
    packed: npt.NDArray[np.uint8], n: int, k: int, group_size: int
) -> npt.NDArray[np.float32]:
    """Return the float32 scales [n, ceil(k / g)] of :func:`pack_group_scales`, without padding.

    Raises:
        ValueError: When the number of bytes does not match the shape.
    """
    expected = packed_sizes(n, k, group_size)[1]
    if packed.dtype != np.uint8 or packed.size != expected:
        raise ValueError(f"{packed.dtype} {packed.shape} is not {expected} bytes of packed group scales")
    rows, columns = padded_shape(n, k)
    split = packed.reshape(rows // BLOCK_ROWS, columns // BLOCK_COLUMNS, 4, 8, -1, 2)  # nb kb w q j h
    bits = (split & np.uint8(0x7F)).transpose(0, 2, 5, 3, 1, 4).reshape(rows, -1)
    return E4M3FN.decode(bits[:n, : -(-k // group_size)])


def _scale_bits(scales: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if scales.dtype == np.uint8:
        return scales
    if scales.dtype == E4M3FN.dtype:
        return scales.view(np.uint8)
    encoded = E4M3FN.encode(scales)
    if (E4M3FN.decode(encoded) != scales).any():
        raise ValueError("group scales are not all E4M3 numbers")
    return encoded.view(np.uint8)


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"no kernel for groups of {group_size}: it knows {GROUP_SIZES}")
