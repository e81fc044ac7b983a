"""The NVIDIA GPUs of this machine, asked of the driver itself: no nvidia-smi, no CUDA toolkit."""

from __future__ import annotations

import ctypes
import sys

# CUdevice_attribute, cuda.h
_MAJOR, _MINOR = 75, 76


def compute_capabilities() -> tuple[str, ...]:
    """Compute capability of each visible GPU, such as ``("90",)``; empty without a GPU or a driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_capability(cuda, index) for index in range(count.value))


def _capability(cuda: ctypes.CDLL, index: int) -> str:
    device, value = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    digits = ""
    for attribute in (_MAJOR, _MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        digits += str(value.value)
    return digits
