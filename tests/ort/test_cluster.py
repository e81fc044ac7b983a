"""A compile on a local Ray cluster of two workers, one of which is killed in the middle: the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("ray")

FAST = ("--target", "none", "--calibration-samples", "1", "--calibration-length", "32", "--no-evaluate", "-v")


@pytest.fixture
def cluster() -> Iterator[tuple[str, int]]:
    """Address and head process of a cluster with two CPUs that lives in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert ray is not None
    # Its sockets need a short path, so not pytest's folder.
    folder = Path(f"/tmp/zqfp-ray-{os.getpid()}")
    command = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}"]
    command += ["--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _wait(lambda: _answers(port), 60)
        yield f"127.0.0.1:{port}", head.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def _busy_workers(head: int) -> list[int]:
    """Worker processes of this cluster that do an item now: Ray writes the task into their name."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            name = (folder / "cmdline").read_bytes()
            # Ray's processes share the session of the head.
            if name.startswith(b"ray::attempt") and os.getsid(int(folder.name)) == os.getsid(head):
                found.append(int(folder.name))
    return found


def _digests(output: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("model.zqfp.onnx*")
    }


@pytest.mark.slow
def test_a_worker_is_killed_mid_run(
    tiny_model: Callable[..., Path], tmp_path: Path, cluster: tuple[str, int]
) -> None:
    address, head = cluster
    command = [sys.executable, "-m", "zqfp_compile", str(tiny_model("llama")), *FAST]
    subprocess.run([*command, "--jobs", "1", "-o", str(tmp_path / "here")], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, "--cluster", address, "-o", str(tmp_path / "there")], stderr=subprocess.PIPE, text=True
    )
    # A worker's first item takes it seconds, in which it imports torch.
    _wait(lambda: bool(_busy_workers(head)) or process.poll() is not None, 90)
    victim = _busy_workers(head)[0]
    os.kill(victim, signal.SIGKILL)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert _digests(tmp_path / "here") == _digests(tmp_path / "there") != {}
