"""Finding a plan's linears in the graph, before and after they became ``W4A8Linear`` nodes."""

from __future__ import annotations

import onnx_ir as ir

from passes._w4a8_function import DOMAIN, OP_TYPE
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan


def is_w4a8(node: ir.Node | None) -> bool:
    """Whether ``node`` is a ``zqfp::W4A8Linear``."""
    return node is not None and node.domain == DOMAIN and node.op_type == OP_TYPE


def planned_nodes(model: ir.Model, plan: QuantPlan) -> list[tuple[LinearSite, ir.Node]]:
    """Return every linear to rewrite with its node: a MatMul or Gemm, or the ``W4A8Linear`` it became.

    Raises:
        PassError: When a planned linear is not in the graph.
    """
    named = {node.name: node for node in model.graph}
    found = []
    for site in plan.rewritten:
        node = named.get(site.name)
        if not is_w4a8(node):
            node = named.get(site.node)
        if node is None:
            raise PassError(
                f"layer {site.name!r}: its node {site.node!r} is not in the graph; use this model's plan"
            )
        found.append((site, node))
    return found


def w4a8_nodes(model: ir.Model, plan: QuantPlan) -> list[tuple[LinearSite, ir.Node]]:
    """Return the ``W4A8Linear`` nodes of the plan, with their sites.

    Raises:
        PassError: When the graph holds a ``W4A8Linear`` that the plan does not know.
    """
    sites = {site.name: site for site in plan.linears}
    found = []
    for node in [node for node in model.graph if is_w4a8(node)]:
        if node.name not in sites:
            raise PassError(
                f"node {node.name!r}: the plan does not know this W4A8Linear; use this model's plan"
            )
        found.append((sites[node.name], node))
    return found


def layer_tensors(plan: QuantPlan, layer: str) -> LinearTensors:
    """Return the quantised tensors of ``layer``.

    Raises:
        PassError: When the quantize step has not filled them.
    """
    if layer not in plan.tensors:
        raise PassError(f"layer {layer!r}: the plan has no quantised tensors; run the quantize step first")
    return plan.tensors[layer]
