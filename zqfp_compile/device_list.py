"""What ``--devices`` lists."""

from __future__ import annotations

import re

from zqfp_compile.errors import UsageError


def parse_devices(text: str) -> tuple[str, ...]:
    """Read ``cuda:0,cuda:1``, or ``cpu`` once for every thread that is to compute; ``cuda`` is ``cuda:0``.

    Raises:
        UsageError: When a name is no device, a GPU comes twice, or CPU and GPU are mixed, which round
            differently.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", name):
            raise UsageError(f"--devices: {name[:80]!r} is no device; write cpu, or GPUs as cuda:0,cuda:1")
    devices = tuple(name if name == "cpu" else f"cuda:{int(name.partition(':')[2] or 0)}" for name in names)
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise UsageError("--devices: CPU and GPU round differently; list GPUs alone, or cpu")
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus):
        raise UsageError(f"--devices: {text[:80]} lists a GPU twice; once is enough")
    return devices
