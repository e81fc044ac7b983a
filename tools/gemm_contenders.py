"""Who competes in bench_gemm.py: each makes, for one shape, a call that multiplies M tokens by one weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from zqfp_compile.formats.codebook import E2M1
from zqfp_compile.formats.scales import legal_scales
from zqfp_compile.kernels.library import Layer, Library, QuantizerTensors
from zqfp_compile.kernels.packing import pack_group_scales, packed_sizes
from zqfp_compile.kernels.torch_linear import PackedWeight, TorchLinear

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    n: int
    k: int
    m: int
    group_size: int = 64
    constraint: str = "e4m3"
    lorc_rank: int = 0


def random_weight(n: int, k: int, group_size: int, constraint: str) -> PackedWeight:
    """Return a weight of random codes and legal scales, made in the kernel's order: any bytes are codes."""
    codes_bytes, scales_bytes = packed_sizes(n, k, group_size)
    table = legal_scales(constraint, E2M1)
    # The packed form of each legal scale: the first byte of a block filled with it.
    bytes_of = np.array([pack_group_scales(np.full((64, 1), s, np.float32), 128)[0] for s in table])
    choice = torch.randint(0, len(table), (scales_bytes,), device="cuda")
    return PackedWeight(
        codes=torch.randint(0, 256, (codes_bytes,), dtype=torch.uint8, device="cuda"),
        group_scales=torch.from_numpy(bytes_of).cuda()[choice],
        row_scales=torch.exp2(torch.empty(n, device="cuda").uniform_(-12, -8)),
    )


class Zqfp:
    """Our kernel on one weight, for any number of tokens."""

    def __init__(self, library: Library, case: Case, max_rows: int) -> None:
        rank = case.lorc_rank
        self.layer = Layer(case.n, case.k, case.group_size, lorc_rank=rank)
        self.linear = TorchLinear(
            library,
            self.layer,
            random_weight(case.n, case.k, case.group_size, case.constraint),
            max_rows=max_rows,
            v=torch.randn(case.k, rank) / case.k**0.5 if rank else None,
            u=torch.randn(rank, case.n) if rank else None,
        )
        self.weight_bytes = sum(
            t.nbytes
            for t in (
                self.linear.weight.codes,
                self.linear.weight.group_scales,
                self.linear.weight.row_scales,
            )
        )

    def inputs(self, m: int) -> torch.Tensor:
        """Return x, float16 [M, K]."""
        return torch.randn(m, self.layer.k, device="cuda", dtype=torch.float16)

    def gemm_call(self, x: torch.Tensor) -> Call:
        """The GEMM alone, on activations that are quantised already."""
        x8, a, xv = self.linear.quantize(x)
        y = torch.empty((len(x), self.layer.n), dtype=torch.float16, device="cuda")
        return lambda: self.linear.multiply(x8, a, xv, y)

    def quantize_call(self, x: torch.Tensor) -> Call:
        """The activation quantizer alone, with x @ V where there is LoRC."""
        made = QuantizerTensors.empty(x, self.linear.scale, self.linear.v)
        return lambda: self.linear.library.quantize_activation_into(x, made)

    def decoded(self) -> torch.Tensor:
        """The weight w8 as the host decodes it, float32 [N, K]."""
        weight = self.linear.weight
        bits = self.linear.library.decode(
            self.layer, weight.codes.cpu().numpy(), weight.group_scales.cpu().numpy()
        )
        return torch.from_numpy(bits).cuda().view(torch.float8_e4m3fn).float()

    def error(self, x: torch.Tensor, w8: torch.Tensor) -> float:
        """The relative error of one call with a poisoned output: never time a wrong kernel."""
        x8, a, xv = self.linear.quantize(x)
        y = torch.full((len(x), self.layer.n), float("nan"), dtype=torch.float16, device="cuda")
        self.linear.multiply(x8, a, xv, y)
        wanted = (x8.float() @ w8.t()) * a[:, None] * self.linear.weight.row_scales
        if xv is not None and self.linear.u is not None:
            wanted += xv.float() @ self.linear.u.float()
        return float((y.float() - wanted).norm() / wanted.norm())


class TorchContenders:
    """cuBLASLt through torch, on one shape: FP8 with one scale per tensor or per row, and FP16."""

    def __init__(self, n: int, k: int) -> None:
        half = torch.randn(n, k, device="cuda", dtype=torch.float16)
        self._half, self._eight = half, half.to(torch.float8_e4m3fn)
        self._row_scales = torch.ones(1, n, device="cuda")

    def calls(self, m: int) -> dict[str, Call]:
        """Return the calls by the name that docs/results/gemm.json gives them."""
        x = torch.randn(m, self._half.shape[1], device="cuda", dtype=torch.float16)
        x8, one = x.to(torch.float8_e4m3fn), torch.ones(1, device="cuda")
        token_scales = torch.ones(m, 1, device="cuda")

        def scaled(scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype) -> Call:
            return lambda: torch._scaled_mm(
                x8, self._eight.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=True
            )

        return {
            "cublaslt_fp8": scaled(one, one, torch.float16),
            "cublaslt_fp8_rowwise": scaled(token_scales, self._row_scales, torch.bfloat16),
            "fp16": lambda: x @ self._half.t(),
        }

    def fp8_errors(self, m: int) -> tuple[float, float]:
        """Return cuBLASLt's relative errors with fast and with promoted accumulation."""
        x8 = torch.randn(m, self._half.shape[1], device="cuda").to(torch.float8_e4m3fn)
        one = torch.ones(1, device="cuda")
        wanted = x8.float() @ self._eight.float().t()
        fast, promoted = (
            torch._scaled_mm(
                x8, self._eight.t(), scale_a=one, scale_b=one, out_dtype=torch.float16, use_fast_accum=fast
            )
            for fast in (True, False)
        )
        errors = [float((y.float() - wanted).norm() / wanted.norm()) for y in (fast, promoted)]
        return errors[0], errors[1]
