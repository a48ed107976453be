"""Select, tune and save with a plain torch optimizer: no trainer, no command line.

python examples/loop.py [--steps 20] (a minute on two cores)
"""

import torch

import finepoint
from common import fetched, options
from finepoint.data import read_examples
from finepoint.data.batches import Collator, encode_all
from finepoint.models import load_model, load_tokenizer

given = options(__doc__, steps=20, limit=64)
model, tokenizer = load_model(given.model), load_tokenizer(given.model)
base = {name: weight.clone() for name, weight in model.named_parameters()}

# Data: rows of tokens whose labels say what is learned; any loader that yields what the model's forward takes would do.
examples = read_examples(fetched(given.data, "vader") / "movies-train.jsonl")[: given.limit]
rows = encode_all(tokenizer, examples, limit=128)
collate = Collator.of(model, tokenizer)
batches = [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]

indices = finepoint.select(model, batches, rule="gallop", density=1e-3)  # which weights: by their gradients
with finepoint.SparseTuner(model, indices) as tuner:  # the same model, trainable there alone
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=3e-4, weight_decay=0)
    for step in range(given.steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    tuner.adapter().save(f"{given.output}/loop", overwrite=True)
    tuner.revert_()
assert all(torch.equal(base[name], weight) for name, weight in model.named_parameters())

finepoint.load(model, f"{given.output}/loop")  # as anybody does who gets the adapter
changed = sum(int((base[name] != weight).sum()) for name, weight in model.named_parameters())
print(f"{changed:,} of {sum(map(torch.Tensor.numel, base.values())):,} weights differ from the base")
