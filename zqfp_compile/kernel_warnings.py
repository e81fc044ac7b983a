"""What a user of ``--weight-lowering plugin`` should know of the output."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from zqfp_compile.backends.host_libraries import HOSTS, KERNELS, kernel_library
from zqfp_compile.pass_base import Declined
from zqfp_compile.plan import QuantPlan


def kernel_warnings(plan: QuantPlan, declined: Sequence[Declined], target: str) -> list[str]:
    """Return one line per finding.

    Args:
        plan: What was quantised.
        declined: What the pass ``lower-weights-plugin`` left to standard operators.
        target: The settled target.
    """
    lines = _outside_kernel(declined, len(plan.rewritten))
    floats = [site for site in plan.rewritten if site.dtype == ir.DataType.FLOAT]
    if target == "onnxruntime" and floats:
        lines.append(
            f"{len(floats)} layers are FLOAT, which the GPU's kernel does not write: the output runs on the "
            "CPU only; export the model in float16 or bfloat16"
        )
    elif target in HOSTS and kernel_library() is None:
        where = "runs on the CPU only" if target == "onnxruntime" else "does not run"
        lines.append(
            f"{KERNELS} is not built (make kernels): until it lies beside the host, the output {where}"
        )
    return lines


def _outside_kernel(declined: Sequence[Declined], total: int) -> list[str]:
    """One line per reason for which layers are not computed by the kernel."""
    layers: dict[str, list[str]] = {}
    for item in declined:
        places = layers.setdefault(item.reason, [])
        if item.place not in places:  # the pass may have run for two files
            places.append(item.place)
    return [
        f"{len(places)} of {total} layers are not computed by the kernel: {reason} (first {places[0]})"
        for reason, places in layers.items()
    ]
