"""tools/paper_table.py on a tiny model: rows, resuming, publishing, failures."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the harness runs transformers models")

ROWS = r"a8/int8-asym/token|w4a8/fp-fp/gptq$|constraint/m2/ours/lorc32|weights/fp8-e5m2/rtn"


@pytest.fixture(scope="module")
def paper_table(repo_root: Path):
    sys.path.insert(0, str(repo_root / "tools"))
    import paper_table

    return paper_table


@pytest.fixture(scope="module")
def inputs(models_folder: Path, tmp_path_factory) -> list[str]:
    from tiny_models import make_model, write_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder / "tiny")
    write_tokenizer(folder / "tiny" / "tokenizer.json")
    text = " ".join(f"the man in number {i} , or {i * i} @-@ ly" for i in range(60))
    for name in ("valid.txt", "test.txt"):
        (folder / name).write_text(text if name == "valid.txt" else text[::-1])
    small = ["--samples", "4", "--length", "32", "--limit-tokens", "200"]
    files = {"--model": "tiny", "--calibration": "valid.txt", "--test": "test.txt"}
    return [*(part for flag, name in files.items() for part in (flag, str(folder / name))), *small]


def test_rows_are_measured_resumed_and_published(paper_table, inputs, tmp_path, capsys, monkeypatch) -> None:
    state, table, published = tmp_path / "s.jsonl", tmp_path / "t.md", tmp_path / "accuracy.json"
    arguments = [*inputs, "--rows", ROWS, "--state", str(state), "--table", str(table)]
    assert paper_table.main(arguments) == 0
    records = [json.loads(line) for line in state.read_text().splitlines()]
    assert [record["name"] for record in records] == [
        "w16a16",
        "a8/int8-asym/token",
        "w4a8/fp-fp/gptq",
        "weights/fp8-e5m2/rtn",
        "constraint/m2/ours/lorc32",
    ]
    assert len({record["perplexity"] for record in records}) == 5
    assert all(record["seconds"] >= 0 and record["hardware"] and record["date"] for record in records)

    # A killed process left half a line: that row alone is measured again.
    state.write_text("\n".join(json.dumps(record) for record in records[:-1]) + '\n{"key": "half')
    measured = []
    real = paper_table.Bench.measure
    monkeypatch.setattr(
        paper_table.Bench, "measure", lambda self, config: measured.append(config) or real(self, config)
    )
    assert paper_table.main([*arguments, "--publish", str(published)]) == 0
    assert [config.lorc_rank for config in measured] == [32]
    assert json.loads(state.read_text().splitlines()[-1])["perplexity"] == records[-1]["perplexity"]

    assert len(table.read_text().splitlines()) == 2 + 5
    rows = {(row["weights"], row["activations"]): row for row in json.loads(published.read_text())}
    assert len(rows) == 5
    ours = rows["fp4-e2m1", "fp8-e4m3 per tensor"]
    assert (ours["constraint"], ours["group_size"], ours["lorc_rank"]) == ("m2", 64, 32)
    assert ours["reference_perplexity"] == round(records[0]["perplexity"], 4)
    assert "sweeps=" in ours["method"]
    assert "--rows" in ours["command"]
    assert rows["fp8-e5m2", "fp8-e4m3 per tensor"]["constraint"] is None
    assert rows["none", "int8-asym per token"]["algorithm"] == "none"


def test_configurations_of_ones_own_and_a_row_that_fails(
    paper_table, inputs, tmp_path, capsys, monkeypatch
) -> None:
    configs = tmp_path / "c.json"
    configs.write_text(
        json.dumps([{"name": "bad", "weights": "int8"}, {"weights": "none", "activations": "int8"}])
    )
    real = paper_table.Bench.measure

    def measure(self, config):
        if config is not None and config.weights == "int8":
            raise RuntimeError("out of memory")
        return real(self, config)

    monkeypatch.setattr(paper_table.Bench, "measure", measure)
    assert paper_table.main([*inputs, "--configs", str(configs), "--state", str(tmp_path / "s")]) == 1
    printed = capsys.readouterr().out
    assert "bad: FAILED, RuntimeError: out of memory" in printed
    assert '"activations": "int8"' in printed
    assert len((tmp_path / "s").read_text().splitlines()) == 2


def test_shards_cover_every_row_once(paper_table, inputs, tmp_path, monkeypatch) -> None:
    names = []
    figures = {"perplexity": 2.0, "bits_per_weight": 4.0, "quantize_seconds": 1.0, "seconds": 1.0}
    monkeypatch.setattr(paper_table.Bench, "measure", lambda self, config: figures)
    for shard in range(3):
        state = tmp_path / f"{shard}"
        assert paper_table.main([*inputs, "--shard", f"{shard}/3", "--state", str(state)]) == 0
        names += [json.loads(line)["key"] for line in state.read_text().splitlines()]
    rows = paper_table.paper_rows()
    setting = json.loads(names[0])
    assert len(set(names)) == len(
        {json.dumps({**setting, "config": str(config)}) for config in rows.values()}
    )


def test_the_papers_grid_is_complete(paper_table) -> None:
    rows = paper_table.paper_rows()
    for bits in ("w8a8", "w4a8"):
        for kind in ("int-int", "int-fp", "fp-fp"):
            for lorc in ("", "/lorc8"):
                config = rows[f"{bits}/{kind}/gptq{lorc}"]
                assert config.algorithm == "gptq"
                assert (config.lorc_rank, config.lorc_metric) == ((8, "plain") if lorc else (0, "moments"))
                assert config.activations.startswith("fp8" if kind.endswith("fp") else "int8")
                assert config.weights.startswith("fp" if kind.startswith("fp") else "int")
    assert {f"constraint/{c}/ours/lorc32" for c in ("none", "m1", "m2", "e4m3")} <= set(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"weights": "fp3"}]', "fp3"),
        ('[{"wheights": "int8"}]', "wheights"),
        ('[{"name": "a"}, {"name": "a", "lorc_rank": 4}]', "two rows are named a"),
    ],
)
def test_bad_configurations_are_named(paper_table, inputs, tmp_path, capsys, content, message) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    assert paper_table.main([*inputs, "--configs", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_a_pattern_without_rows_is_an_error(paper_table, inputs, capsys) -> None:
    assert paper_table.main([*inputs, "--rows", "w3a8"]) == 2
    assert "no row matches" in capsys.readouterr().err
