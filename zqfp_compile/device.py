"""Which processor computes, in torch and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from zqfp_compile.backends.ort import import_onnxruntime
from zqfp_compile.errors import MissingDependencyError

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"


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


def providers_for(device: str) -> tuple[str, ...]:
    """Return ONNX Runtime's providers for a device; without its CUDA provider the CPU does the work."""
    if device == "cuda" and CUDA_PROVIDER in import_onnxruntime().get_available_providers():
        return (CUDA_PROVIDER, CPU_PROVIDER)
    return (CPU_PROVIDER,)


def activation_room(device: str) -> int:
    """Return the bytes of a GPU's memory that activations of a walk may take; 0 on a CPU."""
    return (free_memory(device) or 0) // 2 if device == "cuda" else 0


def free_memory(device: str) -> int | None:
    """Return the bytes that are free on ``cpu`` or ``cuda``; ``None`` where the system does not say."""
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
