"""A node, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from zqfp_compile.torch_graph.call import Call, Function
from zqfp_compile.torch_graph.ops import HOST_INPUTS, HOST_SCALARS, operator

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass
class Step:
    """One node, ready to run.

    Attributes:
        node: The node itself.
        inputs: Names of its inputs, ``None`` for a missing one.
        outputs: Names of its outputs, ``None`` for one nobody needs, unused ones at the end left out.
        replaced: Whether an override gives the output.
        determined: Whether the outputs follow from the shapes of the graph's inputs.
        release: Values nobody needs after it.
    """

    node: ir.Node
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    replaced: bool = False
    determined: bool = False
    release: tuple[str, ...] = ()

    def prepare(self, opsets: Mapping[str, int]) -> None:
        """Look the operator up.

        Raises:
            ModelError: When it is not supported.
        """
        node = self.node
        self.function: Function = operator(node)
        attributes = {
            name: attribute.value
            for name, attribute in node.attributes.items()
            if attribute.type not in _GRAPHS
        }
        self.call = Call(
            op_type=node.op_type,
            name=str(node.name),
            opset=opsets.get(node.domain, 1),
            attributes=attributes,
            outputs=len(self.outputs),
            input_types=tuple(None if value is None else value.dtype for value in node.inputs),
        )
        self.host = HOST_INPUTS.get(node.op_type, frozenset())
        self.scalars = node.op_type in HOST_SCALARS
