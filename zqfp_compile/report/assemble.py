"""From what a run left behind to the report's values."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from zqfp_compile import __version__
from zqfp_compile.calibrate.samples import Samples
from zqfp_compile.certificate import Certificate
from zqfp_compile.disk import file_sha256
from zqfp_compile.distill.train import Distillation
from zqfp_compile.evaluate import Evaluation
from zqfp_compile.plan import LinearSite, QuantPlan
from zqfp_compile.recipe import Recipe
from zqfp_compile.report.histograms import Histogram, layer_histogram
from zqfp_compile.report.model import (
    AttentionReport,
    CacheReport,
    CalibrationReport,
    CertificateReport,
    DistillationReport,
    EmbeddingReport,
    EngineReport,
    LayerReport,
    LogitsReport,
    Perplexity,
    Report,
    ResourcesReport,
    SizeReport,
)
from zqfp_compile.weights import read_weight, release

WORST_LAYERS = 5
# A histogram of this many weights looks like that of all; counting 45 million took 4 s and 1.5 GiB.
HISTOGRAM_WEIGHTS = 1 << 22
_PACKAGES = (
    "numpy",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class Facts:
    """What a run left behind for the report.

    Attributes:
        name: What the model is called: its path, where it was given as a file.
        source: The model's file.
        recipe: Effective options.
        plan: What was quantised, with its tensors.
        model: The original model, prepared; its weights are still readable.
        artifact: The artifact's file.
        samples: Calibration inputs, or ``None``.
        certificate: Per-layer checks, or ``None``.
        evaluation: Whole-model accuracy, or ``None``.
        eval_description: What text the evaluation scored.
        engine: The engine, or ``None``.
        warnings: What a reader must know.
        seconds: Wall time per step.
        resources: What the run was estimated to need, and took.
        distillation: What it did, or ``None``.
    """

    name: str
    source: Path
    recipe: Recipe
    plan: QuantPlan
    model: ir.Model
    artifact: Path
    samples: Samples | None
    certificate: Certificate | None
    evaluation: Evaluation | None
    eval_description: str
    engine: EngineReport | None
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    resources: ResourcesReport | None = None
    distillation: Distillation | None = None


def assemble(facts: Facts) -> Report:
    """Return the report of a run."""
    bits, bits_with_lorc = _bits_per_weight(facts)
    return Report(
        model=facts.name,
        source_sha256=file_sha256(facts.source),
        recipe=facts.recipe.to_dict(),
        layers=_layers(facts),
        perplexity=_perplexity(facts),
        logits=_logits(facts.evaluation),
        bits_per_weight=bits,
        bits_per_weight_with_lorc=bits_with_lorc,
        size=_sizes(facts),
        engine=facts.engine,
        certificate=_certificate(facts.certificate),
        calibration=None
        if facts.samples is None
        else CalibrationReport(facts.samples.description, facts.samples.tokens),
        distillation=_distillation(facts.distillation),
        embeddings=_embeddings(facts),
        kv_cache=_kv_cache(facts.plan),
        attention=_attention(facts.plan),
        warnings=facts.warnings,
        seconds=facts.seconds,
        peak_rss_bytes=_peak_rss(),
        resources=facts.resources,
        versions=tool_versions(),
    )


def _distillation(found: Distillation | None) -> DistillationReport | None:
    if found is None:
        return None
    return DistillationReport(found.tokens, found.kl_before, found.kl_after, found.seconds)


def _embeddings(facts: Facts) -> tuple[EmbeddingReport, ...]:
    checks = {} if facts.certificate is None else {item.name: item for item in facts.certificate.layers}
    found = []
    for site in facts.plan.stored_embeddings:
        tensors = facts.plan.embedding_tensors[site.name]
        original = facts.model.graph.initializers[site.source.initializer].const_value
        found.append(
            EmbeddingReport(
                name=site.name,
                rows=site.rows,
                width=site.width,
                original_bytes=0 if original is None else original.nbytes,
                bytes=tensors.codes.nbytes + tensors.row_scales.nbytes,
                shared_with=site.linears,
                sqnr_db=checks[site.name].sqnr_db if site.name in checks else None,
            )
        )
    return tuple(found)


def _kv_cache(plan: QuantPlan) -> tuple[CacheReport, ...]:
    scales = plan.attention_scales
    return tuple(CacheReport(cache.past, cache.present, scales[cache.new]) for cache in plan.caches)


def _attention(plan: QuantPlan) -> tuple[AttentionReport, ...]:
    scales = plan.attention_scales
    return tuple(
        AttentionReport(site.name, scales[site.q], scales[site.k], scales[site.v]) for site in plan.attentions
    )


def worst_histograms(report: Report, facts: Facts) -> list[Histogram]:
    """Return the histograms of the layers with the lowest output SQNR."""
    sites = {site.name: site for site in facts.plan.linears}
    histograms = []
    for layer in report.worst_layers(WORST_LAYERS):
        if layer.name in facts.plan.tensors:
            histograms.append(_histogram(sites[layer.name], facts))
    return histograms


def _histogram(site: LinearSite, facts: Facts) -> Histogram:
    """Count over all rows of a layer, or over evenly spread ones when it is large."""
    whole = facts.plan.quantized_weight(site)
    rows = slice(None, None, -(-whole.n * whole.k // HISTOGRAM_WEIGHTS))
    quantized = dataclasses.replace(
        whole,
        codes=whole.codes[rows],
        group_scales=None if whole.group_scales is None else whole.group_scales[rows],
        row_scales=whole.row_scales[rows],
        scale_rows=1,  # the rows left are no whole compute groups
    )
    tensors = facts.plan.tensors[site.name]
    histogram = layer_histogram(
        site.name,
        read_weight(facts.model, site.weight)[rows],
        quantized.dequantize(),
        quantized.group_scales,
        quantized.codes if quantized.weight_format != "fp8" else None,
    )
    del whole, quantized
    release(tensors.codes, tensors.group_scales, tensors.row_scales)
    return histogram


def _layers(facts: Facts) -> tuple[LayerReport, ...]:
    checks = {} if facts.certificate is None else {layer.name: layer for layer in facts.certificate.layers}
    rewritten = {site.name for site in facts.plan.rewritten}
    planned = []
    for site in facts.plan.linears:
        tensors = facts.plan.tensors.get(site.name)
        bits, bits_with_lorc = _bits(facts, site)
        planned.append(
            LayerReport(
                name=site.name,
                k=site.k,
                n=site.n,
                rewritten=site.name in rewritten,
                reason=None if site.name in rewritten else "kept in float by mixed precision",
                sqnr_db=checks[site.name].sqnr_db if site.name in checks else None,
                bits=bits / (site.n * site.k),
                weight_format=facts.plan.precision(site).weight_format,
                lorc_rank=0 if tensors is None or tensors.lorc_u is None else tensors.lorc_u.shape.numpy()[0],
                bits_with_lorc=bits_with_lorc / (site.n * site.k),
            )
        )
    skipped = [LayerReport(item.name, item.k, item.n, False, item.reason) for item in facts.plan.skipped]
    return (*planned, *skipped)


def _bits_per_weight(facts: Facts) -> tuple[float | None, float | None]:
    """Return stored bits per decoder weight without and with LoRC factors; shared weights count once."""
    plan = facts.plan
    if not plan.tensors:
        return None, None
    sites = [site for site in plan.linears if not site.is_lm_head] or plan.linears
    unique = _stored_once(plan, sites)
    weights = sum(site.n * site.k for site in unique)
    bits = [_bits(facts, site) for site in unique]
    return sum(pair[0] for pair in bits) / weights, sum(pair[1] for pair in bits) / weights


def _stored_once(plan: QuantPlan, sites: Sequence[LinearSite]) -> list[LinearSite]:
    """Return one site for each weight that is stored: layers can share one."""
    return list({(site.weight, id(plan.tensors.get(site.name))): site for site in sites}.values())


def _bits(facts: Facts, site: LinearSite) -> tuple[int, int]:
    """Return the stored bits of a layer's weight without and with LoRC factors."""
    tensors = facts.plan.tensors.get(site.name)
    if tensors is None:
        stored = facts.model.graph.initializers[site.weight.initializer].const_value
        bits = (stored.dtype if stored is not None else site.dtype).bitwidth * site.n * site.k
        return bits, bits
    weight = (tensors.codes, tensors.group_scales, tensors.row_scales)
    factors = (tensors.lorc_v, tensors.lorc_u, tensors.lorc_v_scale, tensors.lorc_u_scale)
    bits, lorc = (sum(8 * item.nbytes for item in items if item is not None) for items in (weight, factors))
    return bits, bits + lorc


def _perplexity(facts: Facts) -> Perplexity | None:
    evaluation = facts.evaluation
    if evaluation is None:
        return None
    return Perplexity(
        evaluation.perplexity_original,
        evaluation.perplexity_compiled,
        facts.eval_description,
        evaluation.tokens_scored,
    )


def _logits(evaluation: Evaluation | None) -> LogitsReport | None:
    if evaluation is None:
        return None
    return LogitsReport(
        evaluation.logits_sqnr_db, evaluation.cosine, evaluation.kl, evaluation.top1_agreement
    )


def _certificate(certificate: Certificate | None) -> CertificateReport | None:
    if certificate is None:
        return None
    problems = tuple(
        f"{layer.name}: weight bit-equal {layer.weight_bit_equal}, error {layer.max_rel_error:.1e} "
        f"(tolerance {layer.tolerance:.0e})"
        for layer in certificate.layers
        if not layer.ok
    )
    return CertificateReport(certificate.layers_checked, certificate.mismatches, problems)


def _sizes(facts: Facts) -> SizeReport:
    tensors = [value.const_value for value in facts.model.graph.initializers.values()]
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    in_fp16 = sum(
        2 * tensor.size if tensor.dtype in floats else tensor.nbytes
        for tensor in tensors
        if tensor is not None
    )
    plan = facts.plan
    quantized = [site for site in plan.rewritten if site.name in plan.tensors]
    bits = [_bits(facts, site) for site in _stored_once(plan, quantized)]
    return SizeReport(
        _bytes_on_disk(facts.source),
        in_fp16,
        _bytes_on_disk(facts.artifact),
        linear_bytes=sum(pair[0] for pair in bits) // 8 if bits else None,
        lorc_bytes=sum(pair[1] - pair[0] for pair in bits) // 8 if bits else None,
    )


def _bytes_on_disk(model: Path) -> int:
    """Return the size of an ONNX file and the external data it names."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    proto = onnx.load(model, load_external_data=False)
    names = {
        entry.value
        for tensor in proto.graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [model, *(model.parent / name for name in names)]
    return sum(file.stat().st_size for file in files)


def _peak_rss() -> int:
    """Return the largest resident size of this process in bytes; ``resources`` has its children's as well."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tool_versions() -> dict[str, str]:
    """Return the version of Python and of every package that shapes the result, by name."""
    versions = {"zqfp-compile": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
