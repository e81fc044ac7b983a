"""What the passes learn about a model, in frozen values: the graph itself is never a scratch pad."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from zqfp_compile.formats.quantized import QuantizedWeight

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WeightSource:
    """How a linear's weight W[N, K] is obtained from an initializer.

    Attributes:
        initializer: Name of the initializer at the root of the chain.
        transposed: True when the stored tensor is [K, N], the transpose of W; False when it is [N, K].
        scale: Factor on the weight (Gemm ``alpha``).
        casts: Types the weight is rounded to on the way, in order; exact upcasts to FLOAT are left out.
    """

    initializer: str
    transposed: bool
    scale: float = 1.0
    casts: tuple[ir.DataType, ...] = ()


@dataclass(frozen=True)
class LinearSite:
    """One recognised linear layer ``y = x @ W^T (+ bias)``.

    Attributes:
        name: Layer name, from ``pkg.torch.onnx.name_scopes`` or the node name; unique in the model.
        node: Name of the MatMul/Gemm node; unique in the graph.
        activation: Name of the value x, [..., K].
        output: Name of the value y, [..., N]; the rewrite keeps it.
        weight: Where W comes from.
        bias: Name of the Gemm ``C`` initializer, [N] or broadcasting to it, or ``None``; an Add stays.
        bias_scale: Factor on the bias (Gemm ``beta``).
        k: Input features.
        n: Output features.
        dtype: Element type of x and y in the graph (FLOAT, FLOAT16 or BFLOAT16).
        is_lm_head: Whether y (through Cast/Add/Mul at most) is the logits output.
    """

    name: str
    node: str
    activation: str
    output: str
    weight: WeightSource
    bias: str | None
    bias_scale: float
    k: int
    n: int
    dtype: ir.DataType
    is_lm_head: bool = False


@dataclass(frozen=True)
class Skipped:
    """A linear-like node that is not rewritten, and why."""

    name: str
    reason: str
    k: int | None = None
    n: int | None = None


@dataclass(frozen=True)
class CacheSite:
    """One tensor of the KV cache: ``present = Concat(past, new)``.

    Attributes:
        past: Name of the graph input.
        present: Name of the graph output.
        new: Name of the value the step appends; its range sets the scale.
        concat: Name of the Concat node.
        dtype: Element type in the original graph.
    """

    past: str
    present: str
    new: str
    concat: str
    dtype: ir.DataType


@dataclass(frozen=True)
class AttentionSite:
    """One decomposed attention, ``mix = Softmax(f(MatMul(q, k))) @ v``.

    Attributes:
        name: Layer name.
        scores: Name of the MatMul node of queries and keys.
        mix: Name of the MatMul node of probabilities and values.
        q: Name of the value whose range is that of the queries.
        k: The same for the keys; what the step appends where they come from the cache.
        v: The same for the values.
        dtype: Element type of both products in the original graph.
    """

    name: str
    scores: str
    mix: str
    q: str
    k: str
    v: str
    dtype: ir.DataType


@dataclass(frozen=True)
class EmbeddingSite:
    """The token embedding ``h = Gather(table, ids)``.

    Attributes:
        name: Layer name.
        node: Name of the Gather node; unique in the graph.
        output: Name of the value h, [..., D]; the rewrite keeps it.
        source: Where the table [V, D] comes from.
        rows: V.
        width: D.
        dtype: Element type of h (FLOAT, FLOAT16 or BFLOAT16).
        linears: Names of the linears whose weight is the same table (a tied lm_head): they read the same FP8
            tensors, or all keep the float table.
    """

    name: str
    node: str
    output: str
    source: WeightSource
    rows: int
    width: int
    dtype: ir.DataType
    linears: tuple[str, ...] = ()


@dataclass(frozen=True)
class SitePrecision:
    """How one layer is stored.

    Attributes:
        weight_format: ``e2m1``, ``e3m0``, ``int4``, ``fp8`` or ``none``.
        lorc_rank: Rank of the low-rank error compensation, 0 for none.
    """

    weight_format: str
    lorc_rank: int


@dataclass(frozen=True)
class LinearTensors:
    """ONNX-ready tensors of one quantised weight; they may live on disk (``ir.ExternalTensor``).

    Attributes:
        codes: INT4 [N, Kp] (Kp is K rounded up to the group size); for ``fp8`` weights FLOAT8E4M3FN [N, K].
        group_scales: FLOAT8E4M3FN [N, Kp / g]; FLOAT when the constraint is ``none``; ``None`` for ``fp8``.
        row_scales: FLOAT [N], positive.
        lorc_v: [K, r] in the layer's dtype, or FLOAT8E4M3FN with ``lorc_v_scale``; ``None`` without LoRC.
        lorc_u: [r, N] in the layer's dtype, or FLOAT8E4M3FN with ``lorc_u_scale``; ``None`` without LoRC.
        lorc_v_scale: FLOAT [r], positive, for factors in FP8: V = lorc_v * lorc_v_scale[None, :].
        lorc_u_scale: FLOAT [r], positive, for factors in FP8: U = lorc_u * lorc_u_scale[:, None].
    """

    codes: ir.TensorProtocol
    group_scales: ir.TensorProtocol | None
    row_scales: ir.TensorProtocol
    lorc_v: ir.TensorProtocol | None = None
    lorc_u: ir.TensorProtocol | None = None
    lorc_v_scale: ir.TensorProtocol | None = None
    lorc_u_scale: ir.TensorProtocol | None = None


@dataclass(frozen=True)
class QuantPlan:
    """Everything the rewrite passes need and the report prints.

    Attributes:
        linears: Layers to rewrite, in graph order; those that ``precisions`` leaves in float included.
        skipped: Linear-like nodes left alone.
        weight_format: ``e2m1``, ``e3m0``, ``int4``, ``fp8`` or ``none`` (activations are quantised only), of
            layers that ``precisions`` does not name.
        activation_format: ``e4m3``, ``e5m2``, ``int8`` or ``none``.
        per_token: Dynamic per-token activation scales instead of static per-tensor ones.
        group_size: Weights per group scale along K; 0: one group per row.
        scale_constraint: ``none``, ``m1``, ``m2`` or ``e4m3``.
        scale_rows: Rows that share a row scale (a compute group of ``m2``); 1 otherwise.
        activation_scales: Static scale per activation value name (empty when ``per_token``).
        tensors: Quantised tensors per layer name (filled by the quantize step).
        lorc_rank: Rank of the compensation of layers that ``precisions`` does not name.
        lorc_format: How LoRC factors are stored: ``float`` (the layer's dtype) or ``fp8``.
        precisions: Layers that differ from the above, by name. One with the format ``none`` is left as it is,
            its activation included.
        caches: Tensors of the KV cache to hold in FP8.
        attentions: Attentions whose two products run on FP8 operands.
        attention_scales: Static E4M3 scale per value name: ``new`` of the caches, ``q``, ``k`` and ``v`` of
            the attentions.
        embeddings: Token embeddings to store in FP8, with one scale per row.
        embedding_tensors: Their codes and row scales by name (filled by the quantize step).
    """

    linears: tuple[LinearSite, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    weight_format: str = "e2m1"
    activation_format: str = "e4m3"
    per_token: bool = False
    group_size: int = 64
    scale_constraint: str = "e4m3"
    scale_rows: int = 1
    activation_scales: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, LinearTensors] = field(default_factory=dict)
    lorc_rank: int = 0
    lorc_format: str = "float"
    precisions: Mapping[str, SitePrecision] = field(default_factory=dict)
    caches: tuple[CacheSite, ...] = ()
    attentions: tuple[AttentionSite, ...] = ()
    attention_scales: Mapping[str, float] = field(default_factory=dict)
    embeddings: tuple[EmbeddingSite, ...] = ()
    embedding_tensors: Mapping[str, LinearTensors] = field(default_factory=dict)

    @property
    def attention_values(self) -> tuple[str, ...]:
        """The values whose ranges set ``attention_scales``, each once, in graph order of their sites."""
        names = [cache.new for cache in self.caches]
        names += [name for site in self.attentions for name in (site.q, site.k, site.v)]
        return tuple(dict.fromkeys(names))

    @property
    def rewritten(self) -> tuple[LinearSite, ...]:
        """The layers the rewrite touches: all but those that ``precisions`` leaves as they are."""
        keep = {name for name, precision in self.precisions.items() if precision.weight_format == "none"}
        return tuple(site for site in self.linears if site.name not in keep)

    @property
    def tied(self) -> frozenset[str]:
        """The linears that share their table with an embedding."""
        return frozenset(name for site in self.embeddings for name in site.linears)

    @property
    def stored_embeddings(self) -> tuple[EmbeddingSite, ...]:
        """The embeddings the rewrite touches: all but those whose table ``precisions`` leaves in float."""
        rewritten = {site.name for site in self.rewritten}
        return tuple(site for site in self.embeddings if rewritten.issuperset(site.linears))

    @property
    def quantizes_weights(self) -> bool:
        """Whether any layer's weight is quantised."""
        return any(self.precision(site).weight_format != "none" for site in self.linears)

    def precision(self, site: LinearSite) -> SitePrecision:
        """Return how ``site`` is stored."""
        return self.precisions.get(site.name) or SitePrecision(self.weight_format, self.lorc_rank)

    @property
    def static_scales(self) -> bool:
        """Whether activations are quantised with calibrated scales, one per tensor."""
        return self.activation_format != "none" and not self.per_token

    def factor_dtype(self, site: LinearSite) -> str:
        """Return what a layer's LoRC factors are stored in: ``fp8`` or its own type, such as ``float16``."""
        return "fp8" if self.lorc_format == "fp8" else str(site.dtype.numpy())

    def low_rank(self, site: LinearSite) -> tuple[Float32, Float32] | None:
        """Read a layer's LoRC factors back as V [K, r] and U [r, N], or ``None`` without.

        FP8 factors are multiplied by their scales in float32; the graph rounds that to the layer's type.
        """
        tensors = self.tensors.get(site.name)
        if tensors is None or tensors.lorc_v is None or tensors.lorc_u is None:
            return None
        v, u = (factor.numpy().astype(np.float32) for factor in (tensors.lorc_v, tensors.lorc_u))
        if tensors.lorc_v_scale is not None and tensors.lorc_u_scale is not None:
            v *= tensors.lorc_v_scale.numpy()[None, :]
            u *= tensors.lorc_u_scale.numpy()[:, None]
        return v, u

    def replace(self, **changes: object) -> QuantPlan:
        """Return a copy with fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def quantized_weight(self, site: LinearSite, tensors: LinearTensors | None = None) -> QuantizedWeight:
        """Read a layer's stored tensors, by default those of the plan, back as the numpy reference.

        Raises:
            ValueError: When the tensors break the format's rules (DESIGN section 2).
        """
        tensors = tensors or self.tensors[site.name]
        codes, scales = tensors.codes.numpy(), tensors.group_scales
        weight_format = self.precision(site).weight_format
        return QuantizedWeight(
            codes=codes if weight_format == "fp8" else codes.astype(np.int8),
            group_scales=None if scales is None else scales.numpy().astype(np.float32),
            row_scales=tensors.row_scales.numpy(),
            k=site.k,
            weight_format=weight_format,
            group_size=self.group_size,
            scale_constraint=self.scale_constraint,
            scale_rows=self.scale_rows,
        )
