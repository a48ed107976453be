"""Three rules, each at a rate of its own, on the same task: what is learned, what is forgotten, what they share.

python examples/03_compare_rules.py [--steps 40] (some minutes on two cores; one seed ranks nothing:
for more, see `finepoint compare`)
"""

import finepoint
from common import fetched, options
from finepoint.adapters.interference import interference
from finepoint.evaluation.evaluate import Evaluation, measured, read_sets
from finepoint.training.context import prepare
from finepoint.training.run import fit

RATES = {"random": 3e-2, "gallop": 3e-4, "gradient": 3e-4}  # an entry chosen for its gradient wants a smaller step

given = options(__doc__, steps=40, limit=100)
vader = fetched(given.data, "vader")
configs = {
    rule: finepoint.TrainConfig(
        model=given.model, data=f"{vader}/movies-train.jsonl", rule=rule, density=1e-3, lr=lr, steps=given.steps,
        scoring_examples=64, output=f"{given.output}/{rule}", overwrite=True,
    )
    for rule, lr in RATES.items()
}  # fmt: skip
place = prepare(configs["random"])  # one model for all: every run leaves it at the base
adapters = {rule: fit(config, place)[1] for rule, config in configs.items()}

evaluation = Evaluation(
    id=read_sets([f"movies={vader}/movies-test.jsonl"], "id", given.limit),
    ood=read_sets([f"{name}={vader}/{name}.jsonl" for name in ("amazon", "tweets")], "ood", given.limit),
    probe=read_sets([f"news={vader}/news.jsonl"], "probe", 4),
)
found = measured(place.model, place.tokenizer, evaluation, adapters)
base = found["base"]
print(f"base: movies {base['id']['movies']['accuracy']:.3f} ± {base['id']['movies']['stderr']:.3f}, "
      f"news {base['probe']['news']['nll']:.3f} nats a token")  # fmt: skip
for rule, scores in found["adapters"].items():
    print(f"{rule:<9} movies {scores['id_change']['movies']:+.3f}, others {scores['ood_mean']['change']:+.3f}, "
          f"news {scores['probe_change']['news']:+.3f}, KL {scores['probe']['news']['kl']:.4f}")  # fmt: skip
for row in interference(adapters):
    if row["scope"] == "all":
        print(f"{row['a']} and {row['b']} share {row['shared']:,} of {row['entries_a']:,} entries; "
              f"by chance {row['by_chance']:.0f}")  # fmt: skip
