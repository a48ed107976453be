"""Antidotes against dense formulas in float64, for every kind of change."""

import pytest
import torch

from conftest import assert_same_bits, snapshot, tiny_llama
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum, gather
from finepoint.adapters.scaling import scale_by_depth, scaled, wise_ft
from finepoint.errors import FinepointError

LAYERS = 4


def make_adapter(model, kind, seed=0):
    """A random change of some entries of every weight, or of whole weights."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, weight in model.named_parameters():
        size = weight.numel()
        dtype = str(weight.dtype).removeprefix("torch.")
        positions = torch.randperm(size, generator=generator)[: size // 3].sort().values
        if kind == "full":
            positions = torch.arange(size)
        delta = torch.randn(len(positions), generator=generator) * 0.1
        delta[::5] = 0
        base = gather(weight, positions)
        values = (base.double() + delta).to(weight.dtype)
        if kind == "delta":
            wide = torch.promote_types(weight.dtype, torch.float32)
            changes[name] = Change(tuple(weight.shape), dtype, kind, positions, delta.to(wide), checksum(base))
        elif kind == "value":
            changes[name] = Change(tuple(weight.shape), dtype, kind, positions, values, checksum(base))
        else:
            empty = torch.empty(0, dtype=torch.long)
            changes[name] = Change(tuple(weight.shape), dtype, kind, empty, values.view(weight.shape))
    return SparseAdapter(changes)


def trained(model, adapter):
    with adapter.applied(model):
        return snapshot(model)


@pytest.fixture(params=["float32", "bfloat16", "float64"])
def model(request):
    return tiny_llama(getattr(torch, request.param), tied=False, layers=LAYERS)


@pytest.mark.parametrize("kind", ["delta", "value", "full"])
def test_one_gives_the_adapter_and_zero_the_base(model, kind):
    with torch.no_grad():
        model.model.norm.weight[0] = -0.0  # whose bits a sum with 0 would lose
    adapter, base = make_adapter(model, kind), snapshot(model)
    assert_same_bits(trained(model, wise_ft(adapter, model, 1.0)), trained(model, adapter))
    assert_same_bits(trained(model, scale_by_depth(adapter, model, 1.0)), trained(model, adapter))
    assert_same_bits(trained(model, wise_ft(adapter, model, 0.0)), base)
    assert_same_bits(snapshot(model), base)


@pytest.mark.parametrize("kind", ["delta", "value", "full"])
@pytest.mark.parametrize("alpha", [0.3, 1.7])
def test_wise_ft_equals_its_formula(model, kind, alpha):
    adapter, base = make_adapter(model, kind), snapshot(model)
    exact = {name: base[name].double().flatten() for name in adapter}
    for name, change in adapter.changes.items():
        start = exact[name][change.positions()]
        end = start + change.numbers.double() if kind == "delta" else change.numbers.double().flatten()
        exact[name][change.positions()] = (1 - alpha) * start + alpha * end
    for name, value in trained(model, wise_ft(adapter, model, alpha)).items():
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-7, torch.bfloat16: 8e-3}[value.dtype]
        torch.testing.assert_close(value.double().flatten(), exact[name], rtol=tolerance / 2, atol=tolerance / 16)


def test_rounding_happens_once():
    model = tiny_llama(torch.bfloat16)
    adapter, base = make_adapter(model, "delta"), snapshot(model)
    found = trained(model, wise_ft(adapter, model, 0.3))
    for name, change in adapter.changes.items():
        start = base[name].flatten()[change.indices].double()
        expected = (start + 0.3 * change.numbers.double()).bfloat16()
        assert torch.equal(found[name].flatten()[change.indices], expected)


def test_lines_rises_with_depth():
    model = tiny_llama(torch.float64, tied=False, layers=LAYERS)
    adapter, base = make_adapter(model, "full"), snapshot(model)
    after, alpha = trained(model, adapter), 0.1
    found = trained(model, scale_by_depth(adapter, model, alpha))
    for name, value in found.items():
        factor = 1.0
        for layer in range(LAYERS):
            if f"layers.{layer}." in name:
                factor = alpha + (1 - alpha) * layer / (LAYERS - 1)
        if "embed" in name:
            factor = alpha
        torch.testing.assert_close(value, base[name] + factor * (after[name] - base[name]), rtol=0, atol=1e-14)
    assert torch.equal(found["lm_head.weight"], after["lm_head.weight"])


def test_a_tied_head_goes_with_the_embedding():
    model = tiny_llama(torch.float64)
    adapter, base = make_adapter(model, "value"), snapshot(model)
    found = trained(model, scale_by_depth(adapter, model, 0.0))
    assert torch.equal(found["lm_head.weight"], base["lm_head.weight"])


def test_factors_by_name():
    model = tiny_llama(torch.float64)
    adapter, base = make_adapter(model, "delta"), snapshot(model)
    found = trained(model, scaled(adapter, model, lambda name: float("mlp" in name)))
    after = trained(model, adapter)
    for name, value in found.items():
        assert torch.equal(value, after[name] if "mlp" in name else base[name])


def test_a_model_that_is_not_the_base_is_refused():
    model = tiny_llama()
    adapter = make_adapter(model, "full")
    with adapter.applied(model), pytest.raises(FinepointError, match="is applied to the model already"):
        wise_ft(adapter, model, 0.5)
    sparse = make_adapter(model, "delta")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(FinepointError, match="its values are not those of the base"):
        wise_ft(sparse, model, 0.5)
    with pytest.raises(FinepointError, match="Linear has no blocks"):
        scale_by_depth(SparseAdapter({}), torch.nn.Linear(2, 2), 0.5)


def test_a_scaled_adapter_is_saved_like_any(tmp_path):
    model = tiny_llama()
    half = wise_ft(make_adapter(model, "delta"), model, 0.5)
    half.save(tmp_path / "half")
    assert_same_bits(trained(model, SparseAdapter.load(tmp_path / "half")), trained(model, half))
