"""Which processor torch computes on."""

from __future__ import annotations

from zqfp_compile.errors import MissingDependencyError


def torch_device(choice: str) -> str:
    """Return ``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``; ``auto`` takes a GPU that torch can use.

    Raises:
        MissingDependencyError: When ``cuda`` is asked for and torch cannot use one.
    """
    import torch

    if choice == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if choice == "cuda":
        raise MissingDependencyError(
            f"--device cuda: torch {torch.__version__} finds no GPU; install a CUDA build of torch, "
            "or use --device cpu"
        )
    return "cpu"
