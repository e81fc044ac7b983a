"""Plan lint: does the built engine really multiply the planned linears in FP8, in every profile?

The builder is free to run a quantised linear in float, and some graphs make it write a plan that is silently
wrong. With detailed verbosity the VERBOSE log ends with the layer list; deserialising an engine to inspect it
needs a GPU, the log does not. How the list reads (TensorRT-RTX 1.7, measured):

* A GEMM's name joins the ONNX node names of the MatMuls it merges with ``+`` and ends in ``_myl<G>_<I>``, G
  numbering the compiled subgraph, I the layer in it. Long names are not cut. In larger graphs each joined
  name gets a suffix ``_U<number>``; the layer's metadata has the exact ones.
* Equal products are computed once: one of them gives the layer its name, in each profile perhaps another, and
  no layer names the rest.
* In the metadata, ``name | branch (then_branch) | node (If)`` is a node in a branch; nodes behind an If whose
  condition is constant carry its ``| node (If)`` as well.
* Every profile has its own layers, in one list: the first profile's names are plain, those of profile P carry
  ``[profile P]`` on each node name and each input and output of the network.
* A GEMM that multiplies in FP8 has the type ``gemm`` and two FP8 operands. A ``runtime_fusion`` with FP8
  inputs may decode them and multiply in float (seen with a weight scale along K), so it never counts.
* A plugin is a ``custom_layer`` named after its node. Ours multiplies FP8 activations by INT4 codes, decoded
  to FP8 inside, and scales in float32: it covers its linear, and has no accumulator in memory to check. The
  node of several linears has their names, joined with ``+``.
* The per-channel scale a*R is a constant ``..._folded_matmul`` of the layer that reads the GEMM's output; a
  per-tensor one replaces the GEMM's constant ``..._alpha``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_NAME = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w*),")
_LAYER = re.compile(
    _NAME.pattern + r" Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?"
    r", Outputs: \[(?P<outputs>.*?)\], (?:TacticName|ParameterType|TacticValue)\b"
    r"(?:.*?Metadata: (?P<metadata>.*))?"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[-\d,]*)\]"
    r".*?(?:Format/)?Datatype: (?P<dtype>[^,}]+?)\s*[,}]"
)
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_METADATA = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[ONNX Layer: |$)")  # unit separators between entries
_GEMM = "gemm"
_PLUGINS = ("custom_layer", "PluginV3")  # as TensorRT-RTX and TensorRT call them
_UNREAD = "unread"


@dataclass(frozen=True)
class Tensor:
    """One operand of a layer; -1 is a dynamic axis, ``dtype`` the log's word (``FP8``, ``Half``, ...)."""

    name: str
    dims: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Layer:
    """One layer of the built engine.

    Attributes:
        name: As in the log, without the profile mark.
        type: ``gemm``, ``kgen``, ``runtime_fusion``, ...; ``unread`` when the line has a form not known here.
        inputs, constants, outputs: Operands.
        nodes: ONNX nodes the layer says it implements (part of).
        profile: Index of the optimisation profile.
    """

    name: str
    type: str
    inputs: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    nodes: tuple[str, ...] = ()
    profile: int = 0

    @property
    def is_fp8_gemm(self) -> bool:
        """Whether both factors are FP8, in a GEMM of the builder's or in our kernel."""
        return self.is_kernel or (self.type == _GEMM and sum("FP8" in t.dtype for t in self._operands) >= 2)

    @property
    def is_kernel(self) -> bool:
        """Whether this is our plugin with its 4-bit weight."""
        dtypes = [tensor.dtype for tensor in self._operands]
        return self.type in _PLUGINS and any("FP8" in t for t in dtypes) and any("Int4" in t for t in dtypes)

    @property
    def _operands(self) -> tuple[Tensor, ...]:
        return self.inputs + self.constants


@dataclass(frozen=True)
class ProfileLint:
    """What one profile runs in FP8.

    Attributes:
        fp8_gemms: Number of FP8 GEMM layers, plugins included; merged linears share one.
        fp8_linears: Planned linears they cover.
        missing: Planned linears they do not cover.
    """

    fp8_gemms: int
    fp8_linears: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class LintResult:
    """Verdict on an engine.

    Attributes:
        ok: No problem was found.
        fp8_gemms: FP8 GEMM layers, of the profile with the fewest.
        fp8_linears: Planned linears covered by an FP8 GEMM in every profile.
        missing: Planned linears not covered in some profile, in plan order.
        problems: One sentence per finding.
        profiles: The same counts for each profile.
    """

    ok: bool
    fp8_gemms: int
    fp8_linears: int
    missing: tuple[str, ...]
    problems: tuple[str, ...]
    profiles: tuple[ProfileLint, ...] = field(default=())


def parse_layers(log: str, profile_count: int) -> tuple[tuple[Layer, ...], ...]:
    """Read the layer list a build's log ends with.

    Args:
        log: Text of a VERBOSE build log.
        profile_count: Number of optimisation profiles of the engine, at least 1.

    Returns:
        The layers of each profile; empty tuples when the log holds no list.
    """
    lines = list(_layer_lines(log))
    # Inner layers name no profile; the subgraph they are in does, through its GEMMs and network tensors.
    subgraph_profile: dict[str, int] = {}
    for line in lines:
        subgraph, mark = _subgraph(line), _PROFILE.search(line)
        if subgraph and mark:
            subgraph_profile[subgraph] = int(mark[1])
    profiles: list[list[Layer]] = [[] for _ in range(profile_count)]
    for line in lines:
        mark = _PROFILE.search(line)
        profile = int(mark[1]) if mark else subgraph_profile.get(_subgraph(line), 0)
        if profile < profile_count:
            profiles[profile].append(_parse_layer(line, profile))
    return tuple(map(tuple, profiles))


def _layer_lines(log: str) -> Iterator[str]:
    _, found, tail = log.rpartition("Layers:\n")
    for line in tail.split("\n") if found else ():
        if not line.startswith("Name: "):
            return
        yield line


def _subgraph(line: str) -> str:
    head = _NAME.match(line)
    found = _SUBGRAPH.search(head["name"]) if head else None
    return found[1] if found else ""


def _parse_layer(line: str, profile: int) -> Layer:
    found = _LAYER.match(line)
    if not found:
        return Layer(name=line[6:86], type=_UNREAD, profile=profile)
    return Layer(
        name=_PROFILE.sub("", found["name"]),
        type=found["type"],
        inputs=_tensors(found["inputs"]),
        constants=_tensors(found["constants"]),
        outputs=_tensors(found["outputs"]),
        nodes=tuple(_METADATA.findall(found["metadata"] or "")),
        profile=profile,
    )


def _tensors(text: str | None) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(found["name"], tuple(int(dim) for dim in found["dims"].split(",") if dim), found["dtype"])
        for found in _TENSOR.finditer(text or "")
    )


def lint(
    profiles: Sequence[Sequence[Layer]], linears: Sequence[str], *, equal: Sequence[Sequence[str]] = ()
) -> LintResult:
    """Check a plan against what was asked for.

    Every planned linear must be covered by an FP8 GEMM in every profile. No FP8 GEMM may round its unscaled
    accumulator to half: it overflows at the magnitudes of an LLM. Every per-channel scale must have one value
    per output channel of the GEMM (or GEMMs) it belongs to.

    Args:
        profiles: Layers of each profile, from :func:`parse_layers`.
        linears: Node names of the planned linears' MatMuls in the engine-ready ONNX.
        equal: Groups of them that compute the same.
    """
    problems: list[str] = []
    results = []
    for index, layers in enumerate(profiles):
        results.append(_coverage(layers, linears, equal))
        problems += (f"profile {index}: {text}" for text in _profile_problems(layers, results[-1].missing))
    uncovered = {name for result in results for name in result.missing}
    if not results:
        problems.append("the engine has no profile to check")
    return LintResult(
        ok=not problems,
        fp8_gemms=min((result.fp8_gemms for result in results), default=0),
        fp8_linears=len([name for name in linears if name not in uncovered]) if results else 0,
        missing=tuple(name for name in linears if name in uncovered),
        problems=tuple(problems),
        profiles=tuple(results),
    )


def _coverage(layers: Sequence[Layer], linears: Sequence[str], equal: Sequence[Sequence[str]]) -> ProfileLint:
    planned = set(linears)
    gemms = [layer for layer in layers if layer.is_fp8_gemm]
    covered = {name for layer in gemms for name in _multiplied(layer, planned)}
    for group in equal:
        if not covered.isdisjoint(group):
            covered.update(name for name in group if not any(_implements(layer, name) for layer in layers))
    missing = tuple(name for name in linears if name not in covered)
    return ProfileLint(len(gemms), len(linears) - len(missing), missing)


def _multiplied(gemm: Layer, planned: set[str]) -> Iterator[str]:
    """The planned linears in a GEMM's joined name; its node list, where there is one, must agree."""
    joined = _SUBGRAPH.sub("", gemm.name)
    for name in (name for name in planned if name in joined):
        part = rf"(?:^|\+){re.escape(name)}(?:_U\d+)?(?:\+|$)"
        if re.search(part, joined) and (not gemm.nodes or _implements(gemm, name)):
            yield name


def _implements(layer: Layer, name: str) -> bool:
    """Whether the node list has ``name``: alone, among the linears of one plugin, or in a branch."""
    part = rf"(?:^|\+){re.escape(name)}(?:\+|$| \| )"
    return any(name in node and re.search(part, node) for node in layer.nodes)


def _profile_problems(layers: Sequence[Layer], missing: Sequence[str]) -> Iterator[str]:
    if not layers:
        yield "the build log holds no layer list; the builder is a version this lint does not know"
        return
    for layer in layers:
        if layer.type == _UNREAD:
            yield f"layer {layer.name!r} has a form this lint does not know"
    for name in missing:
        yield f"linear {name!r} is not an FP8 GEMM ({_what_runs(layers, name)})"
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        for tensor in layer.inputs:
            readers.setdefault(tensor.name, []).append(layer)
    produced = {tensor.name for layer in layers if layer.is_fp8_gemm for tensor in layer.outputs}
    for layer in layers:
        if layer.is_fp8_gemm and not layer.is_kernel:
            yield from _half_accumulator(layer, readers)
        yield from _scale_sizes(layer, produced)


def _what_runs(layers: Sequence[Layer], name: str) -> str:
    """The layer that implements ``name`` instead, for the message."""
    for layer in layers:
        if _implements(layer, name) and layer.type not in ("kgen", "shape_call"):
            operands = [t for t in layer.inputs + layer.constants if math.prod(t.dims) != 1]
            return f"it runs as {layer.type} of {' x '.join(t.dtype for t in operands)}"
    if any(_implements(layer, name) for layer in layers):
        return "element-wise layers name it, no GEMM"
    return "no layer names it"


def _scales(layer: Layer) -> list[Tensor]:
    return [tensor for tensor in layer.constants if "folded_matmul" in tensor.name]


def _half_accumulator(gemm: Layer, readers: dict[str, list[Layer]]) -> Iterator[str]:
    for output in gemm.outputs:
        half = "Half" in output.dtype or "FP16" in output.dtype
        unscaled = any("_alpha_" in tensor.name for tensor in gemm.constants)
        scaled_later = any(_scales(reader) for reader in readers.get(output.name, ()))
        if half and (unscaled or scaled_later):
            yield (
                f"{gemm.name!r} stores its unscaled FP8 accumulator as half, which overflows; "
                "quantise in float32 and cast after the MatMul"
            )


def _scale_sizes(layer: Layer, produced: set[str]) -> Iterator[str]:
    channels = {t.dims[-1] for t in layer.inputs if t.name in produced and t.dims}
    if not channels:
        return
    for scale in _scales(layer):
        size = math.prod(scale.dims)
        if size != 1 and size not in channels:
            wanted = " or ".join(map(str, sorted(channels)))
            yield (
                f"scale {scale.name!r} of {layer.name!r} has {size} values for {wanted} output channels; "
                "the plan is wrong"
            )
