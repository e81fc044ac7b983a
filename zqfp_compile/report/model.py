"""The report as frozen values. A value nobody measured is ``None`` (null in JSON), never a made-up number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading a report back must not load onnx_ir
    from zqfp_compile.estimate import Estimate

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of both models on the same tokens, in ONNX Runtime.

    Attributes:
        original: Perplexity of the model that was given.
        compiled: Perplexity of the artifact.
        text: What the text was, for a reader ("built-in text", a file name).
        tokens: Tokens scored.
    """

    original: float | None
    compiled: float | None
    text: str
    tokens: int

    @property
    def increase_percent(self) -> float | None:
        """By how many percent the compiled model's perplexity is above the original's."""
        if self.original is None or self.compiled is None or not self.original > 0:
            return None
        return 100.0 * (self.compiled / self.original - 1.0)


@dataclass(frozen=True)
class LogitsReport:
    """Logits of the compiled model against the original's on the same tokens.

    Attributes:
        sqnr_db: Signal to quantisation-noise ratio, dB.
        cosine: Cosine similarity, -1..1.
        kl: Mean KL divergence per token, nats.
        top1_agreement: Fraction (0..1) of tokens whose most likely next token is the same.
    """

    sqnr_db: float | None = None
    cosine: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class SizeReport:
    """Bytes of weights and graph, external data included.

    Attributes:
        original_bytes: The model that was given, as it was given.
        original_fp16_bytes: The same weights if every float tensor were stored in 16 bits.
        compiled_bytes: ``model.zqfp.onnx`` and its data.
        linear_bytes: Of those, the codes and scales of the rewritten layers.
        lorc_bytes: And their LoRC factors.
    """

    original_bytes: int | None = None
    original_fp16_bytes: int | None = None
    compiled_bytes: int | None = None
    linear_bytes: int | None = None
    lorc_bytes: int | None = None

    @property
    def ratio(self) -> float | None:
        """Compiled bytes over the original's bytes in 16 bits."""
        if not self.original_fp16_bytes or self.compiled_bytes is None:
            return None
        return self.compiled_bytes / self.original_fp16_bytes


@dataclass(frozen=True)
class ResourcesReport:
    """What a compile was estimated to need, and what it took until the report was written.

    Attributes:
        estimated: ``None`` when it stopped before that.
        seconds: Wall time of all steps.
        anonymous_bytes: Most memory at any time that was no file's, workers included.
        resident_bytes: The same with mapped files, which the kernel drops when somebody needs the room.
        anonymous_bytes_by_step: By step, those under a tenth of a second left out.
        disk_bytes: Files made: finished work, intermediate files, output.
    """

    estimated: Estimate | None
    seconds: float
    anonymous_bytes: int | None = None
    resident_bytes: int | None = None
    anonymous_bytes_by_step: Mapping[str, int] = field(default_factory=dict)
    disk_bytes: int | None = None


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, rewritten or not.

    Attributes:
        name: Layer name, as in the plan.
        k: Input features.
        n: Output features.
        rewritten: Whether the artifact holds it quantised.
        reason: Why it was left alone; ``None`` when rewritten.
        sqnr_db: SQNR of the layer's output on identical input, dB.
        bits: Stored bits per weight: codes, group and row scales, without LoRC factors; the float type's of
            a layer that mixed precision leaves as it is.
        weight_format: ``e2m1``, ``e3m0``, ``int4``, ``fp8``, or ``none`` when the weight is not quantised.
        lorc_rank: Rank of the error compensation, 0 without.
        bits_with_lorc: ``bits`` and the LoRC factors with their scales.
    """

    name: str
    k: int | None
    n: int | None
    rewritten: bool
    reason: str | None = None
    sqnr_db: float | None = None
    bits: float | None = None
    weight_format: str = "none"
    lorc_rank: int = 0
    bits_with_lorc: float | None = None


@dataclass(frozen=True)
class EngineProfile:
    """One optimisation profile.

    Attributes:
        name: ``prefill`` or ``decode``, for a reader.
        shapes: Input name to its (min, opt, max) dimensions.
        fp8_linears: Planned linears this profile runs as FP8 GEMMs.
        fp8_gemms: FP8 GEMM layers in this profile (merged linears share one).
    """

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(
        default_factory=dict
    )
    fp8_linears: int | None = None
    fp8_gemms: int | None = None


@dataclass(frozen=True)
class LintReport:
    """Verdict of the plan lint.

    Attributes:
        ok: Whether every check held.
        problems: One sentence per finding.
    """

    ok: bool
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineReport:
    """The engine, or why there is none.

    Attributes:
        target: ``tensorrt``, ``tensorrt-rtx``, ``onnxruntime`` or ``none``.
        reason: Why this target was taken.
        path: File name inside the output folder.
        bytes: Its size.
        profiles: Optimisation profiles.
        fp8_linears: Planned linears covered by FP8 GEMMs in every profile.
        fp8_gemms: FP8 GEMM layers, of the profile that has the fewest.
        lint: Plan lint; ``None`` when there was no plan to check.
        repository: Folder of the model repository for Triton Inference Server, when one was asked for.
    """

    target: str
    reason: str
    path: str | None = None
    bytes: int | None = None
    profiles: tuple[EngineProfile, ...] = ()
    fp8_linears: int | None = None
    fp8_gemms: int | None = None
    lint: LintReport | None = None
    repository: str | None = None


@dataclass(frozen=True)
class CertificateReport:
    """Rewritten linears compared with the numpy reference on identical input.

    Attributes:
        layers_checked: Layers compared; zero is a failure.
        mismatches: Layers that differ.
        problems: One sentence per mismatch.
    """

    layers_checked: int
    mismatches: int
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Something was compared and nothing differed."""
        return self.layers_checked > 0 and self.mismatches == 0


@dataclass(frozen=True)
class EmbeddingReport:
    """One token embedding stored as FLOAT8E4M3FN with one FLOAT scale per row.

    Attributes:
        name: Layer name.
        rows: Tokens V.
        width: Numbers per token D.
        original_bytes: The table as it was given.
        bytes: Codes and row scales.
        shared_with: Linear layers that read the same tensors (a tied lm_head).
        sqnr_db: The original rows against the stored ones, dB; ``None`` without certificate.
    """

    name: str
    rows: int
    width: int
    original_bytes: int
    bytes: int
    shared_with: tuple[str, ...] = ()
    sqnr_db: float | None = None


@dataclass(frozen=True)
class CacheReport:
    """One FP8 tensor of the KV cache: a number is its code times ``scale``.

    Inside the graph the scale is a constant: a caller feeds ``past`` with what came out of ``present`` and
    needs it only to read the numbers, or to fill a cache from elsewhere.

    Attributes:
        past: Input, FLOAT8E4M3FN.
        present: Output, FLOAT8E4M3FN.
        scale: Static, calibrated.
    """

    past: str
    present: str
    scale: float


@dataclass(frozen=True)
class AttentionReport:
    """One attention whose two products run on FP8 operands; probabilities always have the scale 1/448.

    Attributes:
        name: Layer name.
        q_scale: Static scale of the queries.
        k_scale: Of the keys.
        v_scale: Of the values.
    """

    name: str
    q_scale: float
    k_scale: float
    v_scale: float


@dataclass(frozen=True)
class CalibrationReport:
    """What the activations were calibrated on."""

    description: str
    tokens: int


@dataclass(frozen=True)
class DistillationReport:
    """End-to-end training of row scales and LoRC factors.

    Attributes:
        tokens: Tokens trained on.
        kl_before: Mean KL(original || quantised) per token of held-out calibration text, nats.
        kl_after: The same with the tensors that the artifact holds.
        seconds: Wall time.
    """

    tokens: int
    kl_before: float
    kl_after: float
    seconds: float


def _now() -> str:
    return datetime.now(timezone.utc).replace(microsecond=0).isoformat()


@dataclass(frozen=True)
class Report:
    """Everything ``report.json`` and ``report.html`` say about one compile.

    Attributes:
        model: Path of the model that was given.
        recipe: The effective recipe, ``Recipe.to_dict()``.
        source_sha256: SHA-256 of the ``.onnx`` file that was given (external data not included).
        layers: Every linear layer in graph order.
        perplexity: ``None`` without evaluation.
        logits: ``None`` without evaluation.
        bits_per_weight: Codes, group and row scales over the planned linears but lm_head; those that mixed
            precision leaves in float count with the bits of their type.
        bits_per_weight_with_lorc: The same with the LoRC factors and their scales.
        size: Bytes before and after.
        engine: ``None`` when the run did not get to engines.
        certificate: ``None`` when it was not run.
        calibration: ``None`` when nothing had to be calibrated.
        distillation: ``None`` when nothing was distilled.
        embeddings: Token embeddings in FP8; empty when they have the model's own type.
        kv_cache: Tensors of the KV cache that are FP8; empty when the cache has the model's own type.
        attention: Attentions on FP8 operands; empty when none is.
        warnings: What a reader must know before trusting the numbers.
        seconds: Wall time per step, in run order.
        peak_rss_bytes: Peak resident memory of the process since it began; ``resources`` counts what the
            compile used, with its workers and the builder.
        resources: Estimated and measured memory, disk and time.
        versions: Package name to version.
        created: UTC time, ISO 8601.
    """

    model: str
    recipe: Mapping[str, Any]
    source_sha256: str | None = None
    layers: tuple[LayerReport, ...] = ()
    perplexity: Perplexity | None = None
    logits: LogitsReport | None = None
    bits_per_weight: float | None = None
    bits_per_weight_with_lorc: float | None = None
    size: SizeReport = field(default_factory=SizeReport)
    engine: EngineReport | None = None
    certificate: CertificateReport | None = None
    calibration: CalibrationReport | None = None
    distillation: DistillationReport | None = None
    embeddings: tuple[EmbeddingReport, ...] = ()
    kv_cache: tuple[CacheReport, ...] = ()
    attention: tuple[AttentionReport, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    resources: ResourcesReport | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = field(default_factory=_now)

    @property
    def rewritten(self) -> tuple[LayerReport, ...]:
        """The layers that were rewritten."""
        return tuple(layer for layer in self.layers if layer.rewritten)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers that were left alone."""
        return tuple(layer for layer in self.layers if not layer.rewritten)

    def worst_layers(self, count: int) -> tuple[LayerReport, ...]:
        """Return up to ``count`` rewritten layers with the lowest measured SQNR, worst first."""
        scored = [(_finite(layer.sqnr_db), layer) for layer in self.rewritten]
        ranked = sorted((pair for pair in scored if pair[0] is not None), key=lambda pair: pair[0] or 0.0)
        return tuple(layer for _, layer in ranked[:count])

    def summary_lines(self) -> list[str]:
        """Return the few lines a person wants after a compile."""
        lines = [f"rewritten: {len(self.rewritten)} of {len(self.layers)} linear layers"]
        if self.bits_per_weight is not None:
            lines[0] += f", {self.bits_per_weight:.2f} bits per weight"
            if self.bits_per_weight_with_lorc is not None:
                lines[0] += f" ({self.bits_per_weight_with_lorc:.2f} with LoRC)"
        if self.size.ratio is not None and self.size.compiled_bytes is not None:
            megabytes, percent = self.size.compiled_bytes / 1e6, 100 * self.size.ratio
            lines.append(f"size: {megabytes:.1f} MB, {percent:.1f}% of the fp16 weights")
        lines += self._accuracy_lines()
        if self.certificate is not None:
            lines.append(
                f"certificate: {self.certificate.layers_checked} layers checked, "
                f"{self.certificate.mismatches} mismatches"
            )
        for item in self.embeddings:
            shared = f", shared with {', '.join(item.shared_with)}" if item.shared_with else ""
            lines.append(
                f"embedding: {item.name} in FP8, {item.original_bytes / 1e6:.1f} -> "
                f"{item.bytes / 1e6:.1f} MB{shared}"
            )
        if self.kv_cache:
            lines.append(f"KV cache: {len(self.kv_cache)} tensors go in and out as FLOAT8E4M3FN")
        if self.attention:
            lines.append(f"attention: {len(self.attention)} layers multiply FP8 operands")
        return [*lines, *self._engine_lines()]

    def _accuracy_lines(self) -> list[str]:
        lines = []
        if self.perplexity is not None and self.perplexity.increase_percent is not None:
            lines.append(
                f"perplexity: {self.perplexity.original:.3f} -> {self.perplexity.compiled:.3f} "
                f"({self.perplexity.increase_percent:+.2f}%) on {self.perplexity.tokens} tokens of "
                f"{self.perplexity.text}"
            )
        if self.logits is not None and self.logits.top1_agreement is not None:
            percent = 100 * self.logits.top1_agreement
            lines.append(f"top-1: {percent:.1f}% of the likeliest next tokens are the original's")
        if self.distillation is not None:
            lines.append(
                f"distillation: KL {self.distillation.kl_before:.4f} -> {self.distillation.kl_after:.4f} "
                f"on held-out text, {self.distillation.tokens} tokens in {self.distillation.seconds:.0f} s"
            )
        return lines

    def _engine_lines(self) -> list[str]:
        if self.engine is None or self.engine.path is None or self.engine.bytes is None:
            return []
        return [f"engine: {self.engine.path}, {self.engine.bytes / 1e6:.1f} MB"] + [
            f"  {profile.name}: {profile.fp8_linears} of {len(self.rewritten)} linears run in "
            f"{profile.fp8_gemms} FP8 GEMMs"
            for profile in self.engine.profiles
            if profile.fp8_linears is not None
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types only; NaN and infinities become ``None``. Keys keep declaration order."""
        plain: dict[str, Any] = _plain({"schema_version": SCHEMA_VERSION, **_fields(self)})
        return plain


# Values derived from fields that belong in the JSON too.
_DERIVED = {Perplexity: "increase_percent", SizeReport: "ratio", CertificateReport: "ok"}


def _fields(value: Any) -> dict[str, Any]:
    result = {spec.name: getattr(value, spec.name) for spec in dataclasses.fields(value)}
    derived = _DERIVED.get(type(value))
    if derived:
        result[derived] = getattr(value, derived)
    return result


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Turn dataclasses, mappings, sequences and numpy scalars into JSON types."""
    if dataclasses.is_dataclass(value):
        return _plain(_fields(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (bool, int, float, str)):
        value = value.item()
    if isinstance(value, float):
        # float(): numpy.float64 is a float, but its repr is not JSON's.
        return _finite(float(value))
    return value
