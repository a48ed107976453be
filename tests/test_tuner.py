import copy
import gc
import inspect
import weakref

import pytest
import torch

import finepoint
from conftest import assert_same_bits, bits, random_batches, snapshot, tiny_gemma, tiny_llama
from finepoint.errors import FinepointError
from finepoint.tuner.tuner import SparseTuner
from reference import TiedToy, dense_masked_training


def random_choice(model, density=0.05, targets="all", seed=0):
    return finepoint.select(model, rule="random", density=density, targets=targets, scope="weight", seed=seed).indices


def train(model, tuner, steps, make_optimizer, close=True):
    optimizer = make_optimizer(tuner.parameters())
    for step in steps:
        for batch in step:
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if close:
        tuner.close()
    return model


def make_model(kind):
    if kind == "toy":
        torch.manual_seed(0)
        return TiedToy()
    make = {"llama": tiny_llama, "gemma": tiny_gemma, "untied": lambda dtype: tiny_llama(dtype, tied=False)}[kind]
    return make(torch.float64)


def toy_steps(kind, count=5):
    batches = random_batches(count)
    if kind == "toy":
        batches = [{key: value.clamp(max=10) for key, value in batch.items()} for batch in batches]
    return [[batch] for batch in batches]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["toy", "llama", "gemma", "untied"])
@pytest.mark.parametrize("density", [0.02, 1.0])
def test_equals_dense_training_with_a_masked_gradient(kind, optimizer, density):
    model, steps = make_model(kind), toy_steps(kind)
    indices = random_choice(model, density)
    dense = dense_masked_training(copy.deepcopy(model), indices, steps, OPTIMIZERS[optimizer])
    before = snapshot(model)
    tuned = train(model, SparseTuner(model, indices), steps, OPTIMIZERS[optimizer])
    moved = 0
    for (name, found), (_, expected) in zip(tuned.named_parameters(), dense.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        others = torch.ones(found.numel(), dtype=torch.bool)
        if name in indices:
            others[indices[name]] = False
            moved += int((found.reshape(-1) != before[name].reshape(-1)).sum())
        assert torch.equal(bits(found.reshape(-1)[others]), bits(before[name].reshape(-1)[others])), name
    assert moved > 0  # negative control: training did something


def test_before_a_step_outputs_are_bit_identical(model, batches):
    expected = [model(**batch).logits for batch in batches]
    tuner = SparseTuner(model, random_choice(model, 0.5))
    for batch, logits in zip(batches, expected, strict=True):
        assert torch.equal(model(**batch).logits, logits)
    tuner.follow_()
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, expected[0])


def test_a_sequential_model_computes_and_trains():
    """It runs all its children, among them the one that holds the deltas."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    dense, x = copy.deepcopy(model), torch.randn(7, 5)
    dense(x).square().sum().backward()
    with finepoint.SparseTuner(model, {"0.weight": torch.arange(0, 20, 3)}) as tuner:
        assert torch.equal(model(x), dense(x))
        model(x).square().sum().backward()
        (delta,) = tuner.parameters()
        torch.testing.assert_close(delta.grad, dense[0].weight.grad.flatten()[::3])


def test_a_negative_zero_keeps_its_bits():
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.zero_().neg_()
    before = snapshot(layer)
    with SparseTuner(layer, {"weight": torch.arange(4)}) as tuner:
        tuner.follow_()
    assert_same_bits(before, snapshot(layer))


def test_no_dense_gradient_is_left_and_only_deltas_train(model, batches):
    tuner = SparseTuner(model, random_choice(model))
    model(**batches[0]).loss.backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"finepoint.{name.replace('.', '/')}.delta" for name in tuner.entries}
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == tuner.count
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable)
        if name in trainable:
            assert parameter.dtype == torch.float32
            assert parameter.ndim == 1


def test_accumulation_over_two_halves_equals_one_batch():
    batch = random_batches(1, rows=4)[0]
    batch["labels"] = batch["input_ids"].clone()
    halves = [{key: value[:2] for key, value in batch.items()}, {key: value[2:] for key, value in batch.items()}]
    gradients = []
    for parts in ([batch], halves):
        model = tiny_llama(torch.float64)
        tuner = SparseTuner(model, random_choice(model))
        for part in parts:
            (model(**part).loss / len(parts)).backward()
        gradients.append([delta.grad for delta in tuner.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, summed, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny_llama(torch.float64)
        model.train()
        tuner = SparseTuner(model, random_choice(model))
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        train(model, tuner, toy_steps("llama"), OPTIMIZERS["adam"])
        results.append(snapshot(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-12)


def test_two_forwards_one_backward_and_a_backward_after_another_forward(batches):
    model = tiny_llama(torch.float64)
    tuner = SparseTuner(model, random_choice(model))
    first, second = model(**batches[0]).loss, model(**batches[1]).loss
    first.backward()
    third = model(**batches[2]).loss  # the backward made the entries stale: this forward writes them once more
    (second + third).backward()
    summed = [delta.grad.clone() for delta in tuner.parameters()]
    for delta in tuner.parameters():
        delta.grad = None
    for batch in batches:
        model(**batch).loss.backward()
    for delta, expected in zip(tuner.parameters(), summed, strict=True):
        torch.testing.assert_close(delta.grad, expected, rtol=1e-10, atol=1e-14)


def test_weights_follow_whoever_steps(batches):
    """torch optimizers at once, by the post-step hook; anyone else before the next forward, by the backward witness."""
    model = tiny_llama()
    tuner = SparseTuner(model, random_choice(model))
    name = next(iter(tuner.entries))
    entries = tuner.entries[name]

    def stored():
        return entries.weight.detach().reshape(-1)[entries.indices].clone()

    model(**batches[0]).loss.backward()
    torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=True).step()
    torch.testing.assert_close(stored(), entries.base + entries.delta)

    model(**batches[0]).loss.backward()
    for delta in tuner.parameters():
        delta.data.sub_(0.01)  # an optimizer torch knows nothing of
    before = stored()
    model(**batches[0])
    assert not torch.equal(stored(), before)
    torch.testing.assert_close(stored(), entries.base + entries.delta)

    state = {key: value + 0.5 if key.endswith("delta") else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    model(**batches[0])
    torch.testing.assert_close(stored(), entries.base + entries.delta)


def test_a_submodule_called_alone_sees_the_new_weights(batches):
    model = tiny_llama()
    tuner = SparseTuner(model, random_choice(model, targets="linear"))
    layer = model.model.layers[0].mlp.up_proj
    entries = tuner.entries["model.layers.0.mlp.up_proj.weight"]
    model(**batches[0]).loss.backward()
    entries.delta.data.add_(1.0)
    x = torch.randn(1, 16)
    expected = layer.weight.detach().clone()
    expected.view(-1)[entries.indices] = entries.base + entries.delta.detach()
    torch.testing.assert_close(layer(x), x @ expected.T)


def test_bfloat16_deltas_accumulate_what_in_place_training_loses(batches):
    """200 steps of 1e-5 on weights of about 0.2, each far below bfloat16's resolution there (2^-10)."""
    model = tiny_llama(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.fill_(0.2)
    base = weight.detach().clone()
    indices = torch.arange(0, weight.numel(), 3)
    tuner = SparseTuner(model, {name: indices})
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-5, weight_decay=0.0)
    plain = base.reshape(-1)[indices].clone().requires_grad_(True)
    plain_optimizer = torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0)
    for _ in range(200):
        for delta in tuner.parameters():
            delta.grad = torch.ones_like(delta)
        plain.grad = torch.ones_like(plain)
        optimizer.step()
        plain_optimizer.step()
    assert torch.equal(plain.detach(), base.reshape(-1)[indices])  # negative control: every update was lost
    assert tuner.changed() == len(indices)
    torch.testing.assert_close(tuner.parameters()[0].detach(), torch.full((len(indices),), -2e-3), rtol=1e-3, atol=0)
    moved = model.get_parameter(name).detach().reshape(-1)
    assert torch.equal(moved[indices], (torch.tensor(0.2).bfloat16().float() - 2e-3).bfloat16().expand(len(indices)))
    others = torch.ones(weight.numel(), dtype=torch.bool)
    others[indices] = False
    assert torch.equal(moved[others], base.reshape(-1)[others])


def test_decay_pulls_towards_the_base(batches):
    model = tiny_llama()
    before = snapshot(model)
    tuner = SparseTuner(model, random_choice(model))
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1, weight_decay=0.5)
    for delta in tuner.parameters():
        delta.data.fill_(1.0)
    for _ in range(400):
        for delta in tuner.parameters():
            delta.grad = torch.zeros_like(delta)
        optimizer.step()
    tuner.close()
    for name, value in snapshot(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_layers_below_the_lowest_entry_run_no_backward(batches):
    model = tiny_llama()
    tuner = SparseTuner(model, random_choice(model, targets="model.layers.1.*"))
    assert tuner.count
    seen = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.register_forward_hook(lambda m, a, out, i=i: seen.append((i, out.requires_grad)))
    model(**batches[0]).loss.backward()
    assert seen == [(0, False), (1, True)]


def test_evaluation_adds_nothing_to_the_graph(batches):
    model = tiny_llama()
    SparseTuner(model, random_choice(model))
    with torch.no_grad():
        assert model(**batches[0]).loss.grad_fn is None
    assert all(parameter is model.get_parameter(name) for name, parameter in model.named_parameters())


def test_an_exception_in_forward_leaves_every_weight_in_its_place(batches):
    model = TiedToy()
    names = dict(model.named_parameters())
    SparseTuner(model, random_choice(model))
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]))
    with pytest.raises(TypeError):
        model.norm("no tensor")
    assert all(model.get_parameter(name) is parameter for name, parameter in names.items())


def test_close_gives_back_the_plain_model(model, batches):
    names = list(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tuner = SparseTuner(model, random_choice(model))
    train(model, tuner, [[batches[0]]], OPTIMIZERS["adam"])
    tuner.close()
    assert list(model.state_dict()) == names
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not hasattr(model, "finepoint")
    SparseTuner(model, random_choice(model)).close()  # and it can be tuned again


def test_revert_restores_the_base_bits(model, batches):
    before = snapshot(model)
    tuner = SparseTuner(model, random_choice(model, 0.5))
    train(model, tuner, [[batch] for batch in batches], OPTIMIZERS["sgd"], close=False)
    assert tuner.changed() > 0
    tuner.revert_()
    assert tuner.changed() == 0
    tuner.close()
    assert_same_bits(before, snapshot(model))


def test_a_deep_copy_trains_on_its_own(batches):
    model = tiny_llama()
    SparseTuner(model, random_choice(model))
    clone = copy.deepcopy(model)
    before = snapshot(model)
    deltas = [parameter for parameter in clone.parameters() if parameter.requires_grad]
    clone(**batches[0]).loss.backward()
    torch.optim.SGD(deltas, lr=1.0).step()
    clone(**batches[0])
    assert_same_bits(before, snapshot(model))
    assert any(not torch.equal(value, before[name]) for name, value in snapshot(clone).items())


def test_a_dropped_model_is_freed():
    model = tiny_llama()
    SparseTuner(model, random_choice(model))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()  # the orphaned hook takes itself away


def test_casting_the_model_afterwards_is_an_error():
    model = tiny_llama()
    tuner = SparseTuner(model, random_choice(model))
    model.bfloat16()
    with pytest.raises(FinepointError, match="was cast after SparseTuner"):
        tuner.follow_()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({}, "no index to train"),
        ({"nowhere": torch.tensor([1])}, "no weight 'nowhere'"),
        ({"lm_head.weight": torch.tensor([0]), "model.embed_tokens.weight": torch.tensor([1])}, "is tied to"),
        ({"model.norm.weight": torch.tensor([1, 1])}, "not ascending and unique"),
        ({"model.norm.weight": torch.tensor([16])}, "outside its 16 entries"),
        ({"model.norm.weight": torch.tensor([-1])}, "outside"),
        ({"model.norm.weight": torch.tensor([0.5])}, "flat integer positions"),
    ],
)
def test_bad_indices_are_refused_and_the_model_is_untouched(llama, indices, message):
    with pytest.raises(FinepointError, match=message):
        SparseTuner(llama, indices)
    assert not hasattr(llama, "finepoint")
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_indices_that_are_a_view_or_changed_later_are_those_that_were_given():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(40, 40), torch.randn(3, 40)
    layer(x).square().sum().backward()
    dense, layer.weight.grad = layer.weight.grad.reshape(-1), None
    memory = torch.arange(1600, dtype=torch.int32)
    wanted = memory[5::67].long()
    with SparseTuner(layer, {"weight": memory[5::67]}) as tuner:
        memory.fill_(10**6)
        layer(x).square().sum().backward()
        torch.testing.assert_close(tuner.parameters()[0].grad, dense[wanted])


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, input_ids, labels=None):
        return input_ids * self.scale


def test_a_model_that_owns_a_trained_weight_itself_keeps_the_signature_of_its_forward():
    model = Scaled()
    expected = inspect.signature(model.forward)
    with SparseTuner(model, {"scale": torch.arange(2)}):
        assert inspect.signature(model.forward) == expected
        assert inspect.signature(copy.deepcopy(model).forward) == expected
    assert "forward" not in vars(model)


def test_one_tuner_at_a_time(llama):
    SparseTuner(llama, random_choice(llama))
    with pytest.raises(FinepointError, match="close that one first"):
        SparseTuner(llama, random_choice(llama))


def test_weights_of_any_layout(batches):
    layer = torch.nn.Linear(3, 4)
    layer.weight = torch.nn.Parameter(torch.randn(3, 4).T)
    assert not layer.weight.is_contiguous()
    before = layer.weight.detach().clone()
    tuner = SparseTuner(layer, {"weight": torch.tensor([1, 6])})
    layer(torch.ones(2, 3)).sum().backward()
    torch.optim.SGD(tuner.parameters(), lr=1.0).step()
    difference = (layer.weight.detach() - before).reshape(-1)
    assert difference.nonzero().view(-1).tolist() == [1, 6]
    torch.testing.assert_close(difference[[1, 6]], torch.tensor([-2.0, -2.0]))


def test_models_may_add_to_a_layers_output_in_place():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            out = self.layer(x)
            out += x
            return out

    model = InPlace()
    tuner = SparseTuner(model, {"layer.weight": torch.arange(9), "layer.bias": torch.arange(3)})
    x = torch.randn(2, 3)
    model(x).sum().backward()
    torch.testing.assert_close(tuner.parameters()[0].grad.view(3, 3), x.sum(0).expand(3, 3))
    torch.testing.assert_close(tuner.parameters()[1].grad, torch.full((3,), 2.0))


def test_nothing_runs_backward_below_the_lowest_layer_with_entries():
    model = tiny_llama(layers=3)
    name = "model.layers.1.mlp.down_proj.weight"
    with finepoint.SparseTuner(model, {name: torch.tensor([0, 5])}):
        needed = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: needed.append(output.requires_grad))
        loss = model(**random_batches()[0]).loss
        assert needed == [False, True, True]
        loss.backward()


def test_training_keeps_no_copy_of_a_weight_or_an_input():
    """What autograd saves beyond the frozen bound: the layers' inputs by reference, so no storage of its own."""

    def saved(model):
        found = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch).loss
        return loss, found

    batch = random_batches()[0]
    model = tiny_llama()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":  # the head is no target
            module.register_forward_pre_hook(
                lambda module, args: inputs.setdefault(args[0].untyped_storage().data_ptr(), args[0])
            )
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    _, bound = saved(model)
    bound_bytes = sum(storage.nbytes() for storage in bound.values())
    with finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.05)):
        inputs.clear()  # those of the audit
        _, sparse = saved(model)
        sparse_bytes = sum(storage.nbytes() for storage in sparse.values())
        assert set(inputs) <= set(sparse), "the layers' inputs are what a sampled gradient needs"
        input_bytes = sum(tensor.untyped_storage().nbytes() for tensor in inputs.values())
        assert sparse_bytes <= bound_bytes + input_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainings_that_take_turns_on_one_model_are_each_what_it_is_alone(dtype):
    """As docs/how-to/trainers.md says: between two turns the model is the base, and deltas and optimizer wait."""

    def turn(model, kept, batch):
        with SparseTuner(model, kept["indices"], audit=False, base=kept.get("base")) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
            if "deltas" in kept:
                optimizer.load_state_dict(kept["optimizer"])
                for delta, before in zip(tuner.parameters(), kept["deltas"], strict=True):
                    delta.data.copy_(before)
            model(**batch).loss.backward()
            optimizer.step()
            kept["deltas"] = [delta.detach().clone() for delta in tuner.parameters()]
            kept["optimizer"], kept["base"] = optimizer.state_dict(), tuner.base
            adapter = tuner.adapter()
            tuner.revert_()
        return adapter

    model, seeds = tiny_llama(dtype), (0, 1)
    base, tenants = snapshot(model), {seed: {"indices": random_choice(model, seed=seed)} for seed in seeds}
    shared = tenants[0]["indices"], tenants[1]["indices"]
    assert any(torch.isin(shared[0][name], shared[1][name]).any() for name in shared[0])  # they meet in some entries
    for at in range(4):
        found = {seed: turn(model, tenants[seed], random_batches(4, seed=seed)[at]) for seed in seeds}
        assert_same_bits(base, snapshot(model))
    for seed in seeds:
        alone = tiny_llama(dtype)
        tuner = SparseTuner(alone, random_choice(alone, seed=seed), audit=False)
        train(alone, tuner, [[batch] for batch in random_batches(4, seed=seed)],
              lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), close=False)  # fmt: skip
        expected = tuner.adapter()
        assert found[seed].changes.keys() == expected.changes.keys()
        assert all(found[seed].changes[name].equals(change) for name, change in expected.changes.items())
