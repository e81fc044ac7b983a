"""Copies between host and GPU that hold up neither what the GPU computes nor the threads that launch it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# Bytes of pinned memory that a copy passes through. One of fewer is the driver's.
_STAGED = 1 << 24


class CopyStream:
    """A GPU's stream for a thread that copies to or from the host beside the computation.

    In the stream that computes, a copy waits for everything queued there, and everything after for the copy,
    as fast as the host takes or gives it. On a CPU it does nothing.
    """

    def __init__(self, device: str) -> None:
        """Take a torch device."""
        self._stream: torch.cuda.Stream | None = None
        if torch.device(device).type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def now(self) -> torch.cuda.Event | None:
        """Return what has been reached when all that this thread has queued is done."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self._stream.device).record_event()
        return event

    @contextlib.contextmanager
    def after(self, reached: torch.cuda.Event | None = None) -> Iterator[None]:
        """Let what this thread does on the GPU begin then, and be done at the end of the block."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if reached is not None:
                self._stream.wait_event(reached)
            yield
            self._stream.synchronize()

    def hand_over(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor made here for the stream that computes: its memory is free when that is done."""
        if self._stream is not None:
            tensor.record_stream(torch.cuda.default_stream(self._stream.device))
        return tensor


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in ordinary memory of the host; one that is there itself.

    The driver's own copy to ordinary memory keeps other threads from launching, while the kernel finds the
    pages for it (1 GB/s on a virtual machine).
    """
    if not tensor.is_cuda or tensor.nbytes < _STAGED:
        return tensor.cpu()
    tensor = tensor.contiguous()
    found = torch.empty(tensor.shape, dtype=tensor.dtype)
    _staged(tensor, found, torch.cuda.current_stream(tensor.device))
    return found


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor of the host on ``device``; see :func:`to_host`."""
    if torch.device(device).type != "cuda" or tensor.nbytes < _STAGED:
        return tensor.to(device)
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    _staged(tensor.contiguous(), found, torch.cuda.current_stream(found.device))
    return found


def _staged(source: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Copy a contiguous tensor to the other side by way of pinned memory, which torch keeps for the next."""
    there, here = (tensor.view(-1).view(torch.uint8) for tensor in (source, target))
    stage = torch.empty(_STAGED, dtype=torch.uint8, pin_memory=True)
    for begin in range(0, len(there), _STAGED):
        part, into = there[begin : begin + _STAGED], here[begin : begin + _STAGED]
        passing = stage[: len(part)]
        passing.copy_(part, non_blocking=True)
        stream.synchronize()
        into.copy_(passing, non_blocking=True)
        stream.synchronize()
