"""What a training step launches, counted: time is never measured here, but calls cannot creep up unnoticed."""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_batches, tiny_llama
from finepoint import SparseTuner, select
from finepoint.tuner.kernels import all_weights


class Launches(TorchDispatchMode):
    """Inside, every operation of PyTorch's is counted, also those of the backward pass."""

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def total(self):
        return sum(self.counts.values())


def test_a_frozen_head_multiplies_a_slice_of_positions_in_one_product_and_not_row_by_row():
    batch = random_batches(1)[0]
    batch = {"input_ids": batch["input_ids"], "labels": batch["labels"][:, -4:], "logits_to_keep": 4}
    products = {}
    for tuned in (False, True):
        model = tiny_llama(tied=False)
        if tuned:
            tuner = SparseTuner(model, select(model, rule="random", density=0.05, targets="linear"))
        else:  # negative control
            model.requires_grad_(False)
        with Launches() as launches:
            loss = model(**batch).loss
        products[tuned] = launches.counts["bmm"]
        if tuned:
            loss.backward()
            assert all(delta.grad is not None for delta in tuner.parameters())
    assert products[True] == products[False] - 1


def functions_called(step):
    """How many functions of Python a step runs: the least of three, since others' finalisers may come in between."""
    return min(_called(step) for _ in range(3))


def _called(step):
    called = 0

    def count(frame, event, argument):
        nonlocal called
        called += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return called


def bound():
    """Nothing to train: the input gradients alone."""
    model = tiny_llama(tied=False).train().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model, []


def sparse(structure):
    model = tiny_llama(tied=False).train()
    chosen = select(model, rule="random", density=0.1, structure=structure, scope="weight", targets="linear")
    return model, SparseTuner(model, chosen, audit=False).parameters()


def step_of(model, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True) if parameters else None
    batch = random_batches(1)[0]

    def step():
        model(**batch).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


@pytest.mark.parametrize("structure", ["entry", "column"])
def test_a_step_launches_few_operations_and_python_functions_a_layer(structure):
    """LoRA takes 27 operations and 48 functions, full fine-tuning 7 and 12 (the model's own not counted)."""
    pytest.importorskip("numba")
    counts, layers = [], 14
    for model, parameters in (bound(), sparse(structure)):
        step = step_of(model, parameters)
        for _ in range(2):  # tables and the optimizer's state are made; the third step is not looked at
            step()
        with Launches() as launches:
            step()
        counts.append((launches.total(), functions_called(step)))
    operations, functions = ((mine - least) / layers for least, mine in zip(*counts, strict=True))
    assert 0 < operations <= 15
    assert 0 < functions <= 55  # 50 alone; a few more where other tests have had their say in the process


def writes_of(layers):
    """Operations that write or compare, of an optimizer's third step and the look at the deltas after it."""
    model = tiny_llama(tied=False, layers=layers)
    tuner = SparseTuner(model, select(model, rule="random", density=0.1, scope="weight"), audit=False)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1, foreach=True)
    for _ in range(3):
        for delta in tuner.parameters():
            delta.grad = torch.ones_like(delta)
        with Launches() as launches:
            optimizer.step()
            tuner._deltas.catch_up_()
    return sum(launches.counts[name] for name in ("scatter_", "where", "equal", "clone", "copy_"))


def test_all_weights_follow_and_are_compared_in_no_operation_of_their_own(monkeypatch):
    pytest.importorskip("numba")
    assert [writes_of(layers) for layers in (1, 3)] == [0, 0]
    monkeypatch.setattr(all_weights, "numba", None)  # negative control: plain PyTorch writes weight by weight
    assert 0 < writes_of(1) < writes_of(3)
