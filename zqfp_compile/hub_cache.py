"""Models in the cache of huggingface_hub, where every file is a symbolic link to a blob of its repository::

    models--ORG--NAME/snapshots/REVISION/onnx/model.onnx_data -> ../../../blobs/HASH

These links are followed; all others out of a model's folder are refused, because what they lead to may be
anybody's file.
"""

from __future__ import annotations

import os
from pathlib import Path


def snapshot(folder: Path) -> Path | None:
    """Return the real path of the snapshot that ``folder`` is, or is in; ``None`` when it is in none."""
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return place
    return None


class HubLinks:
    """The links of one model's folder into the ``blobs`` of the repository that its snapshot is of."""

    def __init__(self, folder: Path) -> None:
        """Look for the snapshot that ``folder`` is in; without one nothing is a link."""
        self._folder = os.path.realpath(folder)
        self._root = snapshot(folder)

    def blob(self, location: str) -> Path | None:
        """Return the real path of the blob that the file ``location`` of the folder links to.

        ``None`` when the folder is in no snapshot, or the file leads elsewhere than right into the ``blobs``
        of the same repository. The blob need not exist.
        """
        if self._root is None:
            return None
        named = Path(os.path.normpath(os.path.join(self._folder, location)))  # noqa: PTH118
        real = Path(os.path.realpath(named))
        # The file alone may be a link, no folder on the way to it.
        linked = named.is_symlink() and Path(os.path.realpath(named.parent)) == named.parent
        return real if linked and real.parent == self._root.parents[1] / "blobs" else None
