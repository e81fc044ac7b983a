"""Reports with all that a page can hold: 210 layers, mixed precision, hostile names."""

from __future__ import annotations

import numpy as np

from zqfp_compile.recipe import Recipe
from zqfp_compile.report import histograms, model

KINDS: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EVIL = "</svg><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def layers(blocks: int = 30) -> tuple[model.LayerReport, ...]:
    made = [
        model.LayerReport(f"model.layers.{b}.{kind}", 576, 1536, True, None, 30.0 - i - b / 10, 4.27)
        for b in range(blocks)
        for i, kind in enumerate(KINDS)
    ]
    return (*made, model.LayerReport("lm_head", 576, 49152, False, "output projection"))


def full_report(**changes: object) -> model.Report:
    shapes = {"input_ids": ((1, 1), (1, 128), (1, 2048))}
    values: dict[str, object] = {
        "model": "model.onnx",
        "recipe": Recipe().to_dict(),
        "layers": layers(),
        "perplexity": model.Perplexity(20.0, 21.0, "built-in text", 20480),
        "logits": model.LogitsReport(21.5, 0.994, 0.06, 0.871),
        "bits_per_weight": 4.27,
        "bits_per_weight_with_lorc": 4.94,
        "size": model.SizeReport(538_000_000, 269_000_000, 123_740_000, 55_500_000, 9_900_000),
        "engine": model.EngineReport(
            "tensorrt-rtx",
            "TensorRT-RTX imports here",
            "tensorrt-rtx.engine",
            194_300_000,
            (
                model.EngineProfile("prefill", shapes, 210, 120),
                model.EngineProfile("decode", shapes, 210, 121),
            ),
            210,
            120,
            model.LintReport(True),
        ),
        "certificate": model.CertificateReport(210, 0),
        "calibration": model.CalibrationReport("built-in text", 4096),
        "distillation": model.DistillationReport(32768, 0.08125, 0.0575, 93.0),
        "embeddings": (model.EmbeddingReport("embed_<tokens>", 320, 72, 46080, 24320, ("lm_head",), 32.0),),
        "kv_cache": (model.CacheReport("past.0.key", "present.0.<key>", 0.0123),),
        "attention": (model.AttentionReport("layers.0.self_attn", 0.5, 0.25, 0.125),),
        "warnings": ("random tokens",),
        "seconds": {"load": 0.42, "engine": 245.0},
        "peak_rss_bytes": 3 * 2**30,
        "versions": {"onnx": "1.23.2"},
        **changes,
    }
    return model.Report(**values)  # type: ignore[arg-type]


def histogram(name: str = "model.layers.0.mlp.down_proj") -> histograms.Histogram:
    weight = np.random.default_rng(0).normal(size=(32, 128)).astype(np.float32)
    scales = np.abs(weight.reshape(32, 2, 64)).max(-1) / 7
    codes = np.rint(weight.reshape(32, 2, 64) / scales[..., None]).astype(np.int8)
    decoded = (codes * scales[..., None]).astype(np.float32).reshape(weight.shape)
    return histograms.layer_histogram(name, weight, decoded, scales, codes.reshape(32, 128))


def hostile_report() -> model.Report:
    """Every text that can come from a model or a file is :data:`EVIL`."""
    return full_report(
        model=EVIL,
        layers=(
            model.LayerReport(f"model.layers.0.{EVIL}", 8, 8, True, None, 20.0, 4.0),
            model.LayerReport(f"other.layers.0.{EVIL}", 8, 8, True, None, 21.0, 4.0),
            model.LayerReport(EVIL, 8, 8, False, EVIL),
        ),
        warnings=(EVIL,),
        recipe={EVIL: [EVIL], "min_shapes": {EVIL: [1]}},
        engine=model.EngineReport(
            EVIL,
            EVIL,
            EVIL,
            1,
            (model.EngineProfile(EVIL, {EVIL: ((1,), (1,), (1,))}),),
            0,
            0,
            model.LintReport(False, (EVIL,)),
        ),
        certificate=model.CertificateReport(1, 1, (EVIL,)),
        perplexity=model.Perplexity(1.0, 1.0, EVIL, 1),
        calibration=model.CalibrationReport(EVIL, 1),
        seconds={EVIL: 1.0},
        versions={EVIL: EVIL},
    )


def mixed_report() -> model.Report:
    """What ``--auto`` leaves: FP4, FP8 and float layers, ranks from 0 to 64, no evaluation, no engine."""
    formats = (("e2m1", 4.27, 0), ("e2m1", 4.27, 32), ("fp8", 8.06, 0), ("e2m1", 4.27, 64), ("none", 16.0, 0))
    made = []
    for i, layer in enumerate(layers()[:-1]):
        weight_format, bits, rank = formats[(i + i // 7) % len(formats)]
        rewritten = weight_format != "none"
        reason = None if rewritten else "kept in float by mixed precision"
        assert layer.k is not None and layer.n is not None
        with_lorc = bits + rank * 16 * (layer.k + layer.n) / (layer.k * layer.n)
        sqnr = layer.sqnr_db if rewritten else None
        shape = (layer.name, layer.k, layer.n)
        made.append(model.LayerReport(*shape, rewritten, reason, sqnr, bits, weight_format, rank, with_lorc))
    nothing = {"engine": None, "perplexity": None, "logits": None, "distillation": None}
    return full_report(layers=tuple(made), recipe=Recipe(auto="bits=4.6").to_dict(), **nothing)
