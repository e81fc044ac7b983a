"""Names as exporters choose them, and as nobody should: ours."""

from __future__ import annotations

import random
from collections.abc import Callable

import onnx
from graph_variants import renamed, value_names

NAME_SCOPES = "pkg.torch.onnx.name_scopes"


def give_names(proto: onnx.ModelProto, random: random.Random) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Rename values and nodes in one of several styles; also returns the values' new names."""
    style = random.choice((_plain, _torch, _optimum, _nameless, _duplicate, _ours))
    values, node_name = style(proto, random)
    return renamed(proto, values, node_name), values


Names = tuple[dict[str, str], Callable[[onnx.NodeProto], str]]


def _plain(proto: onnx.ModelProto, random: random.Random) -> Names:
    return {}, lambda node: node.name


def _torch(proto: onnx.ModelProto, random: random.Random) -> Names:
    """Anonymous values; the module path is metadata, the same for a module called twice."""
    numbers = iter(range(10**6))

    def name(node: onnx.NodeProto) -> str:
        number = next(numbers)
        if random.random() < 0.7:
            scopes = ["", f"model.layers.{number // 4}", f"model.layers.{number // 4}.proj", node.op_type]
            entry = node.metadata_props.add()
            entry.key, entry.value = NAME_SCOPES, repr(scopes)
        return f"node_{node.op_type}_{number}"

    return {old: f"val_{number}" for number, old in enumerate(value_names(proto))}, name


def _optimum(proto: onnx.ModelProto, random: random.Random) -> Names:
    numbers = iter(range(10**6))
    values = {
        old: f"/model/layers.{number // 4}/m{number}/MatMul_output_0"
        for number, old in enumerate(value_names(proto))
    }
    return values, lambda node: f"/model/layers.0/m{next(numbers)}/{node.op_type}"


def _nameless(proto: onnx.ModelProto, random: random.Random) -> Names:
    return {}, lambda node: ""


def _duplicate(proto: onnx.ModelProto, random: random.Random) -> Names:
    return {}, lambda node: random.choice(("a", "b", "a_2", "/a/MatMul"))


# What the passes call new values and nodes: constants of their own, or behind a value's or a layer's name.
_CONSTANTS = ("one", "last_axis", "smallest_range", "largest_e4m3", "all_axes_but_0_of_2", "minus.x.scale")
_BEHIND = (
    *(".scale", ".x8", ".float", ".dequantized", ".codes", ".row_scales", ".bias", ".amax", ".quantized"),
    *("/MatMul", "/w_hat", "/w8", "/cast", "_2"),
)


def _ours(proto: onnx.ModelProto, random: random.Random) -> Names:
    """Values and nodes have names that the passes would give theirs."""
    names = value_names(proto)
    known = {*names, *(item.name for item in (*proto.graph.input, *proto.graph.output))}
    layers = [node.name for node in proto.graph.node if node.op_type in ("MatMul", "Gemm")]
    wanted = [f"zqfp.{name}" for name in _CONSTANTS]
    wanted += [f"{base}{tail}" for base in [*known, *layers] for tail in _BEHIND]
    wanted = sorted(set(wanted) - known)
    random.shuffle(wanted)
    taken = [name for name in names if random.random() < 0.3]
    values = dict(zip(taken, wanted, strict=False))
    nodes = iter(wanted[::-1])
    return values, lambda node: next(nodes) if random.random() < 0.3 else node.name
