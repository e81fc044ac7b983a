"""Raise the default opset to what the rewritten graph needs, and the IR version with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from passes._opset18 import bridge_to_opset18
from zqfp_compile.pass_base import Pass, PassError, PassResult

OLDEST_OPSET = 13
MAX_OPSET = 26  # ONNX Runtime 1.31
MIN_IR_VERSION = 10  # function overloads
MAX_IR_VERSION = 13  # ONNX Runtime 1.31; onnx writes newer by default


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Bring the default domain to at least ``minimum`` and the IR version into 10..13.

    INT4 tensors and blocked scales need opset 21, function overloads IR 10; ONNX Runtime 1.31 reads no opset
    after 26 and no IR version after 13.

    Before::

        ir_version 8, opset 17
        m = ReduceMean(x) axes=[-1]

    After::

        ir_version 10, opset 21
        m = ReduceMean(x, axes_m1)

    Opset 13..17 goes to 18 by ``passes/_opset18.py`` and on by onnxscript, which also inlines model-local
    functions and drops unused nodes. No initializer is read; node names and metadata survive.
    A model at ``minimum`` or above keeps its opset, functions and nodes.
    """

    name: ClassVar[str] = "raise-opset"
    minimum: int = 21

    def call(self, model: ir.Model) -> PassResult:
        """Raise ``model`` in place.

        Raises:
            PassError: When the opset is below 13 or above 26, or a node has no form in the new opset.
        """
        modified = _name_default_domain(model)
        version = model.graph.opset_imports.get("", self.minimum)
        if not OLDEST_OPSET <= version <= MAX_OPSET:
            raise PassError(
                f"the model uses ONNX opset {version}; export it again with an opset between "
                f"{OLDEST_OPSET} and {MAX_OPSET} (for example 21)"
            )
        if version < self.minimum:
            _convert(model, version, self.minimum)
            modified = True
        elif "" not in model.graph.opset_imports:
            model.graph.opset_imports[""] = version
            modified = True
        ir_version = min(max(model.ir_version, MIN_IR_VERSION), MAX_IR_VERSION)
        modified |= ir_version != model.ir_version
        model.ir_version = ir_version
        return PassResult(model, modified)


def _name_default_domain(model: ir.Model) -> bool:
    """Write the default domain as "" where a model imports it by its other name, ``ai.onnx``."""
    imports = model.graph.opset_imports
    if "ai.onnx" not in imports:
        return False
    version = imports.pop("ai.onnx")
    if imports.setdefault("", version) != version:
        raise PassError(
            f"the model imports the default opset twice, as {imports['']} and {version}; export it again"
        )
    return True


def _convert(model: ir.Model, version: int, target: int) -> None:
    from onnxscript import version_converter

    _inline_functions(model)
    if version < 18:
        bridge_to_opset18(model, version)
    known = {node: _schema(node, version) is not None for node in _default_nodes(model)}
    try:
        version_converter.convert_version(model, target_version=target)
    except Exception as error:  # whatever the library raises becomes one line
        reason = " ".join(str(error).split())
        raise PassError(f"the model cannot be raised from opset {version} to {target}: {reason}") from error
    if model.graph.opset_imports.get("") != target:  # the library returns in silence when it gives up
        raise PassError(f"the model cannot be raised from opset {version}; export it with opset {target}")
    for node in _default_nodes(model):
        if known.get(node, True):
            _check_schema(node, version, target)
        if node in known and not _meaning_kept(node):
            raise PassError(
                f"{node.op_type} node {node.name!r} means something else in opset {target} and was not "
                f"converted; export the model with opset {target}"
            )


def _inline_functions(model: ir.Model) -> None:
    if model.functions:
        from onnx_ir.passes import common

        common.InlinePass()(model)


def _default_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == ""]


def _schema(node: ir.Node, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None  # ONNX Runtime keeps a few operators of its own in the default domain


def _check_schema(node: ir.Node, version: int, target: int) -> None:
    """The node must be legal in the new opset: the converter skips in silence what it cannot convert."""
    schema = _schema(node, target)
    place = f"{node.op_type} node {node.name!r}"
    wanted = f"export the model with opset {target}"
    if schema is None:
        raise PassError(f"{place} exists in opset {version} but not in {target}; {wanted}")
    unknown = sorted(set(node.attributes) - set(schema.attributes))
    if unknown:
        raise PassError(f"{place} has the attribute {unknown[0]!r}, unknown in opset {target}; {wanted}")
    inputs, outputs = len(node.inputs), len(node.outputs)
    if not schema.min_input <= inputs <= schema.max_input or not outputs <= schema.max_output:
        raise PassError(f"{place} has {inputs} inputs and {outputs} outputs, not legal in {target}; {wanted}")


def _meaning_kept(node: ir.Node) -> bool:
    """False for the two operators whose old form is still accepted after 18 but read differently."""
    if node.op_type == "GridSample":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() not in ("bilinear", "bicubic")
    if node.op_type != "GroupNormalization":
        return True
    x, scale = node.inputs[0], node.inputs[1]
    if x is None or scale is None or x.shape is None or scale.shape is None or len(x.shape) < 2:
        return False
    return isinstance(x.shape[1], int) and x.shape[1] == scale.shape[0]
