"""The original model with the artifact's decoded weights put in by hand: what the rewrite must compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from graph_variants import live_names, renamed
from onnx import helper
from random_graphs import tensor_proto

from passes._sites import w4a8_nodes
from passes._tensors import w4a8_tensors
from passes._w4a8_function import LORC_U, LORC_U_SCALE, LORC_V, LORC_V_SCALE
from zqfp_compile.plan import LinearSite, LinearTensors, QuantPlan

F32, F16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
FP8 = {"e4m3": onnx.TensorProto.FLOAT8E4M3FN, "e5m2": onnx.TensorProto.FLOAT8E5M2}


def can_refer(original: onnx.ModelProto, plan: QuantPlan) -> bool:
    """Whether there is a reference: Casts to FP8 came with opset 19, and FP8 in attention is not modelled."""
    opset = next(item.version for item in original.opset_import if item.domain == "")
    made = {name for node in original.graph.node for name in node.output}
    return (
        (opset >= 19 or plan.activation_format == "none")
        and not (plan.caches or plan.attentions)
        and all(site.output in made for site in plan.linears)  # linears of functions have no node yet
    )


def reference_model(original: onnx.ModelProto, artifact: ir.Model, plan: QuantPlan) -> onnx.ModelProto:
    """Replace each rewritten linear of ``original`` by MatMul with the artifact's weight, decoded by numpy.

    Nothing of it went through a pass but the weights, which the certificate checks. What is not decoded comes
    in the artifact's order, so that ONNX Runtime computes the same bits.
    """
    model = renamed(original, {}, lambda node: "")  # ONNX Runtime refuses duplicate node names
    linears: dict[str, tuple[LinearSite, ir.Node | None]] = {
        site.output: (site, node) for site, node in w4a8_nodes(artifact, plan)
    }
    if not plan.quantizes_weights:
        linears = {site.output: (site, None) for site in plan.linears}
    tables = {site.output: site for site in plan.stored_embeddings}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        output = node.output[0] if node.output else ""
        if output in linears:
            nodes += _Linear(model.graph, node, plan).nodes(*linears[output])
            continue
        if output in tables:
            site = tables[output]
            name = f"{site.name}.codes"
            gather = next(item for item in artifact.graph if item.name == site.node)
            codes, rows = (array.astype(np.float32) for array in _constant_inputs(gather.inputs[0]))
            model.graph.initializer.append(tensor_proto(f"reference/{name}", codes * rows[:, None]))
            gathered = f"reference/{name}/rows"
            axis = {item.name: item.i for item in node.attribute}
            nodes.append(helper.make_node("Gather", [f"reference/{name}", node.input[1]], [gathered], **axis))
            node = helper.make_node("Cast", [gathered], [output], to=int(site.dtype))
        nodes.append(node)
    # What is dead is gone from the artifact too: a reader more can be a rounding more in float16.
    live = live_names(nodes, (value.name for value in model.graph.output))
    nodes = [node for node in nodes if not live.isdisjoint(node.output)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def weights_model(original: onnx.ModelProto, plan: QuantPlan) -> tuple[onnx.ModelProto, list[LinearSite]]:
    """The original with outputs W [N, K], times Gemm's alpha, of linears that are nodes of its graph."""
    model = renamed(original, {}, lambda node: "")
    nodes = {name: node for node in model.graph.node for name in node.output}
    sites = [site for site in plan.rewritten if site.output in nodes]
    del model.graph.output[:]
    for site in sites:
        node = nodes[site.output]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        wide, name = f"reference/{site.output}/wide", f"reference/{site.output}/weight"
        alpha = tensor_proto(f"{name}/alpha", np.array(attributes.get("alpha", 1.0), np.float32))
        perm = [0, 1] if attributes.get("transB") else [1, 0]
        model.graph.initializer.append(alpha)
        model.graph.node.extend(
            [
                helper.make_node("Cast", [node.input[1]], [wide], to=F32),
                helper.make_node("Transpose", [wide], [f"{name}/flat"], perm=perm),
                helper.make_node("Mul", [f"{name}/flat", alpha.name], [name]),
            ]
        )
        model.graph.output.append(helper.make_tensor_value_info(name, F32, [site.n, site.k]))
    return model, sites


def stored_weight(artifact: ir.Model, plan: QuantPlan, site: LinearSite) -> np.ndarray | None:
    """What the artifact's linear multiplies with, LoRC included, [N, K]; ``None`` for a float weight."""
    node = next((node for found, node in w4a8_nodes(artifact, plan) if found is site), None)
    if node is None:
        return None
    weight, low_rank = _decoded(plan, site, node)
    return weight if low_rank is None else weight + (low_rank[0] @ low_rank[1]).T


def _constant_inputs(value: ir.Value | None) -> list[np.ndarray]:
    """What the node that makes a value reads, which is all constant."""
    made = None if value is None else value.producer()
    assert made is not None
    tensors = [None if source is None else source.const_value for source in made.inputs]
    return [tensor.numpy() for tensor in tensors if tensor is not None]


class _Linear:
    """One linear's nodes in the reference, named after its output."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto, plan: QuantPlan) -> None:
        self._graph, self._node, self._plan = graph, node, plan
        self._made: list[onnx.NodeProto] = []
        self._prefix = f"reference/{node.output[0]}/"

    def _op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{self._prefix}{len(self._made)}"
        self._made.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _const(self, array: np.ndarray) -> str:
        name = f"{self._prefix}const{len(self._graph.initializer)}"
        self._graph.initializer.append(tensor_proto(name, array))
        return name

    def nodes(self, site: LinearSite, linear: ir.Node | None) -> list[onnx.NodeProto]:
        """``y = a * (x8 @ W_hat^T) + (x @ V) @ U + beta * C``, with ``a`` first where it is one number."""
        x = self._node.input[0]
        # bfloat16 runs in float32, see widen_bfloat16.
        dtype = np.dtype(np.float16 if site.dtype == ir.DataType.FLOAT16 else np.float32)
        computed = dtype if self._plan.activation_format == "none" else np.dtype(np.float32)
        operand, scale = self._activation(site, x)
        if linear is None:
            kept = list(self._node.input)
            operand = operand if scale is None else self._op("Mul", operand, scale)
            kept[0] = self._op("Cast", operand, to=int(site.dtype))
            node = onnx.NodeProto.FromString(self._node.SerializeToString())
            node.input[:] = kept
            return [*self._made, node]
        weight, low_rank = _decoded(self._plan, site, linear)
        y = self._op("MatMul", operand, self._const(weight.T.astype(np.float32).astype(computed)))
        if scale is not None:
            y = self._op("Mul", y, scale)
        if computed != dtype:
            y = self._op("Cast", y, to=int(site.dtype))
        if low_rank is not None:
            v, u = (self._factor(factor, dtype) for factor in low_rank)
            y = self._op("Add", y, self._op("MatMul", self._op("MatMul", x, v), u))
        if site.bias is not None:
            # Stored in the type of C, however wide the model then runs.
            stored = _constant(self._graph, site.bias)
            bias = (stored.astype(np.float32) * np.float32(site.bias_scale)).astype(stored.dtype)
            y = self._op("Add", y, self._const(bias.astype(dtype)))
        # No Identity: ONNX Runtime would round float16 there, and nowhere in the artifact.
        self._made[-1].output[0] = self._node.output[0]
        return self._made

    def _factor(self, factor: np.ndarray, dtype: np.dtype[Any]) -> str:
        """LoRC's V or U in ``dtype``; one in FP8 is rounded to it by a node, as in the artifact."""
        if self._plan.lorc_format != "fp8" or dtype == np.float32:
            return self._const(factor.astype(dtype))
        return self._op("Cast", self._const(factor.astype(np.float32)), to=F16)

    def _activation(self, site: LinearSite, x: str) -> tuple[str, str | None]:
        """x8, float32, and a dynamic ``a``; a static one is in x8 already."""
        plan = self._plan
        if plan.activation_format == "none":
            return x, None
        x = self._op("Cast", x, to=F32)
        if plan.per_token:
            last = self._const(np.array([-1], np.int64))
            amax = self._op("ReduceMax", self._op("Abs", x), last, keepdims=1)
            floor = self._op("Max", amax, self._const(np.array(1e-30, np.float32)))
            largest = self._const(np.array(LARGEST[plan.activation_format], np.float32))
            scale = self._op("Div", floor, largest)
        else:
            scale = self._const(np.array(plan.activation_scales[site.activation], np.float32))
        scaled = self._op("Div", x, scale)
        if plan.activation_format == "int8":
            low, high = (self._const(np.array(limit, np.float32)) for limit in (-128, 127))
            codes = self._op("Clip", self._op("Round", scaled), low, high)
        else:
            codes = self._op("Cast", self._op("Cast", scaled, to=FP8[plan.activation_format]), to=F32)
        return (codes, scale) if plan.per_token else (self._op("Mul", codes, scale), None)


def _constant(graph: onnx.GraphProto, name: str) -> np.ndarray:
    """Return the constant called ``name``: an initializer, or what a Constant node makes."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    held |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    return onnx.numpy_helper.to_array(held[name])


def _decoded(
    plan: QuantPlan, site: LinearSite, node: ir.Node
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """W_hat [N, K] and the LoRC factors, of the tensors that ``node`` has in the artifact."""
    tensors = w4a8_tensors(node)
    lorc = [None if value is None else value.const_value for value in (node.inputs[i] for i in _LORC)]
    stored = LinearTensors(tensors.codes, tensors.group_scales, tensors.row_scales, *lorc)
    here = plan.replace(tensors={site.name: stored})
    return here.quantized_weight(site).dequantize(), here.low_rank(site)


_LORC = (LORC_V, LORC_U, LORC_V_SCALE, LORC_U_SCALE)
