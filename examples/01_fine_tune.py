"""Fine-tune on movie reviews, look at what was learned and forgotten, use the adapter and take it off again.

python examples/01_fine_tune.py [--steps 40] (a few minutes on two cores)
"""

import torch

import finepoint
from common import fetched, options
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.settings import EvalConfig
from finepoint.models import load_model, load_tokenizer

given = options(__doc__, steps=40, limit=100)
vader = fetched(given.data, "vader")
folder = f"{given.output}/movies"

record = finepoint.train(
    finepoint.TrainConfig(
        model=given.model, data=f"{vader}/movies-train.jsonl", density=1e-3, steps=given.steps, output=folder,
        overwrite=True,
    )
)  # fmt: skip
print(f"{record['trained']:,} weights trained in {record['seconds']:.0f} s, {record['adapter_bytes']:,} bytes")

found = evaluate_config(
    EvalConfig(
        model=given.model, adapter=[folder], limit=given.limit, id=[f"movies={vader}/movies-test.jsonl"],
        ood=[f"tweets={vader}/tweets.jsonl"], probe=[f"news={vader}/news.jsonl"],
    )
)  # fmt: skip
scores = found["adapters"][folder]
for kind, name in (("id", "movies"), ("ood", "tweets")):
    base = found["base"][kind][name]
    change = scores[f"{kind}_change"][name]
    print(f"{name}: accuracy {base['accuracy']:.3f} ± {base['stderr']:.3f}, {change:+.3f} with the adapter")
print(f"news: {found['base']['probe']['news']['nll']:.3f} nats a token, {scores['probe_change']['news']:+.3f}")

model, tokenizer = load_model(given.model), load_tokenizer(given.model)
before = {name: weight.clone() for name, weight in model.named_parameters()}
prompt = tokenizer("Text: A dull story, but the actors make up for it.\nSentiment:", return_tensors="pt")
with finepoint.SparseAdapter.load(folder).applied(model):
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print("it says:", tokenizer.decode(answer))
assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
print("the base is back, bit for bit")
