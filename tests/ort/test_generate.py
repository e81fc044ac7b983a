"""Text and tokens out of an engine: what transformers makes, piece by piece, greedy and drawn."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from compiled_models import quick

from zqfp_compile import Engine, Sampling, compile_model
from zqfp_compile.errors import ModelError, UsageError
from zqfp_compile.model_io import load_model, save_model

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

TinyModel = Callable[..., Path]
FAMILIES = ("llama", "qwen2", "opt", "gpt2")
PROMPT = "the engine in the"


def of_transformers(model: Any, tokens: list[int], count: int) -> list[int]:
    """The tokens transformers' greedy search appends."""
    ids = torch.tensor([tokens])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1
    )
    return list(made[0, len(tokens) :].tolist())


def reload(folder: Path, **config: Any) -> Engine:
    """The engine of a plain folder after a change of its generation_config.json."""
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Engine.load(folder, device="cpu")


@pytest.fixture
def llama(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of the tiny LLaMA's folder."""
    return Path(shutil.copytree(tiny_model("llama").parent, tmp_path / "llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_greedy(family: str, tiny_model: TinyModel, models_folder: Path) -> None:
    """Token for token, from prompts of one token to many; the end token is the last one of both."""
    from tiny_models import make_model

    model = make_model(family)
    engine = Engine.load(tiny_model(family).parent, device="cpu")
    seen: set[int] = set()
    for tokens in ([5], [0, 17, 200], engine.encode(PROMPT), list(range(2, 90))):
        found = list(engine.generate_tokens(tokens, max_new_tokens=40))
        assert found == of_transformers(model, tokens, 40)
        seen |= set(found)
    assert len(seen) >= 10, "a model that repeats one token shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_goes_in_pieces(
    family: str, tiny_model: TinyModel, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of one piece is behind the next; the last piece is shorter."""
    from tiny_models import make_model

    monkeypatch.setattr("zqfp_compile.runtime.decoding.PREFILL_TOKENS", 30)
    engine = Engine.load(tiny_model(family).parent, device="cpu")
    tokens = np.random.default_rng(5).integers(0, 320, 100).tolist()
    steps: list[int] = []
    take = engine._session.take

    def counted(spec: Any, array: Any) -> Any:
        if spec.name == "input_ids":
            steps.append(array.shape[1])
        return take(spec, array)

    monkeypatch.setattr(engine._session, "take", counted)
    found = list(engine.generate_tokens(tokens, max_new_tokens=12))
    assert found == of_transformers(make_model(family), tokens, 12)
    assert steps == [30, 30, 30, 10] + [1] * 11


def test_the_end_token_ends(tiny_model: TinyModel, llama: Path, models_folder: Path) -> None:
    """One number or a list, out of generation_config.json before config.json, as in transformers."""
    from tiny_models import make_model

    prompt = [5, 9]
    free = list(reload(llama, eos_token_id=None).generate_tokens(prompt, max_new_tokens=30))
    end = free[7]
    stopped = free[: free.index(end) + 1]
    model = make_model("llama")
    for value in (end, [319, end]):
        model.generation_config.eos_token_id = value
        found = list(reload(llama, eos_token_id=value).generate_tokens(prompt, max_new_tokens=30))
        assert found == stopped == of_transformers(model, prompt, 30)
    (llama / "generation_config.json").unlink()
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    (llama / "config.json").write_text(json.dumps({**config, "eos_token_id": end}), encoding="utf-8")
    engine = Engine.load(llama, device="cpu")
    assert list(engine.generate_tokens(prompt, max_new_tokens=30)) == stopped


def test_bfloat16_is_computed_in_float32(tiny_model: TinyModel, models_folder: Path) -> None:
    """On the CPU, where ONNX Runtime has no bfloat16; the weights are rounded to it, nothing else is."""
    from tiny_models import make_model

    engine = Engine.load(tiny_model("llama", dtype="bfloat16").parent, device="cpu")
    tokens = engine.encode(PROMPT)
    wide = make_model("llama", "bfloat16").float()
    assert list(engine.generate_tokens(tokens, max_new_tokens=40)) == of_transformers(wide, tokens, 40)
    assert {spec.dtype for spec in engine.outputs} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_model_continues_as_its_own_logits_say(
    dtype: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With an FP8 cache: step by step through the cache, and from the whole text at once."""
    recipe = quick(target="onnxruntime", evaluate=False, kv_cache_dtype="fp8")
    folder = compile_model(tiny_model("qwen2", dtype=dtype), recipe, output=tmp_path / "out").folder
    engine = Engine.load(folder, device="cpu")
    prompt = engine.encode(PROMPT)
    made = list(engine.generate_tokens(prompt, max_new_tokens=12))
    whole = np.array([prompt + made])
    logits = engine.run(engine._causal_lm.make_feed(whole))["logits"][0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == made


def test_a_model_without_a_cache_generates_the_same(tiny_model: TinyModel, llama: Path) -> None:
    wanted = list(Engine.load(llama, device="cpu").generate_tokens([5, 9, 30], max_new_tokens=12))
    model = load_model(llama / "model.onnx")
    del model.graph.outputs[1:]
    for value in [value for value in model.graph.inputs if value.name.startswith("past")]:
        heads, size = value.shape[1], value.shape[3]
        empty = ir.tensor(np.zeros((1, heads, 0, size), np.float32), name=value.name)
        model.graph.inputs.remove(value)
        value.const_value = empty
        model.graph.initializers[value.name] = value
    save_model(model, llama / "cacheless.onnx")
    engine = Engine.load(llama / "cacheless.onnx", device="cpu")
    assert [spec.name for spec in engine.outputs] == ["logits"]
    assert list(engine.generate_tokens([5, 9, 30], max_new_tokens=12)) == wanted


def test_it_ends_where_the_context_is_full(tiny_model: TinyModel) -> None:
    """OPT has a table of 256 positions, which one more token would leave."""
    engine = Engine.load(tiny_model("opt").parent, device="cpu")
    prompt = [5] * 250
    assert len(list(engine.generate_tokens(prompt, max_new_tokens=100))) == 6
    for tokens in ([5] * 256, []):
        with pytest.raises(UsageError, match=rf"has {len(tokens)} tokens; give 1 to 255"):
            engine.generate_tokens(tokens)
    with pytest.raises(UsageError, match="knows tokens 0 to 319"):
        engine.generate_tokens([5, 320])


def test_pieces_are_the_text(tiny_model: TinyModel) -> None:
    """Characters whose bytes span tokens come whole; together the pieces are what the tokenizer decodes."""
    engine = Engine.load(tiny_model("llama").parent, device="cpu")
    tokens = list(engine.generate_tokens(engine.encode(PROMPT), max_new_tokens=60))
    pieces = list(engine.generate(PROMPT, max_new_tokens=60))
    assert "".join(pieces) == engine.tokenizer.decode(tokens)
    assert len(pieces) > 10


def test_nothing_is_made_before_it_is_asked_for(tiny_model: TinyModel) -> None:
    engine = Engine.load(tiny_model("llama").parent, device="cpu")
    assert list(engine.generate("the", max_new_tokens=0)) == []
    stream = engine.generate("the", max_new_tokens=10**9)
    assert next(stream) and next(stream)


def test_draws_repeat_with_their_seed(tiny_model: TinyModel) -> None:
    engine = Engine.load(tiny_model("llama").parent, device="cpu")

    def draw(seed: int | None) -> list[int]:
        return list(engine.generate_tokens([5], max_new_tokens=20, sampling=Sampling(1.5, seed=seed)))

    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_draws_follow_the_model(tiny_model: TinyModel) -> None:
    """Frequencies of 400 first tokens against the probabilities, among the five that top-k leaves."""
    engine = Engine.load(tiny_model("llama").parent, device="cpu")
    logits = engine.run(engine._causal_lm.make_feed(np.array([[5]])))["logits"][0, -1]
    sampling = Sampling(temperature=2.0, top_k=5)
    shares = sampling.probabilities(logits)
    assert (shares > 0).sum() == 5
    pick = Sampling(temperature=2.0, top_k=5, seed=1).picker()
    found = Counter(pick(logits) for _ in range(400))
    for token in np.flatnonzero(shares):
        error = 4 * np.sqrt(shares[token] * (1 - shares[token]) / 400)  # 4 standard deviations
        assert abs(found[int(token)] / 400 - shares[token]) < error
    assert set(found) <= set(np.flatnonzero(shares).tolist())


@pytest.mark.parametrize("change", ["fixed sequence", "fixed cache", "no present", "no tokens"])
def test_a_model_that_cannot_grow_a_text_says_why(llama: Path, change: str) -> None:
    model = load_model(llama / "model.onnx")
    inputs = {value.name: value for value in model.graph.inputs}
    if change == "fixed sequence":
        inputs["input_ids"].shape = ir.Shape(["batch", 8])
    elif change == "fixed cache":
        for name, value in inputs.items():
            if name.startswith("past"):
                value.shape = ir.Shape(["batch", value.shape[1], 64, value.shape[3]])
    elif change == "no present":
        del model.graph.outputs[2:]
    else:
        inputs["input_ids"].name = "words"
    save_model(model, llama / "changed.onnx")
    engine = Engine.load(llama / "changed.onnx", device="cpu")
    words = {
        "fixed sequence": "takes 8 tokens at a time; export the model with dynamic axes",
        "fixed cache": "takes a cache past_key_values.0.key of fixed length",
        "no present": "no output is the next past_key_values.0.",
        "no tokens": "no input_ids of shape",
    }
    with pytest.raises(UsageError) as caught:
        engine.generate_tokens([5])
    text = str(caught.value)
    assert text.startswith(f"{llama / 'changed.onnx'}: cannot generate text: ") and words[change] in text
    assert "\n" not in text and "--calibration" not in text


def test_one_token_at_a_time(llama: Path) -> None:
    """A decode-only export takes the prompt token by token."""
    wanted = list(Engine.load(llama, device="cpu").generate_tokens([5, 9, 30], max_new_tokens=12))
    model = load_model(llama / "model.onnx")
    for value in model.graph.inputs:
        if value.name in ("input_ids", "position_ids"):
            value.shape = ir.Shape(["batch", 1])
    save_model(model, llama / "decode.onnx")
    engine = Engine.load(llama / "decode.onnx", device="cpu")
    assert list(engine.generate_tokens([5, 9, 30], max_new_tokens=12)) == wanted


def test_logits_that_are_not_numbers_are_said(llama: Path) -> None:
    model = load_model(llama / "model.onnx")
    norm = next(value for name, value in model.graph.initializers.items() if name == "model.norm.weight")
    norm.const_value = ir.tensor(np.full(norm.const_value.shape.numpy(), np.nan, np.float32), name=norm.name)
    save_model(model, llama / "broken.onnx")
    engine = Engine.load(llama / "broken.onnx", device="cpu")
    with pytest.raises(ModelError, match=r"logits are not numbers \(NaN\)"):
        list(engine.generate_tokens([5]))


def test_without_a_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    engine = Engine.load(llama, device="cpu")
    assert list(engine.generate_tokens([5], max_new_tokens=2))
    with pytest.raises(UsageError, match=r"put the model's tokenizer\.json beside it"):
        engine.generate("the")


# chat templates

LOOP = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
)
TEMPLATES = {
    "a file": (
        {"chat_template.jinja": LOOP, "tokenizer_config.json": '{"eos_token": "</s>"}'},
        "<user>hi</s>",
    ),
    "in the config": (
        {"tokenizer_config.json": json.dumps({"chat_template": LOOP, "eos_token": {"content": "</s>"}})},
        "<user>hi</s>",
    ),
    "by name": (
        {"tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": LOOP}]})},
        "<user>hi",
    ),
    "the file wins": (
        {
            "chat_template.jinja": "{{ bos_token }}A",
            "tokenizer_config.json": json.dumps({"chat_template": "B"}),
        },
        "A",
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates(llama: Path, case: str) -> None:
    files, wanted = TEMPLATES[case]
    for name, text in files.items():
        (llama / name).write_text(text, encoding="utf-8")
    engine = Engine.load(llama, device="cpu")
    tokens = engine.encode("hi", chat=True)
    assert engine.tokenizer.decode(tokens, skip_special_tokens=False) == wanted
    assert (1 in tokens) == ("</s>" in wanted), "special tokens are one token each"


HOSTILE = {
    "raises": ("{{ raise_exception('no system prompt') }}", "no system prompt"),
    "syntax": ("{% for %}", "Expected an expression"),
    "escapes": ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
    "writes": ("{{ messages.append(1) }}", "unsafe"),
    "endless": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "imports": ("{% include '/etc/passwd' %}", "no loader"),
    "divides": ("{{ 1 // 0 }}", "zero"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_that_fails_is_one_line(llama: Path, case: str) -> None:
    template, words = HOSTILE[case]
    (llama / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        Engine.load(llama, device="cpu").encode("hi", chat=True)
    text = str(caught.value)
    assert "chat template fails" in text and words in text and "leave --chat out" in text and "\n" not in text


def test_no_template_or_no_config(llama: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        Engine.load(llama, device="cpu").encode("hi", chat=True)
    for text in ("{", "[]", "[" * 100_000):
        (llama / "tokenizer_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=r"tokenizer_config\.json: (is no JSON|holds no JSON object)"):
            Engine.load(llama, device="cpu").encode("hi", chat=True)
    (llama / "chat_template.jinja").write_bytes(b"\xff")
    (llama / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"chat_template\.jinja: cannot be read \(not UTF-8"):
        Engine.load(llama, device="cpu").encode("hi", chat=True)


# the real model

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Zähle drei Früchte auf: 🍎",
    "What is 7 times 8?",
)


@pytest.mark.slow
def test_smollm2_says_what_transformers_says(smollm2: Path, models_folder: Path) -> None:
    """float16 in ONNX Runtime computes in float32, so transformers does with the same weights."""
    from export_smollm2 import SOURCE
    from gguf_export import fetch_gguf
    from gguf_model import load_gguf

    model = load_gguf(fetch_gguf(SOURCE), "float16").float().eval()
    engine = Engine.load(smollm2, device="cpu")
    for question in QUESTIONS:
        for prompt in (question, f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"):
            tokens = engine.encode(prompt)
            found = list(engine.generate_tokens(tokens, max_new_tokens=48))
            assert found == of_transformers(model, tokens, 48), prompt


@pytest.mark.slow
def test_smollm2_is_exported_with_its_chat_template(
    smollm2: Path, models_folder: Path, tmp_path: Path
) -> None:
    """As transformers fills it in, from what the GGUF holds."""
    from export_smollm2 import SOURCE
    from gguf_export import fetch_gguf
    from gguf_model import write_tokenizer

    from zqfp_compile.runtime.chat import chat_prompt
    from zqfp_compile.runtime.folder import ModelFolder

    write_tokenizer(fetch_gguf(SOURCE), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (smollm2.parent / "tokenizer.json").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi\n there"}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_prompt(ModelFolder.of(tmp_path), "Hi\n there") == wanted
    assert wanted.endswith("<|im_start|>user\nHi\n there<|im_end|>\n<|im_start|>assistant\n")
