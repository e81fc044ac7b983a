"""A segment of a walked model in torch: on a GPU nothing then leaves the device."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from zqfp_compile.calibrate.segments import Partition
from zqfp_compile.torch_graph import TorchGraph
from zqfp_compile.torch_graph.ops import multiplies, unsupported


class TorchSegment:
    """``partition.segments[index]`` in torch; its values are float32 whatever the model's float type is."""

    def __init__(self, model: ir.Model, parts: Partition, index: int, device: str) -> None:
        segment = parts.segments[index]
        self._graph = TorchGraph(
            model, nodes=segment.nodes, inputs=segment.inputs, outputs=segment.outputs, device=device
        )
        self.inputs = segment.inputs
        self.multiplies = multiplies(model, segment.nodes)
        self.finished = [name for name, last in parts.last_use.items() if last == index]

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the segment's outputs by name.

        Raises:
            ModelError: When torch fails.
        """
        return {name: _compact(tensor) for name, tensor in self._graph.run(inputs).items()}


def runs_in_torch(model: ir.Model, parts: Partition) -> bool:
    """Return whether torch has every operator of every segment."""
    return not any(unsupported(model, segment.nodes) for segment in parts.segments)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that keeps no larger one alive that it is a part of."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
