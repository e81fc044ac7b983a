"""tools/torch_lm.py on a tiny random LLaMA: streams, groups, moments, restoring, perplexity."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the harness runs transformers models")


@pytest.fixture(scope="module")
def tools(repo_root: Path):
    sys.path.insert(0, str(repo_root / "tools"))
    import torch_lm
    import torch_models

    return torch_lm, torch_models


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.mul_(5.0)  # initial weights are so small that no error would show
    model.model.embed_tokens.weight.mul_(50.0)
    return model


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 97, (6, 32), dtype=np.int64)


def test_perplexity_scores_all_but_each_windows_first_token(tools, model) -> None:
    _, torch_models = tools
    tokens = np.random.default_rng(1).integers(0, 97, 75, dtype=np.int64)  # windows of 32, 32 and 11
    total = 0.0
    for start in (0, 32, 64):
        window = torch.from_numpy(tokens[start : start + 32])
        logits = model(window[None]).logits[0, :-1].double()
        total += float(-logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]].sum())
    wanted = math.exp(total / (31 + 31 + 10))
    for batch in (1, 2):
        # float32 logits against float64
        assert torch_models.perplexity(model, tokens, length=32, batch=batch) == pytest.approx(
            wanted, rel=1e-5
        )


def test_nothing_quantised_changes_nothing(tools, model, windows) -> None:
    torch_lm, torch_models = tools
    tokens = windows.reshape(-1)
    before = torch_models.perplexity(model, tokens, length=32)
    calibration = torch_lm.Calibration(model, windows)
    config = torch_lm.QuantConfig(weights="none", activations="none")
    with torch_lm.quantized(calibration, config) as summary:
        assert summary.linears == 14
        assert summary.bits_per_weight == 32
        assert torch_models.perplexity(model, tokens, length=32) == before


CONFIGS = [
    {"algorithm": "rtn", "constraint": "m2"},
    {"algorithm": "rtn", "lorc_rank": 4, "lorc_metric": "plain"},
    {"algorithm": "gptq", "group_size": 16, "lorc_rank": 4, "lorc_dtype": "fp8"},
    {"algorithm": "gptq", "weights": "int4-asym", "activations": "int8-asym", "group_size": 16},
    {
        "algorithm": "gptq",
        "weights": "int8",
        "activations": "int8",
        "activation_scale": "token",
        "group_size": 0,
    },
    {"weights": "fp8-e4m3", "activations": "fp8-e5m2"},
]


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: "-".join(map(str, options.values())))
def test_quantised_then_restored(tools, model, windows, options) -> None:
    torch_lm, torch_models = tools
    tokens = windows.reshape(-1)
    before = torch_models.perplexity(model, tokens, length=32)
    calibration = torch_lm.Calibration(model, windows)
    lines = []
    with torch_lm.quantized(calibration, torch_lm.QuantConfig(**options), progress=lines.append) as summary:
        inside = torch_models.perplexity(model, tokens, length=32)
        assert inside != before
        assert math.isfinite(inside)
    assert len(lines) == 2
    assert 4 < summary.bits_per_weight < 16
    assert torch_models.perplexity(model, tokens, length=32) == before


def test_batches_do_not_matter(tools, model, windows) -> None:
    torch_lm, torch_models = tools
    config = torch_lm.QuantConfig(algorithm="rtn", weights="int8", group_size=0)
    results = []
    for batch in (1, 3):
        calibration = torch_lm.Calibration(model, windows, batch=batch)
        with torch_lm.quantized(calibration, config):
            results.append(torch_models.perplexity(model, windows.reshape(-1), length=32))
    assert results[0] == pytest.approx(results[1], rel=1e-4)  # other summation order in the matrix products


def test_moments_are_of_the_quantised_predecessors(tools, model, windows, monkeypatch) -> None:
    torch_lm, _ = tools
    seen = {}
    real = torch_lm.quantize_layer

    def spy(weight, options, *, moments, name):
        seen[name] = moments
        return real(weight, options, moments=moments, name=name)

    monkeypatch.setattr(torch_lm, "quantize_layer", spy)
    calibration = torch_lm.Calibration(model, windows)
    config = torch_lm.QuantConfig(algorithm="gptq", activation_scale="token")
    inputs = {}
    original = {}
    ids = torch.from_numpy(windows)

    def record(into, name):
        return lambda module, args: into.__setitem__(name, args[0].flatten(0, 1))

    name = "layers.1.mlp.down_proj"
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(record(original, name))
    model(ids)
    hook.remove()
    with torch_lm.quantized(calibration, config):
        down = model.model.layers[1].mlp.down_proj
        hook = down.register_forward_pre_hook(record(inputs, name))
        model(ids)
        hook.remove()
        rows = down.quantizer(inputs[name])
    moments = seen[name]
    assert moments.tokens == windows.size
    # the same float32 sums in another order
    torch.testing.assert_close(moments.gram, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moments.cross, original[name].T @ rows / len(rows), rtol=1e-3, atol=1e-4)
    assert seen["layers.0.self_attn.q_proj"] is seen["layers.0.self_attn.v_proj"]
    assert seen["layers.0.self_attn.q_proj"] is not seen["layers.0.self_attn.o_proj"]


def test_static_scale_covers_the_calibration(tools, model, windows) -> None:
    torch_lm, _ = tools
    calibration = torch_lm.Calibration(model, windows)
    with torch_lm.quantized(calibration, torch_lm.QuantConfig(weights="none")):
        linear = model.model.layers[0].self_attn.q_proj
        rows = []
        hook = linear.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
        model(torch.from_numpy(windows))
        hook.remove()
    assert float(linear.quantizer.scale) == pytest.approx(float(rows[0].abs().max()) / 448, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"weights": "fp3"}, {"activations": "e4m3"}, {"activation_scale": "row"}, {"lorc_metric": "x"}],
)
def test_unknown_choices_are_named(tools, options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        tools[0].QuantConfig(**options)


def test_unknown_tuning_fails_at_once(tools) -> None:
    with pytest.raises(TypeError, match="sweep_count"):
        tools[0].QuantConfig(tuning={"sweep_count": 3})
