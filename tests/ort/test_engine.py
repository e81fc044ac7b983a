"""Engine: a compiled folder runs as its file does, without copies, and a changed file is refused."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compiled_models import quick

from zqfp_compile import Engine, compile_model
from zqfp_compile.backends.ort import create_session, run_session
from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.errors import MissingDependencyError, ModelError, UsageError

pytest.importorskip("onnxruntime")

TinyModel = Callable[..., Path]
TOKENS = np.random.default_rng(3).integers(2, 320, (1, 9))


@pytest.fixture(scope="module")
def compiled(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA for ONNX Runtime with an FP8 cache; treat it as read-only."""
    folder = tmp_path_factory.mktemp("engine") / "llama.zqfp"
    recipe = quick(target="onnxruntime", evaluate=False, kv_cache_dtype="fp8")
    return compile_model(tiny_model("llama"), recipe, output=folder).folder


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "copy.zqfp"))


def feed_of(engine: Engine, tokens: np.ndarray = TOKENS) -> dict[str, np.ndarray]:
    return CausalLm.from_inputs(engine.inputs, engine.outputs).make_feed(tokens)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def test_it_runs_the_file_made_for_the_runtime(compiled: Path) -> None:
    engine = Engine.load(compiled, device="cpu")
    assert (engine.path, engine.device) == (compiled / "onnxruntime.onnx", "cpu")
    feed = feed_of(engine)
    session = create_session(compiled / "onnxruntime.onnx")
    names = [spec.name for spec in engine.outputs]
    wanted = dict(zip(names, run_session(session, names, feed), strict=True))
    assert wanted["present.0.key"].dtype == ml_dtypes.float8_e4m3fn
    found = engine.run(feed)
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in names)


def test_torch_in_torch_out(compiled: Path) -> None:
    """The same numbers, in torch's types: a cache of FP8 is torch.float8_e4m3fn."""
    engine = Engine.load(compiled, device="cpu")
    feed = feed_of(engine)
    wanted = engine.run(feed)
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array) for name, array in feed.items() if not name.startswith("past")
    }
    shape = feed["past_key_values.0.key"].shape
    tensors |= {
        name: torch.empty(shape, dtype=torch.float8_e4m3fn) for name in feed if name.startswith("past")
    }
    found = engine.run(tensors)
    assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert found["present.0.key"].dtype == torch.float8_e4m3fn
    assert np.array_equal(found["logits"].numpy(), wanted["logits"])
    key = found["present.0.key"].view(torch.uint8).numpy()
    assert np.array_equal(key, wanted["present.0.key"].view(np.uint8))


class OnlyDlpack:
    """What any other library's array looks like."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def test_dlpack_in_numpy_out(compiled: Path) -> None:
    engine = Engine.load(compiled, device="cpu")
    feed = feed_of(engine)
    wanted = engine.run(feed)
    found = engine.run({**feed, "input_ids": OnlyDlpack(feed["input_ids"])})
    assert same(found["logits"], wanted["logits"])


@pytest.mark.parametrize("in_torch", [False, True], ids=["numpy", "torch"])
def test_nothing_is_copied_on_the_way_in_or_out(compiled: Path, in_torch: bool) -> None:
    """What the runtime reads is the caller's memory, and what it wrote is what the caller gets."""
    engine = Engine.load(compiled, device="cpu")
    bound: dict[str, int] = {}
    made: dict[str, int] = {}
    execute = engine._session.execute

    def spy(values: Any, names: Any) -> Any:
        bound.update({name: value.data_ptr() for name, value in values.items()})
        outputs = execute(values, names)
        made.update({name: value.data_ptr() for name, value in outputs.items()})
        return outputs

    engine._session.execute = spy  # type: ignore[method-assign]
    feed: dict[str, Any] = feed_of(engine)
    past = {name: array for name, array in engine.run(feed).items() if name != "logits"}
    step = CausalLm.from_inputs(engine.inputs, engine.outputs)
    feed = {**step.step_inputs(TOKENS[:, :1], TOKENS.shape[1]), **step.next_past(past)}
    if in_torch:
        from zqfp_compile.backends.arrays import from_numpy

        feed = {name: from_numpy(array) for name, array in feed.items()}
    results = engine.run(feed)

    def address(array: Any) -> int:
        return int(array.data_ptr() if in_torch else array.ctypes.data)

    assert bound == {name: address(array) for name, array in feed.items()}
    assert made == {name: address(array) for name, array in results.items()}


def test_outputs_outlive_the_engine(compiled: Path) -> None:
    engine = Engine.load(compiled, device="cpu")
    results = engine.run(feed_of(engine))
    kept = {name: array.copy() for name, array in results.items()}
    del engine
    gc.collect()
    _ = [np.full(100_000, 7.0) for _ in range(20)]
    assert all(same(results[name], kept[name]) for name in kept)


def test_arrays_that_are_not_laid_out_as_the_runtime_wants_are_taken_too(compiled: Path) -> None:
    engine = Engine.load(compiled, device="cpu")
    feed = feed_of(engine)
    wanted = engine.run(feed)
    ids = np.empty((1, 18), np.int64)[:, ::2]
    ids[:] = feed["input_ids"]
    backwards = feed["position_ids"][:, ::-1].copy()[:, ::-1]
    mask = feed["attention_mask"].copy()
    mask.flags.writeable = False
    found = engine.run({**feed, "input_ids": ids, "position_ids": backwards, "attention_mask": mask})
    assert same(found["logits"], wanted["logits"])


def test_wrong_inputs_are_named(compiled: Path) -> None:
    engine = Engine.load(compiled, device="cpu")
    feed = feed_of(engine)
    cases: dict[str, dict[str, Any]] = {
        "'attention_mask' is missing": {k: v for k, v in feed.items() if k != "attention_mask"},
        "'token' is unknown": {**feed, "token": TOKENS},
        "'input_ids' is int32": {**feed, "input_ids": TOKENS.astype(np.int32)},
        "takes int64 [batch, sequence]": {**feed, "input_ids": TOKENS[0]},
        "takes float8_e4m3fn [batch, 2, past_sequence, 18]": {
            **feed,
            "past_key_values.0.key": feed["past_key_values.0.key"][..., :4],
        },
        "'input_ids' is a list": {**feed, "input_ids": TOKENS.tolist()},
    }
    for text, inputs in cases.items():
        with pytest.raises(UsageError) as caught:
            engine.run(inputs)
        assert text in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_runtime_refuses_is_one_line(compiled: Path) -> None:
    engine = Engine.load(compiled, device="cpu")
    with pytest.raises(ModelError, match=r"onnxruntime\.onnx: ONNX Runtime cannot run it") as caught:
        engine.run(feed_of(engine, np.full((1, 4), 10**6)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["onnxruntime.onnx", "onnxruntime.onnx.data", "tokenizer.json", "config.json"]
)
@pytest.mark.parametrize("change", ["changed", "removed"])
def test_a_file_the_compile_did_not_write_is_refused(copy: Path, name: str, change: str) -> None:
    if change == "removed":
        (copy / name).unlink()
    else:
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        Engine.load(copy, device="cpu").generate("the")
    words = {"changed": "has changed since the compile", "removed": "cannot be read (No such file"}
    assert str(caught.value).startswith(f"{copy / name}: ") and words[change] in str(caught.value)


def test_a_file_that_is_not_used_may_change(copy: Path) -> None:
    (copy / "report.html").write_text("mine", encoding="utf-8")
    assert Engine.load(copy, device="cpu").run


def test_a_file_that_came_later_is_refused(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos_token_id": 5}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json: not in manifest\.json"):
        Engine.load(copy, device="cpu").generate("the")
    (copy / "tensorrt.engine").write_bytes(b"ftrt")
    with pytest.raises(ModelError, match=r"tensorrt\.engine: not in manifest\.json"):
        Engine.load(copy / "tensorrt.engine")


MANIFESTS = {
    "text": "no json",
    "a list": "[]",
    "no files": '{"tool": "zqfp-compile"}',
    "files is a list": '{"files": ["a"]}',
    "no digest": '{"files": {"onnxruntime.onnx": {"bytes": 1}}}',
    "digest is a number": '{"files": {"onnxruntime.onnx": {"sha256": 1}}}',
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_broken_manifest_is_one_line(copy: Path, case: str) -> None:
    (copy / "manifest.json").write_text(MANIFESTS[case], encoding="utf-8")
    with pytest.raises(ModelError, match=r"manifest\.json: is no manifest") as caught:
        Engine.load(copy)
    assert "\n" not in str(caught.value)


def test_a_folder_without_its_manifest_is_refused(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(ModelError, match=r"has no manifest\.json"):
        Engine.load(copy)


def test_the_portable_model_runs_where_nothing_else_was_made(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = quick(target="none", evaluate=False)
    folder = compile_model(tiny_model("opt"), recipe, output=tmp_path / "opt.zqfp").folder
    engine = Engine.load(folder, device="cpu")
    assert engine.path == folder / "model.zqfp.onnx"
    feed = feed_of(engine)
    names = [spec.name for spec in engine.outputs]
    wanted = run_session(create_session(engine.path), names, feed)
    assert all(same(engine.run(feed)[name], array) for name, array in zip(names, wanted, strict=True))


def test_one_file_and_plain_folders(compiled: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    assert Engine.load(compiled / "model.zqfp.onnx", device="cpu").path == compiled / "model.zqfp.onnx"
    model = tiny_model("gpt2")
    assert Engine.load(model.parent, device="cpu").path == model
    (tmp_path / "a").mkdir()
    shutil.copy(model, tmp_path / "a" / "gpt2.onnx")
    assert Engine.load(tmp_path / "a", device="cpu").path.name == "gpt2.onnx"
    shutil.copy(model, tmp_path / "a" / "other.onnx")
    with pytest.raises(UsageError, match=r"has gpt2\.onnx, other\.onnx; give"):
        Engine.load(tmp_path / "a", device="cpu")
    with pytest.raises(UsageError, match="no such file or folder"):
        Engine.load(tmp_path / "b")
    with pytest.raises(UsageError, match="--device gpu: is not one of auto, cpu, cuda"):
        Engine.load(compiled, device="gpu")


def with_engine(folder: Path) -> Path:
    """Put an engine into the folder as a compile for TensorRT-RTX would have."""
    import hashlib

    content = b"ftrt no real engine"
    (folder / "tensorrt-rtx.engine").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["files"]["tensorrt-rtx.engine"] = facts
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder / "tensorrt-rtx.engine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(copy: Path) -> None:
    """An engine cannot run here, the portable model beside it can; asking for the GPU says so."""
    engine = with_engine(copy)
    assert Engine.load(copy).path.name == "onnxruntime.onnx"
    for path, device in ((copy, "cuda"), (engine, "auto")):
        with pytest.raises(
            MissingDependencyError, match=r"tensorrt-rtx\.engine: .*needs an NVIDIA GPU"
        ) as caught:
            Engine.load(path, device=device)
        assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    engine.unlink()
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"][engine.name]
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(MissingDependencyError, match="finds no GPU"):
        Engine.load(copy, device="cuda")


def test_weights_stay_on_disk_when_memory_is_short(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from a session that decodes weights in every run."""
    from zqfp_compile.backends import model_session, ort_session

    wanted = Engine.load(compiled, device="cpu")
    feed = feed_of(wanted)
    opened: list[bool] = []

    def spy(path: Path, **options: Any) -> Any:
        opened.append(options["low_memory"])
        return create_session(path, **options)

    monkeypatch.setattr(model_session, "create_session", spy)
    monkeypatch.setattr(ort_session, "free_memory", lambda device: 100_000)
    short = Engine.load(compiled, device="cpu")
    monkeypatch.setattr(ort_session, "free_memory", lambda device: None)
    Engine.load(compiled, device="cpu")
    assert opened == [True, False]
    np.testing.assert_allclose(short.run(feed)["logits"], wanted.run(feed)["logits"], rtol=0, atol=1e-3)
