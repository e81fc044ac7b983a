"""fuse-quantizers in ONNX Runtime's CPU provider: every form gives the numbers it had.

The nodes of the form round to their type on the way, up to three times more than the fused quantiser: in
FLOAT16 that is two units in the last place, 2^-9 of a number, which moves 1 in 32 codes by a step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from fused_quantizers import run, same
from quantizer_forms import FORMS, SKIPS, Block, K
from rewrite_models import NUMPY

from passes import fuse_quantizers
from passes.fuse_quantizers import FuseQuantizers
from zqfp_compile.backends.ort import create_session

pytest.importorskip("onnxruntime")

F32, F16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
SIZES = {"x": 3, "skip": 20, "gate": 3, "up": 1}
UNIT = {F32: 1e-6, F16: 2**-9}
MOST_CODES_OFF = {F32: 1e-3, F16: 1 / 32}


@pytest.fixture(scope="module")
def library(make) -> Path:
    return make("onnxruntime-ops") / "libzqfp_onnxruntime.so"


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_its_numbers(form, dtype, library, monkeypatch):
    monkeypatch.setattr(fuse_quantizers, "NORMS_WITH_LORC", True)
    rng = np.random.default_rng(7)
    feeds = {name: rng.standard_normal((65, K)) * size for name, size in SIZES.items()}
    feeds = {name: x.astype(NUMPY[dtype]) for name, x in feeds.items()}
    for tokens in (False, True):
        outputs = ("s",) if form in SKIPS else ()
        block = Block(FORMS[form], dtype, tokens=tokens, lorc=True, outputs=outputs)
        results = []
        for passes in ((), (FuseQuantizers(),)):
            model = block.model()
            for item in passes:
                assert item.call(model).modified
            session = create_session(ir.to_proto(model).SerializeToString(), custom_ops=library)
            results.append(run(session, feeds))
        same(*results, UNIT[dtype], MOST_CODES_OFF[dtype])
