"""A training that uses weights otherwise than any audit could see is stopped; one that does not is left as it is."""

import copy
import weakref

import pytest
import torch
from torch import nn

from conftest import assert_same_bits, random_batches, snapshot, tiny_llama
from finepoint.errors import FinepointError
from finepoint.selection.select import select
from finepoint.tuner import inputs
from finepoint.tuner.tuner import SparseTuner

BATCH = random_batches(1)[0]
IDS = BATCH["input_ids"]


class LongRows(nn.Module):
    """Uses its second weight once more, without its layer, where rows are long."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        states = self.b(self.a(ids))
        return self.c(states @ self.b.weight.T if ids.shape[1] > 6 else states)


def entropy(logits):
    return nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())


def own(model, step):
    return model(**BATCH).loss


def a_layer_called(model, step):
    return entropy(model.lm_head(model.model(input_ids=IDS).last_hidden_state))


def a_head_by_hand(model, step):
    return entropy(model.model(input_ids=IDS).last_hidden_state @ model.lm_head.weight.T)


def a_term_of_a_weight(model, step):
    return own(model, step) + model.lm_head.weight.square().sum()


def trained(model, loss, steps=5, audit=True, accumulate=1):
    """Trains every third entry of every weight; the model, and the steps in which weights had gradients."""
    indices = {name: torch.arange(0, weight.numel(), 3) for name, weight in model.named_parameters()}
    weights, looked = list(model.parameters()), set()
    with SparseTuner(model, indices, audit=audit) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for step in range(1, steps + 1):
            for _ in range(accumulate):
                loss(model, step).backward()
                looked |= {step for each in weights if each.requires_grad}
            assert all(each.grad is None for each in weights)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            assert not any(each.requires_grad for each in weights)
    return model, looked


@pytest.mark.parametrize("loss", [a_head_by_hand, a_term_of_a_weight])
@pytest.mark.parametrize("tied", [False, True])
def test_a_weight_that_the_loop_uses_by_hand_is_refused_in_the_second_step(loss, tied):
    model = tiny_llama(tied=tied)
    name = r"model\.embed_tokens" if tied else r"lm_head"
    with pytest.raises(FinepointError, match=rf"^in step 2 the chosen entries of {name}\.weight got another gradient"):
        trained(model, loss)
    trained(model, loss, audit=False)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("loss", [own, a_layer_called])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_looking_at_steps_changes_no_bit(loss, dtype, accumulate):
    model = tiny_llama(dtype)
    plain, never = trained(copy.deepcopy(model), loss, audit=False, accumulate=accumulate)
    found, looked = trained(model, loss, accumulate=accumulate)
    assert_same_bits(snapshot(found), snapshot(plain))
    assert not never
    assert accumulate > 1 or looked == {2, 3, 5}


def test_what_longer_rows_bring_about_is_refused_when_they_come():
    torch.manual_seed(0)
    model = LongRows()
    with pytest.raises(FinepointError, match=r"^in step 4 the chosen entries of b.weight got another gradient"):
        trained(model, lambda model, step: model(IDS[:, : 8 if step == 4 else 5]).square().sum())


def test_gradients_that_are_asked_for_by_name_are_no_fault():
    model = tiny_llama()
    tuner = SparseTuner(model, {"model.layers.0.mlp.up_proj.weight": torch.arange(9)})
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for step in range(6):
        if step % 2:
            own(model, step).backward(inputs=tuner.parameters())
        else:
            tuner.parameters()[0].grad = torch.autograd.grad(own(model, step), tuner.parameters())[0]
        optimizer.step()
        optimizer.zero_grad()
        assert not model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad


def test_a_copy_that_is_made_while_a_step_is_looked_at_trains_its_own_deltas_alone():
    model = tiny_llama()
    with SparseTuner(model, {"model.layers.0.mlp.up_proj.weight": torch.arange(9)}) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        own(model, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        own(model, 2)
        assert model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad
        other = copy.deepcopy(model)
        own(other, 3).backward()
        trained = [name for name, each in other.named_parameters() if each.requires_grad]
        assert trained == ["finepoint.model/layers/0/mlp/up_proj/weight.delta"]


def test_a_step_that_is_looked_at_keeps_no_whole_input_of_a_layer(monkeypatch):
    """Of columns a few are kept, of other entries what autograd keeps anyway: in the steps that are looked at, too."""
    monkeypatch.setattr(inputs, "LEAST", 0)
    model, alive = tiny_llama(tied=False).train(), []
    chosen = select(model, rule="random", density=0.1, structure="column", scope="weight", targets="mlp")
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(args[0])))
    with SparseTuner(model, chosen) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for step in range(1, 4):
            alive.clear()
            loss = own(model, step)
            assert any(weight.requires_grad for name, weight in model.named_parameters() if "delta" not in name) == (
                step in (2, 3)
            )
            assert alive
            assert not any(held() is not None for held in alive)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
