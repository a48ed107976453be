"""Choosing anew while training: equal to dense formulas, resumed, by several processes, with everything else."""

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import finepoint
from conftest import assert_same_bits, bits, random_batches, snapshot, tiny_llama, write_lines
from distributed_worker import SERVER, together
from finepoint.adapters.adapter import SparseAdapter
from finepoint.data.examples import read_examples
from finepoint.errors import FinepointError
from finepoint.models.loading import load_model
from finepoint.selection.settings import SelectConfig
from finepoint.training.context import prepare, training_context
from finepoint.training.refresh import Schedule, schedule_of
from finepoint.training.run import choose, train
from finepoint.training.settings import TrainConfig
from finepoint.training.trainer import LengthBuckets
from finepoint.tuner.optimizers import PerEntryAdamW
from finepoint.tuner.tuner import SparseTuner
from reference import TiedToy, dense_refreshed_training, dense_top_k, mean_gradient

LINEAR = round(2 * (16 * 16 * 2 + 16 * 8 * 2 + 16 * 24 * 3) * 0.05)  # a twentieth of the tiny model's linear entries


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.05, lr=1e-2,
                       rule="gallop", steps=6, batch_size=8, refresh="every:2", scoring_examples=32)  # fmt: skip


def run(config, **changes):
    config = replace(config, **changes)
    return train(config), SparseAdapter.load(config.output)


def values_of(adapter):
    """Where an adapter writes and what, without entries that it leaves at the base."""
    return {name: (change.indices, change.numbers) for name, change in adapter.changes.items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, parts in wanted.items():
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(found[name], parts, strict=True)), name


# The tuner


def choices(model, count, density=0.1):
    """Random entries of all weights, others each time; some weights have none at first, or later."""
    names = [name for name, parameter in model.named_parameters() if parameter.numel() > 10]
    made = [dict(finepoint.select(model, rule="random", density=density, targets="all", seed=seed))
            for seed in range(count)]  # fmt: skip
    made[0].pop(names[0]), made[1].pop(names[1], None)
    return made


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["toy", "llama"])
def test_equals_dense_training_with_the_same_choices(kind, keep):
    """Moments stay with their entries, and begin at zero with those that join; what comes back goes on (`keep`)."""
    torch.manual_seed(0)
    model = TiedToy() if kind == "toy" else tiny_llama(torch.float64)
    batches = [{key: value.clamp(max=10) for key, value in batch.items()} for batch in random_batches(7)]
    first, second, third = choices(model, 3)
    schedule = {0: first, 2: second, 3: third, 5: first}
    dense = copy.deepcopy(model)
    dense_refreshed_training(dense, batches, schedule.get, lambda batch: dense(**batch).loss, 1e-2, keep)

    before = snapshot(model)
    tuner = SparseTuner(model, first, ready=[name for name, _ in model.named_parameters()])
    optimizer = PerEntryAdamW(tuner.parameters(), lr=1e-2)
    for done, batch in enumerate(batches):
        if done and done in schedule:
            found = tuner.choose_(schedule[done], optimizer, keep)
            assert found["stayed"] + found["grown"] == tuner.count == sum(map(len, schedule[done].values()))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = tuner.adapter()
    touched = {name: set() for name in dict(model.named_parameters())}
    for chosen in [first, second, third] if keep else [first]:
        for name, indices in chosen.items():
            touched[name] |= set(indices.tolist())
    for (name, found), expected in zip(model.named_parameters(), dense.parameters(), strict=False):
        if not name.startswith("finepoint."):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            others = torch.tensor([i not in touched[name] for i in range(found.numel())])
            assert torch.equal(bits(found.reshape(-1)[others]), bits(before[name].reshape(-1)[others])), name
    assert (adapter.count > tuner.count) == keep
    trained = {name: value for name, value in snapshot(model).items() if not name.startswith("finepoint.")}
    assert tuner.changed() == sum(int((trained[name] != before[name]).sum()) for name, _ in model.named_parameters()
                                  if name in before)  # fmt: skip
    tuner.revert_()
    tuner.close()
    assert_same_bits(before, snapshot(model))
    adapter.apply(model)
    assert_same_bits(trained, snapshot(model))


def test_sgd_state_follows_too_and_without_it_the_result_is_another():
    """A negative control: state that does not follow its entries is noticed."""
    found = []
    for follow in (True, False):
        model = tiny_llama(torch.float64)
        first, second, _ = choices(model, 3)
        tuner = SparseTuner(model, first, ready=dict(model.named_parameters()))
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1, momentum=0.9)
        for done, batch in enumerate(random_batches(4)):
            if done == 2:
                tuner.choose_(second, optimizer)
                for parameter in tuner.parameters() if not follow else ():
                    optimizer.state.pop(parameter, None)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = {name: torch.isin(second[name], first.get(name, torch.empty(0))) for name in second}
        found.append({name: tuner.entries[name].delta.detach() for name in second})
    assert any(not torch.equal(found[0][name][kept[name]], found[1][name][kept[name]]) for name in kept)


def test_ages_of_its_own_make_no_difference_where_all_are_of_one_age():
    torch.manual_seed(0)
    start = torch.randn(50, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        PerEntryAdamW([ours], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1),
    ]
    for _ in range(300):
        gradient = torch.randn(50, dtype=torch.float64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", [False, True])
def test_half_precision_is_exact_to_the_bit(keep):
    model = tiny_llama(torch.bfloat16)
    before = snapshot(model)
    first, second, third = choices(model, 3)
    tuner = SparseTuner(model, first, ready=dict(model.named_parameters()))
    optimizer = PerEntryAdamW(tuner.parameters(), lr=3e-3)
    for batch, chosen in zip(random_batches(3), (second, third, None), strict=True):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if chosen:
            tuner.choose_(chosen, optimizer, keep)
    adapter = {store: tuner.adapter(store) for store in ("value", "delta")}
    trained = {name: value for name, value in snapshot(model).items() if not name.startswith("finepoint.")}
    tuner.revert_()
    tuner.close()
    assert_same_bits(before, snapshot(model))
    for one in adapter.values():
        with one.applied(model):
            assert_same_bits(trained, snapshot(model))
        assert (one.count > tuner.count) == keep


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_choices_is_plain_bookkeeping(seed):
    """Beside it a dictionary from entry to delta; the places of any moment can be gone back to."""
    draw = torch.Generator().manual_seed(seed)
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)
    before = snapshot(layer)
    names = list(before)

    def pick():
        return {name: torch.rand(value.numel(), generator=draw).lt(0.4).nonzero().view(-1)
                for name, value in before.items()}  # fmt: skip

    tuner = SparseTuner(layer, {**pick(), names[0]: torch.arange(2)}, ready=names)
    kept = None
    known = {(name, int(i)): 0.0 for name, entries in tuner.entries.items() for i in entries.indices}

    def check():
        for name, entries in tuner.entries.items():
            expected = before[name].clone().view(-1)
            for (owner, i), delta in known.items():
                if owner == name and delta:
                    expected[i] = (expected[i].float() + torch.tensor(delta)).to(dtype)
            assert torch.equal(bits(expected), bits(entries.weight.view(-1)))

    for _ in range(6):
        for name, entries in tuner.entries.items():
            step = torch.randn(len(entries.indices), generator=draw) * 0.1
            with torch.no_grad():
                entries.delta += step
            known |= {
                (name, i): delta for i, delta in zip(entries.indices.tolist(), entries.delta.tolist(), strict=True)
            }
        tuner.follow_()
        check()
        chosen, keep = pick(), bool(torch.rand(1, generator=draw) < 0.5)
        if not any(len(indices) for indices in chosen.values()):
            continue
        tuner.choose_(chosen, keep=keep)
        now = {(name, int(i)) for name, indices in chosen.items() for i in indices}
        known = {entry: delta for entry, delta in known.items() if keep or entry in now}
        known = dict.fromkeys(now, 0.0) | known
        check()
        if kept is None:
            deltas = {name: entries.delta.detach().clone() for name, entries in tuner.entries.items()}
            kept = {name: place.clone() for name, place in tuner.places().items()}, deltas, dict(known)
    if kept:
        places, deltas, known = kept
        tuner.place_(places)
        with torch.no_grad():
            for name, entries in tuner.entries.items():
                entries.delta.copy_(deltas[name])
        tuner.follow_()
        check()
    tuner.revert_()
    tuner.close()
    assert_same_bits(before, snapshot(layer))


def test_scoring_under_a_tuner_leaves_everything_as_found(batches):
    model = tiny_llama()
    tuner = SparseTuner(model, choices(model, 2)[0])
    optimizer = PerEntryAdamW(tuner.parameters(), lr=1e-2)
    model.train()
    model(**batches[0]).loss.backward()
    optimizer.step()
    before, random_state = snapshot(model), torch.get_rng_state()
    gradients = [parameter.grad.clone() for parameter in tuner.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    plain = tiny_llama()
    plain.load_state_dict({name: value for name, value in before.items() if not name.startswith("finepoint.")})
    for rule in ("gallop", "fisher", "random", "lift"):
        chosen = finepoint.select(model, batches, rule=rule, density=0.05)
        expected = finepoint.select(plain, batches, rule=rule, density=0.05)
        assert chosen.keys() == expected.keys()
        assert all(torch.equal(chosen[name], expected[name]) for name in expected), rule
    assert_same_bits(before, snapshot(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, tuner.parameters(), strict=True))
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    assert all(module.training for module in plain.train().modules()) == all(m.training for m in model.modules())


def test_what_cannot_be_chosen_is_refused():
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    tuner = SparseTuner(model, {names[1]: torch.arange(3)}, ready=[names[2]])
    for chosen, message in (({names[3]: torch.arange(3)}, "does not know .* name it as `ready`"),
                            ({names[2]: torch.arange(0)}, "no index to train"),
                            ({names[1]: torch.arange(5), names[2]: torch.arange(2).flip(0)}, "not asc")):  # fmt: skip
        with pytest.raises(FinepointError, match=message):
            tuner.choose_(chosen)
        assert tuner.count == len(tuner.entries[names[1]].delta) == 3  # nothing was begun


def test_a_sparsified_model_can_be_refreshed_saved_and_loaded(tmp_path):
    batches, model = random_batches(4), tiny_llama()
    before = snapshot(model)
    finepoint.sparsify(model, "gallop", count=40, data=batches, refreshable=True)
    tuner = finepoint.tuner_of(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.choose_(finepoint.select(model, batches, rule="gallop", count=40), optimizer, keep=True)
        assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 40
    finepoint.save(model, tmp_path / "saved")
    trained = {name: value for name, value in snapshot(model).items() if not name.startswith("finepoint.")}
    assert finepoint.tuner_of(model).adapter().count > 40
    assert_same_bits(before, snapshot(finepoint.unload(model, revert=True)))
    assert_same_bits(trained, snapshot(finepoint.load(model, tmp_path / "saved")))


# The schedule


def test_spellings_of_a_schedule():
    assert schedule_of("every:5") == Schedule(5)
    assert schedule_of("every:5,until:20") == schedule_of(["every:5", "until:20"]) == Schedule(5, 20)
    assert schedule_of("drop-grow:0.2") == Schedule(20, None, 0.2)
    assert schedule_of(["until:80", "drop-grow:0.2", "every:10"]) == Schedule(10, 80, 0.2)
    assert [done for done in range(12) if Schedule(3, 8).due(done)] == [3, 6]
    assert Schedule(3, None, 0.5).rate(3, 12) == 0.375
    assert Schedule(3, 6, 0.5).rate(6, 12) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh": "often"}, r"refresh is 'often'; give every:N \[until:M\], or drop-grow:FRACTION"),
        ({"refresh": "until:9"}, "give every:N"),
        ({"refresh": "every:2,steps:3"}, "give every:N"),
        ({"refresh": "every:0"}, "never comes"),
        ({"refresh": "every:5,until:3"}, "never comes"),
        ({"refresh": "drop-grow:2"}, r"FRACTION of the entries is in \(0, 1\]"),
        ({"refresh": "drop-grow:0.2", "structure": "row"}, "drop-grow is for single entries"),
        ({"threshold": "sampled"}, "about as many entries"),
        ({"quantise": "int8"}, "entries of a quantised base are chosen once"),
        ({"baseline": "lora", "density": None}, "refresh is for choosing entries, which baseline 'lora' does not do"),
        ({"refresh": None, "dropped": "keep"}, "give --refresh with it"),
    ],
)
def test_what_cannot_be_refreshed_is_refused_by_name(config, changes, message):
    with pytest.raises(FinepointError, match=message):
        run(config, **changes)


def test_a_quantised_checkpoint_is_refused_before_it_is_touched(config, tokenizer):
    pytest.importorskip("torchao")
    model = load_model(config.model, quantise="int8")
    place = training_context(config, model, tokenizer, read_examples(config.data))
    with pytest.raises(FinepointError, match="q_proj.weight is quantised, .* leave out --refresh"):
        train(config, place)
    assert not hasattr(model, "finepoint")


# Runs


def dense_run(config, rule):
    """What a run does, by dense formulas on a model and its rows; returns the model's weights before and after."""
    place = prepare(config)
    model = place.model
    before = snapshot(model)
    order = list(LengthBuckets([len(row.ids) for row in place.rows], config.batch_size, config.seed))
    size, parts = config.batch_size, config.accumulation
    batches = [place.collator([place.rows[i] for i in order[at : at + size]]) for at in range(0, len(order), size)]
    steps = [batches[at * parts : (at + 1) * parts] for at in range(config.steps)]
    everything = [place.collator(place.rows)]
    names = [name for name, _ in model.named_parameters() if "proj" in name]
    schedule = schedule_of(config.refresh)
    k = round(config.density * sum(before[name].numel() for name in names))
    trained = {}

    def weights():
        return {name: model.get_parameter(name).detach() for name in names}

    def pick(done):
        if done and not schedule.due(done):
            return None
        gradients = {name: value.abs() for name, value in mean_gradient(model, everything).items() if name in names}
        if done == 0 or not schedule.fraction:
            trained.clear()
            trained.update(dense_top_k(rule(weights(), gradients), k))
            return dict(trained)
        moved = {name: torch.full_like(before[name], -torch.inf) for name in names}
        for name, indices in trained.items():
            moved[name].view(-1)[indices] = (weights()[name] - before[name]).abs().view(-1)[indices]
        going = int(schedule.fraction * (1 - done / config.steps) * k)
        staying = dense_top_k(moved, k - going)
        for name, indices in staying.items():
            gradients[name].view(-1)[indices] = torch.inf
        trained.clear()
        trained.update(dense_top_k(gradients, k))
        return dict(trained)

    def loss_of(step):
        total, labels = 0, 0
        for batch in step:
            logits = model(**{key: value for key, value in batch.items() if key not in ("labels", "logits_to_keep")})
            wanted = batch["labels"][:, 1:]
            kept = logits.logits[:, -wanted.shape[1] - 1 : -1]
            total = total + cross_entropy(kept.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=-100)
            labels += int((wanted != -100).sum())
        return total / labels

    dense_refreshed_training(model, steps, pick, loss_of, config.lr, config.dropped == "keep")
    return before, snapshot(model), trained


RULES = {
    "gallop": lambda w, g: {name: g[name] / (w[name].abs() + 1e-8) for name in w},
    "magnitude-low": lambda w, g: {name: -w[name].abs() for name in w},
}


@pytest.mark.parametrize(
    ("rule", "refresh", "dropped", "accumulation"),
    [
        ("gallop", "every:2", "revert", 1),
        ("gallop", "every:2,until:4", "keep", 2),
        ("magnitude-low", "every:1", "keep", 1),
        ("magnitude-low", "drop-grow:0.5,every:2", "revert", 2),
        ("gallop", "drop-grow:0.3,every:1", "keep", 1),
    ],
)
def test_a_run_equals_dense_formulas(config, rule, refresh, dropped, accumulation):
    config = replace(config, rule=rule, refresh=refresh, dropped=dropped, accumulation=accumulation, dtype="float64",
                     schedule="constant", warmup=0.0, clip=0.0, scoring_examples=1000)  # fmt: skip
    record, adapter = run(config)
    before, after, trained = dense_run(config, RULES[rule])
    assert record["trained"] == LINEAR == sum(map(len, trained.values()))
    assert sum(refresh["grown"] for refresh in record["refreshes"]) > 10
    place = prepare(config)
    assert_same_bits(before, snapshot(place.model))
    with adapter.applied(place.model):
        for name, value in snapshot(place.model).items():
            torch.testing.assert_close(value, after[name], rtol=0, atol=1e-10)
    if dropped == "revert":
        assert adapter.count == LINEAR
        assert {name: adapter[name].tolist() for name in adapter} == {n: i.tolist() for n, i in trained.items()}
    else:
        assert adapter.count == LINEAR + record["settled"] > LINEAR


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"rule": "random", "lr": 1e-2}, False),
        ({"rule": "lift", "scope": "weight", "dropped": "keep"}, False),
        ({"structure": "row", "density": 0.1}, False),
        ({"structure": "block:4x4", "scope": "layer"}, False),
        ({"targets": {"*.v_proj": 0.1, "*.o_proj": 0.02}, "density": None}, True),
        ({"targets": {"*.v_proj": 0.1, "*.o_proj": 0.02}, "density": None, "refresh": "drop-grow:0.5,every:2"}, True),
        ({"refresh": "drop-grow:0.5,every:2", "scope": "weight", "rule": "random"}, True),
    ],
)
def test_any_rule_scope_and_structure(config, changes, same):
    """`same`: every weight has a budget of its own, which is kept."""
    record, adapter = run(config, **changes)
    assert sum(refresh["grown"] for refresh in record["refreshes"]) > 0
    assert adapter.count == record["trained"] + record["settled"]
    if same:
        chosen = choose(SelectConfig(**{key: getattr(replace(config, **changes), key) for key in (
            "model", "data", "rule", "density", "targets", "scope")}, output=config.output + "-chosen"))  # fmt: skip
        kinds = {name.split(".")[-2] for name in adapter}
        for kind in kinds:
            assert sum(len(adapter[name]) for name in adapter if kind in name) == sum(
                len(chosen[name]) for name in chosen if kind in name
            )


def test_log_and_record_tell_what_happened(config, tmp_path):
    record, _ = run(config, steps=7, refresh=["every:2", "until:5"])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    told = [row for row in log if "grown" in row]
    assert [row["step"] for row in told] == [3, 5] == [found["step"] for found in record["refreshes"]]
    for row, found in zip(told, record["refreshes"], strict=True):
        assert row["stayed"] + row["grown"] == row["stayed"] + row["dropped"] == record["trained"] == LINEAR
        assert {key: row[key] for key in found} == found
        assert row["refresh_seconds"] > 0
    assert record["settled"] == 0


def test_a_schedule_that_never_comes_says_so(config, caplog):
    record, _ = run(config, refresh="every:6")
    assert record["refreshes"] == []
    assert "every 6 steps, and the run ends after 6: the first choice holds" in caplog.text


def test_the_best_evaluation_may_lie_before_a_refresh(config, tmp_path):
    """What is validated on is made less likely by what is learned, so the first evaluation is the best."""
    yes, no = (write_lines(tmp_path / f"{word}.jsonl", [{"prompt": f"{a}{b}:", "completion": word}
                           for a in "abcdefgh" for b in "abcdefgh"]) for word in ("yes", "no"))  # fmt: skip
    wrong = replace(config, data=yes, schedule="constant", warmup=0.0, validation=no, eval_every=1)
    record, best = run(wrong, keep="best", refresh="every:1", dropped="keep", patience=3)
    assert record["best_step"] == 1
    assert record["stopped_early"]
    assert record["steps"] == 4
    assert sum(found["grown"] for found in record["refreshes"]) > 0
    _, first = run(wrong, steps=1, output=f"{config.output}-first")
    assert_equal(values_of(best), values_of(first))


def test_a_new_head_is_trained_whole_all_the_while(config, tmp_path):
    rows = [{"text": f"{a}{b} is {'good' if a < 'e' else 'bad'}", "label": "pos" if a < "e" else "neg"}
            for a in "abcdefgh" for b in "abcdefgh"]  # fmt: skip
    classes = write_lines(tmp_path / "labels.jsonl", rows)
    for targets in ("linear", "all"):
        record, adapter = run(config, data=classes, targets=targets, overwrite=True)
        assert adapter.changes["score.weight"].kind == "full"
        assert record["trained"] == adapter.count
        assert all(found["stayed"] >= 32 for found in record["refreshes"])
        assert {found["stayed"] + found["grown"] for found in record["refreshes"]} == {record["trained"]}
    record, adapter = run(config, data=classes, targets="all", refresh="drop-grow:0.5,every:2", overwrite=True)
    assert {found["stayed"] + found["grown"] for found in record["refreshes"]} == {record["trained"]}


def test_exclude_and_given_indices_hold_all_the_while(config, tmp_path):
    _, other = run(config, refresh=None, output=str(tmp_path / "other"))
    for refresh in ("every:1", "drop-grow:0.5,every:1"):
        record, adapter = run(config, refresh=refresh, dropped="keep", exclude=[str(tmp_path / "other")],
                              overwrite=True)  # fmt: skip
        assert record["settled"] > 0
        assert not any(torch.isin(adapter[name], other[name]).any() for name in set(adapter) & set(other))
    choose(SelectConfig(model=config.model, rule="random", count=37, output=str(tmp_path / "chosen")))
    for refresh in ("every:1", "drop-grow:0.5,every:1"):
        record, adapter = run(config, density=None, indices=str(tmp_path / "chosen"), refresh=refresh, overwrite=True)
        assert record["trained"] == adapter.count == 37
        assert sum(found["grown"] for found in record["refreshes"]) > 0


# Resuming


def killed_at(config, batch):
    """Trains, and kills the process (this one) before a batch."""
    from finepoint.training.trainer import SparseTrainer

    step, done = SparseTrainer.training_step, []

    def deadly(self, *arguments, **named):
        done.append(1)
        if len(done) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **named)

    SparseTrainer.training_step = deadly
    torch.set_num_threads(1)
    train(config)


def trained_in_a_process(config):
    (found,) = together(1, _trained, config)
    return found


def _trained(config):
    record = train(config)
    adapter = SparseAdapter.load(config.output)
    return record, values_of(adapter)


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ({"refresh": "every:2", "dropped": "keep"}, (5, 7)),
        ({"refresh": "drop-grow:0.5,every:2", "save_every": 2}, (10,)),
    ],
)
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(config, tmp_path, changes, batches):
    """Two batches a step, a choice after every second: 5 is the first batch after a choice, 7 that after its step."""
    config = replace(config, save_every=1, accumulation=2, batch_size=4, validation=config.data, validation_limit=8,
                     keep="best", eval_every=2)  # fmt: skip
    config = replace(config, **changes)
    record, whole = trained_in_a_process(replace(config, output=str(tmp_path / "whole")))
    assert sum(found["grown"] for found in record["refreshes"]) > 0
    for batch in batches:
        broken = replace(config, output=str(tmp_path / f"broken-{batch}"))
        process = SERVER.Process(target=killed_at, args=(broken, batch))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        again, resumed = trained_in_a_process(replace(broken, resume=True))
        assert_equal(resumed, whole)
        timeless = [[{k: v for k, v in found.items() if "seconds" not in k} for found in one["refreshes"]]
                    for one in (record, again)]  # fmt: skip
        assert timeless[0] == timeless[1]


def test_a_checkpoint_with_and_one_without_refresh_are_told_apart(config):
    run(config, steps=4, save_every=2)
    with pytest.raises(FinepointError, match="was trained with refresh every:2, not \\(none given\\)"):
        run(config, resume=True, refresh=None)
    run(config, steps=4, save_every=2, refresh=None, overwrite=True)
    with pytest.raises(FinepointError, match="was trained with refresh \\(none given\\), not every:2"):
        run(config, resume=True)


# Several processes


def _by_several(config, sharded):
    if sharded:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return _trained(config)


@pytest.mark.parametrize("sharded", [False, True])
def test_several_processes_choose_and_train_as_one(config, sharded):
    config = replace(config, dtype="float64", dropped="keep", batch_size=4)
    alone = replace(config, output=f"{config.output}-alone", accumulation=2)
    record, one = trained_in_a_process(alone)
    found = together(2, _by_several, config, sharded)
    for other, values in found:
        assert values.keys() == one.keys()
        for name, (indices, numbers) in one.items():
            assert torch.equal(values[name][0], indices), name
            torch.testing.assert_close(values[name][1], numbers, rtol=1e-5, atol=1e-8)
        assert_equal(values, found[0][1])
        assert [refresh["grown"] for refresh in other["refreshes"]] == [r["grown"] for r in record["refreshes"]]
    log = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "grown" in row] == [3, 5]


def test_an_optimizer_of_eight_bits_is_refused_and_nothing_is_changed():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    first = finepoint.select(model, rule="random", count=50, scope="weight")
    second = finepoint.select(model, rule="random", count=50, scope="weight", seed=1)
    name = "model.embed_tokens.weight"
    with SparseTuner(model, {name: torch.arange(1024)}, ready=first) as tuner:
        # bitsandbytes quantises states from 4,096 numbers on; here from the first.
        optimizer = bitsandbytes.optim.AdamW8bit(tuner.parameters(), lr=1e-3, min_8bit_size=1)
        tuner.choose_({**first, name: torch.arange(7)}, optimizer)  # no state yet
        model(**random_batches(1)[0]).loss.backward()
        optimizer.step()
        before = {key: entries.indices.clone() for key, entries in tuner.entries.items()}
        bits = snapshot(model)
        with pytest.raises(FinepointError, match="AdamW8bit keeps 'state1' in uint8 .* take torch.optim.AdamW"):
            tuner.choose_(second, optimizer)
        assert all(torch.equal(before[key], entries.indices) for key, entries in tuner.entries.items())
        assert_same_bits(bits, snapshot(model))


def _within_ddp():
    model = tiny_llama()
    tuner = SparseTuner(model, {"model.layers.0.mlp.up_proj.weight": torch.arange(3)})
    running = torch.nn.parallel.DistributedDataParallel(model)
    running(**random_batches(1)[0]).loss.backward()
    try:
        tuner.choose_({"model.layers.0.mlp.up_proj.weight": torch.arange(4)})
    except FinepointError as error:
        return str(error)


def test_within_ddp_it_is_refused():
    assert all("within DDP entries cannot be chosen anew" in message for message in together(2, _within_ddp))


# Studies


def test_an_arm_of_a_study_is_refreshed(model_folder, choice_file, tmp_path):
    from finepoint.studies.compare import compare
    from finepoint.studies.settings import CompareConfig

    study = CompareConfig(
        model=str(model_folder), output=str(tmp_path / "study"), seeds=[0], validation_limit=16, test_limit=16,
        tasks={"ends": {"train": choice_file, "validation": choice_file, "test": choice_file}},
        arms=[{"rule": "gallop", "density": 0.05, "lrs": [1e-2]},
              {"name": "fresh", "rule": "gallop", "density": 0.05, "lrs": [1e-2],
               "train": {"refresh": "every:1", "dropped": "keep"}}],
        train={"steps": 4, "batch_size": 8, "eval_every": 2, "scoring_examples": 16},
    )  # fmt: skip
    compare(study)
    cells = {cell["arm"]: cell for path in (tmp_path / "study" / "cells").glob("*.json")
             if (cell := json.loads(path.read_text()))}  # fmt: skip
    assert cells["fresh"]["indices"] == cells["gallop-0.05"]["indices"]  # chosen once, at first
    assert cells["fresh"]["cost"]["trained"] == LINEAR
    assert cells["fresh"]["cost"]["changed"] > LINEAR
    assert sum("grown" in row for row in cells["fresh"]["curve"]) == 3
