"""What to run for given outputs, in which order, and when values can be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from zqfp_compile.errors import ModelError
from zqfp_compile.torch_graph.attention import fuse_attention
from zqfp_compile.torch_graph.ops import DATA_DEPENDENT
from zqfp_compile.torch_graph.step import Step

_SHAPES = ("Shape", "Size")
_RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)

# Gives the value of a replaced node from the values its inputs have.
Override = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """What one set of outputs and overrides takes.

    Attributes:
        folded: Nodes that read constants only, by the names of their outputs.
        steps: All others, in graph order.
        kept: Determined values that undetermined steps read, or that are outputs.
        temporary: Constants that only ``folded`` reads.
    """

    folded: Mapping[str, Step]
    steps: Sequence[Step]
    kept: frozenset[str]
    temporary: frozenset[str]


def schedule(
    nodes: Iterable[ir.Node],
    constants: Iterable[str],
    opsets: Mapping[str, int],
    outputs: Sequence[str],
    overrides: Iterable[str],
    inputs: Iterable[str],
) -> Schedule:
    """Plan a run.

    Args:
        nodes: In topological order.
        constants: Names of initializers.
        opsets: Version per domain.
        outputs: Values wanted.
        overrides: Values that are given by the caller.
        inputs: Values that are fed.

    Raises:
        ModelError: When an operator is not supported, or an output or override is no value of the graph.
    """
    constant = set(constants)
    steps = _needed(list(nodes), constant, outputs, set(overrides), set(inputs))
    folded, rest = _fold(steps, constant)
    rest = fuse_attention(rest, constant, outputs, opsets.get("", 1))
    for step in (*folded.values(), *rest):
        if not step.replaced:
            step.prepare(opsets)
    _mark_determined(rest, constant, set(inputs))
    determined = {name for step in rest if step.determined for name in step.outputs if name}
    read_late = {name for step in rest if not step.determined for name in step.inputs if name}
    kept = frozenset(determined & (read_late | set(outputs)))
    _mark_releases(rest, constant | kept | set(outputs))
    read = {name for step in rest for name in step.inputs if name} | set(outputs)
    made_from = {name for step in folded.values() for name in step.inputs if name}
    return Schedule(folded, rest, kept, frozenset(made_from - read))


def _needed(
    nodes: Sequence[ir.Node],
    constant: set[str],
    outputs: Sequence[str],
    overrides: set[str],
    inputs: set[str],
) -> list[Step]:
    """Return the nodes the outputs depend on. Of a replaced node, the constant inputs are not needed."""
    made = {value.name for node in nodes for value in node.outputs}
    for name in (*overrides, *(name for name in outputs if name not in constant | inputs)):
        if name not in made:
            raise ModelError(f"value {name!r} is not in the graph; compile the original export again")
    wanted, steps = set(outputs), []
    for node in reversed(nodes):
        names = [str(value.name) if value.name in wanted else None for value in node.outputs]
        while names and names[-1] is None:
            names.pop()
        if not names:
            continue
        replaced = not overrides.isdisjoint(name for name in names if name)
        if replaced and len(names) > 1:
            raise ModelError(f"node {node.name!r} has {len(names)} outputs; only one can be replaced")
        reads = tuple(None if value is None else str(value.name) for value in node.inputs)
        steps.append(Step(node, reads, tuple(names), replaced))
        wanted.update(name for name in reads if name and not (replaced and name != reads[0]))
    return steps[::-1]


def _fold(steps: Sequence[Step], constant: set[str]) -> tuple[dict[str, Step], list[Step]]:
    """Split into nodes that read constants only and the others; adds to ``constant``."""
    folded, rest = {}, []
    for step in steps:
        fixed = all(name is None or name in constant for name in step.inputs)
        if fixed and not step.replaced and step.node.op_type not in _RANDOM:
            names = [name for name in step.outputs if name]
            folded.update(dict.fromkeys(names, step))
            constant.update(names)
        else:
            rest.append(step)
    return folded, rest


def _mark_determined(steps: Sequence[Step], constant: set[str], inputs: set[str]) -> None:
    """Find what depends on the shapes of the inputs only: it is computed once per shape."""
    known, shaped = set(constant), constant | inputs
    for step in steps:
        reads = [name for name in step.inputs if name]
        if step.replaced:
            if reads[0] in shaped:
                shaped.update(name for name in step.outputs if name)
            continue
        asked = {step.inputs[index] for index in step.host if index < len(step.inputs)} - {None}
        outputs = [name for name in step.outputs if name]
        op_type = step.node.op_type
        if op_type in _RANDOM:
            continue
        if op_type in _SHAPES:
            step.determined = shaped.issuperset(reads)
        else:
            step.determined = known.issuperset(reads)
        if step.determined:
            known.update(outputs)
        fixed = shaped.issuperset(reads) and known.issuperset(asked) and op_type not in DATA_DEPENDENT
        if step.determined or fixed:
            shaped.update(outputs)


def _mark_releases(steps: Sequence[Step], stay: set[str]) -> None:
    seen = set(stay)
    for step in reversed(steps):
        names = {name for name in (*step.inputs, *step.outputs) if name} - seen
        step.release = tuple(names)
        seen |= names
