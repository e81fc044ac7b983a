"""What must hold for every generated graph; ``docs/generated_graphs.md`` lists it."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from graph_reference import can_refer, reference_model, stored_weight, weights_model
from graph_variants import more_nodes, other_constants, other_names, other_order, renamed
from pass_contract import checked_passes
from random_blocks import BLOCK_LIMIT, random_graph
from random_graphs import SIZES, RandomGraph

from passes._sites import is_w4a8
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from zqfp_compile import CompileResult, Recipe, compile_model
from zqfp_compile.backends.ort import create_session, run_session
from zqfp_compile.calibrate.widen import uses_bfloat16, widen_bfloat16
from zqfp_compile.errors import ZqfpError
from zqfp_compile.plan import QuantPlan

Feed: TypeAlias = dict[str, np.ndarray]
Outputs: TypeAlias = list[np.ndarray]

# Rounding a weight to 4 bits costs at most this part of its norm, under the coarsest scales.
WEIGHT_ERROR = 0.4
SMALLEST_WEIGHT = 1e-6


@dataclass
class Compiled:
    """One compile: its folder and the plan that its passes had."""

    result: CompileResult
    plan: QuantPlan

    def session(self, name: str) -> Any:
        return open_session(self.result.folder / name)


def random_recipe(seed: int, graph: RandomGraph) -> dict[str, Any]:
    """Options that fit ``graph``."""
    choose = random.Random(f"recipe {seed}")
    weights = choose.choices(("fp4", "int4", "fp8", "none"), (6, 2, 2, 1))[0]
    constraint = choose.choice(("e4m3", "e4m3", "m1", "m2", "none"))
    activations = choose.choices(("none", "fp8", "int8", "fp8-e5m2"), (4, 4, 1, 1))[0]
    options: dict[str, Any] = {
        "target": "none",
        "evaluate": False,
        "weights": weights,
        "algorithm": choose.choices(("rtn", "gptq"), (9, 1))[0],
        "fp4_format": choose.choice(("e2m1", "e2m1", "e3m0")),
        "activations": "fp8" if weights == "none" and activations == "none" else activations,
        "activation_scale": choose.choice(("tensor", "token")),
        "group_size": choose.choice((16, 32, 64, 0)),
        "scale_constraint": constraint,
        "scale_rows": choose.choice((1, 4)) if constraint == "m2" else 1,
        "lorc_rank": choose.choice((0, 0, 2, 5)),
        "lorc_format": choose.choice(("fp16", "fp8")),
        "quantize_lm_head": choose.random() < 0.5,
        "weight_lowering": choose.choice(("fp8", "int4")),
        "emit": ["engine-onnx", "onnxruntime"],
    }
    for feature, option in (
        ("embedding", {"quantize_embedding": True}),
        ("cache", {"kv_cache_dtype": "fp8"}),
        ("attention", {"attention": "fp8"}),
    ):
        # Attention of unknown type is refused, which is no matter of chance.
        known = feature != "attention" or len(graph.proto.graph.value_info) > 0
        if feature in graph.features and known and choose.random() < 0.4:
            options |= option
    if (options["weights"], options["fp4_format"]) == ("fp4", "e2m1") and choose.random() < 0.3:
        options["emit"].append("fp4")
    return options


def check_graph(seed: int, folder: Path, *, blocks: int = BLOCK_LIMIT) -> str:
    """Generate, compile and check one graph; return what became of it, for statistics.

    Raises:
        AssertionError: When a property does not hold. Whatever else is raised is a bug as well.
    """
    graph = random_graph(seed, blocks)
    options = random_recipe(seed, graph)
    variant = random.Random(f"variant {seed}")
    path = write(graph, graph.proto, folder / "model", external=variant.random() < 0.3)
    compiled = compile_checked(path, options)
    if isinstance(compiled, ZqfpError):
        check_error(graph, compiled, options)
        return f"refused: {type(compiled).__name__}"
    check_choice(graph, compiled, options)
    feeds = [graph.feed(seed + 1, **SIZES)]
    if any(isinstance(dim, str) for value in graph.inputs for dim in value.shape):
        feeds.append(graph.feed(seed + 2, batch=1, sequence=5, past=3))
    outputs = check_forms(compiled, feeds, options)
    check_weights(graph, compiled, feeds[0])
    what = check_reference(graph, compiled, feeds, outputs)
    if variant.random() < 0.4:
        check_variant(graph, compiled, options, folder, variant, feeds, outputs)
    return what


def check_engine(seed: int, folder: Path, *, blocks: int = BLOCK_LIMIT) -> str:
    """Build an engine of the graph: whatever the builder does with it, a user sees one line at most.

    Raises:
        AssertionError: When an error is not diagnosed.
    """
    graph = random_graph(seed, blocks)
    options = random_recipe(seed, graph)
    options |= {"target": "tensorrt-rtx", "emit": [], "compute_capability": "89"}
    if options["scale_constraint"] == "none":
        options["scale_constraint"] = "e4m3"
    if options["activations"] not in ("fp8", "none"):
        options["activations"] = "fp8"
    compiled = compile_checked(write(graph, graph.proto, folder / "model", external=False), options)
    if isinstance(compiled, Compiled):
        return "engine built"
    text = str(compiled)
    assert "\n" not in text and "internal error" not in text, text
    return f"engine refused: {type(compiled).__name__}"


def write(graph: RandomGraph, proto: onnx.ModelProto, folder: Path, *, external: bool) -> Path:
    """Write ``model.onnx``, its data beside it when ``external``, and ``inputs.npz`` to calibrate on."""
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if external:
        onnx.save(copy, path, save_as_external_data=True, size_threshold=100, location="data")
    else:
        onnx.save(copy, path)
    # A leading axis for the number of samples; numpy cannot write bfloat16.
    arrays: dict[str, Any] = {
        name: array[None].astype(np.float32) if array.dtype.name == "bfloat16" else array[None]
        for name, array in graph.feed(0, **SIZES).items()
    }
    np.savez(folder / "inputs.npz", **arrays)
    return path


def compile_checked(path: Path, options: dict[str, Any]) -> Compiled | ZqfpError:
    """Compile with every pass held to its contract; an error that a user would see is returned."""
    recipe = Recipe.from_dict({**options, "calibration": str(path.parent / "inputs.npz")})
    with checked_passes() as ran:
        try:
            result = compile_model(path, recipe)
        except ZqfpError as error:
            return error
    plans = [pass_.plan for pass_ in ran if isinstance(pass_, QuantizeActivations | QuantizeWeights)]
    return Compiled(result, plans[-1])


def check_error(graph: RandomGraph, error: ZqfpError, options: dict[str, Any]) -> None:
    """One line, and only for a graph that has nothing to compile or is not finite."""
    text = str(error)
    assert "\n" not in text and text and "internal error" not in text, text
    wanted = len(graph.rewritten) + len(graph.inlined) + len(graph.heads) * options["quantize_lm_head"]
    if wanted == 0:
        assert error.exit_code in (2, 3) and "linear" in text, text
        return
    # Every value is looked at. ONNX Runtime refuses duplicate node names.
    proto = onnx.shape_inference.infer_shapes(renamed(graph.proto, {}, lambda node: ""))
    proto.graph.output.extend(proto.graph.value_info)
    outputs = run(open_session(proto), graph.feed(0, **SIZES))
    finite = all(np.isfinite(array).all() for array in outputs)
    assert not finite and ("reaches inf" in text or "reaches nan" in text or "holds NaN" in text), text


def check_choice(graph: RandomGraph, compiled: Compiled, options: dict[str, Any]) -> None:
    """Every linear that can be rewritten is, and every other has its reason."""
    plan = compiled.plan
    wanted = graph.rewritten | (graph.heads if options["quantize_lm_head"] else set())
    outputs = {site.output for site in plan.linears}
    assert wanted <= outputs, f"not rewritten: {sorted(wanted - outputs)}; skipped: {plan.skipped}"
    assert len(outputs - wanted) == len(graph.inlined), f"rewritten as well: {sorted(outputs - wanted)}"
    reasons = [reason for _, reason in graph.declined]
    reasons += [] if options["quantize_lm_head"] else ["lm_head"] * len(graph.heads)
    found = Counter(
        next((part for part in (*reasons, *graph.vanishing) if part in item.reason), item.reason)
        for item in plan.skipped
    )
    least, most = Counter(reasons), Counter([*reasons, *graph.vanishing])
    assert least <= found <= most, f"wanted {reasons}, found {plan.skipped}"
    report = compiled.result.report
    assert all(layer.rewritten or layer.reason for layer in report.layers)
    checked = len(plan.rewritten) + len(plan.stored_embeddings)
    assert report.certificate is not None
    assert (report.certificate.layers_checked, report.certificate.mismatches) == (checked, 0)


def check_forms(compiled: Compiled, feeds: list[Feed], options: dict[str, Any]) -> list[Outputs]:
    """Artifact, engine.onnx and onnxruntime.onnx are valid and give the same bits; return the artifact's."""
    folder = compiled.result.folder
    for name in ("model.zqfp.onnx", "engine.onnx", "onnxruntime.onnx", "model.fp4.onnx"):
        if (folder / name).exists():
            onnx.checker.check_model(str(folder / name), full_check=True)
    session = compiled.session("model.zqfp.onnx")
    outputs = [run(session, feed) for feed in feeds]
    plan = compiled.plan
    # Lowered, FP8 factors are rounded to the layer's type. ONNX Runtime computes the artifact's in float32:
    # in bfloat16 as everything, in float16 because it drops casts there and back.
    rounds = plan.lorc_format == "fp8" and any(site.dtype != ir.DataType.FLOAT for site in plan.linears)
    for name in () if rounds else ("engine.onnx", "onnxruntime.onnx"):
        session = compiled.session(name)
        for feed, wanted in zip(feeds, outputs, strict=True):
            assert_same(wanted, run(session, feed), f"artifact and {name} ({options['weight_lowering']})")
    return outputs


def assert_same(wanted: Outputs, got: Outputs, what: str) -> None:
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: output {index} has another type or shape"
        a, b = a.astype(np.float64), b.astype(np.float64)
        same = np.array_equal(a, b, equal_nan=True)
        assert same, f"{what}: output {index} differs by {np.abs(a - b).max():.3g}"


def check_weights(graph: RandomGraph, compiled: Compiled, feed: Feed) -> None:
    """What a linear multiplies with is near the weight that ONNX Runtime gets to in the original."""
    artifact, plan = ir.load(compiled.result.artifact), compiled.plan
    if compiled.result.report.recipe["algorithm"] == "gptq":
        return  # it looks at the error of the output alone, whatever becomes of the weight
    model, sites = weights_model(graph.proto, plan)
    for site, weight in zip(sites, run(open_session(model), feed), strict=True):
        stored = stored_weight(artifact, plan, site)
        size = float(np.linalg.norm(weight))
        if stored is None or size < SMALLEST_WEIGHT:
            continue
        error = float(np.linalg.norm(stored.astype(np.float64) - weight)) / size
        assert error < WEIGHT_ERROR, f"weight of {site.name} is off by {error:.2f} of its size"


def check_reference(graph: RandomGraph, compiled: Compiled, feeds: list[Feed], outputs: list[Outputs]) -> str:
    """The artifact computes what the original does with the artifact's weights."""
    plan = compiled.plan
    if not can_refer(graph.proto, plan):
        return "compiled"
    artifact = ir.load(compiled.result.artifact)
    session = open_session(reference_model(graph.proto, artifact, plan))
    for feed, got in zip(feeds, outputs, strict=True):
        assert_same(run(session, feed), got, "reference and artifact")
    return "compared"


VARIANTS = ("same", "external", "names", "order", "nodes", "constants")


def check_variant(
    graph: RandomGraph,
    compiled: Compiled,
    options: dict[str, Any],
    folder: Path,
    choose: random.Random,
    feeds: list[Feed],
    outputs: list[Outputs],
) -> None:
    """The same model written another way gets the same packed tensors and computes the same bits."""
    kind = choose.choice(VARIANTS)
    if kind == "nodes" and (compiled.plan.caches or compiled.plan.attentions):
        kind = "order"  # a cache with an Identity in it is left alone, with a reason
    proto, external = graph.proto, choose.random() < 0.3
    names: dict[str, str] = {}
    if kind == "names":
        proto, names = other_names(proto, choose)
    elif kind in ("order", "nodes", "constants"):
        change = {"order": other_order, "nodes": more_nodes, "constants": other_constants}[kind]
        proto = change(proto, choose)
    elif kind == "external":
        external = not (compiled.result.folder.parent / "data").exists()
    other = compile_checked(write(graph, proto, folder / kind, external=external), options)
    assert isinstance(other, Compiled), f"variant {kind} is refused: {other}"
    if kind == "same":
        for file in compiled.result.folder.glob("*.onnx*"):
            assert file.read_bytes() == (other.result.folder / file.name).read_bytes(), f"{file.name} differs"
    wanted = {names.get(output, output): tensors for output, tensors in packed(compiled).items()}
    got = packed(other)
    assert wanted == got, f"variant {kind}: packed tensors differ at {_differing(wanted, got)}"
    if kind == "nodes" and computed_type(ir.load(compiled.result.artifact)) == ir.DataType.FLOAT16:
        return  # ONNX Runtime drops casts there and back between nodes, but not over an Identity
    session = other.session("model.zqfp.onnx")
    for feed, y in zip(feeds, outputs, strict=True):
        assert_same(y, run(session, feed), f"variant {kind}")


def computed_type(artifact: ir.Model) -> ir.DataType:
    """FLOAT16 where any node rounds to it, else FLOAT."""
    made = (value.dtype for node in artifact.graph.all_nodes() for value in node.outputs)
    return ir.DataType.FLOAT16 if ir.DataType.FLOAT16 in made else ir.DataType.FLOAT


def packed(compiled: Compiled) -> dict[str, list[str]]:
    """Digests of the constant inputs of every linear, by the linear's output."""
    artifact = ir.load(compiled.result.artifact)
    found = {}
    for node in artifact.graph:
        if is_w4a8(node):
            constants = [None if value is None else value.const_value for value in node.inputs]
            found[str(node.outputs[0].name)] = [
                "" if tensor is None else hashlib.sha256(tensor.tobytes()).hexdigest() for tensor in constants
            ]
    return found


def _differing(wanted: dict[str, list[str]], got: dict[str, list[str]]) -> list[Any]:
    if set(wanted) != set(got):
        return sorted(set(wanted) ^ set(got))
    return [
        (name, [index for index, (a, b) in enumerate(zip(wanted[name], got[name], strict=True)) if a != b])
        for name in wanted
        if wanted[name] != got[name]
    ]


def open_session(model: Path | onnx.ModelProto) -> Any:
    """A session in which every form of a layer runs the same kernels: nothing is folded, fused or packed."""
    loaded = ir.load(model) if isinstance(model, Path) else ir.from_proto(model)
    if uses_bfloat16(loaded):
        widen_bfloat16(loaded)
    folder = model.parent if isinstance(model, Path) else None
    content = ir.to_proto(loaded).SerializeToString()
    return create_session(content, threads=1, optimize=False, low_memory=True, external_data=folder)


def run(session: Any, feed: Feed) -> Outputs:
    """All outputs; inputs become what the session takes: widened from bfloat16, or a cache in FP8."""
    kinds = {"tensor(float)": np.float32, "tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn}
    takes = {arg.name: kinds.get(arg.type) for arg in session.get_inputs()}
    arrays = {name: array.astype(takes[name] or array.dtype) for name, array in feed.items() if name in takes}
    return run_session(session, None, arrays)
