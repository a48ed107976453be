import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finepoint.adapters.entries import moved
from finepoint.training import kernels
from finepoint.training.kernels import following, plain, sampled_gradient
from finepoint.training.kernels import numba as compiled
from finepoint.training.kernels.numba import by_tiles

KERNELS = {kernel.__name__: kernel for kernel in (plain.by_gather, plain.by_blocks, by_tiles)}


@st.composite
def cases(draw):
    tokens = draw(st.integers(1, 40) | st.sampled_from([63, 64, 65, 128, 200]))
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    count = draw(st.integers(0, height * width))
    seed = draw(st.integers(0, 1000))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    narrow = draw(st.sampled_from([torch.int32, torch.int64]))
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(height, tokens, generator=generator).to(dtype).T  # not contiguous
    x = torch.randn(tokens, 2 * width, generator=generator).to(dtype)[:, ::2]
    indices = torch.randperm(height * width, generator=generator)[:count].sort().values.to(narrow)
    return dy, x, indices


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_kernel_equals_the_reference(kernel, case):
    dy, x, indices = case
    found = KERNELS[kernel](dy, x, indices)
    expected = plain.reference(dy, x, indices)
    assert found.shape == indices.shape
    assert found.dtype == (torch.float64 if dy.dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dy.dtype == torch.float64 else 1e-5  # sums are taken in float32 whatever the operands are
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1, len(dy) ** 0.5))


def test_the_reference_is_what_autograd_gives():
    layer = torch.nn.Linear(5, 7, bias=False).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    indices = torch.tensor([0, 3, 17, 34])
    for kernel in (plain.reference, sampled_gradient):
        torch.testing.assert_close(kernel(dy, x, indices), layer.weight.grad.reshape(-1)[indices], rtol=1e-12, atol=0)


def test_the_compiled_kernel_is_what_the_tests_run():
    assert kernels.kernel_for("cpu", 0.001) is by_tiles


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_operands_of_two_dtypes_are_summed_in_the_wider_one(dtypes):
    dy, x = torch.randn(70, 20).to(dtypes[0]), torch.randn(70, 30).to(dtypes[1])
    indices = torch.arange(0, 600, 7)
    for kernel in KERNELS.values():
        torch.testing.assert_close(kernel(dy, x, indices), plain.reference(dy, x, indices), rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_no_more_than_the_order_of_sums():
    dy, x, indices = torch.randn(300, 40), torch.randn(300, 50), torch.arange(0, 2000, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = by_tiles(dy, x, indices)
        torch.set_num_threads(3)  # more than there are cores
        torch.testing.assert_close(by_tiles(dy, x, indices), alone, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


def test_nothing_is_lost_where_fewer_threads_come_than_were_asked_for(monkeypatch):
    dy, x, indices = torch.randn(300, 40), torch.randn(300, 50), torch.arange(0, 2000, 3)
    monkeypatch.setattr(compiled, "thread_count", lambda: 4)
    monkeypatch.setattr(compiled, "in_torch_threads", lambda work, pointers, shares: work.ctypes(pointers))  # one
    torch.testing.assert_close(by_tiles(dy, x, indices), plain.reference(dy, x, indices), rtol=1e-5, atol=1e-4)


def test_the_triton_kernel_equals_the_reference_in_its_interpreter():
    # In a process of its own: Triton reads the setting when it is imported.
    code = """
import torch
from finepoint.training.kernels.triton import by_programs
from finepoint.training.kernels.plain import reference
torch.manual_seed(0)
cases = [(1, 1, 1, 1), (1, 7, 9, 20), (33, 40, 30, 0), (33, 40, 30, 1), (50, 64, 32, 300), (17, 3, 500, 129)]
for tokens, height, width, count in cases:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        dy, x = torch.randn(height, tokens).to(dtype).T, torch.randn(tokens, width).to(dtype)
        indices = torch.randperm(height * width)[:count].sort().values
        for narrow in (torch.int32, torch.int64):
            found, expected = by_programs(dy, x, indices.to(narrow)), reference(dy, x, indices)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
print("equal")
"""
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "equal\n", done.stderr


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_weights_follow_their_deltas_bit_for_bit_as_in_plain_pytorch(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 30, generator=generator).to(dtype)
    weight[0, 0] = -0.0
    indices = torch.randperm(600, generator=generator)[: seed % 50].sort().values
    base = weight.reshape(-1)[indices]
    delta = torch.randn(len(indices), generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    delta[::3] = 0
    delta *= 10.0 ** (seed % 7 - 5)
    expected = weight.clone()
    expected.view(-1)[indices] = moved(base, delta)
    following.follow_(weight, indices.to(torch.int32), base, delta)
    assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.04, 0.5, 1.0])
def test_every_density_has_a_kernel(density):
    dy, x = torch.randn(2, 8, 32), torch.randn(2, 8, 64)
    indices = torch.arange(0, 2048, max(1, int(1 / density)))
    torch.testing.assert_close(sampled_gradient(dy, x, indices), plain.reference(dy, x, indices), rtol=1e-4, atol=1e-4)


def test_blocks_hold_a_bounded_piece_of_the_dense_gradient(monkeypatch):
    monkeypatch.setattr(plain, "BLOCK", 100)
    dy, x = torch.randn(6, 33).double(), torch.randn(6, 40).double()
    indices = torch.arange(0, 33 * 40, 7)
    torch.testing.assert_close(plain.by_blocks(dy, x, indices), plain.reference(dy, x, indices))


def test_without_the_compiled_kernel_everything_works(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", {})
    assert kernels.kernel_for("cpu", 0.001) is plain.by_gather
    dy, x, indices = torch.randn(9, 20), torch.randn(9, 30), torch.tensor([1, 599])
    torch.testing.assert_close(sampled_gradient(dy, x, indices), plain.reference(dy, x, indices), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 100), st.booleans())
def test_embedding_gradient_equals_autograd(vocabulary, tokens, seed, padded):
    torch.manual_seed(seed)
    padding = 0 if padded else None
    layer = torch.nn.Embedding(vocabulary, 3, padding_idx=padding).double()
    ids = torch.randint(vocabulary, (2, tokens))
    out = layer(ids)
    dy = torch.randn_like(out)
    out.backward(dy)
    indices = torch.randperm(vocabulary * 3)[: vocabulary * 2].sort().values
    found = plain.sampled_embedding_gradient(dy, ids, indices, padding)
    torch.testing.assert_close(found, layer.weight.grad.reshape(-1)[indices], rtol=1e-12, atol=1e-14)
