"""Which GPU architecture an engine is built for."""

from __future__ import annotations

from zqfp_compile.backends import gpu
from zqfp_compile.backends.trt_api import TrtModule
from zqfp_compile.errors import UsageError

DEFAULT_CAPABILITY = "89"


def chooses_capability(trt: TrtModule) -> bool:
    """Return whether the library builds for other architectures than this machine's: TensorRT-RTX does."""
    return hasattr(getattr(trt, "IBuilderConfig", None), "set_compute_capability")


def settle_capability(trt: TrtModule, wanted: str | None, label: str) -> str:
    """Return the architecture as digits, such as ``"89"``; ``"unknown"`` where there is no GPU to ask.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        wanted: ``--compute-capability``; ``None`` takes the GPU here, or 89 without one.
        label: What to call the library in an error.

    Raises:
        UsageError: The library does not build for it.
    """
    here = gpu.compute_capabilities()
    if not chooses_capability(trt):
        if wanted is not None and wanted not in here:
            raise UsageError(
                f"--compute-capability {wanted}: {label} builds for the GPU in this machine only "
                f"({', '.join(here) or 'none found'}); leave the option out"
            )
        return here[0] if here else "unknown"
    known = getattr(trt, "ComputeCapability").__members__  # noqa: B009  TensorRT-RTX only
    if wanted is None:
        wanted = next((digits for digits in here if f"SM{digits}" in known), DEFAULT_CAPABILITY)
    if f"SM{wanted}" not in known:
        choices = ", ".join(name[2:] for name in known if name.startswith("SM"))
        raise UsageError(f"--compute-capability {wanted}: {label} builds for {choices}")
    return wanted
