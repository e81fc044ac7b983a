"""Folders that huggingface_hub downloads into: blobs named by their hash, a snapshot of links to them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def snapshot_of(files: Path, cache: Path, name: str = "models--org--name") -> Path:
    """Move all files under ``files`` into the cache; return the folder of the snapshot with links to them."""
    blobs, revision = cache / name / "blobs", cache / name / "snapshots" / ("5" * 40)
    blobs.mkdir(parents=True)
    for file in [path for path in files.rglob("*") if path.is_file()]:
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        link = revision / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return revision
