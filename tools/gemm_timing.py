"""Timing of GPU calls: medians of single calls, L2 flushed in between, and the chip's two ceilings.

The flush reads. One that writes leaves L2 full of lines that have yet to go to memory, and the timed call
pays for that: on an H100 cuBLASLt's FP8 product of 28672 x 8192 took 96 us instead of 85.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

# Five times the 50 MB of an H100's L2.
FLUSH_BYTES = 256 << 20
# The GPU spins so many cycles, some 100 us, before a timed call: else it may wait for the host meanwhile.
HEAD_START_CYCLES = 200_000


class Timer:
    """Times calls on the current stream."""

    def __init__(self) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")

    def flush(self) -> None:
        """Fill L2 with what nobody wants."""
        self._flush.sum()

    def median_us(self, call: Callable[[], object], budget_ms: float = 60) -> float:
        """Return the median of single calls in microseconds, after warming up; 7 to 50 of them."""
        call()
        torch.cuda.synchronize()
        once = self._times(call, 3)
        repeats = max(7, min(50, int(budget_ms * 1000 / (min(once) + 100))))
        return statistics.median(self._times(call, repeats))

    def _times(self, call: Callable[[], object], repeats: int) -> list[float]:
        pairs = []
        for _ in range(repeats):
            self.flush()
            torch.cuda._sleep(HEAD_START_CYCLES)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1000 for start, end in pairs]


def launch_us(timer: Timer) -> float:
    """Return what a kernel with next to nothing to do reads: the floor of every time here."""
    one = torch.ones(1, device="cuda")
    return timer.median_us(lambda: one.add_(1))


def copy_gbps(timer: Timer) -> float:
    """Return the device-to-device copy bandwidth in GB/s, counting bytes read and bytes written."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer.median_us(lambda: target.copy_(source)) / 1000


def fp8_tflops(timer: Timer) -> float:
    """Return cuBLASLt's best FP8 rate in TFLOP/s on 8192 x 8192 x 8192, random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones(1, device="cuda")

    def call() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * 8192**3 / timer.median_us(call) / 1e6
