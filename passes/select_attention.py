"""Pass ``select-attention``: find the KV cache and the attentions that can run in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes._attention_forms import find_attentions, find_caches
from passes._layer_names import name_nodes
from zqfp_compile.errors import UsageError
from zqfp_compile.pass_base import Declined, Pass, PassResult
from zqfp_compile.plan import QuantPlan


@dataclass(frozen=True)
class SelectAttention(Pass):
    """Write the KV-cache tensors and the attentions that can run in FP8 into a plan.

    Matched, past a graph input whose name says ``past`` or ``cache``, present a graph output::

        present = Concat(past, new)

    and, with any elementwise operators for ``scale`` and ``mask``::

        mix = MatMul(Softmax(mask(scale(MatMul(q, k)))), v)

    Left alone, with a reason: a cache that a fused operator or a branch reads, a fused attention, a Softmax
    whose scores or probabilities are no product of two activations.

    The graph changes only to be unambiguous: nodes without a name or with a duplicate one get a unique name.

    Attributes:
        plan: What is known already; the result extends it.
        kv_cache: Look for the cache.
        attention: Look for the attentions.
    """

    name: ClassVar[str] = "select-attention"
    plan: QuantPlan
    kv_cache: bool = False
    attention: bool = False

    def call(self, model: ir.Model) -> PassResult:
        """Fill ``caches`` and ``attentions`` of ``PassResult.plan``.

        Raises:
            UsageError: When the model has none of what was asked for.
        """
        modified = name_nodes(model.graph)
        caches, declined = find_caches(model.graph)
        if self.kv_cache and not caches:
            raise UsageError(f"--kv-cache-dtype fp8: {_nothing('KV cache input', declined)}")
        if not self.kv_cache:
            declined = []
        attentions, left = find_attentions(model.graph, caches) if self.attention else ([], [])
        if self.attention and not attentions:
            raise UsageError(f"--attention fp8: {_nothing('attention', left)}")
        plan = self.plan.replace(caches=tuple(caches) if self.kv_cache else (), attentions=tuple(attentions))
        return PassResult(model, modified, (*declined, *left), plan)


def _nothing(what: str, declined: list[Declined]) -> str:
    if not declined:
        return f"the model has no {what}; leave the option out"
    first = declined[0]
    return f"no {what} of the model can become FP8, such as {first.place!r}: {first.reason}"
