"""Executors: the same results whoever works, as they are finished, errors in one line, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import pytest

from zqfp_compile.disk import DiskFullError
from zqfp_compile.errors import MissingDependencyError, ModelError, UsageError
from zqfp_compile.parallel.choice import WORTH_PROCESSES, Workers
from zqfp_compile.parallel.executor import InProcess, attempt
from zqfp_compile.parallel.processes import Processes


# Work of the standard library: the workers of a test do not see this file.
def test_every_item_comes_once_with_its_result() -> None:
    items = [5, 3, 0, 8, 1, 13, 2]
    with Processes(2) as processes:
        for executor in (processes, InProcess()):
            assert sorted(executor.as_completed(str, items)) == list(enumerate(map(str, items)))
        assert sorted(processes.as_completed(len, ["again", "the same workers"])) == [(0, 5), (1, 16)]
        assert list(processes.as_completed(str, [])) == []


def test_what_is_finished_does_not_wait_for_a_slow_item(tmp_path: Path) -> None:
    """It would be lost if the compile were killed: the first item ends when the others have been taken."""
    last = tmp_path / "others-are-taken"
    wait = f"import os, time\nfor _ in range(3000):\n os.path.exists({str(last)!r}) or time.sleep(0.01)"
    with Processes(2) as processes:
        taken = processes.as_completed(exec, [wait, "1", "2", "3", "4"])
        assert sorted(index for index, _ in islice(taken, 4)) == [1, 2, 3, 4]
        last.touch()
        assert list(taken) == [(0, None)]


def test_few_are_ahead_of_the_one_taken(tmp_path: Path) -> None:
    """Results that nobody takes must not pile up in memory."""
    folders = [str(tmp_path / str(index)) for index in range(20)]
    with Processes(2) as processes:
        results = processes.as_completed(os.mkdir, folders)
        next(results)
        time.sleep(0.5)
        assert len(list(tmp_path.iterdir())) <= 5
        assert len(list(results)) == 19


def test_errors_are_those_of_the_work() -> None:
    with Processes(2) as processes:
        with pytest.raises(RuntimeError, match=r"in a worker: Traceback[\s\S]*ZeroDivisionError"):
            list(processes.as_completed(eval, ["1 / 0", "__import__('time').sleep(0.3) or 7"]))
        assert sorted(processes.as_completed(eval, ["1", "2"])) == [(0, 1), (1, 2)], (
            "nothing of the failed one is left"
        )


def test_diagnosed_errors_keep_their_class_and_line(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ModelError, match="weight 'w': 3 values are NaN"):
        attempt(fail, ModelError("weight 'w': 3 values are NaN")).unwrap()
    with pytest.raises(MissingDependencyError, match="the disk is full"):  # a subclass with other arguments
        attempt(fail, DiskFullError(tmp_path, "no space", 1, 2)).unwrap()
    with pytest.raises(MissingDependencyError, match="out of memory"):
        attempt(fail, MemoryError()).unwrap()


def test_a_killed_worker_is_one_line() -> None:
    with Processes(2) as processes, pytest.raises(MissingDependencyError, match=r"killed.*--jobs") as caught:
        list(processes.as_completed(eval, ["1", "__import__('os').kill(__import__('os').getpid(), 9)", "3"]))
    assert "\n" not in str(caught.value)


def test_a_crashed_worker_is_one_line() -> None:
    with Processes(2) as processes, pytest.raises(MissingDependencyError, match=r"ended.*--jobs 1"):
        list(processes.as_completed(eval, ["__import__('os')._exit(3)"]))


_PARENT = """
import sys
from zqfp_compile.parallel.processes import Processes

with Processes(2) as processes:
    items = ["__import__('os').getpid()"] * 2 + ["__import__('time').sleep(60)"] * 2
    results = processes.as_completed(eval, items)
    print(next(results)[1], next(results)[1], flush=True)
    next(results)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(number: int) -> None:
    """In the middle of an item, however the parent ends."""
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_PARENT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert parent.stdout is not None
    workers = parent.stdout.readline().split()
    assert workers
    parent.send_signal(number)
    parent.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(worker) for worker in workers)


def _runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_who_works() -> None:
    """One process per core where it pays, what was asked for otherwise."""
    assert Workers().processes([1 << 20] * 100) == 1
    assert Workers().processes([WORTH_PROCESSES // 4] * 4) >= 1
    assert Workers(3).processes([1, 1, 1, 1]) == 3 and Workers(3).processes([1, 1]) == 2
    with Workers(1).executor([1]) as executor:
        assert isinstance(executor, InProcess)
    with pytest.raises(UsageError, match="--jobs: 0 is below 1"):
        Workers(0)
    with pytest.raises(UsageError, match="drop one"):
        Workers(2, "auto")


def test_no_cluster_is_one_line() -> None:
    pytest.importorskip("ray")
    wanted = r"--cluster 127\.0\.0\.1:1: cannot be reached"
    workers = Workers(cluster="127.0.0.1:1")
    with pytest.raises(MissingDependencyError, match=wanted) as caught, workers.executor([1]):
        pytest.fail("there is none")
    assert "\n" not in str(caught.value)
