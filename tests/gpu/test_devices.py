"""GPTQ spread over GPUs: the tensors of one, to the last bit, with two threads on one GPU as well."""

import numpy as np
import pytest
import torch
from compiled_models import walked_bytes

from zqfp_compile.calibrate.causal_lm import CausalLm
from zqfp_compile.model_io import load_model
from zqfp_compile.quantize import layer
from zqfp_compile.registry import create_pass

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

SPREADS = [["cuda:0", "cuda:0"]]
if torch.cuda.device_count() > 1:
    SPREADS += [["cuda:0", "cuda:1"], ["cuda:1"], ["cuda:1", "cuda:0", "cuda:1"]]


def test_no_bit_depends_on_the_number_of_gpus(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "HALVED_SIZE", 1)
    model = load_model(tiny_model("llama", dtype="float16"))
    plan = create_pass("select-linears").call(model).plan.replace(lorc_rank=4)
    random, interface = np.random.default_rng(0), CausalLm.from_model(model)
    feeds = [interface.make_feed(random.integers(2, 320, (1, 16 + index))) for index in range(11)]
    one = walked_bytes(model, plan, feeds, tmp_path / "one", ["cuda:0"])
    assert len(one) >= 14 * 5
    for number, devices in enumerate(SPREADS):
        assert walked_bytes(model, plan, feeds, tmp_path / str(number), devices) == one
