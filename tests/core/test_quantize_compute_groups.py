"""GPTQ and its descent keep one row scale per compute group (``m2``, ``scale_rows``)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from zqfp_compile.quantize.layer import LayerOptions, quantize_layer
from zqfp_compile.quantize.moments import InputMoments


def test_gptq_under_compute_groups():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(22, 80, generator=generator)
    mix = torch.randn(80, 80, generator=generator) / 9 + torch.eye(80)
    moments = InputMoments(80)
    moments.add(torch.randn(400, 80, generator=generator) @ mix)
    options = LayerOptions(scale_constraint="m2", scale_rows=8, group_size=32, lorc_rank=2)

    def error(**changes) -> float:
        layer = quantize_layer(weight, dataclasses.replace(options, **changes), moments=moments)
        assert layer.weight.scale_rows == changes.get("scale_rows", 8)
        rows = layer.weight.row_scales
        assert all(len(set(rows[start : start + 8])) == 1 for start in (0, 8, 16)) or "scale_rows" in changes
        difference = weight - layer.effective_weight() - layer.lorc.weight()
        return float(((difference @ moments.gram) * difference).sum())

    joined, alone, nearest = error(), error(scale_rows=1), error(algorithm="rtn")
    # One mantissa for eight rows costs less (measured 15%) than GPTQ wins (1.8 times).
    assert 0.95 * alone < joined < 1.3 * alone
    assert joined < 0.7 * nearest
    assert np.isfinite(joined)
