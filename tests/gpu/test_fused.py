"""The Triton forms of GPTQ's and coordinate descent's inner loops against their torch forms."""

import pytest
import torch

from zqfp_compile.quantize import descent, fused, gptq, rtn
from zqfp_compile.quantize.grid import WeightGrid
from zqfp_compile.quantize.rtn import quantize_tensors

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


def problem(n=200, k=300, columns=100, group_size=64):
    torch.manual_seed(0)
    weight = torch.randn(n, k, device="cuda")
    mix = torch.randn(columns, 2 * columns, device="cuda")
    gram = mix @ mix.t() / columns
    order = torch.randperm(k, device="cuda")[:columns]
    grid = WeightGrid(quantize_tensors(weight, group_size=group_size), "cuda")
    return weight, gram, order, grid


def wide(inner):
    """Return the values as a part of a larger matrix."""
    return torch.nn.functional.pad(inner, (0, 28))[:, : len(inner)]


@pytest.mark.parametrize(("columns", "group_size"), [(128, 64), (100, 64), (7, 0)])
def test_round_block(columns, group_size):
    weight, gram, order, grid = problem(columns=columns, group_size=group_size)
    factor = torch.linalg.cholesky(gram, upper=True)
    block = weight[:, order].t().contiguous()
    assert fused.usable(grid, block)
    rounded = torch.empty_like(block)
    scaled = fused.round_block(block, wide(factor), fused.groups(grid, order), grid, rounded)
    wanted, wanted_scaled = gptq._round_block(block.clone(), factor, order, grid)
    # A value within float32 rounding of a midpoint may go the other way and take later ones with it.
    assert (rounded == wanted).float().mean() > 0.995
    same = (rounded == wanted).all(dim=0)
    torch.testing.assert_close(scaled[:, same], wanted_scaled[:, same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [128, 100, 7])
def test_descend_block(columns):
    weight, gram, order, grid = problem(columns=columns)
    values = torch.stack([grid.nearest(weight[:, c], c) for c in order.tolist()])
    slope = gram @ torch.randn_like(values) * 0.1
    wanted, before = descent._descend_block(values, slope, gram, order, grid), values.clone()
    changes = fused.descend_block(values, slope, wide(gram), fused.groups(grid, order), grid)
    assert torch.equal(values, before + changes)
    assert (changes == wanted).float().mean() > 0.995
    assert bool((wanted != 0).any())


@pytest.mark.parametrize("weight_format", ["e2m1", "int4", "e3m0"])
@pytest.mark.parametrize(("k", "group_size"), [(300, 64), (256, 32), (48, 16)])
def test_search_scales(k, group_size, weight_format, monkeypatch):
    torch.manual_seed(1)
    weight, x = torch.randn(200, k, device="cuda"), torch.randn(4 * k, k, device="cuda")
    gram = x.t() @ x / len(x)
    start = quantize_tensors(weight, weight_format=weight_format, group_size=group_size)
    assert fused.searches(weight, group_size) and not fused.searches(weight.cpu(), group_size)
    found = descent.refit_scales(start, weight, gram).group_scales
    monkeypatch.setattr(fused, "searches", lambda values, size: False)
    wanted = descent.refit_scales(start, weight, gram).group_scales
    # Sums in another order: two scales that are equally good may change places.
    assert (found == wanted).float().mean() > 0.995 and (wanted != start.group_scales).any()


@pytest.mark.parametrize(
    ("width", "count", "period"), [(64, 600, 5), (64, 600, None), (300, 3, 1), (7, 1, 1)]
)
def test_group_errors(width, count, period, monkeypatch):
    torch.manual_seed(2)
    sizes = torch.rand(width, count, device="cuda")
    levels = torch.rand(8, count, device="cuda").sort(dim=0).values
    levels[0] = 0
    importance = None if period is None else torch.rand(width, period, device="cuda")
    assert fused.measures(sizes) and not fused.measures(sizes.cpu())
    found = rtn._group_errors(sizes, levels, importance)
    more = torch.cat([levels * 1.5, levels], dim=1)
    assert torch.equal(rtn._group_errors(sizes, more, importance)[count:], found)
    monkeypatch.setattr(fused, "measures", lambda sizes: False)
    torch.testing.assert_close(found, rtn._group_errors(sizes, levels, importance))


@pytest.mark.parametrize("constraint", ["none", "m1", "m2", "e4m3"])
def test_the_search_of_scales(constraint, monkeypatch):
    """All choices at once find what one after the other does."""
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(3)).cuda()
    weight[7] = 0
    importance = torch.rand(300, generator=torch.Generator().manual_seed(4)).cuda()
    found = quantize_tensors(weight, scale_constraint=constraint, importance=importance)
    monkeypatch.setattr(fused, "measures", lambda sizes: False)
    wanted = quantize_tensors(weight, scale_constraint=constraint, importance=importance)
    assert (found.group_scales == wanted.group_scales).float().mean() > 0.995
    assert (found.codes == wanted.codes).float().mean() > 0.995
