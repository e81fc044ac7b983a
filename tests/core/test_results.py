"""tools/results.py, and the committed docs/results/accuracy.json."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROW = {
    "model": "m",
    "text": "WikiText-2 test",
    "method": "torch",
    "algorithm": "gptq",
    "weights": "fp4-e2m1",
    "activations": "fp8-e4m3 per tensor",
    "constraint": "m2",
    "group_size": 64,
    "lorc_rank": 0,
    "bits_per_weight": 4.17,
    "perplexity": 21.2,
    "reference_perplexity": 17.95,
    "command": "python tools/paper_table.py",
    "hardware": "NVIDIA H200",
    "date": "2026-11-22",
}


@pytest.fixture(scope="module")
def results(repo_root: Path):
    sys.path.insert(0, str(repo_root / "tools"))
    import results

    return results


def test_rows_are_replaced_by_configuration_and_sorted(results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "accuracy.json"
    for rank in (32, 8, 0):
        results.add_row(path, {**ROW, "lorc_rank": rank})
    results.add_row(path, {**ROW, "lorc_rank": 8, "perplexity": 20.0, "date": "2026-11-23"})
    results.add_row(path, {**ROW, "constraint": None, "group_size": None})
    rows = results.read_rows(path)
    assert [(row["constraint"], row["lorc_rank"]) for row in rows] == [
        (None, 0),
        ("m2", 0),
        ("m2", 8),
        ("m2", 32),
    ]
    assert rows[2]["perplexity"] == 20.0
    assert list(rows[0]) == list(results.FIELDS)
    assert [child.name for child in path.parent.iterdir()] == ["accuracy.json"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("weights", None),
        ("constraint", "m3"),
        ("group_size", -1),
        ("lorc_rank", 1.5),
        ("lorc_rank", True),
        ("bits_per_weight", 0),
        ("perplexity", float("inf")),
        ("perplexity", float("nan")),
        ("reference_perplexity", "17.95"),
        ("date", "22.11.2026"),
        ("date", "20261122"),
    ],
)
def test_bad_values_are_refused_by_name(results, tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "accuracy.json"
    with pytest.raises(ValueError, match=field):
        results.add_row(path, {**ROW, field: value})
    assert not path.exists()


def test_fields_are_exactly_those(results, tmp_path: Path) -> None:
    row = {**ROW, "seconds": 3}
    del row["command"]
    with pytest.raises(ValueError, match=r"missing \['command'\], unknown \['seconds'\]"):
        results.add_row(tmp_path / "accuracy.json", row)


def test_a_damaged_file_is_not_overwritten(results, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps([ROW, {"model": "m"}]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="row 1"):
        results.add_row(path, ROW)
    assert path.read_bytes() == before


def test_writers_do_not_lose_each_others_rows(repo_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    script = (
        "import sys, json, pathlib; sys.path.insert(0, sys.argv[1]); import results\n"
        "row = json.loads(sys.argv[3])\n"
        "for i in range(15): results.add_row(pathlib.Path(sys.argv[2]), {**row, 'lorc_rank': i})\n"
    )

    def write(model: str) -> int:
        row = json.dumps({**ROW, "model": model})
        command = [sys.executable, "-c", script, str(repo_root / "tools"), str(path), row]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, "abc")) == [0, 0, 0]
    assert len(json.loads(path.read_text())) == 45


def test_the_committed_rows_are_valid(results, repo_root: Path) -> None:
    path = repo_root / "docs" / "results" / "accuracy.json"
    assert results.read_rows(path) or path.read_text() == "[]\n"


def test_hardware_names_the_cpu(results) -> None:
    assert results.hardware("cpu").endswith("cores")
