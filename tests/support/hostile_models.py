"""Hostile models that pass the checks of the file: the compile must refuse them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from hostile_case import HostileCase, on_model
from hostile_protos import changed, node
from onnx import helper
from small_lm import small_lm


def _lm(wrong: str, change: Callable[[onnx.ModelProto], object], *says: str, code: int = 3) -> HostileCase:
    """The small language model after ``change``."""
    return on_model("model", wrong, damage_lm(change), *says, code=code, flags=EVALUATE)


def damage_lm(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    """Return what writes the small language model after ``change``."""
    return lambda place: (place / "m" / "model.onnx").write_bytes(
        changed(change, small_lm).SerializeToString()
    )


def _poison(value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[1]
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[1, 2] = value
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    return change


def _reshape(
    index: int, shape: tuple[int, ...], dtype: type = np.float32
) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[index]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, dtype), tensor.name))

    return change


def _operator(op_type: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    """The second linear is another operator."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[2].op_type, model.graph.node[2].domain = op_type, domain
        model.opset_import.append(helper.make_opsetid(domain, 1) if domain else model.opset_import[0])

    return change


def _expanded(shape: list[int]) -> Callable[[onnx.ModelProto], None]:
    """The embedding grows to ``shape`` before the first linear reads it."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.array(shape), "s"))
        model.graph.node[1].input[0] = "g"
        model.graph.node.add().CopyFrom(node("Expand", ["e", "s"], "g"))

    return change


def _quantised(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "zqfp"
    model.opset_import.append(helper.make_opsetid("zqfp", 1))
    model.graph.node[1].op_type = "W4A8Linear"


NO_LINEAR = "the options leave no linear layer to rewrite"
# An operator that only the evaluation runs.
EVALUATE = ("--evaluate", "--eval-text", "m/text.txt", "--eval-length", "64")

COMPILED = (
    _lm("with NaN", _poison(np.nan), "'model.layers.0.proj'", "NaN", "--exclude"),
    _lm("with infinity", _poison(np.inf), "'model.layers.0.proj'", "infinite", "--exclude"),
    _lm("with a linear of no output", _reshape(1, (64, 0)), NO_LINEAR, code=2),
    _lm("with a linear of no input", _reshape(1, (0, 64)), NO_LINEAR, code=2),
    _lm(
        "with a linear of another width",
        _reshape(1, (32, 64)),
        "layers.0.proj takes 32 features",
        "'e' has 64",
    ),
    _lm("with weights of rank 0", _reshape(1, ()), NO_LINEAR, code=2),
    _lm("with bools for weights", _reshape(1, (64, 64), np.bool_), NO_LINEAR, code=2),
    _lm("with complex weights", _reshape(1, (64, 64), np.complex64), NO_LINEAR, code=2),
    _lm("with an unknown operator", _operator("Frobnicate"), "Frobnicate"),
    _lm("with an unknown operator of a known domain", _operator("Frobnicate", "com.microsoft"), "Frobnicate"),
    _lm("with an operator of too few inputs", lambda it: it.graph.node[1].input.pop(), "has 1 inputs"),
    _lm("with 10^18 values from a shape", _expanded([10**9, 10**9, 1, 64]), "ONNX Runtime"),
    _lm(
        "with 10^12 values from a shape", _expanded([10**8, 1, 64]), "memory ran out in ONNX Runtime", code=6
    ),
    _lm("compiled already", _quantised, "was compiled by zqfp-compile already"),
)
