"""INT4 storage as ONNX defines it: two's complement nibbles, row-major, low nibble first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pack_int4(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack codes of any shape, two to a byte.

    Args:
        codes: int8 values in -8..7; rows are not padded, the whole tensor is one run.

    Returns:
        uint8 [ceil(codes.size / 2)]; the last high nibble of an odd count is 0 (ONNX, TensorProto.raw_data).

    Raises:
        ValueError: When a code does not fit in 4 bits.
    """
    flat = np.ascontiguousarray(codes, dtype=np.int8).reshape(-1)
    if flat.size and (flat.min() < -8 or flat.max() > 7):
        raise ValueError(f"codes {flat.min()}..{flat.max()} do not fit in 4 bits")
    nibbles = flat.view(np.uint8) & np.uint8(0x0F)
    packed: npt.NDArray[np.uint8] = nibbles[0::2].copy()
    odd = nibbles[1::2]
    packed[: odd.size] |= odd << np.uint8(4)
    return packed


def unpack_int4(packed: npt.NDArray[np.uint8], shape: Sequence[int]) -> npt.NDArray[np.int8]:
    """Unpack to int8 codes of the given shape.

    Raises:
        ValueError: When the number of bytes does not match the shape.
    """
    count = math.prod(shape)
    if packed.size != (count + 1) // 2:
        raise ValueError(f"{packed.size} bytes do not hold {count} 4-bit codes")
    flat = packed.reshape(-1)
    nibbles = np.empty(2 * flat.size, dtype=np.uint8)
    nibbles[0::2] = flat & np.uint8(0x0F)
    nibbles[1::2] = flat >> np.uint8(4)
    # Move the nibble to the top of the byte: the arithmetic shift back extends its sign.
    codes: npt.NDArray[np.int8] = (nibbles[:count] << np.uint8(4)).view(np.int8) >> np.int8(4)
    return codes.reshape(tuple(shape))
