import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finepoint.training import kernels
from finepoint.training.kernels import plain, sampled_gradient

KERNELS = {kernel.__name__: kernel for _, kernel in [*kernels.CPU, *kernels.PLAIN, (1.0, plain.by_blocks)]}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@st.composite
def cases(draw):
    tokens, height, width = draw(st.integers(1, 40)), draw(st.integers(1, 30)), draw(st.integers(1, 30))
    count = draw(st.integers(0, height * width))
    seed = draw(st.integers(0, 1000))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(height, tokens, generator=generator).to(dtype).T  # not contiguous
    x = torch.randn(tokens, 2 * width, generator=generator).to(dtype)[:, ::2]
    indices = torch.randperm(height * width, generator=generator)[:count].sort().values
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
    tolerance = TOLERANCE[dy.dtype]
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


def test_the_compiled_kernels_are_installed_for_the_tests():
    assert set(KERNELS) == {"by_tiles", "by_dots", "by_gather", "by_blocks"}


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
    monkeypatch.setattr(kernels, "CPU", kernels.PLAIN)
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
