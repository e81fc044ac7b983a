"""Small graphs with square weights, planned as select-linears does."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from zqfp_compile.plan import QuantPlan
from zqfp_compile.registry import create_pass


def square_linears(body: str) -> tuple[ir.Model, QuantPlan]:
    """A graph of x [b, 4] to y with float32 weights W<a..e> [4, 4], and its plan."""
    declared = ", ".join(f"float[4, 4] W{letter}" for letter in "abcde")
    signature = f"g (float[b, 4] x, {declared}) => (float[b, 4] y)"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {signature} {{ {body} }}')
    for value in [value for value in model.graph.inputs if value.name != "x"]:
        value.const_value = ir.tensor(np.eye(4, dtype=np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.initializers[str(value.name)] = value
    plan = create_pass("select-linears", quantize_lm_head=True).call(model).plan
    assert plan is not None
    return model, plan
