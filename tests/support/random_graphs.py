"""Random ONNX models around linear layers: valid by construction, the same for the same seed.

The idea is NNSmith's (Liu et al., ASPLOS 2023, arXiv 2207.13066): grow a graph operator by operator, each
with inputs it is legal for. Shapes are known while it grows, so no solver is needed. Operators and forms are
those of exporters, and whatever a pass of ours could confuse with them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from graph_variants import live_names
from onnx import TensorProto, helper

F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
NUMPY: dict[int, np.dtype[Any]] = {
    kind: ir.DataType(kind).numpy() for kind in (F32, F16, BF16, TensorProto.DOUBLE, TensorProto.INT64)
}
NUMPY |= {TensorProto.BOOL: np.dtype(bool), TensorProto.INT8: np.dtype(np.int8)}
VOCABULARY = 11  # no linear but an lm_head has as many outputs
# Inputs that are no floats are below these.
NUMBERS: dict[int, int] = {TensorProto.INT64: VOCABULARY, TensorProto.BOOL: 2}
RAISED = 21  # models of an older opset are raised: their functions are inlined, dead nodes removed
LOCAL = "local"  # domain of the functions
WIDTHS = (1, 4, 6, 8, 16, 24, 33, 40, 64, 72)
Dim = int | str


@dataclass(frozen=True)
class Value:
    """A value of the graph; an axis whose size varies has a symbol for a size."""

    name: str
    shape: tuple[Dim, ...]
    dtype: int

    @property
    def width(self) -> int:
        """The last axis, which never varies."""
        assert isinstance(self.shape[-1], int)
        return self.shape[-1]


@dataclass
class RandomGraph:
    """A model and what must come of it.

    Attributes:
        proto: The model, its weights inside.
        opset: Its default opset.
        inputs: What a caller feeds.
        rewritten: Outputs of linears of the main graph that must be rewritten.
        inlined: Outputs of calls whose function is a linear, rewritten where raise-opset inlines it.
        declined: Pairs, for each linear that must be left alone: the output of its node, or of the main
            graph's node that it is in, and a part of the reason.
        vanishing: Reasons of dead linears, most of which are gone once the opset is raised.
        heads: Outputs of projections to the vocabulary, rewritten when the recipe says so.
        features: ``embedding``, ``cache``, ``attention``, ``lm_head``, where there is one, with its output.
    """

    proto: onnx.ModelProto
    opset: int
    inputs: list[Value]
    rewritten: set[str] = field(default_factory=set)
    inlined: set[str] = field(default_factory=set)
    declined: list[tuple[str, str]] = field(default_factory=list)
    vanishing: list[str] = field(default_factory=list)
    heads: set[str] = field(default_factory=set)
    features: dict[str, str] = field(default_factory=dict)

    def feed(self, seed: int, **sizes: int) -> dict[str, np.ndarray]:
        """Inputs with the given sizes of ``batch``, ``sequence`` and ``past``."""
        numbers = np.random.default_rng(seed)
        feed = {}
        for value in self.inputs:
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in value.shape]
            if value.dtype in NUMBERS:
                array = np.asarray(numbers.integers(0, NUMBERS[value.dtype], shape))
            else:
                array = np.asarray(numbers.standard_normal(shape), np.float32)
            feed[value.name] = array.astype(NUMPY[value.dtype])
        return feed


class Maker:
    """A graph being grown.

    Attributes:
        random: Decides everything but the numbers in tensors.
        numbers: Those.
        dtype: Float type of most values.
        live: Values that operators to come may read; all are floats of ``dtype``.
        made: All outputs of nodes by name.
        weights: Stored matrices that linears may share.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.dtype = self.random.choices((F32, F16, BF16), (5, 3, 2))[0]
        # Where and the loops take bfloat16 from opset 16 on.
        self.opset = self.random.randint(16 if self.dtype == BF16 else 13, 24)
        self.fixed = self.random.random() < 0.25
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.overridable: set[str] = set()
        self.functions: list[onnx.FunctionProto] = []
        self.live: list[Value] = []
        self.outputs: list[Value] = []
        self.weights: list[Value] = []
        self.made: dict[str, Value] = {}
        self.graph = RandomGraph(onnx.ModelProto(), self.opset, [])
        self._count = 0
        self._inner = False

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def input(self, name: str, shape: Sequence[Dim], dtype: int | None = None) -> Value:
        """A graph input; in a graph of fixed shapes, of the sizes it is calibrated with."""
        dims = tuple(SIZES.get(str(dim), dim) if self.fixed else dim for dim in shape)
        value = Value(name, dims, dtype or self.dtype)
        self.graph.inputs.append(value)
        return value

    def op(
        self,
        kind: str,
        inputs: Sequence[Value | str],
        shape: Sequence[Dim],
        dtype: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """Append a node with one output."""
        return self.split(kind, inputs, [tuple(shape)], dtype, domain, **attributes)[0]

    def split(
        self,
        kind: str,
        inputs: Sequence[Value | str],
        shapes: Sequence[tuple[Dim, ...]],
        dtype: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """Append a node with an output per shape."""
        outputs = [Value(self.name(kind.lower()), shape, dtype or self.dtype) for shape in shapes]
        read = [value if isinstance(value, str) else value.name for value in inputs]
        node = helper.make_node(kind, read, [value.name for value in outputs], domain=domain, **attributes)
        node.name = f"node_{outputs[0].name}"
        self.nodes.append(node)
        self.made.update((value.name, value) for value in outputs)
        return outputs

    def const(self, array: np.ndarray, *, overridable: bool = True) -> Value:
        """A constant: an initializer, at times also a graph input, or a Constant node."""
        name, dtype = self.name("const"), int(ir.DataType.from_numpy(array.dtype))
        tensor = tensor_proto(name, array)
        if self.chance(0.2):
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"node_{name}", value=tensor))
        else:
            self.initializers.append(tensor)
            if overridable and not self._inner and self.chance(0.1):
                self.overridable.add(name)
        return Value(name, array.shape, dtype)

    def ints(self, *numbers: int) -> Value:
        return self.const(np.array(numbers, np.int64))

    def scalar(self, number: float) -> Value:
        return self.const(np.array(number, np.float32).astype(NUMPY[self.dtype]))

    def floats(self, *shape: int, dtype: int | None = None) -> np.ndarray:
        """Normal numbers in the graph's type, or in ``dtype``."""
        return self.numbers.standard_normal(shape).astype(np.float32).astype(NUMPY[dtype or self.dtype])

    @contextmanager
    def inside(self) -> Iterator[tuple[list[onnx.NodeProto], list[onnx.TensorProto]]]:
        """Nodes and initializers go into the lists given, those of a subgraph or a function."""
        outer = self.nodes, self.initializers
        self.nodes, self.initializers, self._inner = [], [], True
        try:
            yield self.nodes, self.initializers
        finally:
            (self.nodes, self.initializers), self._inner = outer, False

    def pick(self, fits: Callable[[Value], bool] = lambda value: True) -> Value | None:
        """A live value that ``fits``, the newest ones more often."""
        found = [value for value in self.live if fits(value)]
        return self.random.choices(found, range(1, len(found) + 1))[0] if found else None


SIZES = {"batch": 2, "sequence": 3, "past": 2}


def tensor_proto(name: str, array: np.ndarray) -> onnx.TensorProto:
    proto: onnx.TensorProto = ir.to_proto(ir.Tensor(np.asarray(array), name=name))
    return proto


def loose_info(value: Value) -> onnx.ValueInfoProto:
    """Name, type and rank of a value, with the sizes that never vary."""
    shape = [dim if isinstance(dim, int) else None for dim in value.shape]
    return helper.make_tensor_value_info(value.name, value.dtype, shape)


def drop_dead(maker: Maker) -> None:
    """Take linears that no output depends on out of what is expected."""
    graph = maker.graph
    live = live_names(maker.nodes, (value.name for value in maker.outputs))
    dead = (graph.rewritten | graph.inlined) - live
    graph.declined += [(output, "no output depends on it") for output in dead]
    graph.features = {kind: output for kind, output in graph.features.items() if output in live}
    graph.inlined &= live
    graph.rewritten &= live
    if graph.opset < RAISED:
        graph.vanishing = [reason for output, reason in graph.declined if output not in live]
        graph.declined = [(output, reason) for output, reason in graph.declined if output in live]


def build(maker: Maker, exported_shapes: bool) -> onnx.ModelProto:
    """The model of what ``maker`` has grown; ``exported_shapes`` puts inferred ones on inner values."""
    dims = {value.name: value for value in maker.outputs}
    outputs = [loose_info(value) for value in dims.values()]
    inputs = [
        helper.make_tensor_value_info(value.name, value.dtype, value.shape) for value in maker.graph.inputs
    ]
    stored = [tensor for tensor in maker.initializers if tensor.name in maker.overridable]
    inputs += [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in stored]
    graph = helper.make_graph(maker.nodes, "random", inputs, outputs, maker.initializers)
    imports = [helper.make_opsetid("", maker.opset)]
    if maker.functions:
        imports.append(helper.make_opsetid(LOCAL, 1))
    # The oldest that has the opset (functions came with 8).
    ir_version = max(8, helper.find_min_ir_version_for(imports[:1]))
    proto: onnx.ModelProto = helper.make_model(
        graph, opset_imports=imports, functions=maker.functions, ir_version=ir_version
    )
    return onnx.shape_inference.infer_shapes(proto) if exported_shapes else proto
