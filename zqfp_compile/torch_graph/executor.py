"""An ONNX graph, or a part of one, as a function of torch tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.errors import ModelError
from zqfp_compile.registry import create_pass
from zqfp_compile.torch_graph.constants import Constants, settled
from zqfp_compile.torch_graph.dtypes import computed, from_array, on_host
from zqfp_compile.torch_graph.schedule import Override, Schedule, schedule
from zqfp_compile.torch_graph.step import Step

Feeds = Mapping[str, torch.Tensor | npt.NDArray[Any]]
Values = dict[str, torch.Tensor]

# Input shapes whose masks, positions and sizes are remembered.
_SHAPES_KEPT = 8


class TorchGraph:
    """A graph in torch, on the CPU or a GPU, differentiable.

    FLOAT, FLOAT16 and BFLOAT16 values are float32 and casts between them do nothing; all other types are
    computed as ONNX says. Shapes and other small numbers that follow from shapes stay on the host, so that a
    GPU is never waited for. Weights are loaded when first needed and stay on the device; what follows from
    weights alone is computed once, what follows from the shapes of the inputs once per shapes.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        nodes: Sequence[ir.Node] | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        device: str = "cpu",
    ) -> None:
        """Prepare ``model``, or the part of it that ``nodes`` are. Nothing is loaded yet.

        Args:
            model: It must not change while this object is used. Functions are inlined in a copy.
            nodes: A part of the graph, in topological order; all of it by default.
            inputs: Names of the values that are fed; the graph's inputs by default.
            outputs: Names of the values to return; the graph's outputs by default.
            device: ``cpu`` or ``cuda``.

        Raises:
            ModelError: When functions cannot be inlined.
        """
        graph = model.graph
        self._inputs = list(_names(graph.inputs) if inputs is None else inputs)
        self._outputs = list(_names(graph.outputs) if outputs is None else outputs)
        part = list(graph if nodes is None else nodes)
        if any(node.op_identifier() in model.functions for node in part):
            model = _inlined(model, part, self._inputs, self._outputs)
            graph = model.graph
            part = list(graph)
        self._nodes = part
        self._device = device
        self._opsets = dict(graph.opset_imports)
        weights = {
            name: value.const_value
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        self._initializers = frozenset(weights)
        # Models of IR 3 list weights among the inputs.
        self._inputs = [name for name in self._inputs if name not in weights]
        self._constants = Constants(weights, device)
        self._schedules: dict[tuple[frozenset[str], tuple[str, ...]], _Runner] = {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that :meth:`run` takes."""
        return tuple(self._inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values that :meth:`run` returns by default."""
        return tuple(self._outputs)

    def run(
        self,
        feeds: Feeds,
        *,
        outputs: Sequence[str] | None = None,
        overrides: Mapping[str, Override] | None = None,
    ) -> Values:
        """Compute ``outputs``.

        Gradients flow from the outputs to whatever the feeds and overrides were computed from, where torch
        records them; weights of the graph itself have none.

        Args:
            feeds: Inputs by name, on any device; those the outputs do not depend on may be missing.
            outputs: Values to return: any of the graph's, not only its outputs.
            overrides: By name of a value, what computes it instead of its node: a function of the node's
                inputs by name, float32 on the device. The first of these is the activation; constant ones
                (the weight) are loaded only when read.

        Returns:
            The outputs, on the device; shapes and the like may be on the host.

        Raises:
            ModelError: When an operator is not supported or fails, or an input is missing.
        """
        wanted = tuple(self._outputs if outputs is None else outputs)
        given = overrides or {}
        key = (frozenset(given), wanted)
        if key not in self._schedules:
            plan = schedule(self._nodes, self._initializers, self._opsets, wanted, given.keys(), self._inputs)
            self._schedules[key] = _Runner(plan, self._constants, self._device)
        values = {name: self._fed(name, value) for name, value in feeds.items() if name in self._inputs}
        return self._schedules[key].run(values, wanted, given)

    def _fed(self, name: str, value: torch.Tensor | npt.NDArray[Any]) -> torch.Tensor:
        """Return an input as it is computed with; a vector of integers is a shape and stays on the host."""
        tensor = from_array(value) if isinstance(value, np.ndarray) else value
        if tensor.ndim <= 1 and not tensor.is_floating_point():
            return tensor
        return computed(tensor.to(self._device))


class _Runner:
    """One schedule with its constants."""

    def __init__(self, plan: Schedule, constants: Constants, device: str) -> None:
        self._plan = plan
        self._constants = constants
        self._device = device
        self._on_gpu = torch.device(device).type != "cpu"
        # By the shapes of all inputs, what follows from them.
        self._determined: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Values] = OrderedDict()

    def run(self, values: Values, outputs: Sequence[str], overrides: Mapping[str, Override]) -> Values:
        """Compute ``outputs`` from ``values``, the inputs, which are used up."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in values.items())
        known = self._determined.get(shapes)
        values.update(known or {})
        for step in self._plan.steps:
            if step.replaced:
                self._replace(step, values, overrides)
            elif not step.determined:
                self._compute(step, values)
            elif known is None:
                # Whoever runs the graph first, later runs may need gradients.
                with torch.inference_mode(False), torch.no_grad():
                    self._compute(step, values)
            for name in step.release:
                values.pop(name, None)
        if known is None:
            self._remember(shapes, {name: values[name] for name in self._plan.kept})
        return {name: self.value(name, values) for name in outputs}

    def value(self, name: str, values: Values) -> torch.Tensor:
        """Return a value that was computed, or a constant."""
        found = values.get(name)
        if found is not None:
            return found
        if name not in self._plan.folded and name not in self._constants:
            raise ModelError(f"input {name!r} of the graph is missing; feed it")
        return self._constants.get(name, self._fold)

    def _remember(self, shapes: tuple[tuple[str, tuple[int, ...]], ...], found: Values) -> None:
        self._determined[shapes] = found
        if len(self._determined) > _SHAPES_KEPT:
            self._determined.popitem(last=False)
        for name in self._plan.temporary:
            self._constants.drop(name)

    def _compute(self, step: Step, values: Values) -> None:
        inputs = [None if name is None else self.value(name, values) for name in step.inputs]
        if self._on_gpu:
            self._place(step, inputs)
        for name, tensor in zip(step.outputs, _apply(step, inputs), strict=False):
            if name is not None:
                values[name] = settled(tensor, self._device)

    def _replace(self, step: Step, values: Values, overrides: Mapping[str, Override]) -> None:
        name = str(step.outputs[0])
        result = overrides[name](_Reads(self, [read for read in step.inputs if read], values))
        values[name] = computed(result.to(self._device))

    def _fold(self, name: str) -> torch.Tensor:
        made: Values = {}
        self._compute(self._plan.folded[name], made)
        return made[name]

    def _place(self, step: Step, inputs: list[torch.Tensor | None]) -> None:
        """Bring the inputs together: on the GPU if any of them is there, sizes and axes on the host."""
        data = [
            tensor for index, tensor in enumerate(inputs) if tensor is not None and index not in step.host
        ]
        together = any(not on_host(tensor) for tensor in data)
        for index, tensor in enumerate(inputs):
            if tensor is None:
                continue
            if index in step.host:
                inputs[index] = tensor.cpu()
            elif together and on_host(tensor) and not (step.scalars and tensor.ndim == 0):
                name = str(step.inputs[index])
                constant = name in self._plan.folded or name in self._constants
                # The copy is queued: small tensors in pageable memory are free again at once.
                inputs[index] = (
                    self._constants.moved(name) if constant else tensor.to(self._device, non_blocking=True)
                )


class _Reads(Mapping[str, torch.Tensor]):
    """The inputs of a replaced node; constants are loaded when they are looked at."""

    def __init__(self, runner: _Runner, names: Sequence[str], values: Values) -> None:
        self._runner = runner
        self._names = names
        self._values = values

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._runner.value(name, self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _apply(step: Step, inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    try:
        results = step.function(step.call, *inputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())
        shapes = ", ".join("-" if tensor is None else str(list(tensor.shape)) for tensor in inputs)
        raise ModelError(
            f"node {step.call.name!r}: torch cannot compute {step.call.op_type} of {shapes} ({reason}); "
            "check the model with onnx.checker"
        ) from error
    return results if isinstance(results, tuple) else (results,)


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def _inlined(
    model: ir.Model, nodes: Sequence[ir.Node], inputs: Sequence[str], outputs: Sequence[str]
) -> ir.Model:
    """Return the part of ``model`` as a model without functions; weights are shared."""
    values = {
        value.name: value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None
    }
    graph = ir.GraphView(
        [values.get(name) or ir.Value(name=name) for name in inputs],
        [values[name] for name in outputs],
        nodes=nodes,
        initializers=[
            value for value in values.values() if value.is_initializer() and value.name not in inputs
        ],
        opset_imports=model.graph.opset_imports,
        name="part",
    ).clone()
    functions = [function.clone() for function in model.functions.values()]
    part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    create_pass("inline-functions").call(part)
    return part
