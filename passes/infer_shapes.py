"""Pass ``infer-shapes``: types and shapes for values that an exporter left without."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from zqfp_compile.pass_base import Pass, PassResult


class InferShapes(Pass):
    """Record what ONNX's shape inference knows of values without a type or shape.

    Before, as TorchScript exports (Optimum) have it::

        x -> Mul -> h              nothing said of h

    After::

        x -> Mul -> h              h: FLOAT16 [batch, sequence, 4096]

    Inference goes through the functions of the model, so ``W4A8Linear`` must not have been lowered yet: of
    our hosts' ops it knows nothing. Weights are not loaded. A model that says everything is left alone.
    """

    name: ClassVar[str] = "infer-shapes"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``."""
        values = (value for node in model.graph for value in node.outputs if value.uses())
        if all(value.dtype is not None and value.shape is not None for value in values):
            return PassResult(model, False)
        return PassResult(model, ShapeInferencePass()(model).modified)
