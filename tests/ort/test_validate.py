"""zqfp-validate A B: figures are right, gates fail with exit 4, bad input is one line and its exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zqfp_compile import cli_validate
from zqfp_compile.backends.ort import create_session
from zqfp_compile.compare import Gates, compare_models
from zqfp_compile.errors import ModelError, UsageError

VOCAB, HIDDEN = 50, 16


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    outputs: tuple[str, ...] = ("logits",),
    inputs: tuple[str, ...] = ("input_ids",),
    functions: tuple[onnx.FunctionProto, ...] = (),
    dtype: int = TensorProto.FLOAT,
) -> Path:
    types = {"input_ids": TensorProto.INT64, "position_ids": TensorProto.INT64, "x": dtype}
    dims: dict[str, list[Any]] = {"x": ["B", HIDDEN]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, types[name], dims.get(name, ["B", "S"])) for name in inputs],
        [
            helper.make_tensor_value_info(
                name, dtype, ["B", "S", VOCAB] if name.startswith("logits") else None
            )
            for name in outputs
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions), path)
    return path


def weights(noise: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    head = rng.normal(size=(HIDDEN, VOCAB)).astype(np.float32)
    head += noise * np.random.default_rng(2).normal(size=head.shape).astype(np.float32)
    return {"table": table, "head": head}


def lm_nodes(op: str = "MatMul", output: str = "logits", **attributes: Any) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"]),
        helper.make_node(op, ["hidden", "head"], [output], **attributes),
    ]


def language_model(path: Path, noise: float = 0.0, output: str = "logits") -> Path:
    return save(path, lm_nodes(output=output), weights(noise), outputs=(output, "hidden"))


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return language_model(tmp_path / "a" / "model.onnx")


@pytest.fixture
def b(tmp_path: Path) -> Path:
    return language_model(tmp_path / "b" / "model.onnx", noise=0.1)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signal_handlers: None) -> Any:
    """``cli(*args)`` -> (exit code, stdout, stderr), through the installed command's entry point."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["zqfp-validate", *map(str, args)])
        with pytest.raises(SystemExit) as leaving:
            cli_validate.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(leaving.value.code or 0), captured.out, captured.err

    return call


def expected_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [create_session(path).run(["logits"], {"input_ids": row[None]})[0] for row in tokens]
    ).astype(np.float64)


# --- figures


def test_figures_equal_those_computed_from_the_logits(a, b, tmp_path):
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, 20))
    np.savez(tmp_path / "in.npz", input_ids=tokens)
    result = compare_models(a, b, inputs=tmp_path / "in.npz", samples=3)
    exact, other = expected_logits(a, tokens), expected_logits(b, tokens)
    p = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    q = np.exp(other) / np.exp(other).sum(-1, keepdims=True)
    logits = result.outputs[0]
    # Float64 sums of the same float32 logits: only the order of summation differs.
    assert logits.max_abs_error == pytest.approx(np.abs(exact - other).max(), rel=1e-12)
    noise = np.square(exact - other).sum()
    assert logits.sqnr_db == pytest.approx(10 * math.log10(np.square(exact).sum() / noise), abs=1e-9)
    norms = np.linalg.norm(exact) * np.linalg.norm(other)
    assert logits.cosine == pytest.approx((exact * other).sum() / norms, abs=1e-12)
    assert logits.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-9)
    assert logits.top1_agreement == pytest.approx((exact.argmax(-1) == other.argmax(-1)).mean())
    assert (logits.values, result.samples) == (3 * 20 * VOCAB, 3)
    hidden = result.outputs[1]
    assert hidden.equal
    assert (hidden.sqnr_db, hidden.cosine, hidden.kl, hidden.top1_agreement) == (
        math.inf,
        pytest.approx(1),
        None,
        None,
    )


def test_a_model_equals_itself(a, cli):
    code, out, err = cli(a, a, "--min-sqnr", 200, "--min-top1", 100, "--atol", 0)
    assert code == 0
    assert "equal" in out
    assert "100.0%" in out
    assert "RANDOM tokens" in err  # neither has a tokenizer beside it


def test_a_compiled_folder_runs_its_model_local_functions(a, tmp_path, cli):
    body = [
        helper.make_node("Add", ["w", "w"], ["twice"]),
        helper.make_node("MatMul", ["x", "twice"], ["y"]),
    ]
    function = helper.make_function(
        "local", "Doubled", ["x", "w"], ["y"], body, [helper.make_opsetid("", 21)]
    )
    half = weights()
    half["head"] = half["head"] / 2
    save(
        tmp_path / "x.zqfp" / "model.zqfp.onnx",
        lm_nodes("Doubled", domain="local"),
        half,
        functions=(function,),
    )
    code, out, _ = cli(a, tmp_path / "x.zqfp", "--atol", 0)  # halving and doubling are exact
    assert code == 0
    assert "equal" in out


def test_models_with_other_inputs_and_other_logits_names_are_matched(a, tmp_path):
    nodes = [
        helper.make_node("Cast", ["position_ids"], ["p"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["p", "zero"], ["z"]),
        helper.make_node("Unsqueeze", ["z", "last"], ["z3"]),
        *lm_nodes(output="before"),
        helper.make_node("Add", ["before", "z3"], ["logits_out"]),
    ]
    extra = {"zero": np.zeros((), np.float32), "last": np.array([-1])}
    other = save(
        tmp_path / "other.onnx",
        nodes,
        {**weights(), **extra},
        inputs=("input_ids", "position_ids"),
        outputs=("logits_out",),
    )
    result = compare_models(a, other)
    assert [output.name for output in result.outputs] == ["logits"]
    assert result.outputs[0].equal
    assert any("only in" in warning and "hidden" in warning for warning in result.warnings)


# float16 keeps 11 bits, about 66 dB per operation, bfloat16's weights 8, 48 dB; a few layers cost some of it.
@pytest.mark.parametrize(("dtype", "sqnr"), [("float16", 40), ("bfloat16", 20)])
def test_text_goes_through_the_tokenizer_beside_the_model(tiny_model, tmp_path, cli, dtype, sqnr):
    a = tiny_model("llama")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    code, out, _ = cli(
        a, tiny_model("llama", dtype=dtype), "--text", tmp_path / "text.txt",
        "--samples", 2, "--length", 16, "--min-sqnr", sqnr, "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0
    assert "text.txt" in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["inputs"] == "2 x 16 tokens of text.txt"
    names = [output["name"] for output in data["outputs"]]
    assert names[0] == "logits"
    assert len(names) == 5  # and keys and values of two layers
    assert data["outputs"][0]["values"] % (2 * 16) == 0


def test_bfloat16_is_compared_in_float32(tmp_path):
    """The same weights in both types are the same model; neither inputs nor outputs are rounded."""
    nodes = [helper.make_node("MatMul", ["x", "head"], ["y"])]
    head = weights()["head"].astype(ml_dtypes.bfloat16)
    ends = {"inputs": ("x",), "outputs": ("y",)}
    narrow = save(tmp_path / "narrow.onnx", nodes, {"head": head}, dtype=TensorProto.BFLOAT16, **ends)
    wide = save(tmp_path / "wide.onnx", nodes, {"head": head.astype(np.float32)}, **ends)
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).normal(size=(2, HIDDEN)).astype(np.float32))
    for pair in ((narrow, wide), (wide, narrow)):
        (output,) = compare_models(*pair, inputs=tmp_path / "in.npz", samples=2).outputs
        assert output.equal and output.values == 2 * VOCAB


def test_models_without_tokens_take_an_npz(tmp_path, cli):
    head = {"head": weights()["head"]}
    nodes = [helper.make_node("MatMul", ["x", "head"], ["y"])]
    a = save(tmp_path / "a.onnx", nodes, head, inputs=("x",), outputs=("y",))
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(0).normal(size=(5, HIDDEN)).astype(np.float32))
    code, out, _ = cli(a, a, "--inputs", tmp_path / "in.npz", "--samples", 5)
    assert code == 0
    assert "5 samples of in.npz" in out
    code, _, err = cli(a, a)
    assert code == 2
    assert "--inputs FILE.npz" in err
    code, _, err = cli(a, a, "--inputs", tmp_path / "in.npz", "--min-top1", 90)
    assert code == 2
    assert "no logits output in common" in err


# --- gates


@pytest.mark.parametrize(
    ("gate", "value", "passes"),
    [
        ("--min-sqnr", 10, True),
        ("--min-sqnr", 60, False),
        ("--min-top1", 50, True),
        ("--min-top1", 100, False),
        ("--atol", 10, True),
        ("--atol", 1e-3, False),
        ("--rtol", 1e-9, False),
    ],
)
def test_gates(a, b, cli, tmp_path, gate, value, passes):
    code, _, err = cli(a, b, gate, value, "--samples", 8, "--json", tmp_path / "r.json")
    assert code == (0 if passes else 4), err
    data = json.loads((tmp_path / "r.json").read_text())  # written whether or not the gate holds
    assert bool(data["failures"]) is not passes
    if not passes:
        assert "logits" in err
        assert len(err.strip().splitlines()[-1]) < 200


def test_nan_in_one_model_only_always_fails(a, tmp_path, cli):
    broken = weights()
    broken["head"][3, 7] = np.nan
    save(tmp_path / "nan.onnx", lm_nodes(), broken)
    code, _, err = cli(a, tmp_path / "nan.onnx", "--json", tmp_path / "r.json")
    assert code == 4
    assert "NaN or infinite in one model only" in err
    text = (tmp_path / "r.json").read_text()
    row = json.loads(text, parse_constant=pytest.fail)["outputs"][0]
    assert (row["sqnr_db"], row["max_abs_error"], row["equal"]) == (None, None, False)
    code, _, _ = cli(tmp_path / "nan.onnx", tmp_path / "nan.onnx")
    assert code == 0  # the same NaN in both is no difference


def test_infinite_sqnr_is_null_and_equal_in_json(a, tmp_path, cli):
    assert cli(a, a, "-q", "--json", tmp_path / "r.json")[:2] == (0, "")
    row = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)["outputs"][0]
    assert (row["sqnr_db"], row["equal"]) == (None, True)


# --- bad input


def test_shapes_that_differ_are_a_model_error(a, tmp_path):
    small = weights()
    small["head"] = small["head"][:, :10]
    other = save(tmp_path / "other.onnx", lm_nodes(), small)
    with pytest.raises(ModelError, match=r"A gives \[1, 128, 50\], B gives \[1, 128, 10\]"):
        compare_models(a, other)


def test_no_output_in_common(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "head"], ["y"])]
    head = {"head": weights()["head"]}
    a = save(tmp_path / "a.onnx", nodes, head, inputs=("x",), outputs=("y",))
    nodes = [helper.make_node("MatMul", ["x", "head"], ["z"])]
    b = save(tmp_path / "b.onnx", nodes, head, inputs=("x",), outputs=("z",))
    np.savez(tmp_path / "in.npz", x=np.ones((1, HIDDEN), np.float32))
    with pytest.raises(ModelError, match="no output in common"):
        compare_models(a, b, inputs=tmp_path / "in.npz", gates=Gates())


def test_inputs_and_text_exclude_each_other(a, tmp_path):
    with pytest.raises(UsageError, match="exclude each other"):
        compare_models(a, a, inputs=tmp_path / "in.npz", text=tmp_path / "t.txt")


BAD_CALLS = {
    "missing": (["{a}", "{dir}/none.onnx"], 2, "no such file"),
    "empty folder": (["{a}", "{dir}/empty.zqfp"], 2, "no model.zqfp.onnx"),
    "not onnx": (["{a}", "{dir}/text.onnx"], 3, "text file"),
    "not npz": (["{a}", "{a}", "--inputs", "{dir}/text.onnx"], 2, "not an .npz"),
    "broken npz": (["{a}", "{a}", "--inputs", "{dir}/bad.npz"], 2, "cannot be read"),
    "unknown array": (["{a}", "{a}", "--inputs", "{dir}/wrong.npz"], 2, "'tokens' is no input"),
    "missing text": (["{a}", "{a}", "--text", "{dir}/none.txt"], 2, "--text"),
    "text without tokenizer": (["{a}", "{a}", "--text", "{dir}/text.onnx"], 2, "tokenizer.json"),
    "no json folder": (["{a}", "{a}", "--json", "{dir}/none/r.json"], 2, "does not exist"),
    "json is a folder": (["{a}", "{a}", "--json", "{dir}"], 6, "cannot be written"),
    "samples": (["{a}", "{a}", "--samples", "0"], 2, "samples"),
    "top1": (["{a}", "{a}", "--min-top1", "101"], 2, "min-top1"),
    "one argument": (["{a}"], 2, "B"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_a_message_and_an_exit_code(name, a, tmp_path, cli):
    (tmp_path / "empty.zqfp").mkdir()
    (tmp_path / "text.onnx").write_text("hello, this is no model " * 20)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez(tmp_path / "wrong.npz", tokens=np.ones((1, 4), np.int64))
    args, expected, message = BAD_CALLS[name]
    code, _, err = cli(*(arg.format(a=a, dir=tmp_path) for arg in args))
    assert code == expected, err
    assert message in err
    assert "--calibration" not in err


def test_an_engine_without_a_gpu_is_exit_6(a, tmp_path, cli):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "model.engine").write_bytes(b"ftrt")
    code, _, err = cli(a, tmp_path / "model.engine")
    assert code == 6
    assert err.strip().startswith("zqfp-validate: error:")
    assert "GPU" in err or "TensorRT" in err


def test_help_names_the_exit_codes(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert "4 accuracy gate failed" in " ".join(out.split())


def test_large_models_run_with_their_weights_on_disk(a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zqfp_compile.backends import model_session, ort, runners

    wanted = []

    def spy(path: Path, **options: Any) -> Any:
        wanted.append(options["low_memory"])
        return create_session(path, **options)

    monkeypatch.setattr(model_session, "create_session", spy)
    feed = {"input_ids": np.arange(6).reshape(2, 3)}
    expected = runners.OrtRunner(a).run(feed)
    monkeypatch.setattr(ort, "LOW_MEMORY_BYTES", 1000)  # the model has 6400 bytes of weights
    results = runners.OrtRunner(a).run(feed)
    assert wanted == [False, True]
    assert all(np.array_equal(results[name], value) for name, value in expected.items())
