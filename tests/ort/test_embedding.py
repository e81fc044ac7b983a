"""--quantize-embedding in ONNX Runtime: exact rows, one table for a tied lm_head, what stays and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from compiled_models import LINEARS, TOKENS, check_valid, quick, run_artifact
from onnx.reference import ReferenceEvaluator

from zqfp_compile import compile_model
from zqfp_compile.backends.ort import create_session
from zqfp_compile.certificate import certify
from zqfp_compile.errors import UsageError
from zqfp_compile.model_io import load_model
from zqfp_compile.plan import LinearTensors, QuantPlan, SitePrecision
from zqfp_compile.precision.auto import Chooser
from zqfp_compile.precision.goal import parse_goal
from zqfp_compile.precision.sensitivity import LayerErrors
from zqfp_compile.quantize_model import quantize_embeddings
from zqfp_compile.registry import create_pass
from zqfp_compile.tensor_store import TensorStore
from zqfp_compile.weights import read_weight

pytest.importorskip("onnxruntime")

E4M3 = onnx.TensorProto.FLOAT8E4M3FN


def _stored(path: Path) -> dict[str, int]:
    """Element types of the tensors of the embedding's size, by name."""
    graph = onnx.load(path, load_external_data=False).graph
    wanted = [item for item in graph.initializer if tuple(item.dims) in ((320, 72), (72, 320))]
    return {item.name: item.data_type for item in wanted}


def _selected(path: Path) -> tuple[ir.Model, QuantPlan]:
    """A prepared model, its plan with lm_head and embedding."""
    model = load_model(path)
    for name in ("strip-metadata", "raise-opset"):
        create_pass(name).call(model)
    plan = create_pass("select-linears", quantize_lm_head=True).call(model).plan
    plan = create_pass("select-embedding", plan=plan).call(model).plan
    assert plan is not None
    return model, plan


def _gathered(path: Path) -> np.ndarray:
    """What the artifact's embedding gives for every token, in ONNX Runtime."""
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0].endswith("/table"))
    model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    shortened = onnx.utils.Extractor(model).extract_model(["input_ids"], [node.output[0]])
    session = create_session(shortened.SerializeToString())
    (rows,) = session.run(None, {"input_ids": np.arange(320)[None]})
    (expected,) = ReferenceEvaluator(shortened).run(None, {"input_ids": np.arange(320)[None]})
    assert np.array_equal(rows, expected)
    return rows[0]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_compiles_with_an_exact_certificate(
    family: str, dtype: str, algorithm: str, tiny_model, tmp_path: Path
) -> None:
    tied = family == "qwen2"
    options: dict[str, Any] = {"quantize_lm_head": tied, "algorithm": algorithm, "evaluate": False}
    source = tiny_model(family, dtype=dtype)
    result = compile_model(source, quick(quantize_embedding=True, **options), output=tmp_path / "out")
    check_valid(result.artifact)
    report = result.report
    assert report.warnings == ()
    assert report.certificate is not None and report.certificate.mismatches == 0
    assert report.certificate.layers_checked == LINEARS[family] + tied + 1
    (table,) = report.embeddings
    assert table.shared_with == (("lm_head",) if tied else ())
    assert table.bytes == 320 * 72 + 320 * 4
    assert table.original_bytes == 320 * 72 * (4 if dtype == "float32" else 2)
    # Four significant bits, rounded to nearest: the worst case of uniform errors is 2^-4 / sqrt(3), 29 dB.
    assert table.sqnr_db is not None and table.sqnr_db > 29
    fp8 = [name for name, kind in _stored(result.artifact).items() if kind == E4M3]
    assert len(fp8) == 1
    model, plan = _selected(source)
    exact = read_weight(model, plan.embeddings[0].source)
    # Half a step of three mantissa bits is 1/16 of a power of two, so at most 1/28 of a row's largest value.
    error = np.abs(_gathered(result.artifact).astype(np.float32) - exact).max(axis=1)
    assert (error <= np.abs(exact).max(axis=1) / 27).all()
    outputs, decoded = run_artifact(result.artifact)
    assert outputs["logits"].shape == (*TOKENS.shape, 320) and np.isfinite(decoded).all()
    if tied:
        assert not [name for name, kind in _stored(result.artifact).items() if kind != E4M3]
        lm_head = next(layer for layer in report.layers if layer.name == "lm_head")
        assert (lm_head.weight_format, lm_head.lorc_rank) == ("fp8", 0)


def test_a_tied_table_stays_when_the_lm_head_does(tiny_model, tmp_path: Path) -> None:
    recipe = quick(quantize_embedding=True, evaluate=False)
    result = compile_model(tiny_model("qwen2"), recipe, output=tmp_path / "out")
    (warning,) = result.report.warnings
    assert warning.startswith(
        "embedding model.embed_tokens stays as it is: its table is also read by 'lm_head'"
    )
    assert result.report.embeddings == ()
    assert set(_stored(result.artifact).values()) == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("opt", "float32", {"weights": "fp8"}),
        ("gpt2", "bfloat16", {"scale_constraint": "none", "target": "onnxruntime"}),
        ("llama", "float16", {"weights": "none", "quantize_lm_head": False}),
        ("qwen2", "float16", {"lorc_budget": 1.0, "emit": ("fp4",)}),
    ],
)
def test_with_other_options(family: str, dtype: str, options: dict[str, Any], tiny_model, tmp_path) -> None:
    values = {"quantize_lm_head": True, "evaluate": False, **options}
    recipe = quick(quantize_embedding=True, **values)
    report = compile_model(tiny_model(family, dtype=dtype), recipe, output=tmp_path / "out").report
    assert len(report.embeddings) == 1
    assert report.certificate is not None and report.certificate.mismatches == 0


def test_the_model_hardly_changes(tiny_model, tmp_path: Path) -> None:
    """One FP8 linear apart, all but the embedding is float; evaluated in the form for ONNX Runtime."""
    options = {"weights": "fp8", "activations": "none", "lorc_rank": 0, "include": ["layers.1.mlp.down_proj"]}
    recipe = quick(quantize_embedding=True, **options)
    report = compile_model(tiny_model("llama"), recipe, output=tmp_path / "out").report
    # The rows have 32 dB; two layers of a random model double the noise at most.
    assert report.logits is not None and report.logits.sqnr_db > 24


def test_the_certificate_sees_a_wrong_scale(tiny_model, tmp_path: Path) -> None:
    model, plan = _selected(tiny_model("llama", dtype="float16"))
    with TensorStore(tmp_path) as store:
        plan = quantize_embeddings(model, plan.replace(linears=()), store)
        ((name, right),) = plan.embedding_tensors.items()
        rows = right.row_scales.numpy().copy()
        rows[200] *= np.float32(1.125)
        wrong = LinearTensors(right.codes, None, store.put("rows", rows, right.row_scales.dtype))
        for tensors, ok in ((right, True), (wrong, False)):
            artifact = model.clone()
            changed = plan.replace(embedding_tensors={name: tensors})
            create_pass("quantize-embedding", plan=changed).call(artifact)
            certificate = certify(
                artifact,
                plan,
                {},
                lambda site: read_weight(model, site.weight),
                original_bias=lambda site: None,
                original_table=lambda site: read_weight(model, site.source),
            )
            (check,) = certificate.layers
            assert check.ok == ok and (check.n, check.k) == (320, 72)


def test_auto_takes_a_tied_pair_as_fp8_or_leaves_it(tiny_model) -> None:
    _, plan = _selected(tiny_model("qwen2", dtype="float16"))
    loud = {0: 1e-2, 8: 1e-3}
    layers = [
        LayerErrors((site.name,), loud, 1e-4, 0.0, divergence=1e-3 if site.is_lm_head else 1e-6)
        for site in plan.linears
    ]
    (head,) = (site for site in plan.linears if site.is_lm_head)
    seen = set()
    for bits in (8.0, 10.0, 12.0, 16.0):
        choice = Chooser(plan, layers, parse_goal(f"bits={bits}")).choose()
        seen.add(choice.precisions[head.name])
        assert choice.bits <= bits
        chosen = plan.replace(precisions=choice.precisions)
        kept = choice.precisions[head.name].weight_format == "none"
        assert (chosen.stored_embeddings == ()) == kept
    assert seen == {SitePrecision("fp8", 0), SitePrecision("none", 0)}
    with pytest.raises(UsageError, match=r"bits=4\.5 is below"):
        Chooser(plan, layers, parse_goal("bits=4.5")).choose()
    ranks_only = Chooser(plan, layers, None, 0.5).choose()
    assert ranks_only.precisions[head.name] == SitePrecision("fp8", 0)
