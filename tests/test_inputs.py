"""Inputs of layers that are made again in the backward pass, from what autograd keeps anyway."""

import pytest
import torch
from torch import nn

from conftest import random_batches, tiny_gemma, tiny_llama
from finepoint.memory.plan import plan
from finepoint.selection.select import select
from finepoint.training.settings import PlanConfig
from finepoint.training.trainer import CHECKPOINTING
from finepoint.tuner import inputs
from finepoint.tuner.tuner import SparseTuner


@pytest.fixture
def made(monkeypatch):
    """Small inputs are made again, too; what is made is counted."""
    monkeypatch.setattr(inputs, "LEAST", 0)
    found, carry_out = [], inputs._carried_out

    def counted(steps, factors):
        found.append(steps)
        return carry_out(steps, factors)

    monkeypatch.setattr(inputs, "_carried_out", counted)
    monkeypatch.setattr(inputs.Record, "holds", lambda *given: True)  # that is counted too
    return found


def gradients_of(model, batch, structure="entry"):
    chosen = select(model, rule="random", density=0.1, structure=structure, scope="weight")
    with SparseTuner(model, chosen, audit=False) as tuner:
        model(**batch).loss.backward()
        return [delta.grad for delta in tuner.parameters()]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", ["entry", "row"])
def test_gradients_have_the_bits_of_inputs_that_were_kept(make, dtype, structure, made, monkeypatch):
    model, batch = make().to(dtype).train(), random_batches(1)[0]
    again = gradients_of(model, batch, structure)
    assert made
    made.clear()
    monkeypatch.setattr(inputs, "LEAST", 1 << 40)
    kept = gradients_of(model, batch, structure)
    assert not made
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, kept, strict=True))


def test_layers_that_read_one_input_make_it_once(made):
    model = tiny_llama().train()
    gradients_of(model, random_batches(1)[0])
    whole = [steps for steps in made if isinstance(steps, tuple) and not all(isinstance(part, int) for part in steps)]
    # Per block a norm before attention, one before the MLP; the gated product's factors are places alone. What comes
    # before the first trained layer has no backward pass, so that nothing is kept of it.
    assert len(whole) == 2 * model.config.num_hidden_layers - 1


def test_checkpointed_activations_are_kept_as_before(made):
    """Whoever packs what autograd keeps may be asked for it once; asked earlier, it would be computed twice."""
    model = tiny_llama().train()
    getattr(model, f"{CHECKPOINTING}_enable")()
    gradients_of(model, random_batches(1)[0])
    assert not made


def test_memory_falls_by_the_inputs(made, monkeypatch, model_folder):
    """As `finepoint plan` sees it, which runs the same code on tensors without memory."""
    asked = PlanConfig(model=str(model_folder), density=0.5, tokens=16, batch_size=2, padded=False, device="cpu")
    less = plan(asked).training["activations"]
    monkeypatch.setattr(inputs, "LEAST", 1 << 40)
    more, config = plan(asked).training["activations"], tiny_llama().config
    norms = 2 * config.num_hidden_layers - 1  # before the first one nothing is trained
    wide = norms * config.hidden_size + config.num_hidden_layers * config.intermediate_size
    assert more - less == 4 * 2 * 16 * wide


class Reused(nn.Module):
    """A product that two layers read, once as it is and once after a change in place."""

    def __init__(self, change):
        super().__init__()
        self.scale, self.first, self.second = nn.Parameter(torch.ones(8)), nn.Linear(8, 4), nn.Linear(8, 4)
        self.change = change

    def forward(self, x):
        h = self.scale * (x * x.square().mean(-1, keepdim=True).rsqrt())
        return self.first(h).sum() + self.second(self.change(h)).square().sum()


@pytest.mark.parametrize(("change", "plainly", "count"), [
    (lambda h: h, lambda h: h, 1),
    (lambda h: h * 2.0, lambda h: h * 2.0, 1),  # a number has forgotten that it has no dtype: this one is kept
    (lambda h: h * torch.full((8,), 3.0), lambda h: h * 3.0, 2),
    (lambda h: h.mul_(torch.full((8,), 3.0)), lambda h: h * 3.0, 1),  # the first layer's is made as it was
])  # fmt: skip
def test_products_that_change_and_graphs_that_are_used_twice(change, plainly, count, made):
    torch.manual_seed(0)
    model, dense = Reused(change), Reused(plainly)
    dense.load_state_dict(model.state_dict())
    model.scale.requires_grad_(False)
    gradients, x = [], torch.randn(5, 8, requires_grad=True)
    chosen = torch.arange(0, 32, 3)
    with SparseTuner(model, {"first.weight": chosen, "second.weight": chosen}, audit=False) as tuner:
        loss = model(x)
        for retain in (True, False):
            loss.backward(retain_graph=retain)
            gradients.append([delta.grad for delta in tuner.parameters()])
            for delta in tuner.parameters():
                delta.grad = None
    assert sum(isinstance(steps, tuple) and steps[0] == 0 for steps in made) == 2 * count
    dense(x.detach().requires_grad_()).backward()
    for found in gradients:
        for gradient, layer in zip(found, (dense.first, dense.second), strict=True):
            torch.testing.assert_close(gradient, layer.weight.grad.reshape(-1)[chosen])


def without_gradient(h):
    with torch.no_grad():
        h.clamp_(-0.5, 0.5)
    return h


def behind_autograd(h):
    h.data.clamp_(-0.5, 0.5)
    return h


def of_a_factor(h):
    """What is changed has become a factor of the product, which autograd does not keep."""
    scaled = h * torch.full((8,), 3.0)
    scaled.data[:, :3] = 0
    return scaled * torch.full((8,), 2.0)


@pytest.mark.parametrize("change", [without_gradient, behind_autograd, of_a_factor])
@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_inputs_that_are_changed_behind_autograd_are_kept(change, before, monkeypatch, caplog):
    """From the first time on, or, where it begins later, from the next time that it is looked at; which is told."""
    monkeypatch.setattr(inputs, "LEAST", 0)
    torch.manual_seed(0)
    model, dense = Reused(lambda h: h), Reused(lambda h: h)
    dense.load_state_dict(model.state_dict())
    model.scale.requires_grad_(False)
    chosen, right = torch.arange(0, 32, 3), []
    with SparseTuner(model, {"second.weight": chosen}, audit=False) as tuner:
        for step in range(10):
            if step == before:
                model.change = change
                # The first layer, which the dense model trains, would refuse what it sees.
                dense.change = behind_autograd if change is without_gradient else change
            x = torch.randn(5, 8)
            for each in (model, dense):
                each.zero_grad()
                each(x.clone().requires_grad_()).backward()
            expected = dense.second.weight.grad.reshape(-1)[chosen]
            right.append(torch.allclose(*[delta.grad for delta in tuner.parameters()], expected, atol=1e-5))
    looked = next(uses for uses in (1, 2, 4, 8) if uses > before) - 1
    late = change is not without_gradient  # of that the tensor's version tells
    assert right == [not (late and before <= step < looked) for step in range(10)]
    assert ("is changed after it is made" in caplog.text) == (late and before > 0)
