"""What errors in linear layers do to a language model's predictions, in one ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from zqfp_compile.calibrate.sessions import open_model, run_session
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.device import providers_for
from zqfp_compile.distill.divergence import divergence
from zqfp_compile.errors import ModelError
from zqfp_compile.plan import LinearSite

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]


class Probe:
    """A model whose linear layers can be given weight errors from run to run.

    Before::

        y = x @ W^T

    After, with an input ``error`` that may be empty::

        y = If(Size(error) > 0) { x @ W^T + x @ error } else { x @ W^T }

    So one session, opened once, serves every layer, candidate and combination; only the errors of the layers
    in question are in memory.
    """

    def __init__(
        self,
        model: ir.Model,
        sites: Sequence[LinearSite],
        feeds: Sequence[Feed],
        *,
        logits: str,
        device: str = "cpu",
    ) -> None:
        """Open the session and run the unchanged model.

        Args:
            model: The original model; it is not changed.
            sites: Layers that errors can be given to.
            feeds: Windows of tokens, as graph inputs.
            logits: Name of the logits output, [B, S, V].
            device: ``cpu`` or ``cuda``, which ONNX Runtime takes where it can.

        Raises:
            ModelError: When ONNX Runtime cannot run the model, or its logits are NaN or infinite.
        """
        self._inputs = {site.name: f"zqfp_error_{index}" for index, site in enumerate(sites)}
        self._feeds = list(feeds)
        probed = _probing_model(model, sites, self._inputs, logits)
        if uses_bfloat16(probed):
            widen_bfloat16(probed)
        self._session = open_model(probed, providers_for(device))
        self._wanted = {arg.name for arg in self._session.get_inputs()}
        types = {arg.name: arg.type for arg in self._session.get_inputs()}
        self._dtypes = {
            name: np.float16 if types[key] == "tensor(float16)" else np.float32
            for name, key in self._inputs.items()
        }
        self._original = [self._run(feed, {}) for feed in self._feeds]
        if not all(np.isfinite(logits).all() for logits in self._original):
            raise ModelError("the model's logits hold NaN or Inf; export it in float32 or bfloat16")

    def divergence(self, errors: Mapping[str, npt.NDArray[np.float32]]) -> float:
        """Return the mean KL(original || disturbed) per token, nats.

        For a model that predicts its text well this is what the mean negative log likelihood rises by, with a
        fraction of the sampling noise.

        Args:
            errors: W_hat - W per layer name, float32 [N, K].
        """
        total, tokens = 0.0, 0
        for feed, original in zip(self._feeds, self._original, strict=True):
            disturbed = self._run(feed, errors)
            total += divergence(torch.from_numpy(original), torch.from_numpy(disturbed))
            tokens += len(original)
        return total / tokens

    def _run(self, feed: Feed, errors: Mapping[str, npt.NDArray[np.float32]]) -> Array:
        """Return logits [T, V]."""
        inputs = {name: value for name, value in feed.items() if name in self._wanted}
        for name, key in self._inputs.items():
            error = errors.get(name, np.zeros((0, 0), np.float32))
            inputs[key] = np.ascontiguousarray(error.T, dtype=self._dtypes[name])
        (logits,) = run_session(self._session, inputs)
        flat: Array = logits.reshape(-1, logits.shape[-1])
        return flat


def _probing_model(
    model: ir.Model, sites: Sequence[LinearSite], inputs: Mapping[str, str], logits: str
) -> ir.Model:
    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for value in graph.inputs}
    values.update({value.name: value for node in graph for value in node.outputs})
    kept = values[logits]
    for site in sites:
        changed = _disturb(graph, values, site, inputs[site.name])
        if values[site.output] is kept:
            kept = changed
    graph.outputs.clear()
    graph.outputs.append(kept)
    RemoveUnusedNodesPass()(copy)
    return copy


def _disturb(graph: ir.Graph, values: Mapping[str | None, ir.Value], site: LinearSite, name: str) -> ir.Value:
    """Give one layer an error input; returns what everything reads instead of its output."""
    x, y = values[site.activation], values[site.output]
    error = ir.Value(name=name, type=ir.TensorType(site.dtype), shape=ir.Shape([f"{name}_k", f"{name}_n"]))
    graph.inputs.append(error)
    users = list(y.uses())
    size = ir.node("Size", [error])
    active = ir.node("Cast", size.outputs, {"to": ir.DataType.BOOL})
    product = ir.node("MatMul", [x, error])
    total = ir.node("Add", [y, product.outputs[0]])
    same = ir.node("Identity", [y])
    branches = {
        "then_branch": _branch([product, total], f"{name}_then"),
        "else_branch": _branch([same], f"{name}_else"),
    }
    choice = ir.node("If", active.outputs, branches)
    result = choice.outputs[0]
    for value, suffix in ((size, "size"), (active, "active"), (choice, "y")):
        value.outputs[0].name = f"{name}_{suffix}"
    result.type, result.shape = y.type, y.shape
    producer = y.producer()
    assert producer is not None
    graph.insert_after(producer, [size, active, choice])
    for user, index in users:
        user.replace_input_with(index, result)
    return result


def _branch(nodes: Sequence[ir.Node], name: str) -> ir.Graph:
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"{name}_{index}"
    return ir.Graph([], nodes[-1].outputs, nodes=nodes, name=name)
