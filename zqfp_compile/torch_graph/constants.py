"""Weights and whatever follows from them alone: loaded when first read, kept where they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch

from zqfp_compile.torch_graph.dtypes import from_onnx

# Tensors of so many values stay on the host until they meet one of the GPU: shapes, axes, indices, scalars.
HOST_VALUES = 1 << 12


class Constants:
    """Constant values by name, on the host or the device: small ones can be had on both."""

    def __init__(self, initializers: Mapping[str, ir.TensorProtocol], device: str) -> None:
        self._initializers = initializers
        self._device = device
        self._home: dict[str, torch.Tensor] = {}
        self._moved: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._initializers or name in self._home

    def get(self, name: str, fold: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return a value; ``fold`` computes the ones that are no initializers, once."""
        found = self._home.get(name)
        if found is None:
            # Whoever runs the graph first, later runs may need gradients.
            with torch.inference_mode(False), torch.no_grad():
                found = self._load(name) if name in self._initializers else fold(name)
                self._home[name] = found = settled(found, self._device)
        return found

    def moved(self, name: str) -> torch.Tensor:
        """Return a value that lies on the host on the device."""
        found = self._moved.get(name)
        if found is None:
            with torch.inference_mode(False):
                self._moved[name] = found = self._home[name].to(self._device, non_blocking=True)
        return found

    def drop(self, name: str) -> None:
        """Forget a value that only other constants were made of."""
        self._home.pop(name, None)
        self._moved.pop(name, None)

    def _load(self, name: str) -> torch.Tensor:
        tensor = self._initializers[name]
        return from_onnx(tensor, "cpu" if tensor.size <= HOST_VALUES else self._device)


def settled(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Return a large tensor on the device, a small one where it is."""
    return tensor if tensor.numel() <= HOST_VALUES else tensor.to(device, non_blocking=True)
