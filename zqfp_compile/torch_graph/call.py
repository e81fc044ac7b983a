"""What an operator function is told about its node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from zqfp_compile.errors import ModelError

Result = torch.Tensor | tuple[torch.Tensor, ...]
# (call, inputs in the node's order, None where an optional one is missing) -> its outputs.
Function = Callable[..., Result]


@dataclass(frozen=True)
class Call:
    """One node.

    Attributes:
        op_type: ONNX operator.
        name: Name of the node.
        opset: Version of the operator's domain in the model.
        attributes: Values by name; tensors as ``ir.TensorProtocol``.
        outputs: How many outputs are computed, unused ones at the end left out.
        input_types: Element types of the inputs as far as the graph says.
    """

    op_type: str
    name: str
    opset: int
    attributes: Mapping[str, Any]
    outputs: int
    input_types: tuple[ir.DataType | None, ...]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the operator's default."""
        return self.attributes.get(name, default)

    def axes(self, given: torch.Tensor | None) -> list[int] | None:
        """Return axes, which are an input in newer opsets and an attribute in older ones."""
        if given is not None:
            return [int(axis) for axis in given.tolist()]
        axes = self.get("axes")
        return None if axes is None else list(axes)

    def unsupported(self, what: str) -> ModelError:
        """Return the error for a form of the operator that is not implemented."""
        return ModelError(
            f"node {self.name!r}: {self.op_type} with {what} is not supported in torch; "
            "export without it, or calibrate with ONNX Runtime"
        )
