"""Which file of a folder runs, and that it is the one the compile wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zqfp_compile.backends.trt_api import MODULES
from zqfp_compile.companions import companion_folder
from zqfp_compile.disk import file_sha256
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.output_folder import ARTIFACT, MANIFEST, ORT_MODEL
from zqfp_compile.text_file import COMPANION_BYTES, UnreadableError, read_text

ENGINES = tuple(f"{target}.engine" for target in MODULES)
_PLAIN_MODEL = "model.onnx"


@dataclass(frozen=True)
class ModelFolder:
    """A compiled folder, or the folder of an ONNX model.

    Attributes:
        path: The folder.
        file: The one file to run when the caller named it, else ``None``.
        digests: SHA-256 per file name out of ``manifest.json``; ``None`` for a folder without one.
    """

    path: Path
    file: str | None
    digests: Mapping[str, str] | None

    @classmethod
    def of(cls, path: Path) -> ModelFolder:
        """Look at a folder, or at the folder of a file.

        Raises:
            UsageError: When nothing is there.
            ModelError: When the manifest is missing or cannot be read.
        """
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder; give a compiled folder or a model")
        folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
        if not (folder / MANIFEST).exists():
            if (folder / ARTIFACT).is_file():
                raise ModelError(f"{folder}: has no {MANIFEST}, so the copy is not complete; copy it all")
            return cls(folder, file, None)
        return cls(folder, file, _read_digests(folder / MANIFEST))

    def onnx_model(self) -> Path:
        """Return the model for ONNX Runtime, the one made for it if there is one, checked.

        Raises:
            UsageError: When there is none, or several to choose from.
            ModelError: When a file differs from the manifest.
        """
        name = self.file or self._find_onnx()
        if self.digests is not None:
            data = f"{name}.data"  # the one file save_model puts weights in
            for used in (name, data) if data in self.digests else (name,):
                self.verified(used)
        return self.path / name

    def engine(self) -> Path | None:
        """Return the TensorRT or TensorRT-RTX engine, checked; ``None`` when there is none.

        Raises:
            ModelError: When it differs from the manifest.
        """
        candidates = ENGINES if self.file is None else (self.file,)
        for name in candidates:
            if not name.endswith(".onnx") and self._has(name):
                return self.verified(name)
        return None

    def companion(self, name: str) -> Path | None:
        """Return a file that came along with the model, such as its tokenizer, checked; ``None``: not there.

        Raises:
            ModelError: When it differs from the manifest.
        """
        if self.digests is None:
            path = companion_folder(self.path / (self.file or _PLAIN_MODEL)) / name
            return path if path.exists() else None
        return self.verified(name) if self._has(name) else None

    def read_text(self, name: str) -> str | None:
        """Return what a companion says; ``None``: not there.

        Raises:
            ModelError: When it differs from the manifest, is too large, or is no UTF-8 text.
        """
        path = self.companion(name)
        try:
            return None if path is None else read_text(path, COMPANION_BYTES)
        except UnreadableError as error:
            raise ModelError(f"{path}: cannot be read ({error}); export the model again") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object a companion holds; empty: not there.

        Raises:
            ModelError: When it differs from the manifest or holds something else.
        """
        text = self.read_text(name)
        try:
            value = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{self.path / name}: is no JSON; export the model again") from error
        if not isinstance(value, dict):
            raise ModelError(f"{self.path / name}: holds no JSON object; export the model again")
        return value

    def verified(self, name: str) -> Path:
        """Return the path of a file after comparing it with the manifest.

        Raises:
            ModelError: When it is missing, not listed or not what the compile wrote.
        """
        path = self.path / name
        if self.digests is None:
            return path
        if name not in self.digests:
            raise ModelError(f"{path}: not in {MANIFEST}, so this compile did not write it; remove it")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: is not a regular file; copy it again, or compile again")
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise ModelError(
                f"{path}: {MANIFEST} lists it and it cannot be read ({error.strerror}); copy it again, or "
                "compile again"
            ) from error
        if digest != self.digests[name]:
            raise ModelError(
                f"{path}: has changed since the compile (SHA-256 {digest[:12]}..., {MANIFEST} says "
                f"{self.digests[name][:12]}...); copy it again, or compile again"
            )
        return path

    def _has(self, name: str) -> bool:
        """Whether a file is there, or should be."""
        return (self.digests is not None and name in self.digests) or (self.path / name).exists()

    def _find_onnx(self) -> str:
        for name in (ORT_MODEL, ARTIFACT) if self.digests is not None else (_PLAIN_MODEL,):
            if self._has(name):
                return name
        names = sorted(path.name for path in self.path.glob("*.onnx"))
        if self.digests is None and len(names) == 1:
            return names[0]
        found = f"has {', '.join(names)}" if names else "has no .onnx file"
        raise UsageError(f"{self.path}: {found}; give a compiled folder or the path of one model")


def _read_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 per file; the manifest may be anybody's."""
    try:
        manifest: Any = json.loads(read_text(path, COMPANION_BYTES))
        digests = {str(name): facts["sha256"] for name, facts in manifest["files"].items()}
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests.values()):
            raise ValueError("a sha256 is none")
    except UnreadableError as error:
        raise ModelError(f"{path}: cannot be read ({error}); copy the folder or compile again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path}: is no manifest of zqfp-compile; copy the folder or compile again"
        ) from error
    return digests
