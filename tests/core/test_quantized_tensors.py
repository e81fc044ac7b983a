"""Quantised weights in torch: the parts of those in numpy, moved, joined and checked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from zqfp_compile.formats.quantized import QuantizedWeight
from zqfp_compile.quantize.quantized_tensors import QuantizedTensors, joined
from zqfp_compile.quantize.rtn import quantize_tensors, quantize_weight


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    scales = [(a.group_scales, b.group_scales)] if a.group_scales is not None else []
    pairs = [(a.codes, b.codes), (a.row_scales, b.row_scales), *scales]
    return all(np.asarray(left).tobytes() == np.asarray(right).tobytes() for left, right in pairs)


@pytest.mark.parametrize("form", ["e2m1", "int4", "fp8"])
def test_rows_joined_are_the_weight(form: str) -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    whole = quantize_weight(weight, weight_format=form, group_size=32)
    parts = [quantize_tensors(rows, weight_format=form, group_size=32) for rows in weight.split([16, 32])]
    assert same(joined(parts, "cpu").checked(), whole)
    back = QuantizedTensors.of(whole, "cpu")
    assert same(back.checked(), whole) and np.shares_memory(back.checked().row_scales, whole.row_scales)
    assert joined([back], "cpu").codes is back.codes


def test_what_breaks_the_format_is_refused_and_files_are_not_written_to() -> None:
    found = quantize_tensors(torch.ones(4, 32), group_size=32)
    with pytest.raises(ValueError, match="leave -7"):
        dataclasses.replace(found, codes=torch.full_like(found.codes, 9)).checked()
    fixed = found.checked()
    fixed.row_scales.flags.writeable = False  # as if a file had it
    copy = QuantizedTensors.of(fixed, "cpu")
    copy.row_scales.mul_(2.0)
    assert (fixed.row_scales * 2 == copy.row_scales.numpy()).all()
