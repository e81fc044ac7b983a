"""Decide which linear layers are rewritten."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._layer_names import UniqueNames, layer_name, name_nodes
from passes._linear_forms import LinearForm, recognise
from passes._liveness import DEAD_REASON, live_nodes
from passes._lm_head import is_lm_head, vocabulary_sizes
from passes._weight_chain import constant_values, lift_constant, subgraphs_of
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.pass_base import Declined, Pass, PassResult
from zqfp_compile.plan import LinearSite, QuantPlan, Skipped, WeightSource

LM_HEAD_REASON = "lm_head; use --quantize-lm-head"


@dataclass(frozen=True)
class _Layer:
    """A linear-like node: either a recognised form, or the reason why it is left alone."""

    name: str
    node: ir.Node
    form: LinearForm | None = None
    reason: str | None = None
    lm_head: bool = False

    def skipped(self, reason: str) -> Skipped:
        return Skipped(self.name, reason, *((self.form.k, self.form.n) if self.form else (None, None)))


@dataclass(frozen=True)
class SelectLinears(Pass):
    """Find the linear layers and write them into a plan.

    Matched, x an activation [..., K] of rank 2 or more and W FLOAT, FLOAT16 or BFLOAT16::

        y = MatMul(x, W)                        W [K, N]
        y = Gemm(x, W, C)                       any alpha, beta, transB; C a constant row or absent
        y = MatMul(x, Transpose(Cast(W)))       Identity, Cast and Transpose in any order and number

    W is an initializer, shared or not, or a Constant node. Left alone, with a reason: any other constant
    operand (left, batched, computed, integer, double, quantised, also a graph input), Gemm with transA or an
    activation as C, linears inside If, Loop or functions, those that no output depends on, the output
    projection to the vocabulary (unless ``quantize_lm_head``), and what ``include`` and ``exclude`` rule out.
    A product of two activations is no linear and gets no entry.

    The graph changes only to be unambiguous: nodes without a name or with a duplicate one get a unique name,
    and Constant nodes that hold a planned weight or bias become initializers of the same name.

    Attributes:
        include: Regular expressions searched in layer names; when given, one of them must match.
        exclude: Regular expressions searched in layer names; none of them may match.
        quantize_lm_head: Also select the output projection.
    """

    name: ClassVar[str] = "select-linears"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    quantize_lm_head: bool = False

    def call(self, model: ir.Model) -> PassResult:
        """Fill ``PassResult.plan`` with the linears in graph order and the skipped nodes.

        Raises:
            UsageError: When a pattern matches no layer, or the options leave no layer to rewrite.
            ModelError: When no node is a linear that can be rewritten.
        """
        modified = name_nodes(model.graph)
        layers = _find_layers(model)
        _check_recognised(model, layers)
        self._check_patterns(layers)
        linears: list[LinearSite] = []
        skipped: list[Skipped] = []
        for layer in layers:
            reason = layer.reason or self._ruled_out(layer)
            if layer.form is None or reason is not None:
                skipped.append(layer.skipped(str(reason)))
                continue
            linears.append(_site(layer, layer.form))
            for value in (layer.form.root.value, layer.form.bias):
                modified |= value is not None and lift_constant(model.graph, value)
        if not linears:
            last = next(entry for entry in skipped if entry.k is not None)
            raise UsageError(
                f"the options leave no linear layer to rewrite: {last.name!r} is left out ({last.reason})"
            )
        plan = QuantPlan(linears=tuple(linears), skipped=tuple(skipped))
        declined = tuple(Declined(entry.name, entry.reason) for entry in skipped)
        return PassResult(model, modified, declined, plan)

    def _ruled_out(self, layer: _Layer) -> str | None:
        """Why the options leave a recognised ``layer`` out."""
        for pattern in self.exclude:
            if re.search(pattern, layer.name):
                return f"excluded by --exclude {pattern!r}"
        if self.include and not any(re.search(pattern, layer.name) for pattern in self.include):
            return "not matched by --include"
        if layer.lm_head and not self.quantize_lm_head:
            return LM_HEAD_REASON
        return None

    def _check_patterns(self, layers: list[_Layer]) -> None:
        names = [layer.name for layer in layers]
        for flag, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in names):
                    near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
                    raise UsageError(f"{flag} {pattern!r} matches no layer; the nearest names are {near}")


def _find_layers(model: ir.Model) -> list[_Layer]:
    """Every linear-like node, in graph order, nested ones last."""
    names = UniqueNames(model.graph)
    constant = constant_values(model.graph)
    vocabularies = vocabulary_sizes(model.graph)
    live = live_nodes(model.graph)
    layers = []
    for node in model.graph:
        form = recognise(node, constant)
        if isinstance(form, LinearForm) and node not in live:
            form = DEAD_REASON
        if isinstance(form, LinearForm):
            head = is_lm_head(node.outputs[0], form.n, vocabularies)
            layers.append(_Layer(names.claim(layer_name(node), node), node, form, lm_head=head))
        elif form is not None:
            layers.append(_Layer(names.claim(layer_name(node), node), node, reason=form))
    nested = [*_in_subgraphs(model.graph, constant), *_in_functions(model, constant)]
    return layers + [_Layer(names.claim(layer_name(node), node), node, reason=why) for node, why in nested]


def _in_subgraphs(graph: ir.Graph, constant: set[ir.Value]) -> Iterator[tuple[ir.Node, str]]:
    for owner in ir.traversal.RecursiveGraphIterator(graph):
        for attr in owner.attributes.values():
            for node in (node for inner in subgraphs_of(attr) for node in inner):
                if recognise(node, constant) is not None:
                    place = f"{owner.op_type} {owner.name!r}"
                    yield node, f"inside {place}; only the main graph is compiled"


def _in_functions(model: ir.Model, constant: set[ir.Value]) -> Iterator[tuple[ir.Node, str]]:
    """Linears in function bodies, whose weight is a constant there or a constant argument of some call."""
    calls = list(ir.traversal.RecursiveGraphIterator(model.graph))
    for identifier, function in model.functions.items():
        if function.domain == "zqfp":
            continue
        place = f"{function.domain}::{function.name}"
        fixed = constant_values(function.graph)
        for call in calls:
            if call.op_identifier() == identifier:
                arguments = zip(function.inputs, call.inputs, strict=False)
                fixed.update(formal for formal, actual in arguments if actual in constant)
        for node in function:
            if recognise(node, fixed) is not None:
                yield node, f"inside the function {place}; inline it before compiling"


def _site(layer: _Layer, form: LinearForm) -> LinearSite:
    activation, output = layer.node.inputs[0], layer.node.outputs[0]
    assert activation is not None  # recognise() saw it
    return LinearSite(
        name=layer.name,
        node=str(layer.node.name),
        activation=str(activation.name),
        output=str(output.name),
        weight=WeightSource(str(form.root.value.name), form.transposed, form.scale, form.root.casts),
        bias=None if form.bias is None else str(form.bias.name),
        bias_scale=form.bias_scale,
        k=form.k,
        n=form.n,
        dtype=form.root.dtype,
        is_lm_head=layer.lm_head,
    )


def _check_recognised(model: ir.Model, layers: list[_Layer]) -> None:
    if any(layer.form is not None for layer in layers):
        return
    if layers:
        first = layers[0]
        raise ModelError(
            f"no linear layers that can be compiled: {len(layers)} found and declined, "
            f"such as {first.name!r} ({first.reason})"
        )
    count = Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    seen = ", ".join(f"{number} {op}" for op, number in count.most_common(5)) or "no nodes"
    raise ModelError(
        f"no linear layers: no MatMul or Gemm has a constant weight (the graph has {seen}); "
        "give an ONNX export of a language model that holds its weights"
    )
