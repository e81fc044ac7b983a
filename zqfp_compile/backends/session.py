"""What the runtime engine asks of a backend: values stay where the backend has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from zqfp_compile.backends.arrays import Array
from zqfp_compile.calibrate.causal_lm import InputSpec


class Session(Protocol):
    """A loaded model. A *value* is the backend's own tensor: an ``OrtValue``, or a torch tensor on the GPU.

    Attributes:
        path: File it came from.
        inputs: What :meth:`execute` takes.
        outputs: What :meth:`execute` returns.
        device: Where values live, ``cpu`` or ``cuda``.
    """

    path: Path
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    device: str

    def take(self, spec: InputSpec, array: Any) -> Any:
        """Return a value for an input: ``array``'s own memory where it is on the device already.

        Raises:
            UsageError: When element type, rank or a fixed dimension differ from the input's.
        """

    def largest(self, spec: InputSpec, axis: int) -> int | None:
        """Return the most elements an input may have along a dynamic axis, or ``None`` for any number."""

    def execute(self, feed: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Run on a value per input; return the values of the outputs ``names``.

        Raises:
            ZqfpError: When the runtime refuses the inputs or fails.
        """

    def to_numpy(self, spec: InputSpec, value: Any) -> Array:
        """Return an output's value as numbers on the host, without a copy when it is there already."""

    def to_torch(self, spec: InputSpec, value: Any) -> torch.Tensor:
        """Return an output's value as a tensor on its device, sharing its memory."""
