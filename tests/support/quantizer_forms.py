"""Every form of SiLU times up and of a norm that the pass fuse-quantizers knows, in front of a quantiser."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx.parser
import onnx_ir as ir
from rewrite_models import NUMPY

K = 48
RANK = 16
SCALE = 0.0117
EPSILON = 0.25  # of a size that shows

SILU, NORM = "QuantizeSiluMul", "QuantizeRmsNorm"
_NORM = """c32 = Cast <to=1> (x)
p32 = Pow(c32, two)
m32_1 = ReduceMean <keepdims=1> (p32, axes)
e32_1 = Add(m32_1, eps)
q32_1 = Sqrt(e32_1)
r32_1 = Reciprocal(q32_1)
n32 = Mul(c32, r32_1)"""
EXPORTED = f"{_NORM}\nn = Cast <to=T> (n32)\nh = Mul(gamma, n)"
SKIP_NORM = """h, mean32_1, deviation32_1, s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon=0.25> (
x, skip, gamma)""".replace("\n", "")

# The body makes h; names that end in _1 have a last dimension of 1, those with 32 in them are FLOAT.
SILUS = {
    "sigmoid": "g = Sigmoid(gate)\ns = Mul(gate, g)\nh = Mul(s, up)",
    "operands swapped": "g = Sigmoid(gate)\ns = Mul(g, gate)\nh = Mul(up, s)",
    "QuickGelu": "s = com.microsoft.QuickGelu <alpha=1.0> (gate)\nh = Mul(s, up)",
    "Swish": "s = Swish (gate)\nh = Mul(up, s)",
}
NORMS = {
    "SimplifiedLayerNormalization": "h = SimplifiedLayerNormalization <axis=-1, epsilon=0.25> (x, gamma)",
    "RMSNormalization": "h = RMSNormalization <axis=1, epsilon=0.25> (x, gamma)",
    "exported": EXPORTED,
    "gamma first": EXPORTED.replace("Mul(gamma, n)", "Mul(n, gamma)").replace(
        "Mul(c32, r32_1)", "Mul(r32_1, c32)"
    ),
    "square by Mul": EXPORTED.replace("Pow(c32, two)", "Mul(c32, c32)"),
    "eps first": EXPORTED.replace("Add(m32_1, eps)", "Add(eps, m32_1)").replace("axes", "axis"),
    "one over root": EXPORTED.replace("Reciprocal(q32_1)", "Div(one, q32_1)"),
    "x over root": EXPORTED.replace("r32_1 = Reciprocal(q32_1)\n", "").replace(
        "Mul(c32, r32_1)", "Div(c32, q32_1)"
    ),
    "gamma in FLOAT": f"{_NORM}\nw32 = Cast <to=1> (gamma)\no32 = Mul(n32, w32)\nh = Cast <to=T> (o32)",
}
SKIPS = {
    "SkipSimplifiedLayerNormalization": SKIP_NORM,
    "Add": f"s = Add(x, skip)\n{EXPORTED.replace('Cast <to=1> (x)', 'Cast <to=1> (s)')}",
    "Add and RMSNormalization": "s = Add(skip, x)\nh = RMSNormalization <epsilon=0.25> (s, gamma)",
}
FORMS = {**SILUS, **NORMS, **SKIPS}


@dataclass(frozen=True)
class Block:
    """One form with its quantiser.

    Attributes:
        body: Lines of ONNX text that make h from gate and up, or x, skip and gamma.
        dtype: Type of everything that is not FLOAT by its name.
        tokens: Whether the quantiser is QuantizeTokens.
        lorc: Whether it has V.
        outputs: Values besides the quantiser's that are outputs of the graph.
    """

    body: str
    dtype: ir.DataType = ir.DataType.FLOAT16
    tokens: bool = False
    lorc: bool = False
    outputs: tuple[str, ...] = ()

    def constants(self) -> dict[str, np.ndarray]:
        """The stored tensors that a body may name."""
        rng = np.random.default_rng(5)
        return {
            "gamma": rng.standard_normal(K).astype(NUMPY[self.dtype]),
            "v": (rng.standard_normal((K, RANK)) * 0.1).astype(NUMPY[self.dtype]),
            "a": np.array(SCALE, np.float32),
            "two": np.array(2, np.float32),
            "one": np.array(1, np.float32),
            "eps": np.array(EPSILON, np.float32),
            "axes": np.array([-1]),
            "axis": np.array([1]),
            "zero": np.array([0]),
        }

    def model(self) -> ir.Model:
        """The graph, [batch, K] activations x, skip, gate and up."""
        kind = {1: "float", 10: "float16", 16: "bfloat16"}[int(self.dtype)]
        lines = self.body.replace("to=T", f"to={int(self.dtype)}").splitlines()
        made = [name for line in lines for name in re.findall(r"\w+", line.split(" = ")[0])]
        values = [f"{'float' if '32' in name else kind}{self._dims(name)} {name}" for name in made]
        results = ["x8", *["t"] * self.tokens, *["xv"] * self.lorc]
        types = {
            "x8": f"float8e4m3fn[batch,{K}] x8",
            "t": "float[batch,1] t",
            "xv": f"{kind}[batch,{RANK}] xv",
        }
        outputs = [types[name] for name in results]
        outputs += [value for value in values if value.split()[-1] in self.outputs]
        inner = [value for value in values if value not in outputs]
        inputs = [f"{kind}[batch,{K}] {name}" for name in ("gate", "up", "x", "skip")]
        inputs += [f"float {name}" for name in self.constants()]
        operands = ["h", *["a"] * (not self.tokens), *["v"] * self.lorc]
        op = "zqfp.QuantizeTokens" if self.tokens else "zqfp.QuantizeActivation"
        call = f"{', '.join(results)} = {op} <lorc_rank={RANK * self.lorc}> ({', '.join(operands)})"
        body = "\n".join([*lines, call])
        opset = 24 if "Swish" in self.body else 23
        model = ir.from_proto(
            onnx.parser.parse_model(
                f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "zqfp" : 1]>\n'
                f"g ({', '.join(inputs)}) => ({', '.join(outputs)}) <{', '.join(inner)}> {{\n{body}\n}}"
            )
        )
        self._store_constants(model.graph)
        for number, node in enumerate(model.graph):
            node.name = f"node_{number}_{node.op_type}"
        return model

    @staticmethod
    def _dims(name: str) -> str:
        return f"[batch,{1 if name.endswith('_1') else K}]"

    def _store_constants(self, graph: ir.Graph) -> None:
        stored = self.constants()
        for value in [value for value in graph.inputs if value.name in stored]:
            graph.inputs.remove(value)
            tensor = ir.tensor(stored[str(value.name)])
            value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(tensor.shape.numpy())
            graph.register_initializer(value)
