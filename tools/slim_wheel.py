"""Make a wheel small enough to carry to a GPU machine without network: device code for one architecture only.

    python -m pip download --no-deps onnxruntime-gpu
    python tools/slim_wheel.py onnxruntime_gpu-*.whl --sm 90 --output slim/ --drop '*providers_tensorrt.so' \
        --drop '*libonnxruntime.so.*' --drop '*/transformers/*' --drop '*/tools/*'

In every library of the wheel, the images (cubins, PTX) of other architectures are overwritten with zeros: the
CUDA runtime reads none of them on a GPU that has its own. Members are compressed with LZMA, which pip knows.
onnxruntime-gpu 1.31.1 goes from 256 to 61 MB.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import struct
import sys
import zipfile
from pathlib import Path

# A fat binary of CUDA: header (magic, version 1, its 16 bytes, size of what follows), then images, each with
# a header: kind, version, header size, payload size, ..., architecture at byte 28.
_MAGIC, _HEADER = 0xBA55ED50, struct.Struct("<IHHQ")
_IMAGE = struct.Struct("<HHIQ12xI")
_CUBIN = 2


def strip_images(library: bytearray, sm: int) -> int:
    """Overwrite the images that are no cubins for ``sm`` (90: sm_90 and sm_90a); return how many bytes."""
    stripped, at = 0, 0
    while (at := library.find(_MAGIC.to_bytes(4, "little"), at)) >= 0:
        _, version, header, size = _HEADER.unpack_from(library, at)
        image, end = at + header, at + header + size
        at += 4
        if (version, header) != (1, _HEADER.size) or end > len(library):
            continue
        while image < end:
            kind, _, image_header, payload, architecture = _IMAGE.unpack_from(library, image)
            start, image = image + image_header, image + image_header + payload
            if (kind, architecture) != (_CUBIN, sm):
                library[start:image] = bytes(payload)
                stripped += payload
        at = end
    return stripped


def slim(source: Path, target: Path, sm: int, drop: list[str]) -> None:
    """Write ``source`` without the members that match ``drop``, and without other architectures' images."""
    record: list[str] = []
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as new:
        for info in old.infolist():
            if info.is_dir() or any(fnmatch.fnmatch(info.filename, pattern) for pattern in drop):
                continue
            if info.filename.endswith(".dist-info/RECORD"):
                record_name = info.filename
                continue
            content = bytearray(old.read(info))
            if ".so" in Path(info.filename).name:
                stripped = strip_images(content, sm)
                print(f"{info.filename}: {stripped / 1e6:.0f} of {len(content) / 1e6:.0f} MB are for others")
            new.writestr(info.filename, bytes(content))
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            record.append(f"{info.filename},sha256={digest},{len(content)}")
        new.writestr(record_name, "\n".join([*record, f"{record_name},,", ""]))


def main() -> int:
    """Parse the command line and write the wheel under its own name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sm", type=int, required=True, help="the architecture to keep, 90 for an H100")
    parser.add_argument("--output", type=Path, required=True, help="folder for the new wheel")
    parser.add_argument("--drop", action="append", default=[], help="members to leave out, a pattern")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / options.wheel.name
    slim(options.wheel, target, options.sm, options.drop)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
