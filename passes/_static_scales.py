"""The calibrated scales of attention as initializers; shared by the two passes that need them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from passes._emit import Names, initializer_value
from zqfp_compile.pass_base import PassError
from zqfp_compile.plan import QuantPlan


def register_scale(graph: ir.Graph, names: Names, name: str, plan: QuantPlan, value: str) -> ir.Value:
    """Return a new initializer FLOAT [] called ``name`` with ``plan.attention_scales[value]``.

    Raises:
        PassError: When the plan has no positive finite scale for ``value``.
    """
    scale = np.array(plan.attention_scales.get(value, 0.0), np.float32)
    if not (scale > 0 and np.isfinite(scale)):
        raise PassError(f"value {value!r}: no positive calibrated scale; calibrate on inputs that reach it")
    initializer = initializer_value(names.value(name), ir.tensor(scale))
    graph.register_initializer(initializer)
    return initializer
