"""Exports the tiny test models by torch.onnx: every family in float32, float16 and bfloat16.

    python models/tiny.py --output build/models/tiny

Writes ``<output>/<family>-<dtype>/`` with ``model.onnx``, ``config.json`` and ``tokenizer.json``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when loaded by the tests

from atomic_folder import atomic_folder
from causal_lm_export import export, prepare_for_export
from tiny_models import FAMILIES, make_model, write_tokenizer

DTYPES = ("float32", "float16", "bfloat16")


def build_tiny(family: str, dtype: str, folder: Path) -> Path:
    """Export one tiny model by torch.onnx into ``folder`` (replaced at the end); return the model."""
    with atomic_folder(folder) as temporary:
        model = make_model(family, dtype)
        write_tokenizer(temporary / "tokenizer.json")
        model.config.save_pretrained(temporary)
        export(prepare_for_export(model), temporary / "model.onnx", external_data=False)
    return folder / "model.onnx"


def main() -> None:
    """Parse the arguments and export every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the models' folders into")
    output = parser.parse_args().output
    for family in FAMILIES:
        for dtype in DTYPES:
            print(build_tiny(family, dtype, output / f"{family}-{dtype}"), flush=True)


if __name__ == "__main__":
    main()
