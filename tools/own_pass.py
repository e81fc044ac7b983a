"""A pass of one's own in front of a compile: copy this file and write yours (docs/writing_a_pass.md)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from zqfp_compile import Recipe, compile_model, load_model
from zqfp_compile.pass_base import Declined, Pass, PassResult


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Let whoever reads an Identity read its input.

    Before::

        i = Identity(x)
        y = MatMul(i, w)

    After::

        y = MatMul(x, w)

    An Identity whose result is a graph output stays: its name is part of the interface.
    """

    name: ClassVar[str] = "drop-identity"

    def call(self, model: ir.Model) -> PassResult:
        """Drop the nodes from the main graph of ``model``, in place."""
        declined = []
        modified = False
        for node in list(model.graph):
            if node.op_type != "Identity" or node.domain != "" or node.inputs[0] is None:
                continue
            if node.outputs[0].is_graph_output():
                declined.append(Declined(str(node.name), "its result is a graph output"))
                continue
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
            modified = True
        return PassResult(model, modified, tuple(declined))


def main() -> None:
    """Run the pass on a model, say what it did, and compile what comes out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the .onnx file; its tokenizer.json lies beside it")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--recipe", type=Path, help="options, as zqfp-compile writes them")
    options = parser.parse_args()

    result = DropIdentity().call(load_model(options.model))
    print("changed" if result.modified else "nothing to do")
    for declined in result.declined:
        print(f"{declined.place} stays: {declined.reason}")

    recipe = Recipe.from_yaml(options.recipe) if options.recipe else Recipe()
    compiled = compile_model(result.model, recipe, output=options.output, folder=options.model.parent)
    print(*compiled.summary(), sep="\n")


if __name__ == "__main__":
    main()
