from functools import partial

import pytest
import torch
from finepoint.tuner.kernels.compiled import numba_kernels, or_plain
from hypothesis import given, settings
from hypothesis import strategies as st

from finepoint.adapters.entries import moved
from finepoint.tuner import kernels
from finepoint.tuner import kernels as following
from finepoint.tuner.kernels import numba as compiled
from finepoint.tuner.kernels import plain, sampled_gradient
from finepoint.tuner.kernels.numba import by_tiles

KERNELS = {"by_gather": plain.by_gather, "by_tiles": by_tiles} | {
    f"{way.__name__}, {name}": partial(way, multiply=multiply)
    for way in (plain.by_blocks, plain.by_product)
    for name, multiply in plain.PRODUCTS.items()
}
EXACT = {name: kernel for name, kernel in KERNELS.items() if "half" not in name}
ROUNDING = 2.0**-8  # of a number in bfloat16, to the nearest: half a unit in its eighth bit


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


def strided(tensor):
    """The same numbers, every second in memory, the ones between far out of range."""
    return torch.stack([tensor, torch.full_like(tensor, 30000)], 1)[:, 0]


def error_bound(dy, x, indices):
    """How far a sum in float32 of so many products can be from the true one, in any order, entry by entry: (k,)."""
    units = torch.finfo(torch.float64 if dy.dtype == torch.float64 else torch.float32).eps / 2 * (len(dy) + 1)
    return 1.01 * units * plain.reference(dy.double().abs(), x.double().abs(), indices)


@pytest.mark.parametrize("kernel", EXACT)
@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_kernel_equals_the_reference_up_to_the_order_of_sums(kernel, case):
    dy, x, indices = case
    found = KERNELS[kernel](dy, x, indices)
    expected = plain.reference(dy.double(), x.double(), indices)
    assert found.shape == indices.shape
    assert found.dtype == (torch.float64 if dy.dtype == torch.float64 else torch.float32)
    if dy.dtype != torch.float64:  # sums are taken in float32 whatever the operands are
        assert ((found - expected).abs() <= error_bound(dy, x, indices)).all()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * max(1, len(dy) ** 0.5))


@pytest.mark.parametrize("kernel", sorted(KERNELS.keys() - EXACT.keys()))
@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_product_in_bfloat16_is_the_reference_rounded_once(kernel, case):
    assert plain.rounds_once(torch.bfloat16)
    dy, x, indices = (part.bfloat16() if part.is_floating_point() else part for part in case)
    found, exact = KERNELS[kernel](dy, x, indices), plain.reference(dy.double(), x.double(), indices)
    assert found.dtype == torch.float32
    allowed = error_bound(dy, x, indices)
    assert ((found - exact).abs() <= allowed + ROUNDING * (exact.abs() + allowed)).all()


@settings(max_examples=20, deadline=None)
@given(cases())
def test_compiled_code_that_knows_addresses_alone_reads_indices_of_any_layout(case):
    dy, x, indices = case
    assert torch.equal(by_tiles(dy, x, strided(indices)), by_tiles(dy, x, indices))


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
    assert kernels.kernel_for(torch.ones(2, 30), torch.ones(2, 40), 1).__wrapped__ is by_tiles


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_operands_of_two_dtypes_are_summed_in_the_wider_one(dtypes):
    dy, x = torch.randn(70, 20).to(dtypes[0]), torch.randn(70, 30).to(dtypes[1])
    indices = torch.arange(0, 600, 7)
    for kernel in EXACT.values():
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


def fails(*arguments):
    raise RuntimeError("no compiler here\nand more")


def test_a_compiled_kernel_that_fails_gives_way_to_the_plain_one_with_one_line(caplog):
    kernel = or_plain(fails, plain.by_gather)
    dy, x, indices = torch.randn(9, 20), torch.randn(9, 30), torch.tensor([1, 599])
    for _ in range(3):
        found = kernel(dy, x, indices)
        torch.testing.assert_close(found, plain.reference(dy, x, indices), rtol=1e-4, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        "the compiled kernel fails does not run on this machine (RuntimeError: no compiler here); plain PyTorch, "
        "slower, takes its place"
    ]


def test_wrong_arguments_do_not_count_as_a_kernel_that_fails(caplog):
    kernel = or_plain(plain.reference, plain.by_gather)
    with pytest.raises((RuntimeError, ValueError)):
        kernel(torch.randn(9, 20), torch.randn(8, 30), torch.tensor([1, 599]))
    assert not caplog.records


def test_weights_follow_in_plain_pytorch_where_the_compiled_loop_fails(monkeypatch):
    monkeypatch.setitem(following.ONE_PASS, torch.float32, (fails, torch.float32))
    monkeypatch.setattr(following, "_write_", or_plain(following.in_one_pass_, following.in_steps_))
    weight = torch.zeros(4, 5)
    following.follow_(weight, torch.tensor([3, 7], dtype=torch.int32), torch.zeros(2), torch.tensor([1.0, 2.0]))
    assert weight.view(-1)[[3, 7]].tolist() == [1, 2]
    assert weight.sum() == 3


@pytest.mark.parametrize("error", [ModuleNotFoundError("numba"), OSError("libLLVM.so: cannot open")])
def test_without_numba_or_with_a_broken_one_plain_pytorch_is_used(error, monkeypatch, caplog):
    def broken(name):
        raise error

    monkeypatch.setattr("finepoint.tuner.kernels.compiled.import_module", broken)
    assert numba_kernels.__wrapped__() is None
    assert len(caplog.records) == (not isinstance(error, ModuleNotFoundError))  # what is not installed is no fault


@settings(max_examples=60, deadline=None)
@given(cases())
def test_groups_and_entries_off_the_cpu_take_one_dense_product(case):
    dy, x, _ = case
    expected = dy.double().T @ x.double()
    for product in (plain.product, plain.turned):
        found = product(dy.T, x)
        assert found.dtype == (torch.float64 if dy.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_half_precision_is_not_multiplied_as_it_is_where_a_device_cannot_sum_it_in_float32():
    assert not plain.sums_in_float32("cpu", torch.bfloat16)  # has no such product
    half = torch.ones(2, 3, dtype=torch.bfloat16, device="meta")
    assert plain.product(half, half.T).dtype == torch.float32


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
    given = [indices.to(torch.int32), base, delta]
    following.follow_(weight, *(map(strided, given) if seed % 2 else given))
    assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.04, 0.5, 1.0])
def test_every_density_has_a_kernel(density):
    dy, x = torch.randn(2, 8, 32), torch.randn(2, 8, 64)
    indices = torch.arange(0, 2048, max(1, int(1 / density)))
    torch.testing.assert_close(sampled_gradient(dy, x, indices), plain.reference(dy, x, indices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [plain.by_blocks, plain.by_product])
def test_blocks_hold_a_bounded_piece_of_the_dense_gradient(kernel, monkeypatch):
    monkeypatch.setattr(plain, "BLOCK", 100)
    monkeypatch.setattr(plain, "WIDE_BLOCK", 100)
    dy, x = torch.randn(6, 33).double(), torch.randn(6, 40).double()
    for indices in (
        torch.arange(0, 33 * 40, 7),
        torch.arange(1000, 1020),
        torch.tensor([0]),
        torch.tensor([33 * 40 - 1]),
    ):
        torch.testing.assert_close(kernel(dy, x, indices), plain.reference(dy, x, indices))


def test_without_the_compiled_kernel_everything_works(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", {})
    monkeypatch.setattr(kernels, "KNOWN", {})
    assert kernels.kernel_for(torch.ones(9, 20), torch.ones(9, 30), 2) is kernels.ELSEWHERE["dense"]
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
