"""What needs no GPU of tools/bench_gemm.py and gpu_session.sh: rows, contenders that fail, the summary."""

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def bench(repo_root):
    sys.path.insert(0, str(repo_root / "tools"))
    import bench_gemm

    return bench_gemm


class Clock:
    """A timer of calls that return their microseconds."""

    def median_us(self, call):
        return call()


def row(m, **us):
    case = {
        "n": 64,
        "k": 128,
        "m": m,
        "group_size": 64,
        "constraint": "e4m3",
        "lorc_rank": 0,
        "hardware": "x",
    }
    return {**case, "us": us, "quantizer_us": 1.0, "gbps": 2.0, "tflops": 3.0, "relative_error": 0.1}


def test_a_failing_contender_costs_its_own_column_and_the_fastest_counts(bench, capsys):
    def fails():
        raise MemoryError("no room\nfor it")

    mine = row(4, zqfp=5.0)
    for name, call in (
        ("fp16", fails),
        ("cutlass_e2m1", lambda: 9.0),
        ("cutlass_e2m1", lambda: 7.0),
        ("x", lambda: 8.0),
    ):
        bench.add_time(mine, name, call, Clock())
    assert mine["us"] == {"zqfp": 5.0, "cutlass_e2m1": 7.0, "x": 8.0}
    assert capsys.readouterr().err == "fp16 does not run for M = 4: no room\n"


def test_wrong_results_are_shown_and_not_written(bench, tmp_path, capsys):
    path = tmp_path / "gemm.json"
    bench.write_rows([row(1, zqfp=3.0), row(16, fp16=4.0)], path)
    bench.write_rows([row(1, zqfp=2.0, fp16=4.0), row(8, zqfp=2.5)], path)
    assert [(r["m"], r["us"]["zqfp"]) for r in json.loads(path.read_text())] == [(1, 2.0), (8, 2.5)]
    bench.print_table([row(1, zqfp=3.0), row(16, fp16=4.0)], 3000, 1400, 4.5)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[6:8] == ["3.0", "-"] and second.split()[6:8] == ["-", "4.0"]


def test_contenders_can_be_named(bench):
    assert bench.names("fp16,ort_nbits") == ("fp16", "ort_nbits") and bench.names("") == ()
    with pytest.raises(Exception, match="cutlas: choose from cublaslt_fp8"):
        bench.names("cutlas")


def test_a_session_goes_on_after_failures_and_says_why(repo_root, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("it would measure")
    done = subprocess.run(
        ["tools/gpu_session.sh", "table", "check"],
        cwd=repo_root,
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and len(done.stdout) < 12000
    assert "==== table: exit 2" in done.stdout and "there is no CUDA GPU" in done.stdout
    assert "==== check: exit 6" in done.stdout and "no CUDAExecutionProvider" in done.stdout
    assert "decode-zqfp" not in done.stdout
    assert (tmp_path / "session.log").read_text().count("====") == 2
