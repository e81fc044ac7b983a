"""Fixtures for pass tests: an honest runner and golden graphs.

``run_pass(pass_, model)`` runs a pass under the contract of ``zqfp_compile.pass_base``; ``golden(name,
model)`` compares the graph with ``tests/goldens/<name>.txt`` (``ZQFP_UPDATE_GOLDENS=1`` writes it).
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_contract import call_checked

from zqfp_compile.pass_base import Pass, PassResult
from zqfp_compile.specs import attribute_graphs

GOLDENS = Path(__file__).parents[1] / "goldens"
SHOWN_ELEMENTS = 8


def _check_model(model: ir.Model) -> None:
    """onnx.checker with type and shape inference; external data is put into the (small) test model first."""
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            const = model.graph.initializers[tensor.name].const_value
            assert const is not None
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = const.tobytes()
    onnx.checker.check_model(proto, full_check=True)


@pytest.fixture
def run_pass() -> Callable[..., PassResult]:
    """``run_pass(pass_, model, check=True)``: the pass's result, after checking what every pass promises.

    ``modified`` agrees with a hash of the model before and after; the same pass run again changes nothing;
    the result satisfies onnx.checker (``check=False`` where the graph holds what the checker cannot infer).
    """

    def run(pass_: Pass, model: ir.Model, *, check: bool = True) -> PassResult:
        result = call_checked(pass_, model)
        if check:
            _check_model(result.model)
        return result

    return run


@pytest.fixture
def golden() -> Callable[[str, ir.Model], None]:
    """``golden(name, model)``: the model's text equals ``tests/goldens/<name>.txt``; a missing file fails."""

    def compare(name: str, model: ir.Model) -> None:
        path = GOLDENS / f"{name}.txt"
        text = graph_text(model)
        if os.environ.get("ZQFP_UPDATE_GOLDENS") == "1":
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path} is missing; write it with ZQFP_UPDATE_GOLDENS=1 and read it"
        wanted = path.read_text(encoding="utf-8")
        if text != wanted:
            diff = difflib.unified_diff(wanted.splitlines(), text.splitlines(), "golden", "now", lineterm="")
            pytest.fail("\n".join((f"{path.name} differs (ZQFP_UPDATE_GOLDENS=1 rewrites it):", *diff)))

    return compare


def graph_text(model: ir.Model) -> str:
    """The model as reviewable text: one line per value or node, tensors of over 8 elements elided."""
    lines = [f"ir_version {model.ir_version}", _opsets(model.graph.opset_imports)]
    lines += _graph_lines(model.graph, "graph")
    for (domain, op_type, overload), function in sorted(model.functions.items()):
        title = f"function {domain}::{op_type}" + (f":{overload}" if overload else "")
        lines += ["", title, "  " + _opsets(function.opset_imports)]
        lines += ["  input  " + _value(value) for value in function.inputs]
        lines += [f"  attribute {name}" for name in function.attributes]
        lines += _node_lines(function, "  ")
        lines += ["  output " + _value(value) for value in function.outputs]
    return "\n".join(lines) + "\n"


def _opsets(imports: dict[str, int]) -> str:
    return "opset " + ", ".join(f"{domain or 'ai.onnx'}={v}" for domain, v in sorted(imports.items()))


def _graph_lines(graph: ir.Graph, title: str, indent: str = "") -> Iterator[str]:
    yield f"{indent}{title} {graph.name or ''}".rstrip()
    inner = indent + "  "
    for value in graph.inputs:
        yield f"{inner}input  {_value(value)}"
    for value in graph.initializers.values():
        yield f"{inner}const  {_value(value)} {_tensor(value.const_value)}"
    yield from _node_lines(graph, inner)
    for value in graph.outputs:
        yield f"{inner}output {_value(value)}"


def _node_lines(nodes: Iterable[ir.Node], indent: str) -> Iterator[str]:
    for node in nodes:
        op = "::".join(filter(None, (node.domain, node.op_type)))
        op += f":{node.overload}" if node.overload else ""
        inputs = ", ".join("-" if value is None else str(value.name) for value in node.inputs)
        outputs = ", ".join(str(value.name) for value in node.outputs)
        attributes = sorted(node.attributes.items())
        plain = [f"{name}={_attribute(attr)}" for name, attr in attributes if not attribute_graphs(attr)]
        yield f"{indent}{outputs} = {' '.join([f'{op}({inputs})', *plain])}  # {node.name or ''}".rstrip(" #")
        for key, text in sorted(node.metadata_props.items()):
            yield f"{indent}  meta {key}: {text}"
        for name, attr in attributes:
            for graph in attribute_graphs(attr):
                yield from _graph_lines(graph, f"{name}:", indent + "  ")


def _attribute(attr: ir.Attr) -> str:
    if attr.is_ref():
        return f"@{attr.ref_attr_name}"
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return f"{tensor.dtype}{list(tensor.shape)}{_tensor(tensor)}"
    if attr.type == ir.AttributeType.FLOAT:
        return f"{attr.as_float():.7g}"
    return repr(list(attr.value) if isinstance(attr.value, (list, tuple)) else attr.value)


def _value(value: ir.Value) -> str:
    shape = "?" if value.shape is None else ", ".join(str(d) for d in value.shape)
    return f"{value.name} {value.dtype or '?'}[{shape}]"


def _tensor(tensor: ir.TensorProtocol | None) -> str:
    if tensor is None:
        return "missing"
    if tensor.size > SHOWN_ELEMENTS:
        return "..."
    numbers = np.asarray(tensor.numpy()).astype(np.float64).ravel()
    return "{" + ", ".join(f"{number:.7g}" for number in numbers) + "}"


@pytest.fixture
def tool(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> Iterator[ModuleType]:
    """The module of tools/ that the test file is named after."""
    name = request.path.stem.removeprefix("test_")
    monkeypatch.syspath_prepend(repo_root / "tools")
    yield importlib.import_module(name)
    sys.modules.pop(name)
