"""Two linears of one activation that are gate and up of a SiLU product."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
from quantizer_forms import SILUS
from rewrite_models import Case, artifact

from zqfp_compile.plan import QuantPlan

# q and v of rewrite_models: their values and layers.
GATE, UP = "q", "v"
_KINDS = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def gated(
    case: Case,
    body: str = SILUS["sigmoid"],
    *,
    outputs: tuple[str, ...] = ("h",),
    plan: QuantPlan | None = None,
) -> tuple[ir.Model, QuantPlan]:
    """The model after the rewrite passes, and its plan.

    Args:
        case: Its q is gate and its v, which has a bias, is up.
        body: Lines of ONNX text that make h from gate and up.
        outputs: Values that are outputs of the graph, ``gate`` and ``up`` among those there are.
        plan: Instead of the case's.
    """
    model, plan = artifact(case, plan)
    graph = model.graph
    values = {"gate": graph.outputs[0], "up": graph.outputs[1]}
    part = _parse(body, case)
    ir.convenience.replace_all_uses_with(part.inputs, list(values.values()))
    for number, node in enumerate(list(part)):
        node.name = f"node_{number}_{node.op_type}"
        part.remove(node)
        graph.append(node)
        values |= {str(value.name): value for value in node.outputs}
    graph.outputs[:] = [values[name] for name in outputs]
    graph.opset_imports.update(part.opset_imports)
    return model, plan


def _parse(body: str, case: Case) -> ir.Graph:
    """A graph from gate and up to every value of the body, each with its type and shape."""
    shape = f"{_KINDS[case.dtype]}[batch,{case.n}]"
    made = [line.split(" = ")[0].strip() for line in body.splitlines()]
    inputs, results = (", ".join(f"{shape} {name}" for name in names) for names in (("gate", "up"), made))
    imports = f'"" : {24 if "Swish" in body else 21}, "com.microsoft" : 1'
    head = f"<ir_version: 10, opset_import: [{imports}]>"
    model = onnx.parser.parse_model(f"{head}\ng ({inputs}) => ({results}) {{\n{body}\n}}")
    graph = ir.from_proto(model).graph
    graph.outputs.clear()
    return graph
