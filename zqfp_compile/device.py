"""Which processor computes, in torch and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zqfp_compile.backends.ort import import_onnxruntime
from zqfp_compile.errors import MissingDependencyError

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
# What the CUDA provider has no kernels for is the CPU's.
CUDA_PROVIDERS = (CUDA_PROVIDER, CPU_PROVIDER)


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


def torch_devices(choice: str, listed: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the devices to compute on: those ``listed`` (``cpu``, ``cuda:0``), else :func:`torch_device`'s.

    Raises:
        MissingDependencyError: When torch cannot use one of them.
    """
    import torch

    found = tuple(listed) or (torch_device(choice),)
    for device in found if listed else ():
        if device != "cpu" and int(device.partition(":")[2]) >= torch.cuda.device_count():
            raise MissingDependencyError(
                f"--devices {device}: torch {torch.__version__} finds {torch.cuda.device_count()} GPUs; list "
                "those that are there, or use --device cpu"
            )
    return found


def providers_for(device: str) -> tuple[str, ...]:
    """Return ONNX Runtime's providers for a device; without its CUDA provider the CPU does the work."""
    if device.startswith("cuda") and CUDA_PROVIDER in import_onnxruntime().get_available_providers():
        return CUDA_PROVIDERS
    return (CPU_PROVIDER,)


def activation_room(devices: Sequence[str]) -> dict[str, int]:
    """Return by GPU (``cuda:0``) the bytes of its memory that a walk may fill with activations."""
    names = {device if ":" in device else f"{device}:0" for device in devices if device != "cpu"}
    return {name: (free_memory(name) or 0) // 2 for name in sorted(names)}


def free_memory(device: str) -> int | None:
    """Return the bytes that are free on ``cpu`` or a GPU; ``None`` where the system does not say."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
