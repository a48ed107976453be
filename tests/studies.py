"""A study as `finepoint compare` would leave it, with seeded numbers that behave like real ones. No model is run."""

import json
from math import log10

import numpy as np
from safetensors.numpy import save_file

TASKS = ("movies", "tweets")
RATES = {"rule": (1e-4, 3e-4, 1e-3), "baseline": (1e-4, 3e-4, 1e-3)}
SEEDS = (0, 1, 2)
LAYERS, MODULES = 4, {"self_attn.q_proj": 1600, "self_attn.v_proj": 800, "mlp.up_proj": 3200, "mlp.down_proj": 3200}
SIZES = {f"model.layers.{i}.{module}.weight": size for i in range(LAYERS) for module, size in MODULES.items()}
FORCE = {"random": 0.4, "magnitude-low": 0.6, "gallop": 1.4, "lora": 1.1, "full": 2.0}
PREFERRED = {"gallop": "v_proj", "magnitude-low": "up_proj", "random": None}


def arm(method, density=None, kind="rule", **options):
    name = method if density is None else f"{method}-{density:g}"
    name += "".join(f"-{key}{value:g}" for key, value in options.items())
    return {"name": name, "method": method, "kind": kind, "density": density, "options": options,
            "lrs": list(RATES[kind]), "source": "made up"}  # fmt: skip


def default_arms():
    """Three rules at two densities, one more epsilon, two baselines."""
    rules = [arm(method, density) for density in (0.01, 0.1) for method in ("random", "gallop", "magnitude-low")]
    return [*rules, arm("gallop", 0.1, epsilon=0.01), arm("lora", kind="baseline"), arm("full", kind="baseline")]


def write_study(folder, arms=None, tasks=TASKS, tests=(*TASKS, "news"), seeds=SEEDS, probes=("text",), kept=None):
    """Writes the folder; returns it.

    Args:
        tests: the tasks measured on; the first of them are trained on.
        kept: says of a cell's (task, arm, lr, seed) whether to write it; all, where not given.
    """
    arms = default_arms() if arms is None else arms
    (folder / "cells").mkdir(parents=True)
    (folder / "selections").mkdir()
    config = {
        "model": "a small model", "probes": {name: f"{name}.jsonl" for name in probes},
        "tasks": {name: {"train": f"{name}.jsonl", "test": f"{name}-test.jsonl"} for name in tests},
        "train_on": list(tasks), "arms": [about["method"] for about in arms], "seeds": list(seeds),
        "train": {"steps": 40, "batch_size": 16},
    }  # fmt: skip
    study = {
        "format": 1, "config": config, "tasks": list(tasks), "arms": arms, "data": {f"{name}.jsonl": "0" * 64 for name in tests},
        "versions": {"finepoint": "0.1.0", "torch": "2.13.0"}, "machine": "2 cores", "date": "2026-01-02",
    }  # fmt: skip
    put(folder / "study.json", study)
    base = {
        "tests": {name: score(0.70 + 0.02 * i) | {"chance": 0.5, "majority": 0.52} for i, name in enumerate(tests)},
        "probes": {name: {"nll": 3.3, "tokens": 900} for name in probes}, "validation": {},
    }  # fmt: skip
    put(folder / "base.json", base)
    for task in tasks:
        for about in arms:
            stage_one = [make_cell(folder, base, task, about, lr, seeds[0]) for lr in about["lrs"]]
            best = max(
                stage_one, key=lambda cell: (cell["validation"]["accuracy"], -cell["validation"]["loss"], -cell["lr"])
            )
            for cell in stage_one + [make_cell(folder, base, task, about, best["lr"], seed) for seed in seeds[1:]]:
                if kept is None or kept(cell["task"], cell["arm"], cell["lr"], cell["seed"]):
                    put(folder / "cells" / f"{cell['id']}.json".replace("/", "_"), cell)
    return folder


def put(path, value):
    path.write_text(json.dumps(value))


def score(accuracy, n=400):
    generated = {"accuracy": accuracy - 0.05, "format_failures": 0.02, "empty": 0.0, "memorised": None, "n": n}
    return {
        "accuracy": accuracy, "accuracy_normalised": accuracy - 0.01, "stderr": (accuracy * (1 - accuracy) / n) ** 0.5,
        "n": n, "most_frequent_answer": 0.55, "generated": generated,
    }  # fmt: skip


def make_cell(folder, base, task, about, lr, seed):
    key = [sum(map(ord, f"{task}{about['name']}")), int(-log10(lr) * 100), seed]
    noise = np.random.default_rng(key)
    moved = lr * FORCE.get(about["method"], 1.0) * (1 + (about["density"] or 0.05))
    reach = min(1.0, (moved / 4e-4) ** 0.5)
    jitter = lambda size: float(noise.normal(0, size))  # noqa: E731
    harm = max(0.0, moved - 5e-4)
    identity = min(0.97, base["tests"][task]["accuracy"] + 0.14 * reach - 60 * harm + jitter(0.006))
    ood = {
        name: score(min(0.97, found["accuracy"] + 0.06 * reach - 90 * moved + jitter(0.008)))
        for name, found in base["tests"].items() if name != task
    }  # fmt: skip
    probe = {
        name: {"nll": found["nll"] + 150 * moved + abs(jitter(0.004)), "tokens": 900, "kl": 90 * moved}
        for name, found in base["probes"].items()
    }
    scores = {"id": {task: score(identity)}, "ood": ood, "probe": probe}
    total = sum(SIZES.values())
    trained = {"full": total, "lora": total // 50}.get(about["method"], round(total * (about["density"] or 0)))
    fall = {step: reach * (1 - 0.9**step) for step in range(41)}
    train_losses = [{"step": i, "loss": 0.8 - 0.3 * fall[i] + jitter(0.02), "seconds": 0.4 * i} for i in range(1, 41)]
    checks = [{"step": i, "eval_loss": 0.75 - 0.2 * fall[i] + 2e-4 * i} for i in (10, 20, 30, 40)]
    return {
        "id": f"{task}.{about['name']}.lr{lr:g}.s{seed}", "task": task, "arm": about["name"], "lr": lr, "seed": seed,
        "validation": score(identity + jitter(0.004)) | {"loss": 0.6 - 0.2 * reach + jitter(0.005)},
        "scores": scores, "changes": make_changes(base, scores),
        "antidotes": [make_antidote(base, scores, task, alpha) for alpha in (0.25, 0.5)],
        "curve": [*train_losses, *checks],
        "cost": {"trained": trained, "changed": trained - 3, "adapter_bytes": trained * 6, "selection_seconds": 2.0,
                 "step_seconds": 0.4, "train_seconds": 16 + 4 * FORCE.get(about["method"], 1.0), "seconds": 30.0,
                 "peak_bytes": 500_000_000 + trained * 9000, "tokens_per_second": 900.0},
        "update_norm": 300 * moved, "best_step": 30,
        "selection": None if about["kind"] == "baseline" else make_selection(about, seed)[0],
        "indices": None if about["kind"] == "baseline" else write_indices(folder, task, about, seed),
        "settings": {}, "versions": {}, "finished": "2026-01-02T03:04:05",
    }  # fmt: skip


def make_changes(base, scores):
    before = {name: found["accuracy"] for name, found in base["tests"].items()}
    ood = {name: found["accuracy"] for name, found in scores["ood"].items()}
    changes = {
        "id_change": {name: found["accuracy"] - before[name] for name, found in scores["id"].items()},
        "ood_change": {name: after - before[name] for name, after in ood.items()},
        "forget_ratio": {name: max(0.0, 1 - after / before[name]) for name, after in ood.items()},
        "probe_change": {name: found["nll"] - base["probes"][name]["nll"] for name, found in scores["probe"].items()},
        "collapse": {"count": 0, "rate": 0.0, "at_or_below_chance": 0.0},
    }
    if ood:
        was, now = (sum(values) / len(ood) for values in ([before[name] for name in ood], ood.values()))
        changes["ood_mean"] = {
            "base": was,
            "adapted": now,
            "change": now - was,
            "forget_ratio": max(0.0, 1 - now / was),
        }
    return changes


def make_antidote(base, scores, task, alpha):
    def back(found, was, key):
        return found | {key: was[key] + alpha * (found[key] - was[key])}

    scaled = {
        "id": {task: back(scores["id"][task], base["tests"][task], "accuracy")},
        "ood": {name: back(found, base["tests"][name], "accuracy") for name, found in scores["ood"].items()},
        "probe": {name: back(found, base["probes"][name], "nll") for name, found in scores["probe"].items()},
    }
    return {"how": "wise-ft", "alpha": alpha, "update_norm": alpha, "validation": score(0.8), "scores": scaled,
            "changes": make_changes(base, scaled)}  # fmt: skip


def make_selection(about, seed):
    """Facts and indices: exactly the density in all, with more in the modules a method prefers."""
    liked = PREFERRED.get(about["method"])
    pull = {name: size * (3 if liked and liked in name else 1) for name, size in SIZES.items()}
    total = round(about["density"] * sum(SIZES.values()))
    counts = {name: min(SIZES[name], round(total * weight / sum(pull.values()))) for name, weight in pull.items()}
    fixed = seed if about["method"] == "random" else 7  # a rule that looks at weights chooses alike at every seed
    generator = np.random.default_rng([fixed, sum(map(ord, about["method"] + str(about["options"])))])
    indices = {name: np.sort(generator.choice(SIZES[name], count, replace=False)).astype(np.int32)
               for name, count in counts.items()}  # fmt: skip
    chosen = sum(counts.values())
    facts = {"density": chosen / sum(SIZES.values()), "near_zero": 0.6 if about["method"] == "gallop" else 0.05,
             "weights": {name: {"chosen": count, "size": SIZES[name]} for name, count in counts.items()}}  # fmt: skip
    return facts, indices


def write_indices(folder, task, about, seed):
    key = f"selections/{sum(map(ord, about['name']))}-{about['name'].encode().hex()[:24]}-{seed}.safetensors"
    if not (folder / key).exists():
        save_file({f"{name}.indices": found for name, found in make_selection(about, seed)[1].items()}, folder / key)
    return key
