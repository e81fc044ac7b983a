"""Bridge models of opset 13..17 to opset 18, in place.

onnxscript's converter starts at 18 and leaves older nodes silently as they are. Comparing ``onnx.defs`` of
13 and 18 shows four incompatible changes, handled here; every other operator of 13 means the same in 18.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from zqfp_compile.pass_base import PassError

REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)


def bridge_to_opset18(model: ir.Model, version: int) -> None:
    """Rewrite nodes whose opset 13..17 form is not valid, or means something else, in opset 18.

    ::

        ReduceMean(x) axes=[-1]    ->  ReduceMean(x, axes)    axes: int64 initializer, one per distinct list
        a, b = Split(x)            ->  a, b = Split(x) num_outputs=2
        RoiAlign(x, r, i)          ->  RoiAlign(x, r, i) coordinate_transformation_mode="output_half_pixel"

    Raises:
        PassError: On a BatchNormalization with training outputs, which opset 14 dropped.
    """
    axes_values: dict[tuple[int, ...], ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.domain != "":
            continue
        if node.op_type in REDUCTIONS:
            _axes_to_input(node, model.graph, axes_values)
        elif node.op_type in _ATTRIBUTE_CHANGES:
            _ATTRIBUTE_CHANGES[node.op_type](node, version)


def _axes_to_input(node: ir.Node, graph: ir.Graph, known: dict[tuple[int, ...], ir.Value]) -> None:
    attribute = node.attributes.get("axes")
    if attribute is None:
        return
    axes = tuple(attribute.as_ints())
    if axes not in known:
        known[axes] = _new_axes(graph, axes)
    del node.attributes["axes"]
    node.resize_inputs(2)
    node.replace_input_with(1, known[axes])


def _new_axes(graph: ir.Graph, axes: tuple[int, ...]) -> ir.Value:
    """An int64 initializer [len(axes)] of the main graph (inner graphs see it) under an unused name."""
    base = "axes_" + "_".join(str(axis).replace("-", "m") for axis in axes)
    used = {value.name for value in _all_values(graph)}
    name, suffix = base, 1
    while name in used:
        name, suffix = f"{base}_{suffix}", suffix + 1
    value = ir.val(name, const_value=ir.tensor(list(axes), dtype=ir.DataType.INT64, name=name))
    graph.register_initializer(value)
    return value


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    graphs = [graph, *graph.subgraphs()]
    values = [value for g in graphs for value in (*g.inputs, *g.initializers.values())]
    return values + [value for g in graphs for node in g for value in node.outputs]


def _split(node: ir.Node, version: int) -> None:
    if len([value for value in node.inputs if value is not None]) == 1:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _roi_align(node: ir.Node, version: int) -> None:
    if version < 16:
        mode = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
        node.attributes[mode.name] = mode


def _batch_normalization(node: ir.Node, version: int) -> None:
    if version < 14 and len(node.outputs) > 1:
        raise PassError(
            f"BatchNormalization {node.name!r} has training outputs, which opset 14 dropped; "
            "export the model in evaluation mode"
        )


_ATTRIBUTE_CHANGES: dict[str, Callable[[ir.Node, int], None]] = {
    "Split": _split,
    "RoiAlign": _roi_align,
    "BatchNormalization": _batch_normalization,
}
