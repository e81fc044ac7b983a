import numpy as np
import pytest
import torch

from zqfp_compile.formats.codebook import CODE_BOOKS
from zqfp_compile.formats.minifloat import MINI_FLOATS
from zqfp_compile.quantize.activation import fake_quantize_activation, token_scales
from zqfp_compile.quantize.rounding import decode_codes, encode_codes, round_minifloat


def around(points):
    """The float32 points, their neighbours, and all of them negated."""
    points = np.asarray(points, dtype=np.float32)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    near = np.concatenate([points, np.nextafter(points, up), np.nextafter(points, down)])
    return np.concatenate([near, -near, np.array([0.0, -0.0, np.inf, -np.inf], dtype=np.float32)])


@pytest.mark.parametrize("spec", MINI_FLOATS.values(), ids=lambda spec: spec.name)
def test_minifloats_bit_for_bit(spec):
    codes = spec.decode(np.arange(256, dtype=np.uint8))
    codes = np.unique(codes[np.isfinite(codes)])
    ties = (codes[:-1].astype(np.float64) + codes[1:]) / 2
    inputs = around(np.concatenate([codes, ties, [2 * spec.max_value]]))
    inputs = np.append(inputs, np.float32(np.nan))
    ours = round_minifloat(torch.from_numpy(inputs), spec).numpy()
    expected = spec.round(inputs)
    assert np.array_equal(ours[:-1].view(np.uint32), expected[:-1].view(np.uint32))
    assert np.isnan(ours[-1])
    assert np.isnan(expected[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype):
    spec = MINI_FLOATS["e4m3"]
    inputs = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    inputs = inputs[~inputs.isnan()]
    assert np.array_equal(round_minifloat(inputs, spec).numpy(), spec.round(inputs.float().numpy()))


@pytest.mark.parametrize("book", CODE_BOOKS.values(), ids=lambda book: book.name)
def test_code_books_bit_for_bit(book):
    levels = np.array(book.magnitudes)
    inputs = around(np.concatenate([levels, (levels[:-1] + levels[1:]) / 2, [1e-30, 1e30]]))
    codes = encode_codes(torch.from_numpy(inputs), book)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), book.encode(inputs))
    every = np.arange(-7, 8, dtype=np.int8)
    assert np.array_equal(decode_codes(torch.from_numpy(every), book).numpy(), book.decode(every))


@pytest.mark.parametrize(
    ("name", "top", "bound"), [("e4m3", 448, 30.5), ("e5m2", 57344, 24.5), ("int8", 127, 35)]
)
def test_activation_per_token(name, top, bound):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    x[5] = 0
    scales = token_scales(x, name)
    assert scales.shape == (64, 1)
    assert scales[5] == 1
    assert torch.equal(scales[6, 0], x[6].abs().max() / top)
    y = fake_quantize_activation(x, name)
    assert (y[5] == 0).all()
    keep = [row for row in range(64) if row != 5]
    sqnr = 10 * torch.log10(x[keep].square().sum(1) / (x - y)[keep].square().sum(1))
    # Gaussian rows: 31.5 dB for 3 mantissa bits, 25.5 for 2; over 36 for 127 steps up to the maximum.
    assert sqnr.min() > bound


def test_activation_per_tensor_saturates():
    x = torch.tensor([1000.0, -1000.0, 1.0, 0.3])
    assert fake_quantize_activation(x, "e4m3", 1.0).tolist() == [448, -448, 1, 0.3125]
    assert fake_quantize_activation(x, "int8", 0.5).tolist() == [63.5, -64, 1, 0.5]
    assert fake_quantize_activation(x, "e5m2", torch.tensor(0.5)).tolist() == [1024, -1024, 1, 0.3125]
    with pytest.raises(ValueError, match="e3m4"):
        fake_quantize_activation(x, "e3m4")
