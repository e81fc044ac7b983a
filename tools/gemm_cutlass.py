"""CUTLASS's W4A8 GEMM of E2M1 weights as a contender of bench_gemm.py: tools/cutlass, in ctypes.

Its weights have an FP16 scale per 128 columns and no row scales (w4a8.cu says why). Several tile sizes are
built; the fastest one is the contender's time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

NAME = "libcutlass_w4a8.so"
GROUP_SIZE = 128
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def find() -> Path | None:
    """Return the library's path, in ``$ZQFP_KERNELS`` or ``build/kernels``; ``None`` when it is not built."""
    folder = Path(os.environ.get("ZQFP_KERNELS", Path(__file__).parents[1] / "build" / "kernels"))
    return path if (path := folder / NAME).is_file() else None


class Library:
    """The loaded library; loading needs no GPU.

    Attributes:
        names: The kernels, by number.
    """

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.contenderError.restype = self._c.contenderName.restype = ctypes.c_char_p
        self.names: list[str] = []
        while (name := self._c.contenderName(len(self.names))) is not None:
            self.names.append(name.decode())

    def workspace_bytes(self, kernel: int, m: int, n: int, k: int) -> int:
        """Return the bytes of workspace of a call.

        Raises:
            RuntimeError: When the kernel does not take the shape.
        """
        size = ctypes.c_size_t()
        self._check(self._c.contenderWorkspace(kernel, m, n, k, ctypes.byref(size)))
        return size.value

    def gemm(
        self,
        kernel: int,
        shape: tuple[int, int, int],
        pointers: tuple[int, int, int, int, int],
        alpha: float,
        stream: int,
    ) -> None:
        """Launch kernel number ``kernel`` on M, N, K and the addresses of codes, scales, x8, y and workspace.

        Raises:
            RuntimeError: When it refuses.
        """
        *inputs, y, workspace = map(ctypes.c_void_p, pointers)
        number = ctypes.c_float(alpha)
        self._check(
            self._c.contenderGemm(kernel, *shape, *inputs, number, y, workspace, ctypes.c_void_p(stream))
        )

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"{NAME}: {self._c.contenderError().decode()}")


class CutlassContender:
    """All kernels on one weight N x K of random codes, K a multiple of 128."""

    def __init__(self, library: Library, n: int, k: int) -> None:
        self._library, self._n, self._k = library, n, k
        self._codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.tensor([0.75, 0.875, 1, 1.125, 1.25, 1.375], device="cuda")
        self._scales = scales[torch.randint(0, 6, (k // GROUP_SIZE, n), device="cuda")].half()

    def decoded(self) -> torch.Tensor:
        """The weight as FP8 numbers, float32 [N, K]: the first of two codes is in the low half of a byte."""
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device="cuda")
        codes = torch.stack([self._codes & 15, self._codes >> 4], dim=-1).reshape(self._n, self._k)
        scales = self._scales.float().t().repeat_interleave(GROUP_SIZE, dim=1)
        return (table[codes.int()] * scales).to(torch.float8_e4m3fn).float()

    def call(self, kernel: int, x8: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
        """Return a call that writes y float16 [M, N] of x8 float8_e4m3fn [M, K].

        Raises:
            RuntimeError: When the kernel does not take the shape.
        """
        shape = (len(x8), self._n, self._k)
        size = self._library.workspace_bytes(kernel, *shape)
        workspace = torch.zeros(max(size, 16), dtype=torch.uint8, device="cuda")
        tensors = (self._codes, self._scales, x8, y, workspace)
        stream = torch.cuda.current_stream().cuda_stream

        def run() -> None:
            a, b, c, d, e = (tensor.data_ptr() for tensor in tensors)
            self._library.gemm(kernel, shape, (a, b, c, d, e), 1.0, stream)

        return run

    def right_calls(self, m: int, w8: torch.Tensor) -> dict[str, Callable[[], None]]:
        """Return calls on M tokens by kernel name: those whose results are right, on a poisoned output."""
        x8 = torch.randn(m, self._k, device="cuda").to(torch.float8_e4m3fn)
        wanted = x8.float() @ w8.t()
        calls = {}
        for kernel, name in enumerate(self._library.names):
            y = torch.full((m, self._n), float("nan"), dtype=torch.float16, device="cuda")
            try:
                call = self.call(kernel, x8, y)
                call()
            except RuntimeError as error:
                print(f"{name} does not run for M = {m}: {error}")
                continue
            relative = float((y.float() - wanted).norm() / wanted.norm())
            if relative < 0.02:  # 14 bits of the tensor core's sums; a wrong index gives 1
                calls[name] = call
            else:
                print(f"{name} is wrong for M = {m}: relative error {relative:.1e}")
        return calls
