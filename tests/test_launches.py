"""What a training step launches, counted: time is never measured here, but calls cannot creep up unnoticed."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_batches, tiny_llama
from finepoint import SparseTuner, select


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
