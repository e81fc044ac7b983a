"""Writes a LLaMA-shaped ONNX model of any size with random weights, streamed to disk.

    python models/make_large.py --output build/models/large

The defaults give 2.6 GB of external data. The graph is a causal LM without a KV cache, opset 21:

    input_ids, attention_mask, position_ids   int64 [batch, sequence]
    logits                                    float [batch, sequence, vocab]

Linear layers are MatMul nodes on named [K, N] initializers (``model.layers.0.self_attn.q_proj.weight``) with
the module path in the node name. A megabyte of weights per core are in memory at a time.
"""

from __future__ import annotations

import argparse
import math
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from atomic_folder import atomic_folder
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 21, 10
ALIGNMENT = 4096  # so that the tensors can be memory-mapped
CHUNK = 1 << 18  # elements drawn at a time
HEAD_SIZE = 64
DTYPES = {
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; ``hidden`` is a multiple of 64, the head size."""

    layers: int = 5
    hidden: int = 4096
    intermediate: int = 11008
    vocab: int = 32000
    dtype: str = "float16"


@dataclass(frozen=True)
class Drawn:
    """A weight: seeded normal values times ``scale`` (ones for vectors) at ``offset`` in the data file."""

    name: str
    dims: tuple[int, ...]
    scale: float
    dtype: np.dtype[Any]
    offset: int

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.offset + math.prod(self.dims) * self.dtype.itemsize

    def write(self, path: Path) -> None:
        """Draw the values and put them into the file, which exists."""
        random = np.random.Generator(np.random.SFC64(zlib.crc32(self.name.encode())))
        count = math.prod(self.dims)
        with path.open("r+b") as data:
            data.seek(self.offset)
            for start in range(0, count, CHUNK):
                block = min(CHUNK, count - start)
                normal = random.standard_normal(block, dtype=np.float32) * np.float32(self.scale)
                data.write((normal if len(self.dims) > 1 else np.ones(block)).astype(self.dtype).tobytes())


class GraphWriter:
    """Collects nodes, and gives weights their places in the data file as they are named."""

    def __init__(self, shape: Shape, location: str) -> None:
        self.shape, self.location = shape, location
        self.weights: list[Drawn] = []
        self.element_type, self.dtype = DTYPES[shape.dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.known: set[str] = set()

    def op(self, kind: str, inputs: Iterable[str], name: str, **attributes: Any) -> str:
        """Add one node called ``name``; return its only output."""
        output = f"{name}_output_0"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name, **attributes))
        return output

    def activation(self, name: str, width: int, element_type: int | None = None) -> str:
        """Record the shape of an activation [batch, sequence, width], as exporters do; return its name."""
        kind = self.element_type if element_type is None else element_type
        self.values.append(helper.make_tensor_value_info(name, kind, ["batch", "sequence", width]))
        return name

    def constant(self, name: str, values: object, dtype: type = np.int64) -> str:
        """Add a small initializer once, stored in the model file."""
        if name not in self.known:
            self.known.add(name)
            self.initializers.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def weight(self, name: str, dims: tuple[int, ...], scale: float) -> str:
        """Give a weight of shape ``dims`` its place in the data file."""
        end = self.weights[-1].end if self.weights else 0
        drawn = Drawn(name, dims, scale, self.dtype, end + -end % ALIGNMENT)
        self.weights.append(drawn)
        tensor = TensorProto(name=name, dims=dims, data_type=self.element_type)
        tensor.data_location = TensorProto.EXTERNAL
        fields = {"location": self.location, "offset": drawn.offset, "length": drawn.end - drawn.offset}
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def linear(self, x: str, path: str, k: int, n: int) -> str:
        """MatMul of x [..., k] with a weight [k, n] named after the module ``path``."""
        weight = self.weight(f"{path}.weight", (k, n), k**-0.5)
        return self.activation(self.op("MatMul", [x, weight], node_name(path, "MatMul")), n)

    def cast(self, x: str, name: str) -> str:
        """Cast to the model's type."""
        return self.op("Cast", [x], name, to=self.element_type)

    def rms_norm(self, x: str, path: str) -> str:
        """RMSNorm with its statistics in float32."""
        name, hidden = node_name(path, ""), self.shape.hidden
        wide = self.op("Cast", [x], f"{name}Cast", to=TensorProto.FLOAT)
        square = self.op("Mul", [wide, wide], f"{name}Square")
        mean = self.op("ReduceMean", [square, self.constant("last_axis", [-1])], f"{name}ReduceMean")
        safe = self.op("Add", [mean, self.constant("epsilon", 1e-5, np.float32)], f"{name}Add")
        root = self.op("Sqrt", [safe], f"{name}Sqrt")
        normal = self.activation(self.op("Div", [wide, root], f"{name}Div"), hidden, TensorProto.FLOAT)
        weight = self.weight(f"{path}.weight", (hidden,), 1)
        scaled = self.op("Mul", [self.cast(normal, f"{name}Cast_1"), weight], f"{name}Mul")
        return self.activation(scaled, hidden)


def node_name(path: str, kind: str) -> str:
    """Module path and operator as torch's tracing exporter writes them."""
    for part in ("layers", "self_attn", "mlp"):
        path = path.replace(f".{part}", f"/{part}")
    return f"/{path}/{kind}"


def rotary_tables(writer: GraphWriter) -> tuple[str, str]:
    """cos and sin [batch, 1, sequence, 64] of ``position_ids``."""
    frequencies = 10000.0 ** -(np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
    positions = writer.op("Cast", ["position_ids"], "/rotary/Cast", to=TensorProto.FLOAT)
    axes = writer.constant("rotary_axes", [1, 3])
    column = writer.op("Unsqueeze", [positions, axes], "/rotary/Unsqueeze")
    row = writer.constant("frequencies", np.tile(frequencies, 2), np.float32)
    angles = writer.op("Mul", [column, row], "/rotary/Mul")
    cos, sin = (writer.op(kind, [angles], f"/rotary/{kind}") for kind in ("Cos", "Sin"))
    return writer.cast(cos, "/rotary/Cast_cos"), writer.cast(sin, "/rotary/Cast_sin")


def additive_mask(writer: GraphWriter) -> str:
    """Causal and padding mask [batch, 1, sequence, sequence]: 0 or -30000."""
    op, constant = writer.op, writer.constant
    zero, one = constant("zero", 0), constant("one", 1)
    length = op("Gather", [op("Shape", ["input_ids"], "/mask/Shape"), one], "/mask/Gather")
    steps = op("Range", [zero, length, one], "/mask/Range")
    rows = op("Unsqueeze", [steps, constant("axis_1", [1])], "/mask/Unsqueeze")
    causal = op("LessOrEqual", [steps, rows], "/mask/LessOrEqual")
    real = op("Cast", ["attention_mask"], "/mask/Cast", to=TensorProto.BOOL)
    keys = op("Unsqueeze", [real, constant("mask_axes", [1, 2])], "/mask/Unsqueeze_1")
    visible = op("And", [causal, keys], "/mask/And")
    values = [constant("shown", 0.0, np.float32), constant("hidden", -30000.0, np.float32)]
    return writer.cast(op("Where", [visible, *values], "/mask/Where"), "/mask/Cast_1")


def split_heads(writer: GraphWriter, x: str, name: str) -> str:
    """[batch, sequence, hidden] -> [batch, heads, sequence, 64]."""
    shape = writer.constant("split_heads", [0, 0, -1, HEAD_SIZE])
    return writer.op(
        "Transpose",
        [writer.op("Reshape", [x, shape], f"{name}Reshape")],
        f"{name}Transpose",
        perm=[0, 2, 1, 3],
    )


def rotate(writer: GraphWriter, x: str, tables: tuple[str, str], name: str) -> str:
    """Rotary embedding of x [batch, heads, sequence, 64]."""
    left, right = f"{name}left", f"{name}right"
    writer.nodes.append(helper.make_node("Split", [x], [left, right], f"{name}Split", axis=-1, num_outputs=2))
    turned = writer.op("Concat", [writer.op("Neg", [right], f"{name}Neg"), left], f"{name}Concat", axis=-1)
    kept = writer.op("Mul", [x, tables[0]], f"{name}Mul")
    return writer.op("Add", [kept, writer.op("Mul", [turned, tables[1]], f"{name}Mul_1")], f"{name}Add")


def attention(writer: GraphWriter, x: str, path: str, tables: tuple[str, str], mask: str) -> str:
    """Multi-head self-attention, decomposed."""
    hidden, base = writer.shape.hidden, node_name(path, "")
    q, k, v = (
        split_heads(writer, writer.linear(x, f"{path}.{p}_proj", hidden, hidden), f"{base}{p}/")
        for p in "qkv"
    )
    q, k = rotate(writer, q, tables, f"{base}rope_q/"), rotate(writer, k, tables, f"{base}rope_k/")
    scale = writer.cast(writer.constant("scale", HEAD_SIZE**-0.5, np.float32), f"{base}Cast")
    keys = writer.op("Transpose", [k], f"{base}Transpose", perm=[0, 1, 3, 2])
    scores = writer.op("MatMul", [writer.op("Mul", [q, scale], f"{base}Mul"), keys], f"{base}MatMul")
    weights = writer.op(
        "Softmax", [writer.op("Add", [scores, mask], f"{base}Add")], f"{base}Softmax", axis=-1
    )
    mixed = writer.op("MatMul", [weights, v], f"{base}MatMul_1")
    merged = writer.op("Transpose", [mixed], f"{base}Transpose_1", perm=[0, 2, 1, 3])
    flat = writer.op("Reshape", [merged, writer.constant("merge_heads", [0, 0, -1])], f"{base}Reshape")
    return writer.linear(flat, f"{path}.o_proj", hidden, hidden)


def feed_forward(writer: GraphWriter, x: str, path: str) -> str:
    """SwiGLU feed-forward block."""
    hidden, wide, base = writer.shape.hidden, writer.shape.intermediate, node_name(path, "")
    gate = writer.linear(x, f"{path}.gate_proj", hidden, wide)
    silu = writer.op("Mul", [gate, writer.op("Sigmoid", [gate], f"{base}Sigmoid")], f"{base}Mul")
    up = writer.linear(x, f"{path}.up_proj", hidden, wide)
    product = writer.activation(writer.op("Mul", [silu, up], f"{base}Mul_1"), wide)
    return writer.linear(product, f"{path}.down_proj", wide, hidden)


def build(writer: GraphWriter) -> onnx.ModelProto:
    """Build the whole graph; :attr:`GraphWriter.weights` says what belongs into the data file."""
    shape = writer.shape
    table = writer.weight("model.embed_tokens.weight", (shape.vocab, shape.hidden), 1)
    hidden = shape.hidden
    x = writer.activation(writer.op("Gather", [table, "input_ids"], "/model/embed_tokens/Gather"), hidden)
    tables, mask = rotary_tables(writer), additive_mask(writer)
    for i in range(shape.layers):
        path = f"model.layers.{i}"
        normal = writer.rms_norm(x, f"{path}.input_layernorm")
        attended = attention(writer, normal, f"{path}.self_attn", tables, mask)
        x = writer.activation(writer.op("Add", [x, attended], node_name(path, "Add")), hidden)
        normal = writer.rms_norm(x, f"{path}.post_attention_layernorm")
        fed = feed_forward(writer, normal, f"{path}.mlp")
        x = writer.activation(writer.op("Add", [x, fed], node_name(path, "Add_1")), hidden)
    writer.linear(writer.rms_norm(x, "model.norm"), "lm_head", hidden, shape.vocab)
    writer.nodes[-1].output[0] = "logits"
    writer.values.pop()  # an output of the graph declares its own
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"]) for n in names]
    logits = helper.make_tensor_value_info("logits", writer.element_type, ["batch", "sequence", shape.vocab])
    graph = helper.make_graph(
        writer.nodes, "large", inputs, [logits], writer.initializers, value_info=writer.values
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="make_large")


def make_large(folder: Path, shape: Shape) -> Path:
    """Write ``folder`` (replaced at the end) with model.onnx and model.onnx.data; return the model's path."""
    with atomic_folder(folder) as temporary:
        writer = GraphWriter(shape, "model.onnx.data")
        model = build(writer)
        data = temporary / "model.onnx.data"
        data.touch()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # numpy draws outside Python's lock
            list(pool.map(lambda drawn: drawn.write(data), writer.weights))
        (temporary / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def main() -> None:
    """Parse the arguments and write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    for name in ("layers", "hidden", "intermediate", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name), help="default %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=Shape.dtype, help="default %(default)s")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    if arguments["hidden"] % HEAD_SIZE:
        parser.error(f"--hidden must be a multiple of {HEAD_SIZE}, the head size")
    path = make_large(output, Shape(**arguments))
    print(f"{path}: {(path.parent / 'model.onnx.data').stat().st_size / 1e9:.2f} GB of external data")


if __name__ == "__main__":
    main()
