"""Exports the tiny test models by optimum-onnx. Runs in its own environment, see requirements-optimum.txt.

    python -m venv .venv-optimum
    .venv-optimum/bin/python -m pip install -r models/requirements-optimum.txt
    .venv-optimum/bin/python models/export_tiny_optimum.py --output build/models/optimum

Writes ``<output>/<family>-<dtype>/`` with ``model.onnx``, ``config.json`` and ``tokenizer.json``; the
weights are those of ``tiny.py``. The whole output folder is replaced.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from atomic_folder import atomic_folder
from tiny_models import FAMILIES, make_model, write_tokenizer

DTYPES = ("float32", "float16")
OPSET = 18


def export(family: str, dtype: str, folder: Path) -> None:
    """Export one tiny model with its KV cache as ``folder/model.onnx``."""
    from optimum.exporters.onnx import onnx_export_from_model

    folder.mkdir()
    model = make_model(family, dtype)
    onnx_export_from_model(
        model,
        folder,
        task="text-generation-with-past",
        opset=OPSET,
        do_validation=False,
        no_post_process=True,
    )
    write_tokenizer(folder / "tokenizer.json")


def main() -> None:
    """Parse the arguments and export every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the models' folders into")
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    with atomic_folder(output) as temporary:
        for family in FAMILIES:
            for dtype in DTYPES:
                export(family, dtype, temporary / f"{family}-{dtype}")
                print(output / f"{family}-{dtype}" / "model.onnx", flush=True)


if __name__ == "__main__":
    main()
