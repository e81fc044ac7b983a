"""LLaMA-shaped ONNX models with random weights and a KV cache, as ONNX Runtime runs them fastest.

The graph is the one ONNX Runtime's own LLM exports have: fused norms, q, k and v in one linear layer,
GroupQueryAttention with rotary embedding and a cache that is written in place. Only the linear layers of the
decoder differ between contenders: embedding and lm_head are float16 in all of them. Ours goes through the
passes fuse-quantizers and join-quantizers, as a compiled model does.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from passes.fuse_quantizers import FuseQuantizers
from passes.join_quantizers import JoinQuantizers
from zqfp_compile.kernels.packing import pack_group_scales, packed_sizes, padded_shape

F16, F32, U8, INT4 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT4
E4M3 = TensorProto.FLOAT8E4M3FN
ALIGNMENT = 4096
RANDOM_BYTES = 1 << 26
OPSETS = [
    helper.make_opsetid("", 21),
    helper.make_opsetid("com.microsoft", 1),
    helper.make_opsetid("zqfp", 1),
]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def linear_weights(self) -> int:
        """Weights of the decoder's linear layers."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


PRESETS = {
    "llama-7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 151936),
}


class Writer:
    """Collects nodes and the last dimensions of values, and streams weights to the external data file.

    Every weight is a piece of one block of random bytes, starting where its name's hash says: making 13 GB of
    fresh random numbers would take longer than the benchmark, and no kernel can tell.
    """

    def __init__(self, shape: Shape, data: BinaryIO, location: str) -> None:
        self.shape, self.data, self.location = shape, data, location
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.widths: dict[str, int] = {}
        self.linear_bytes = 0
        rng = np.random.default_rng(0)
        largest = 2 * shape.hidden * max(shape.intermediate, shape.vocab)
        size = min(RANDOM_BYTES, largest)
        self.normal = rng.standard_normal(size // 2, dtype=np.float32).astype(np.float16)
        self._scaled = {1.0: self.normal}
        self.bytes = rng.integers(0, 256, size, dtype=np.uint8)

    def op(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> str:
        """Add one node named after its first output, which is returned."""
        node = helper.make_node(kind, inputs, outputs, f"{outputs[0]}/{kind}", domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def small(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """Add a tensor stored in the model file."""
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def stored(
        self, name: str, dims: tuple[int, ...], kind: int, source: np.ndarray[Any, Any], size: int
    ) -> str:
        """Add a tensor of ``size`` bytes, repeating ``source`` from a place of its own."""
        self.data.write(b"\0" * (-self.data.tell() % ALIGNMENT))
        offset = self.data.tell()
        start, left = zlib.crc32(name.encode()) % len(source), size
        while left > 0:
            left -= self.data.write(source[start:].view(np.uint8)[:left].data)
            start = 0
        tensor = TensorProto(name=name, dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self.location, "offset": offset, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def half(self, name: str, *dims: int, scale: float = 1.0) -> str:
        """Add a random float16 tensor."""
        if scale not in self._scaled:
            self._scaled[scale] = (self.normal * np.float32(scale)).astype(np.float16)
        return self.stored(name, dims, F16, self._scaled[scale], 2 * math.prod(dims))


class Float16Linears:
    """MatMul on float16 weights."""

    name = "fp16"

    def emit(self, writer: Writer, x: str, k: int, outputs: dict[str, int]) -> None:
        """Add the linears ``outputs`` (name -> N) of one input."""
        for name, n in outputs.items():
            writer.linear_bytes += 2 * k * n
            writer.op("MatMul", [x, writer.half(f"{name}.w", k, n, scale=k**-0.5)], [name])


class NBitsLinears:
    """MatMulNBits: ONNX Runtime's int4 in blocks of 32 with float16 scales, symmetric."""

    name = "ort_int4"

    def emit(self, writer: Writer, x: str, k: int, outputs: dict[str, int]) -> None:
        """Add the linears ``outputs`` (name -> N) of one input."""
        if k % 32:
            raise ValueError(f"{self.name}: K = {k} is no multiple of its block, 32")
        # Codes around 8 have a standard deviation of 4.6.
        scales = (np.abs(writer.normal[: 1 << 20]) * np.float16(k**-0.5 / 4.6)).astype(np.float16)
        for name, n in outputs.items():
            size = n * k // 2
            codes = writer.stored(f"{name}.w", (n, k // 32, 16), U8, writer.bytes, size)
            stored = writer.stored(f"{name}.s", (n * k // 32,), F16, scales, size // 8)
            writer.linear_bytes += size + size // 8
            attributes = {"K": k, "N": n, "bits": 4, "block_size": 32}
            writer.op("MatMulNBits", [x, codes, stored], [name], "com.microsoft", **attributes)


@dataclass(frozen=True)
class W4A8Linears:
    """Our ops, with the nodes that the pass lower-weights-plugin makes.

    Attributes:
        lorc_rank: Rank of every layer.
        per_token: Whether every token has a scale.
        group_size: Weights to a scale.
        two_launches: Whether quantisers stay nodes of their own: what join-quantizers saves.
        ungated: Whether gate and up have outputs of their own, which down's quantiser multiplies: what gated
            layers save.
    """

    lorc_rank: int = 0
    per_token: bool = False
    group_size: int = 64
    two_launches: bool = False
    ungated: bool = False

    @property
    def name(self) -> str:
        """The contender's name in the results."""
        rank = f"_lorc{self.lorc_rank}" if self.lorc_rank else ""
        kind = "_two_launches" * self.two_launches + "_ungated" * self.ungated
        return f"zqfp{rank}" + "_token" * self.per_token + kind

    def emit(self, writer: Writer, x: str, k: int, outputs: dict[str, int]) -> None:
        """Add the linears ``outputs`` (name -> N) of one input, as one product."""
        several = {"output_n": list(outputs.values())} if len(outputs) > 1 else {}
        self._emit(writer, x, k, outputs, list(outputs), several)

    def emit_gated(self, writer: Writer, x: str, k: int, rows: dict[str, int], h: str) -> None:
        """Add gate and up (``rows``: name -> N) of one input as the one layer that makes ``h``."""
        self._emit(writer, x, k, rows, [h], {"gated": 1})

    def _emit(
        self, writer: Writer, x: str, k: int, rows: dict[str, int], outputs: list[str], kind: dict[str, Any]
    ) -> None:
        n, rank, name = sum(rows.values()), self.lorc_rank * len(rows), "+".join(rows)
        codes, scales = packed_sizes(n, k, self.group_size)
        inputs = [
            *self._quantize(writer, x, k, rank),
            writer.stored(f"{name}.codes", padded_shape(n, k), INT4, writer.bytes, codes),
            writer.stored(f"{name}.scales", (scales,), E4M3, _legal_scales(), scales),
            # Codes have a root mean square of 2.6, scales are around 1.
            writer.small(f"{name}.rows", np.full(n, k**-0.5 / 2.6, np.float32)),
        ]
        writer.linear_bytes += codes + scales + 4 * n
        if rank:
            inputs += [f"{x}.xv", writer.half(f"{name}.u", rank, n, scale=0.01)]
            writer.linear_bytes += 2 * rank * (n + k)
        attributes: dict[str, Any] = {"n": n, "k": k, "group_size": self.group_size, "lorc_rank": rank}
        attributes |= {"per_token": int(self.per_token), "bias": 0, "dtype": F16, **kind}
        writer.op("PackedW4A8Linear", inputs, outputs, "zqfp", **attributes)

    def _quantize(self, writer: Writer, x: str, k: int, rank: int) -> list[str]:
        """Add the quantiser of ``x``, and x @ V where there is a rank; return x8 and a."""
        static = [] if self.per_token else [writer.small(f"{x}.a", np.float32(0.02))]
        inputs, outputs = [x, *static], [f"{x}.x8", *([f"{x}.a"] if self.per_token else [])]
        if rank:
            inputs.append(writer.half(f"{x}.v", k, rank, scale=k**-0.5))
            outputs.append(f"{x}.xv")
        kind = "QuantizeTokens" if self.per_token else "QuantizeActivation"
        writer.op(kind, inputs, outputs, "zqfp", lorc_rank=rank)
        return [f"{x}.x8", f"{x}.a"]


@functools.cache
def _legal_scales() -> np.ndarray[Any, Any]:
    """Packed bytes of random group scales around 1."""
    values = np.random.default_rng(1).choice([0.75, 0.875, 1, 1.125, 1.25, 1.375], (4096, 256))
    return pack_group_scales(values.astype(np.float32), 64)


Linears = Float16Linears | NBitsLinears | W4A8Linears


def write_model(folder: Path, shape: Shape, linears: Linears, max_length: int) -> tuple[Path, int]:
    """Write ``folder/<name>.onnx`` and its data; return the path and the bytes of the decoder's linears.

    Inputs: input_ids int64 [batch, sequence], seqlens_k int32 [batch] (total length - 1), total_length int32
    [], past.<i>.key and .value float16 [batch, kv_heads, max_length, head_size], which present.<i>
    overwrites.
    Output: logits float16 [batch, vocab] of the last token.
    """
    path = folder / f"{linears.name}.onnx"
    with (folder / f"{path.name}.data").open("wb") as data:
        writer = Writer(shape, data, f"{path.name}.data")
        graph = _graph(writer, linears, max_length)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    if isinstance(linears, W4A8Linears):
        fused = ir.from_proto(model)
        for made in (FuseQuantizers(), *([] if linears.two_launches else [JoinQuantizers()])):
            made.call(fused)
        model = ir.to_proto(fused)
    path.write_bytes(model.SerializeToString())
    return path, writer.linear_bytes


def _graph(writer: Writer, linears: Linears, max_length: int) -> onnx.GraphProto:
    shape = writer.shape
    _rotary_tables(writer, max_length)
    writer.small("ones", np.ones(shape.hidden, np.float16))
    writer.op("Gather", [writer.half("embed", shape.vocab, shape.hidden), "input_ids"], ["x"])
    writer.widths |= dict.fromkeys(("x", "l0.norm"), shape.hidden)
    writer.op("SimplifiedLayerNormalization", ["x", "ones"], ["l0.norm"], axis=-1, epsilon=1e-5)
    total = "x"
    for i in range(shape.layers):
        _attention(writer, linears, i)
        total = _add_norm(writer, total, f"l{i}.o", f"l{i}.norm2", f"l{i}.sum")
        _feed_forward(writer, linears, i)
        last = i == shape.layers - 1
        total = _add_norm(writer, total, f"l{i}.down", "norm" if last else f"l{i + 1}.norm", f"l{i}.sum2")
    writer.op("Gather", ["norm", writer.small("last", np.int64(-1))], ["last_token"], axis=1)
    head = writer.half("lm_head", shape.hidden, shape.vocab, scale=shape.hidden**-0.5)
    writer.op("MatMul", ["last_token", head], ["logits"])
    inputs, outputs = _interface(shape)
    inner = [
        helper.make_tensor_value_info(name, F16, ["batch", "sequence", width])
        for name, width in writer.widths.items()
    ]
    return helper.make_graph(writer.nodes, "decoder", inputs, outputs, writer.initializers, value_info=inner)


def _rotary_tables(writer: Writer, max_length: int) -> None:
    half = writer.shape.head_size // 2
    angles = np.arange(max_length)[:, None] * 10000.0 ** (-np.arange(half) / half)
    writer.small("cos", np.cos(angles).astype(np.float16))
    writer.small("sin", np.sin(angles).astype(np.float16))


def _add_norm(writer: Writer, x: str, branch: str, norm: str, total: str) -> str:
    outputs, domain = [norm, "", "", total], "com.microsoft"
    writer.widths |= dict.fromkeys((norm, total), writer.shape.hidden)
    writer.op("SkipSimplifiedLayerNormalization", [x, branch, "ones"], outputs, domain, epsilon=1e-5)
    return total


def _linears(writer: Writer, linears: Linears, x: str, k: int, outputs: dict[str, int]) -> None:
    """Add the linears of ``x``, and note how wide their outputs are."""
    linears.emit(writer, x, k, outputs)
    writer.widths |= outputs


def _attention(writer: Writer, linears: Linears, i: int) -> None:
    shape = writer.shape
    wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    _linears(writer, linears, f"l{i}.norm", shape.hidden, {f"l{i}.qkv": wide + 2 * narrow})
    inputs = [
        f"l{i}.qkv",
        "",
        "",
        f"past.{i}.key",
        f"past.{i}.value",
        "seqlens_k",
        "total_length",
        "cos",
        "sin",
    ]
    outputs = [f"l{i}.mix", f"present.{i}.key", f"present.{i}.value"]
    attributes = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "do_rotary": 1}
    writer.op("GroupQueryAttention", inputs, outputs, "com.microsoft", **attributes)
    _linears(writer, linears, f"l{i}.mix", wide, {f"l{i}.o": shape.hidden})


def _feed_forward(writer: Writer, linears: Linears, i: int) -> None:
    shape = writer.shape
    rows = dict.fromkeys((f"l{i}.gate", f"l{i}.up"), shape.intermediate)
    if isinstance(linears, W4A8Linears) and not linears.ungated:
        linears.emit_gated(writer, f"l{i}.norm2", shape.hidden, rows, f"l{i}.hidden")
    else:
        _linears(writer, linears, f"l{i}.norm2", shape.hidden, rows)
        writer.op("Sigmoid", [f"l{i}.gate"], [f"l{i}.sigmoid"])
        writer.op("Mul", [f"l{i}.gate", f"l{i}.sigmoid"], [f"l{i}.silu"])
        writer.op("Mul", [f"l{i}.silu", f"l{i}.up"], [f"l{i}.hidden"])
    writer.widths[f"l{i}.hidden"] = shape.intermediate
    _linears(writer, linears, f"l{i}.hidden", shape.intermediate, {f"l{i}.down": shape.hidden})


def _interface(shape: Shape) -> tuple[list[Any], list[Any]]:
    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        info("total_length", TensorProto.INT32, []),
    ]
    outputs = [info("logits", F16, ["batch", shape.vocab])]
    cache: list[str | int] = ["batch", shape.kv_heads, "max_length", shape.head_size]
    for i in range(shape.layers):
        for part in ("key", "value"):
            inputs.append(info(f"past.{i}.{part}", F16, cache))
            outputs.append(info(f"present.{i}.{part}", F16, cache))
    return inputs, outputs
