"""The per-run certificate: every rewritten linear, alone in ONNX Runtime, against numpy on identical input.

Whole-model logits cannot prove a rewrite right, because FP8 rounding amplifies noise (DESIGN section 9). One
linear can: its decoded weight must equal the numpy reference bit for bit, and its output the equation of
DESIGN section 2 within the rounding of one matrix product.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from zqfp_compile.backends.ort import check_memory, create_session
from zqfp_compile.calibrate.widen import widen_bfloat16
from zqfp_compile.disk import read_chunks
from zqfp_compile.errors import AccuracyError
from zqfp_compile.formats.minifloat import MINI_FLOATS
from zqfp_compile.plan import EmbeddingSite, LinearSite, QuantPlan
from zqfp_compile.quantize.threads import in_threads, one_torch_thread
from zqfp_compile.report.metrics import sqnr_db
from zqfp_compile.weights import release
from zqfp_compile.work_folder import WorkFolder

Progress = Callable[[int, int, str], None]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Largest |y - reference| relative to the largest |reference|, by type of y. float32: a sum of K products in
# any order, each rounded at 6e-8. float16: the product, the two LoRC products and the sums, each rounded to
# 11 bits (5e-4). Below the type's normal numbers rounding is absolute, so |reference| counts as at least the
# smallest of those.
TOLERANCE = {ir.DataType.FLOAT: 1e-5, ir.DataType.FLOAT16: 2e-3}

# Rows of an embedding compared; of a larger table as many, evenly spread.
_TOKENS = 4096

# Weights of the reference in float64 at once.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class LayerCheck:
    """One linear's certificate.

    Attributes:
        name: Layer name.
        k: Input features.
        n: Output features.
        weight_bit_equal: Whether ONNX Runtime decodes the weight to exactly the numpy reference.
        max_rel_error: Largest |y - reference| over the largest |reference|, reference in float64; that counts
            as at least the smallest normal number of y's type.
        tolerance: What ``max_rel_error`` may be.
        sqnr_db: The original linear's output against the rewritten one's (with LoRC) on the same rows, dB.
    """

    name: str
    k: int
    n: int
    weight_bit_equal: bool
    max_rel_error: float
    tolerance: float
    sqnr_db: float

    @property
    def ok(self) -> bool:
        """Whether the layer computes what it should."""
        return self.weight_bit_equal and self.max_rel_error <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """All layers' certificates.

    Attributes:
        layers: One per rewritten linear, in graph order, then one per rewritten embedding.
    """

    layers: tuple[LayerCheck, ...]

    @property
    def layers_checked(self) -> int:
        """Number of linears and embeddings compared."""
        return len(self.layers)

    @property
    def mismatches(self) -> int:
        """Number of them that failed."""
        return sum(not layer.ok for layer in self.layers)


def certify(
    artifact: ir.Model,
    plan: QuantPlan,
    rows: Mapping[str, Float32],
    original_weight: Callable[[LinearSite], Float32],
    *,
    original_bias: Callable[[LinearSite], Float32 | None],
    original_table: Callable[[EmbeddingSite], Float32] | None = None,
    threads: int = 1,
    work: WorkFolder | None = None,
    progress: Progress = lambda done, total, detail: None,
) -> Certificate:
    """Check every rewritten linear and embedding of ``plan`` in the rewritten graph.

    Args:
        artifact: The rewritten model, with its functions.
        plan: Layers, formats, activation scales and quantised tensors.
        rows: Sample rows per activation name, float32 [m, K] holding values of the layer's type.
        original_weight: Returns W[N, K] of a layer before quantisation.
        original_bias: Returns the layer's own bias [N] before the rewrite, or ``None``; one that a following
            Add holds is no part of the layer.
        original_table: Returns the table [V, D] of an embedding before quantisation; needed when the plan has
            one.
        threads: Linears compared at once, each on one core; the functions above are called in several.
        work: Where verdicts are kept, and found again for a layer whose bytes in the artifact, and whose
            rows, are the same to the last bit; its key covers the original model.
        progress: Called with (layers done, layers, layer name).

    Raises:
        AccuracyError: When there is nothing to compare, or a layer cannot be compared.
        MissingDependencyError: When the disk is full.
    """
    values = {value.name: value for node in artifact.graph for value in node.outputs}
    values.update({value.name: value for value in artifact.graph.inputs})
    sites = plan.rewritten
    reading = threading.Lock()  # tensors that layers share are unpacked and released in place

    def check(site: LinearSite) -> LayerCheck:
        x = rows.get(site.activation)
        if x is None or x.size == 0:
            raise AccuracyError(
                f"certificate: layer {site.name!r} has no sample rows; calibrate on more text"
            )
        with reading:
            model, linear = _extract(artifact, values, site)
            bias = original_bias(site)
        key = "" if work is None else _digest(model, site, x)
        found = None if work is None else work.find(f"check-{key}")
        if found is not None:
            equal, *figures = (array.item() for array in found)
            return LayerCheck(site.name, site.k, site.n, equal, *figures)
        if bias is not None and linear is not None:  # W4A8Linear holds beta * C in the layer's type
            bias = bias.astype(site.dtype.numpy()).astype(np.float32)
        with reading:
            ir.external_data.load_to_model(model)
        alone = _serialize(model, site, quantized=linear is not None)
        del model, linear
        layer = _check_layer(alone, plan, site, x, original_weight, bias, reading)
        if work is not None and layer.ok:
            figures = [layer.weight_bit_equal, layer.max_rel_error, layer.tolerance, layer.sqnr_db]
            work.keep(f"check-{key}", [np.array(figure) for figure in figures])
        return layer

    checks: list[LayerCheck] = []
    for layer in in_threads(check, sites, threads):
        progress(len(checks), len(sites), layer.name)
        checks.append(layer)
    for embedding in plan.stored_embeddings:
        if original_table is None:
            raise ValueError(f"embedding {embedding.name!r}: no original table is given")
        checks.append(_check_embedding(artifact, values, plan, embedding, original_table))
    progress(len(sites), len(sites), "")
    if not checks:
        raise AccuracyError("certificate: no linear was compared; the run proves nothing about the model")
    return Certificate(tuple(checks))


@dataclass(frozen=True, eq=False)
class _Alone:
    """A layer cut out of the artifact.

    Attributes:
        content: It as an ONNX file, weights included, in float32 when it was bfloat16.
        rank: Number of dimensions of its input.
        quantized: Whether its weight is.
    """

    content: bytes
    rank: int
    quantized: bool


def _serialize(model: ir.Model, site: LinearSite, quantized: bool) -> _Alone:
    if site.dtype == ir.DataType.BFLOAT16:
        widen_bfloat16(model)
    shape = model.graph.inputs[0].shape
    content = ir.to_proto(model).SerializeToString(deterministic=True)
    return _Alone(content, 2 if shape is None else len(shape), quantized)


def _digest(model: ir.Model, site: LinearSite, rows: Float32) -> str:
    """A digest of a layer as the artifact has it, weights included, and of the rows it is compared on.

    Weights are hashed where they are: a layer whose verdict is known is never loaded.
    """
    digest = hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            for chunk in read_chunks(Path(tensor.path), tensor.offset or 0, tensor.nbytes):
                digest.update(chunk)
    digest.update(repr(site).encode())
    digest.update(rows.tobytes())
    return digest.hexdigest()


def _check_layer(
    alone: _Alone,
    plan: QuantPlan,
    site: LinearSite,
    rows: Float32,
    original_weight: Callable[[LinearSite], Float32],
    bias: Float32 | None,
    reading: threading.Lock,
) -> LayerCheck:
    x = rows.astype(site.dtype.numpy())
    output, decoded = _run(alone, site, x)
    if not alone.quantized and site.dtype == ir.DataType.BFLOAT16:
        site = _without_bfloat16_casts(site)
    original = original_weight(site)  # only now: running takes several times the weight's memory
    expected = _reference_weight(plan, site, reading) if alone.quantized else original
    # Without a W4A8Linear (activations quantised only) the weight is the original initializer itself.
    equal = decoded is not None and np.array_equal(decoded, expected) if alone.quantized else decoded is None
    del decoded
    with reading:
        factors = _factors(plan, site)
    reference = _reference_output(plan, site, x.astype(np.float32), expected, factors, bias)
    exact = _product(x.astype(np.float32), original)
    if bias is not None:
        exact += bias
    return LayerCheck(
        name=site.name,
        k=site.k,
        n=site.n,
        weight_bit_equal=bool(equal),
        max_rel_error=_relative_error(output, reference, _computed_type(site)),
        tolerance=TOLERANCE[_computed_type(site)],
        sqnr_db=sqnr_db(exact, output),
    )


def _without_bfloat16_casts(site: LinearSite) -> LinearSite:
    """The weight as it is multiplied where bfloat16 runs as float32 and the graph casts it."""
    casts = tuple(dtype for dtype in site.weight.casts if dtype != ir.DataType.BFLOAT16)
    return dataclasses.replace(site, weight=dataclasses.replace(site.weight, casts=casts))


def _check_embedding(
    artifact: ir.Model,
    values: Mapping[str | None, ir.Value],
    plan: QuantPlan,
    site: EmbeddingSite,
    original_table: Callable[[EmbeddingSite], Float32],
) -> LayerCheck:
    """Gather rows in ONNX Runtime; each must be its codes times its scale, rounded once to the type of h."""
    if site.output not in values:
        raise AccuracyError(
            f"certificate: embedding {site.name!r} is not in the compiled graph; report this as a bug"
        )
    ids = np.unique(np.linspace(0, site.rows - 1, _TOKENS).astype(np.int64))
    computed = ir.DataType.FLOAT if site.dtype == ir.DataType.BFLOAT16 else site.dtype
    found = _gather(_extract_embedding(artifact, values, site), site, ids)
    tensors = plan.embedding_tensors[site.name]
    codes, scales = (tensor.numpy()[ids].astype(np.float32) for tensor in (tensors.codes, tensors.row_scales))
    release(tensors.codes, tensors.row_scales)
    expected = (codes * scales[:, None]).astype(computed.numpy()).astype(np.float32)
    return LayerCheck(
        name=site.name,
        k=site.width,
        n=site.rows,
        weight_bit_equal=np.array_equal(found, expected),
        max_rel_error=_relative_error(found, expected.astype(np.float64), computed),
        tolerance=0.0,
        sqnr_db=sqnr_db(original_table(site)[ids], found),
    )


def _extract_embedding(
    artifact: ir.Model, values: Mapping[str | None, ir.Value], site: EmbeddingSite
) -> ir.Model:
    """Return a model from the Gather's indices, now the input ``ids`` [n], to its rows."""
    gather = next(node for node in artifact.graph if node.name == site.node)
    start, end = gather.inputs[1], values[site.output]
    assert start is not None
    nodes, constants = _between(start, end, site)
    graph = ir.GraphView(
        [start],
        [end],
        nodes=nodes,
        initializers=constants,
        opset_imports=artifact.graph.opset_imports,
        name="embedding",
    ).clone()
    for value in (output for node in graph for output in node.outputs):
        value.shape = None
    ids = graph.inputs[0]
    ids.name, ids.shape, ids.type = "ids", ir.Shape([None]), ir.TensorType(start.dtype or ir.DataType.INT64)
    graph.outputs[0].type = ir.TensorType(site.dtype)
    model = ir.Model(graph, ir_version=artifact.ir_version)
    ir.external_data.load_to_model(model)
    if site.dtype == ir.DataType.BFLOAT16:
        widen_bfloat16(model)
    return model


def _gather(model: ir.Model, site: EmbeddingSite, ids: npt.NDArray[np.int64]) -> Float32:
    dtype = model.graph.inputs[0].dtype
    assert dtype is not None
    try:
        session = create_session(ir.to_proto(model).SerializeToString(), threads=1, low_memory=True)
        (rows,) = session.run(None, {"ids": ids.astype(dtype.numpy())})
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        check_memory(error)
        reason = " ".join(str(error).split())
        raise AccuracyError(f"certificate: embedding {site.name!r} does not run ({reason})") from error
    found: Float32 = rows.astype(np.float32)
    return found


def _extract(
    artifact: ir.Model, values: Mapping[str | None, ir.Value], site: LinearSite
) -> tuple[ir.Model, ir.Node | None]:
    """Return a model from the layer's activation to its output, with ``w_hat`` as a second output.

    Weights stay where they are. The second result is the layer's ``W4A8Linear`` in the copy, ``None`` when
    its weight is not quantised.
    """
    if site.activation not in values or site.output not in values:
        raise AccuracyError(
            f"certificate: layer {site.name!r} is not in the compiled graph; report this as a bug"
        )
    start, end = values[site.activation], values[site.output]
    nodes, constants = _between(start, end, site)
    graph = ir.GraphView(
        [start],
        [end],
        nodes=nodes,
        initializers=constants,
        opset_imports=artifact.graph.opset_imports,
        name="layer",
    ).clone()
    _set_types(graph, site)
    functions = []
    linear = next((node for node in graph if node.op_type == "W4A8Linear"), None)
    if linear is not None:
        function = artifact.functions[linear.op_identifier()].clone()
        w_hat = next((v for node in function for v in node.outputs if v.name == "w_hat"), None)
        if w_hat is not None:
            function.outputs.append(w_hat)
            linear.resize_outputs(2)
            decoded = linear.outputs[1]
            decoded.name, decoded.dtype = "w_hat", ir.DataType.FLOAT
            graph.outputs.append(decoded)
        functions.append(function)
    return ir.Model(graph, ir_version=artifact.ir_version, functions=functions), linear


def _set_types(graph: ir.Graph, site: LinearSite) -> None:
    """Let the cut-out layer take any number of rows, typed as ONNX Runtime wants inputs to be.

    An export with fixed shapes fixes them on inner values too, and many leave those without a type.
    """
    rank = 2 if graph.inputs[0].shape is None else len(graph.inputs[0].shape)
    for value in (output for node in graph for output in node.outputs):
        value.shape = None
    graph.inputs[0].shape = ir.Shape([*(None for _ in range(rank - 1)), site.k])
    for value in (graph.inputs[0], graph.outputs[0]):
        value.type = ir.TensorType(site.dtype)


def _between(
    start: ir.Value, end: ir.Value, site: LinearSite | EmbeddingSite
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Return the nodes that compute ``end`` from ``start``, in order, and the initializers they read."""
    nodes: dict[ir.Node, None] = {}
    constants: dict[ir.Value, None] = {}

    def visit(value: ir.Value | None) -> None:
        if value is None or value is start:
            return
        producer = value.producer()
        if producer is None:
            if value.const_value is None:
                raise AccuracyError(
                    f"certificate: layer {site.name!r} also depends on {value.name!r}; report this as a bug"
                )
            constants[value] = None
        elif producer not in nodes:
            for needed in producer.inputs:
                visit(needed)
            nodes[producer] = None

    visit(end)
    return list(nodes), list(constants)


def _run(alone: _Alone, site: LinearSite, x: npt.NDArray[Any]) -> tuple[Float32, Float32 | None]:
    batched = x.reshape((1,) * (alone.rank - 2) + x.shape)
    if site.dtype == ir.DataType.BFLOAT16:
        batched = batched.astype(np.float32)
    try:
        # One thread: a pool would keep spinning on the cores that the reference needs next.
        session = create_session(alone.content, threads=1, low_memory=True)
        outputs = session.run(None, {site.activation: batched})
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        check_memory(error)
        reason = " ".join(str(error).split())
        raise AccuracyError(f"certificate: layer {site.name!r} does not run ({reason})") from error
    y = outputs[0].reshape(-1, site.n).astype(np.float32)
    return y, outputs[1] if len(outputs) > 1 else None


def _reference_weight(plan: QuantPlan, site: LinearSite, reading: threading.Lock) -> Float32:
    tensors = plan.tensors[site.name]
    try:
        with reading:
            quantized = plan.quantized_weight(site)
            release(tensors.codes, tensors.group_scales, tensors.row_scales)
        return quantized.dequantize()
    except ValueError as error:
        raise AccuracyError(f"certificate: layer {site.name!r} has illegal tensors: {error}") from error


def _factors(plan: QuantPlan, site: LinearSite) -> tuple[Float64, Float64] | None:
    """Return LoRC's factors as they are multiplied with, V [K, r] and U [r, N]."""
    factors = plan.low_rank(site)
    if factors is None:
        return None
    release(plan.tensors[site.name].lorc_v, plan.tensors[site.name].lorc_u)
    v, u = (factor.astype(_computed_type(site).numpy()).astype(np.float64) for factor in factors)
    return v, u


def _reference_output(
    plan: QuantPlan,
    site: LinearSite,
    x: Float32,
    weight: Float32,
    factors: tuple[Float64, Float64] | None,
    bias: Float32 | None,
) -> Float64:
    """The equation of DESIGN section 2 in float64, on x float32 [m, K]."""
    quantized = _quantize_activation(plan, site, x)
    if plan.activation_format == "none" and site.dtype == ir.DataType.FLOAT16:
        weight = weight.astype(np.float16)  # unquantised activations multiply in the layer's type
    y: Float64 = _product(quantized, weight)
    if factors is not None:
        v, u = factors
        y += _product(_product(x.astype(np.float64), v.T), u.T)
    return y if bias is None else y + bias


def _product(x: npt.NDArray[Any], weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return x [m, K] @ weight^T [K, N] in x's type, blocks of the weight converted one at a time."""
    left, right = torch.from_numpy(x), torch.from_numpy(weight)
    result = torch.empty(len(left), len(right), dtype=left.dtype)
    step = max(1, _BLOCK // right.shape[1])
    # numpy's BLAS spins on all cores after every product, and waits for them when others are busy.
    with one_torch_thread():
        for start in range(0, len(right), step):
            block = right[start : start + step].to(left.dtype)
            torch.mm(left, block.t(), out=result[:, start : start + step])
    product: npt.NDArray[Any] = result.numpy()
    return product


def _quantize_activation(plan: QuantPlan, site: LinearSite, x: Float32) -> Float64:
    """Return ``a * x8``, float64 [m, K]."""
    if plan.activation_format == "none":
        return x.astype(np.float64)
    if plan.per_token:
        largest = np.float32(127.0 if plan.activation_format == "int8" else _format_max(plan))
        scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) / largest
    else:
        scale = np.array(plan.activation_scales[site.activation], np.float32)
    if plan.activation_format == "int8":
        x8 = np.clip(np.rint(x / scale), -128, 127)
    else:
        x8 = MINI_FLOATS[plan.activation_format].round(x / scale)
    result: Float64 = x8.astype(np.float64) * scale.astype(np.float64)
    return result


def _format_max(plan: QuantPlan) -> float:
    return MINI_FLOATS[plan.activation_format].max_value


def _computed_type(site: LinearSite) -> ir.DataType:
    """ONNX Runtime computes bfloat16 layers in float32 here (see :mod:`zqfp_compile.calibrate.widen`)."""
    return ir.DataType.FLOAT if site.dtype == ir.DataType.BFLOAT16 else site.dtype


def _relative_error(value: Float32, reference: Float64, dtype: ir.DataType) -> float:
    """Largest difference by the reference's largest value; where the layer's type overflows, inf is right."""
    if np.isnan(value).any():
        return math.inf
    limits = np.finfo(dtype.numpy())
    largest = float(limits.max)
    value, reference = np.clip(value, -largest, largest), np.clip(reference, -largest, largest)
    size = max(float(np.abs(reference).max()), float(limits.smallest_normal))
    return float(np.abs(value - reference).max()) / size
