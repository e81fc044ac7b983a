"""Copies beside the computation: the same numbers, at the time they are there."""

import threading

import pytest
import torch

from zqfp_compile.quantize.copies import CopyStream, to_device, to_host

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("rows", [0, 3, 6000])
def test_there_and_back(rows, dtype):
    """Small ones, and those that pass through pinned memory in parts."""
    tensor = torch.randn(rows, 4099).to(dtype)
    there = to_device(tensor, "cuda")
    assert there.is_cuda and there.dtype == dtype
    for back in (to_host(there), to_host(there.t()).t()):
        assert not back.is_cuda and not back.is_pinned()
        assert torch.equal(back.float(), tensor.float())
    assert to_host(tensor) is tensor


def test_a_thread_copies_what_is_computed_when_it_is():
    """And what it hands over stays as it is while it is used."""
    copies, found = CopyStream("cuda"), []
    x = torch.randn(4096, 4096, device="cuda") / 32
    for _ in range(50):
        x = torch.tanh(x @ x)
    done = copies.now()

    def copy():
        with copies.after(done):
            found.append(to_host(x))
            weight = to_device(found[0], "cuda")
        found.append(copies.hand_over(weight))

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    host, weight = found
    torch.cuda._sleep(10**8)
    total = weight.double().sum()
    del weight, found[:]
    with copies.after():
        torch.full((4096, 4096), 7.0, device="cuda")  # does not get the memory that is still read
    assert torch.equal(host, x.cpu())
    torch.testing.assert_close(float(total), float(host.double().sum()), rtol=1e-9, atol=1e-6)
