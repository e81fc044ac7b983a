"""ONNX graphs in torch on a GPU: same numbers as on the CPU, gradients, and the walk without ONNX Runtime."""

from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
import torch

from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.calibrate.linears import Replacement
from zqfp_compile.calibrate.walk import walk
from zqfp_compile.model_io import load_model
from zqfp_compile.quantize.threads import DeviceThreads
from zqfp_compile.registry import create_pass
from zqfp_compile.torch_graph import TorchGraph

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

EXPORTS = [("torch", "float32"), ("torch", "bfloat16"), ("optimum", "float32")]


@contextmanager
def no_waiting():
    """An error wherever torch waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("exporter", "dtype"), EXPORTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_cuda_agrees_with_the_cpu(family, exporter, dtype, tiny_model):
    model = load_model(tiny_model(family, exporter=exporter, dtype=dtype))
    here, there = TorchGraph(model), TorchGraph(model, device="cuda")
    feed = CausalLm.from_model(model).make_feed(np.random.default_rng(0).integers(2, 320, (2, 9)))
    expected = here.run(feed)
    wide = {n: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a for n, a in feed.items()}
    placed = {name: torch.from_numpy(array).cuda() for name, array in wide.items()}
    there.run(placed)  # loads the weights
    with no_waiting():
        found = there.run(placed)
    for name, tensor in expected.items():
        assert found[name].is_cuda
        # float32 products on both sides, other orders of sums.
        torch.testing.assert_close(found[name].cpu(), tensor, rtol=1e-4, atol=1e-4)


def test_gradients_on_cuda(tiny_model):
    model = load_model(tiny_model("llama"))
    (site, *_) = create_pass("select-linears").call(model).plan.linears
    feed = CausalLm.from_model(model).make_feed(np.random.default_rng(0).integers(2, 320, (1, 9)))
    slopes = []
    for device in ("cpu", "cuda"):
        weight = torch.zeros(site.n, site.k, device=device, requires_grad=True)
        replaced = {site.output: lambda values, w=weight: values[site.activation] @ w.t()}
        graph = TorchGraph(model, device=device)
        graph.run(feed, outputs=["logits"], overrides=replaced)["logits"].square().sum().backward()
        slopes.append(weight.grad.cpu())
    assert slopes[0].any()
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-3 * float(slopes[0].abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_walk_on_cuda(family, tiny_model, tmp_path, monkeypatch):
    model = load_model(tiny_model(family))
    plan = create_pass("select-linears").call(model).plan.replace(activation_format="none")
    feeds = [CausalLm.from_model(model).make_feed(np.random.default_rng(0).integers(2, 320, (1, 24)))]
    seen = []
    for device in ("cpu", "cuda"):
        moments = {}

        def keep(sites, weights, found):
            moments[sites[0].activation] = found  # noqa: B023
            return [Replacement(weight) for weight in weights]

        if device == "cuda":
            monkeypatch.setattr("zqfp_compile.calibrate.walk.open_model", None)
        walk(model, plan, feeds, keep, scratch=tmp_path, threads=DeviceThreads([device]))
        seen.append(moments)
    for name, expected in seen[0].items():
        found = seen[1][name].gram.cpu()
        torch.testing.assert_close(found, expected.gram, rtol=0, atol=1e-4 * float(expected.gram.abs().max()))
