"""Train two tasks on entries of their own, merge them, and take one out again, exactly.

python examples/02_merge_and_take_out.py [--steps 40] (some minutes on two cores)
"""

import torch

import finepoint
from common import fetched, options
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.settings import EvalConfig
from finepoint.models import load_model

given = options(__doc__, steps=40, limit=60)
vader, wordnet = fetched(given.data, "vader"), fetched(given.data, "wordnet")
tests = {"movies": f"{vader}/movies-test.jsonl", "words": f"{wordnet}/wordnet-test.jsonl"}
data = {"movies": f"{vader}/movies-train.jsonl", "words": f"{wordnet}/wordnet-train.jsonl"}
folders = {task: f"{given.output}/{task}" for task in ("movies", "words", "both")}

for task, excluded in (("movies", []), ("words", [folders["movies"]])):
    finepoint.train(
        finepoint.TrainConfig(
            model=given.model, data=data[task], rule="gallop", density=1e-3, steps=given.steps, scoring_examples=64,
            exclude=excluded, output=folders[task], overwrite=True,
        )
    )  # fmt: skip
movies, words = (finepoint.SparseAdapter.load(folders[task]) for task in data)
model = load_model(given.model)
both = finepoint.merge([movies, words], how="error")  # an error if they shared an entry
both.save(folders["both"], overwrite=True)

found = evaluate_config(
    EvalConfig(
        model=given.model, adapter=list(folders.values()), limit=given.limit,
        id=[f"{task}={file}" for task, file in tests.items()],
    )
)  # fmt: skip
print(f"{'accuracy':<10}" + "".join(f"{task:>10}" for task in tests))
for name, scores in {"base": found["base"], **{t: found["adapters"][f] for t, f in folders.items()}}.items():
    print(f"{name:<10}" + "".join(f"{scores['id'][task]['accuracy']:>10.3f}" for task in tests))


def bits(model):
    return {name: weight.clone() for name, weight in model.named_parameters()}


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


with both.applied(model):
    merged = bits(model)
with words.applied(model):
    words_alone = bits(model)
movies.apply(model)
words.apply(model)
assert same(bits(model), merged)
movies.revert(model)  # applied first, taken out first
assert same(bits(model), words_alone)
words.revert(model)
print("merged = one after the other; without movies = words alone; bit for bit")
