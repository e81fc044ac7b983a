"""The operators of the kernel's hosts, and which layers they take.

``zqfp::QuantizeActivation(x, a, v?) -> x8, xv?``             static scale
``zqfp::QuantizeTokens(x, v?) -> x8, a, xv?``                 one scale per token
``zqfp::PackedW4A8Linear(x8, a, codes, group_scales, row_scales, [bias], [xv, u]) -> y, ...``
``zqfp::QuantizeSiluMul(gate, up, a?, v?) -> x8, a?, xv?``            ONNX Runtime only, as the others
``zqfp::QuantizeRmsNorm(x, gamma, skip?, a?, v?) -> x8, a?, xv?, sum?``
``zqfp::QuantizedW4A8Linear(operands, a?, v?, codes, group_scales, row_scales, bias?, u?) -> y, ..., sum?``

The last is a quantiser, whose operands it has, and the only linear that reads it. Either linear with
``gated`` = 1 has one output, ``silu(gate) * up`` of half its rows each (``packing.gated_order``).

The linear is no ``W4A8Linear``: a custom op beats a model-local function of its name, so a session that has
the library could not run the artifact, whose codes are in another order. Optional inputs are left out, never
empty: their number tells which are there (TensorRT counts the inputs of a plugin).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from passes._emit import int_attribute
from passes._fused_forms import Form, find_gated
from passes._w4a8_function import BIAS, DOMAIN, LORC_V, X8
from zqfp_compile.kernels.packing import BLOCK_ROWS, GROUP_SIZES
from zqfp_compile.plan import LinearSite, QuantPlan

LINEAR = "PackedW4A8Linear"
QUANTIZE_STATIC = "QuantizeActivation"
QUANTIZE_TOKENS = "QuantizeTokens"
QUANTIZE_SILU = "QuantizeSiluMul"
QUANTIZE_NORM = "QuantizeRmsNorm"
QUANTIZED_LINEAR = "QuantizedW4A8Linear"
# TensorRT's parser takes a plugin only for nodes that name its namespace.
PLUGIN_NAMESPACE, PLUGIN_VERSION = "zqfp", "1"

K_MULTIPLE, N_MULTIPLE, RANK_MULTIPLE, LARGEST_RANK, MOST_OUTPUTS = 16, 8, 8, 64, 4

# Layers of one x8, with their nodes.
Linears = list[tuple[LinearSite, ir.Node]]


@dataclass(frozen=True, eq=False)
class Product:
    """Layers that the kernel multiplies at once.

    Attributes:
        linears: They, in the order of their rows.
        gated: What makes h of gate and up, which ``linears`` are then; the kernel makes h only.
    """

    linears: Linears
    gated: Form | None = None

    @property
    def name(self) -> str:
        """The names of the layers, joined."""
        return "+".join(site.name for site, _ in self.linears)

    @property
    def n(self) -> int:
        """Rows of all layers."""
        return sum(site.n for site, _ in self.linears)

    @property
    def rank(self) -> int:
        """The padded ranks of all layers, added up."""
        return sum(padded_rank(lorc_rank(node)) for _, node in self.linears)

    @property
    def nodes(self) -> list[ir.Node]:
        """What it takes the place of, the layers first."""
        return [*(node for _, node in self.linears), *(self.gated.nodes if self.gated else ())]

    @property
    def outputs(self) -> list[ir.Value]:
        """What it makes."""
        return [self.gated.h] if self.gated else [node.outputs[0] for _, node in self.linears]


def padded_rank(rank: int) -> int:
    """Return ``rank`` rounded up to what the kernel takes."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def refusal(plan: QuantPlan, site: LinearSite, node: ir.Node, only_half: bool) -> str | None:
    """Return why the kernel cannot take the ``W4A8Linear`` of ``site``; ``None`` when it can."""
    return _refused_format(plan, site, only_half) or _refused_shape(plan, site, node)


def _refused_format(plan: QuantPlan, site: LinearSite, only_half: bool) -> str | None:
    weight_format = plan.precision(site).weight_format
    if only_half and site.dtype == ir.DataType.FLOAT:
        return "the kernel has no FLOAT outputs; export the model in float16 or bfloat16"
    if weight_format != "e2m1":
        return f"the kernel has no {weight_format} weights"
    if plan.activation_format != "e4m3":
        return f"the kernel has no {plan.activation_format} activations"
    if plan.scale_constraint == "none":
        return "the kernel has no unconstrained group scales"
    if plan.group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        return f"the kernel has no group size {plan.group_size or 'row'} ({known})"
    return None


def _refused_shape(plan: QuantPlan, site: LinearSite, node: ir.Node) -> str | None:
    rank = lorc_rank(node)
    if site.k % K_MULTIPLE:
        return f"the kernel needs K as a multiple of {K_MULTIPLE}, not {site.k}"
    if site.n % N_MULTIPLE:
        return f"the kernel needs N as a multiple of {N_MULTIPLE}, not {site.n}"
    if rank > LARGEST_RANK:
        return f"the kernel has no LoRC rank above {LARGEST_RANK}, and this is {rank}"
    if activation_source(plan, site, node) is None:
        return "its activation is not quantised by the nodes of quantize-activations"
    return None


def lorc_rank(node: ir.Node) -> int:
    """Return the rank of a ``W4A8Linear``'s compensation, 0 without."""
    v = node.inputs[LORC_V]
    return 0 if v is None or v.shape is None else int(v.shape.numpy()[1])


def activation_source(plan: QuantPlan, site: LinearSite, node: ir.Node) -> ir.Value | None:
    """Walk back over the nodes of quantize-activations, from x8 to the activation x; ``None`` without."""
    value = _operand(node.inputs[X8], "QuantizeLinear")
    if plan.per_token:
        value = _operand(value, "Div")
    if value is not None and value.name != site.activation:
        value = _operand(value, "Cast")
    return value if value is not None and value.name == site.activation else None


def _operand(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The first input of the node that makes ``value``, when that is an ``op_type``."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == op_type else None


def plugin_node(
    op_type: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, int | Sequence[int]],
    outputs: int,
    metadata: dict[str, str],
) -> ir.Node:
    """Return a node of the hosts' domain, its values and itself without names."""
    attrs = [int_attribute(name, value) for name, value in attributes.items()]
    attrs.append(ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE))
    attrs.append(ir.AttrString("plugin_version", PLUGIN_VERSION))
    return ir.Node(DOMAIN, op_type, inputs, attrs, num_outputs=outputs, metadata_props=metadata)


def linear_attributes(product: Product, plan: QuantPlan) -> dict[str, int | list[int]]:
    """Return what a host needs to know of ``product`` besides its inputs."""
    sizes = [site.n for site, _ in product.linears]
    attributes: dict[str, int | list[int]] = {
        "n": product.n,
        "k": product.linears[0][0].k,
        "group_size": plan.group_size,
        "lorc_rank": product.rank,
        "per_token": int(plan.per_token),
        "bias": int(any(node.inputs[BIAS] is not None for _, node in product.linears)),
        "dtype": int(product.linears[0][0].dtype),
    }
    if product.gated:
        return {**attributes, "gated": 1}
    return attributes if len(sizes) == 1 else {**attributes, "output_n": sizes}


def products(linears: Linears) -> list[Product]:
    """Divide the linears of one x8 into those that the kernel multiplies at once.

    These are gate and up of a SiLU product, whose rows take turns, and the others, whose rows are put below
    each other. Each output begins with a block of 64 rows there, so at most one, the last, may have an N
    that blocks do not divide. Layers with LoRC go together while their ranks fit: U is block-diagonal then,
    [sum of ranks, sum of N]. The kernel reads it in steps of 32 ranks, each as many bytes as 128 columns of
    the weight: three of rank 16 take two steps instead of one, 3% more bytes at K = 4096, less than a launch
    costs. Layers without LoRC would pay for nothing and stay by themselves.
    """
    gated = _gated_pairs(linears)
    taken = {node for product in gated for _, node in product.linears}
    kinds: dict[tuple[ir.DataType, bool], Linears] = {}
    for site, node in linears:
        if node not in taken:
            kinds.setdefault(_kind(site, node), []).append((site, node))
    return [*gated, *(product for kind in kinds.values() for product in _products(kind))]


def _kind(site: LinearSite, node: ir.Node) -> tuple[ir.DataType, bool]:
    return site.dtype, lorc_rank(node) > 0


def _gated_pairs(linears: Linears) -> list[Product]:
    """Two of ``linears`` each that are gate and up of one h, in the graph that they are in."""
    made = {node.outputs[0]: (site, node) for site, node in linears}
    found = []
    for up, (_, node) in made.items():
        readers = up.consumers()
        form = find_gated(readers[0].outputs[0]) if len(readers) == 1 else None
        if form is None or not all(inner.graph is node.graph for inner in form.nodes):
            continue
        pair = [made[value] for value in form.operands if value in made]
        product = Product(pair, form)
        if len(pair) == 2 and _kind(*pair[0]) == _kind(*pair[1]) and product.rank <= LARGEST_RANK:
            found.append(product)
    return found


def _products(kind: Linears) -> list[Product]:
    made: list[Product] = []
    for item in sorted(kind, key=lambda item: item[0].n % BLOCK_ROWS > 0):
        joined = Product([*made[-1].linears, item]) if made else None
        if joined is not None and _fits(joined):
            made[-1] = joined
        else:
            made.append(Product([item]))
    return made


def _fits(product: Product) -> bool:
    blocks = all(site.n % BLOCK_ROWS == 0 for site, _ in product.linears[:-1])
    return blocks and len(product.linears) <= MOST_OUTPUTS and product.rank <= LARGEST_RANK
