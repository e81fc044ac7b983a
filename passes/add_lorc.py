"""Pass ``add-lorc``: ``W4A8Linear`` nodes get their low-rank error compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._emit import Names
from passes._sites import layer_tensors, w4a8_nodes
from passes._tensors import TensorSharer
from passes._w4a8_function import INPUTS, LORC_U, LORC_U_SCALE, LORC_V, LORC_V_SCALE, Variant, X, add_function
from zqfp_compile.pass_base import Pass, PassError, PassResult
from zqfp_compile.plan import QuantPlan


@dataclass(frozen=True)
class AddLoRC(Pass):
    """Add ``(x @ V) @ U`` (LoRC, ZeroQuant-V2 section 5) to every layer whose plan tensors have factors.

    Before::

        W4A8Linear(x8, a, codes, group_scales, row_scales, bias, "", "", "", "", "") -> y

    After, with x the activation before any quantisation or cast, V [K, r] and U [r, N] in the type of y::

        W4A8Linear(x8, a, codes, group_scales, row_scales, bias, x, V, U, "", "") -> y    (overload ..._lorc)

    After, with factors in FP8 and a FLOAT scale [r] for each::

        W4A8Linear(x8, a, codes, group_scales, row_scales, bias, x, V8, U8, v, u) -> y    (overload ..._lorc8)

    Layers without factors, and layers that have their branch already, are left alone.

    Attributes:
        plan: Linears and their tensors.
    """

    name: ClassVar[str] = "add-lorc"
    plan: QuantPlan

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``.

        Raises:
            PassError: When a layer's activation or tensors are missing.
        """
        names = Names(model.graph)
        sharer = TensorSharer(model.graph, names)
        values = {value.name: value for node in model.graph for value in node.outputs}
        values.update({value.name: value for value in model.graph.inputs})
        modified = False
        for site, node in w4a8_nodes(model, self.plan):
            tensors = layer_tensors(self.plan, site.name)
            if tensors.lorc_v is None or tensors.lorc_u is None or node.inputs[LORC_V] is not None:
                continue
            if site.activation not in values:
                raise PassError(f"layer {site.name!r}: its input {site.activation!r} is not in the graph")
            node.replace_input_with(X, values[site.activation])
            for index in (LORC_V, LORC_U, LORC_V_SCALE, LORC_U_SCALE):
                tensor = getattr(tensors, INPUTS[index])
                if tensor is not None:
                    node.replace_input_with(index, sharer.value(f"{site.name}.{INPUTS[index]}", tensor))
            variant = Variant.of_node(self.plan, site, node)
            node.overload = variant.overload
            add_function(model, variant)
            modified = True
        return PassResult(model, modified)
