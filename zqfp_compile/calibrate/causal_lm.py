"""The inputs of a causal language model, whichever exporter named them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.errors import UsageError

Dim = int | str | None
Feed = dict[str, npt.NDArray[Any]]

# Inputs that are neither tokens nor cache, and what make_feed puts in them.
_OPTIONAL = (
    "attention_mask",
    "position_ids",
    "cache_position",
    "token_type_ids",
    "use_cache_branch",
    "num_logits_to_keep",
    "logits_to_keep",
)

_ORT_TYPES = {
    "float": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "double": ir.DataType.DOUBLE,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int16": ir.DataType.INT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float8e5m2": ir.DataType.FLOAT8E5M2,
}


@dataclass(frozen=True)
class InputSpec:
    """A graph input or output.

    Attributes:
        name: Name in the graph.
        dtype: Element type.
        dims: One entry per axis: a size, or a symbol's name or ``None`` when it varies.
    """

    name: str
    dtype: ir.DataType
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class PastInput:
    """A KV-cache input.

    Attributes:
        spec: The input.
        batch_axis: Axis of the batch, or ``None`` when there is none.
        length_axis: Axis of the number of cached tokens.
        present: Name of the output that is this input's next value, or ``None``.
    """

    spec: InputSpec
    batch_axis: int | None
    length_axis: int
    present: str | None

    def empty(self, batch: int) -> npt.NDArray[Any]:
        """Return a cache without tokens (zeros where the graph fixes the length)."""
        dims: list[int] = []
        for axis, dim in enumerate(self.spec.dims):
            if isinstance(dim, int):
                dims.append(dim)
            else:
                dims.append(batch if axis == self.batch_axis else 0)
        return np.zeros(dims, dtype=self.spec.dtype.numpy())


@dataclass(frozen=True)
class CausalLm:
    """How to feed one causal language model.

    Attributes:
        input_ids: The token input, [batch, sequence].
        optional: The other inputs that are not cache.
        past: KV-cache inputs in graph order.
        logits: Name of the logits output, [batch, sequence, vocabulary].
        vocab_size: Vocabulary size from the logits' last axis, or ``None`` when the graph does not fix it.
    """

    input_ids: InputSpec
    optional: tuple[InputSpec, ...]
    past: tuple[PastInput, ...]
    logits: str
    vocab_size: int | None

    @classmethod
    def from_inputs(cls, inputs: Sequence[InputSpec], outputs: Sequence[InputSpec]) -> CausalLm:
        """Recognise the interface.

        Raises:
            UsageError: When this is no causal language model we can feed; names the inputs it has.
        """
        by_name = {spec.name: spec for spec in inputs}
        tokens = by_name.get("input_ids")
        if tokens is None or len(tokens.dims) != 2:
            raise _cannot_feed(inputs, "no input_ids of shape [batch, sequence]")
        optional = tuple(spec for spec in inputs if spec.name in _OPTIONAL)
        cache = [spec for spec in inputs if "past" in spec.name.lower() or "cache." in spec.name.lower()]
        known = {"input_ids", *(spec.name for spec in optional), *(spec.name for spec in cache)}
        unknown = [spec.name for spec in inputs if spec.name not in known]
        if unknown:
            raise _cannot_feed(inputs, f"{unknown[0]!r} is unknown")
        for spec in optional:
            _check_optional(spec, inputs)
        logits = _find_logits(outputs, inputs)
        presents = [spec for spec in outputs if spec.name != logits.name]
        past = tuple(_past_input(spec, inputs, name) for spec, name in _pair_presents(cache, presents))
        last = logits.dims[-1]
        return cls(tokens, optional, past, logits.name, last if isinstance(last, int) else None)

    @classmethod
    def from_model(cls, model: ir.Model) -> CausalLm:
        """Recognise the interface of a graph.

        Raises:
            UsageError: See :meth:`from_inputs`.
        """
        return cls.from_inputs(graph_inputs(model), graph_outputs(model))

    @classmethod
    def from_session(cls, session: Any) -> CausalLm:
        """Recognise the interface of an ``onnxruntime.InferenceSession``.

        Raises:
            UsageError: See :meth:`from_inputs`.
        """
        inputs = [_session_spec(arg) for arg in session.get_inputs()]
        return cls.from_inputs(inputs, [_session_spec(arg) for arg in session.get_outputs()])

    @property
    def sequence_length(self) -> int | None:
        """The sequence length when the graph fixes it, else ``None``."""
        dim = self.input_ids.dims[1]
        return dim if isinstance(dim, int) else None

    @property
    def batch_size(self) -> int | None:
        """The batch size when the graph fixes it, else ``None``."""
        dim = self.input_ids.dims[0]
        return dim if isinstance(dim, int) else None

    def make_feed(self, tokens: npt.NDArray[np.integer[Any]]) -> Feed:
        """Return the inputs that start a sequence: empty cache, nothing masked, positions from 0.

        Args:
            tokens: Token numbers, int64 [B, S].
        """
        empty = {item.spec.name: item.empty(tokens.shape[0]) for item in self.past}
        # A cache whose length the graph fixes is all padding here, so it is masked out.
        return self._feed(tokens, empty, valid_past=0)

    def make_feed_with_past(
        self, tokens: npt.NDArray[np.integer[Any]], past: Mapping[str, npt.NDArray[Any]]
    ) -> Feed:
        """Return the inputs that continue a sequence.

        Args:
            tokens: The next token numbers, int64 [B, S].
            past: Cache per input name, as :meth:`next_past` returns it.
        """
        length = past[self.past[0].spec.name].shape[self.past[0].length_axis] if self.past else 0
        return self._feed(tokens, past, valid_past=length)

    def next_past(self, outputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the cache for the next step out of a step's outputs (by output name)."""
        return {item.spec.name: outputs[item.present] for item in self.past if item.present is not None}

    def step_inputs(
        self, tokens: npt.NDArray[np.integer[Any]], past_length: int, valid_past: int | None = None
    ) -> Feed:
        """Return every input but the cache.

        Args:
            tokens: The next token numbers, int64 [B, S].
            past_length: Length of the cache they come with.
            valid_past: How much of it is not padding; all of it when left out.
        """
        batch, length = tokens.shape
        valid_past = past_length if valid_past is None else valid_past
        feed: Feed = {"input_ids": tokens.astype(self.input_ids.dtype.numpy())}
        for spec in self.optional:
            value = _optional_value(spec, batch, length, past_length, valid_past)
            feed[spec.name] = value.astype(spec.dtype.numpy())
        return feed

    def _feed(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        past: Mapping[str, npt.NDArray[Any]],
        valid_past: int,
    ) -> Feed:
        first = self.past[0] if self.past else None
        past_length = past[first.spec.name].shape[first.length_axis] if first else 0
        return {**self.step_inputs(tokens, past_length, valid_past), **past}


def graph_inputs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return the inputs a caller must feed (initializers listed as inputs are left out)."""
    initializers = model.graph.initializers
    return tuple(_value_spec(value) for value in model.graph.inputs if value.name not in initializers)


def graph_outputs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return the outputs of a graph."""
    return tuple(_value_spec(value) for value in model.graph.outputs)


def find_vocab_size(model: ir.Model) -> int | None:
    """Return the number of rows of the embedding that ``input_ids`` indexes, or ``None``."""
    frontier = [value for value in model.graph.inputs if value.name == "input_ids"]
    while frontier:
        value = frontier.pop()
        for node, index in value.uses():
            if node.op_type == "Gather" and index == 1:
                table = node.inputs[0]
                rows = table.shape[0] if table is not None and table.shape else None
                return rows if isinstance(rows, int) else None
            if node.op_type in ("Cast", "Reshape", "Identity") and index == 0:
                frontier.append(node.outputs[0])
    return None


def _optional_value(
    spec: InputSpec, batch: int, length: int, past_length: int, valid_past: int
) -> npt.NDArray[Any]:
    positions = np.arange(valid_past, valid_past + length)
    if spec.name == "attention_mask":
        mask = np.ones((batch, past_length + length), np.int64)
        mask[:, valid_past:past_length] = 0
        return mask
    if spec.name == "position_ids":
        return np.tile(positions, (batch, 1)) if len(spec.dims) == 2 else positions
    if spec.name == "cache_position":
        return np.arange(past_length, past_length + length)
    if spec.name == "token_type_ids":
        return np.zeros((batch, length), np.int64)
    one = (1,) * len(spec.dims)
    if spec.name == "use_cache_branch":
        return np.full(one, valid_past > 0)
    return np.zeros(one, np.int64)  # 0 logits to keep means all of them


def _check_optional(spec: InputSpec, inputs: Sequence[InputSpec]) -> None:
    ranks = {
        "attention_mask": (2,),
        "position_ids": (1, 2),
        "cache_position": (1,),
        "token_type_ids": (2,),
        "use_cache_branch": (0, 1),
        "num_logits_to_keep": (0, 1),
        "logits_to_keep": (0, 1),
    }
    if len(spec.dims) not in ranks[spec.name]:
        raise _cannot_feed(inputs, f"{spec.name} has {len(spec.dims)} axes")


def _past_input(spec: InputSpec, inputs: Sequence[InputSpec], present: str | None) -> PastInput:
    """Tell the cache's batch and length axes apart: both vary, the batch comes first."""
    varying = [axis for axis, dim in enumerate(spec.dims) if not isinstance(dim, int)]
    rank = len(spec.dims)
    if rank < 3 or len(varying) > 2:
        raise _cannot_feed(inputs, f"{spec.name} needs heads and head size as fixed dimensions")
    if len(varying) == 2:
        return PastInput(spec, varying[0], varying[1], present)
    batch_axis = rank - 4 if rank >= 4 else None
    if len(varying) == 1 and varying[0] == batch_axis:
        return PastInput(spec, batch_axis, rank - 2, present)
    return PastInput(spec, batch_axis, varying[0] if varying else rank - 2, present)


def _pair_presents(
    past: Sequence[InputSpec], presents: Sequence[InputSpec]
) -> list[tuple[InputSpec, str | None]]:
    """Match cache inputs and outputs by layer number and key/value, else by order."""
    by_key = {_cache_key(spec.name): spec.name for spec in presents}
    if len(by_key) == len(presents) and all(_cache_key(spec.name) in by_key for spec in past):
        return [(spec, by_key[_cache_key(spec.name)]) for spec in past]
    if len(past) == len(presents):
        return [(spec, other.name) for spec, other in zip(past, presents, strict=True)]
    return [(spec, None) for spec in past]


def _cache_key(name: str) -> tuple[tuple[str, ...], str]:
    """Return the numbers in a cache name and whether it is the keys or the values."""
    rest = name.lower().replace("key_values", "")
    kind = "key" if "key" in rest else "value" if "value" in rest else ""
    return tuple(re.findall(r"\d+", rest)), kind


def _find_logits(outputs: Sequence[InputSpec], inputs: Sequence[InputSpec]) -> InputSpec:
    for spec in outputs:
        if spec.name == "logits":
            return spec
    for spec in outputs:
        if len(spec.dims) == 3 and "present" not in spec.name.lower():
            return spec
    raise _cannot_feed(inputs, "no logits output of shape [batch, sequence, vocabulary]")


def _cannot_feed(inputs: Sequence[InputSpec], reason: str) -> UsageError:
    listing = ", ".join(f"{spec.name} {_shape_text(spec.dims)}" for spec in inputs)
    return UsageError(
        f"not a causal language model that text can feed ({reason}); its inputs are {listing}; "
        "pass --calibration FILE.npz with an array per input"
    )


def _shape_text(dims: Sequence[Dim]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in dims) + "]"


def _value_spec(value: ir.Value) -> InputSpec:
    dims: tuple[Dim, ...] = ()
    if value.shape is not None:
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return InputSpec(value.name or "", value.dtype or ir.DataType.UNDEFINED, dims)


def _session_spec(arg: Any) -> InputSpec:
    name = arg.type.removeprefix("tensor(").removesuffix(")")
    return InputSpec(arg.name, _ORT_TYPES.get(name, ir.DataType.UNDEFINED), tuple(arg.shape))
