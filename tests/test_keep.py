"""What `--protect` keeps: the Fisher information at the chosen entries, and the pull that it gives."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, kl_div

import finepoint
from conftest import (
    assert_same_bits,
    assert_same_tensors,
    interrupted_at,
    make_tokenizer,
    random_batches,
    snapshot,
    tiny_llama,
    write_lines,
)
from finepoint.adapters.adapter import SparseAdapter
from finepoint.baselines.dense import DenseTuner
from finepoint.cli import main
from finepoint.data.batches import Collator, Row
from finepoint.data.recipes import table
from finepoint.errors import FinepointError
from finepoint.huggingface.session import adapter_of
from finepoint.selection.passes import drawing, drawn
from finepoint.selection.rules import RULES
from finepoint.training import texts
from finepoint.training.context import TrainingContext
from finepoint.training.divergence import BasePredictions
from finepoint.training.earlier import EarlierTasks
from finepoint.training.keep import PROTECTIONS, Beside, Protected, _generator, fisher_at, step_sizes
from finepoint.training.run import fit, train
from finepoint.training.settings import TrainConfig
from finepoint.training.texts import examples_to_keep, rows_to_read
from finepoint.tuner.anchor import Anchor
from finepoint.tuner.interface import Method
from finepoint.tuner.optimizers import scale_steps_


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(3)
    found = []
    for length in (7, 12, 9):
        ids = torch.randint(3, 60, (1, length), generator=draw)
        labels = ids.clone()
        labels[:, :2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def dense_fisher(model, batches, seed, each=True):
    """The mean squared gradient a token, of whole weights, by autograd; without a seed a text, of its own labels.

    Args:
        each: every batch has draws of its own.
    """
    total, tokens = {}, 0
    one = drawing(torch.Generator().manual_seed(seed or 0))
    for place, batch in enumerate(batches):
        draw = drawing(_generator(seed, place)) if each else one
        wanted = batch["labels"][0, 1:] != -100
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1][wanted]
        drawn = batch["labels"][0, 1:][wanted] if seed is None else draw(logits.detach())
        model.zero_grad()
        cross_entropy(logits, drawn, reduction="sum").backward()
        for name, weight in model.named_parameters():
            total[name] = total.get(name, 0) + weight.grad.square()
        tokens += 1 if seed is None else len(logits)
    return {name: found / tokens for name, found in total.items()}


def test_the_information_is_that_of_whole_weights_at_the_entries(batches):
    model = tiny_llama(torch.float64).eval()
    indices = dict(finepoint.select(model, rule="random", density=0.2, targets="all"))
    dense = dense_fisher(model, batches, 5)
    with finepoint.SparseTuner(model, indices, audit=False) as tuner:
        found = fisher_at(tuner, model, batches, 5)
        assert all(delta.grad is None for delta in tuner.trained().values())
    for name, fisher in found.items():
        torch.testing.assert_close(fisher, dense[name].reshape(-1)[indices[name]], rtol=1e-10, atol=1e-20)
    assert sum(float(fisher.sum()) for fisher in found.values()) > 0


def test_labels_are_drawn_as_the_model_says():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2
    draws = drawing(torch.Generator().manual_seed(1))(logits.expand(20_000, 20))
    found = torch.bincount(draws, minlength=20) / len(draws)
    chances = torch.softmax(logits[0], -1)
    assert ((found - chances).abs() < 5 * (chances / len(draws)).sqrt() + 1e-4).all()


def test_training_is_that_of_whole_weights_with_the_penalty(batches):
    """Three steps of SGD in float64, beside dense weights that are moved at the same entries alone."""
    model = tiny_llama(torch.float64).eval()
    dense = tiny_llama(torch.float64).eval()
    indices = dict(finepoint.select(model, rule="random", density=0.2))
    information = dense_fisher(tiny_llama(torch.float64).eval(), batches, 0)
    start = {name: weight.detach().clone() for name, weight in dense.named_parameters()}
    with finepoint.SparseTuner(model, indices, audit=False) as tuner:
        anchor = Anchor(tuner.trained, fisher_at(tuner, model, batches, 0), 300.0)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for batch in batches:
            model(**batch).loss.backward()
            anchor.add_()
            optimizer.step()
            optimizer.zero_grad()
        tuner.follow_()
        weights = dict(model.named_parameters())
        for batch in batches:
            dense.zero_grad()
            dense(**batch).loss.backward()
            with torch.no_grad():
                for name, positions in indices.items():
                    weight = dense.get_parameter(name)
                    pull = weight.grad + 300.0 * information[name] * (weight - start[name])
                    weight.view(-1)[positions] -= 0.1 * pull.reshape(-1)[positions]
        for name in indices:
            torch.testing.assert_close(weights[name], dense.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_a_sparsified_model_is_held_in_any_loop(batches):
    """SGD of whoever's, and of a copy of the model, beside dense weights that are moved at the same entries alone."""
    model, dense = tiny_llama(torch.float64).eval(), tiny_llama(torch.float64).eval()
    information = dense_fisher(tiny_llama(torch.float64).eval(), batches, 3)
    finepoint.sparsify(model, density=0.2, protect=batches, protect_strength=300.0, seed=3)
    start = {name: weight.detach().clone() for name, weight in dense.named_parameters()}
    for running in (copy.deepcopy(model), model):
        tuner = finepoint.tuner_of(running)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        with torch.no_grad():
            for name, weight in dense.named_parameters():
                weight.copy_(start[name])
        for batch in batches:
            running(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            dense.zero_grad()
            dense(**batch).loss.backward()
            with torch.no_grad():
                for name, entries in tuner.entries.items():
                    weight, places = dense.get_parameter(name), entries.indices.long()
                    pull = weight.grad + 300.0 * information[name] * (weight - start[name])
                    weight.view(-1)[places] -= 0.1 * pull.reshape(-1)[places]
        weights = dict(running.named_parameters())
        for name in tuner.entries:
            torch.testing.assert_close(weights[name], dense.get_parameter(name), rtol=1e-9, atol=1e-12)
            assert not torch.equal(weights[name], start[name])


class Plain(torch.optim.Optimizer):
    """Takes the gradient off, whatever its scale."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad)


def test_a_loop_that_hides_its_gradients_is_told(batches):
    model = finepoint.sparsify(tiny_llama().eval(), density=0.2, protect=batches)
    optimizer = torch.optim.LBFGS(finepoint.tuner_of(model).parameters())
    with pytest.raises(FinepointError, match=r"within optimizer.step, where what is to be kept cannot be added"):
        optimizer.step(lambda: model(**batches[0]).loss)


def test_going_on_from_a_held_adapter_says_that_nothing_holds_it(batches, caplog):
    model = finepoint.sparsify(tiny_llama().eval(), density=0.2, protect=batches)
    tuner = finepoint.tuner_of(model)
    for delta in tuner.parameters():
        torch.nn.init.ones_(delta)
    tuner.follow_()
    adapter = adapter_of(model)
    assert adapter.info["protect_by"] == "anchor"
    again = finepoint.load(finepoint.unload(model, revert=True), adapter, trainable=True)
    assert "what is trained now is not" in caplog.text
    assert "protect_by" not in adapter_of(again).info


def test_texts_are_read_all_over_the_file(tokenizer):
    rows = [Row([place], [place]) for place in range(10)]
    assert [row.ids for row in rows_to_read(rows, tokenizer, 4)] == [[0], [2], [5], [7]]
    assert rows_to_read(rows, tokenizer, 16) == rows


@pytest.mark.parametrize(("protect", "message"), [
    ([{"input_ids": torch.tensor([[3, 4, 5]])}], "a batch without labels"),
    ([{"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[-100, -100]])}], "every label is -100"),
    ([{"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[7, -100]])}], "every label is -100"),
])  # fmt: skip
def test_what_holds_nothing_is_told_and_the_model_left_plain(protect, message, llama, monkeypatch, batches):
    with pytest.raises(FinepointError, match=message):
        finepoint.sparsify(llama, density=0.2, protect=protect)
    for strength in (-5.0, float("nan"), float("inf"), "5"):
        with pytest.raises(FinepointError, match="give a number, 0 or more"):
            finepoint.sparsify(llama, density=0.2, protect=batches, protect_strength=strength)
    with pytest.raises(FinepointError, match="LlamaModel is none"):
        finepoint.sparsify(llama.model, density=0.2, protect=batches)
    monkeypatch.setattr("finepoint.huggingface.sparsify.fisher_at", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finepoint.sparsify(llama, density=0.2, protect=batches)
    monkeypatch.undo()
    assert finepoint.tuner_of(finepoint.sparsify(llama, density=0.2, protect=batches)).count


@pytest.mark.parametrize("moving", [False, True])
def test_kl_sees_a_head_that_is_trained_or_comes_to_be(moving):
    model, base = tiny_llama(torch.float64, tied=False).eval(), tiny_llama(torch.float64, tied=False).eval()
    first = "model.layers.0.mlp.up_proj.weight" if moving else "lm_head.weight"
    with finepoint.SparseTuner(model, {first: torch.arange(50)}, ["lm_head.weight"], audit=False) as tuner:
        given = replace(protected(model, tuner, 1.0), moving=moving)
        penalty = PROTECTIONS["kl"].make(given)
        told = BasePredictions.of(model, given.context.collator, TEXTS, changing=["lm_head.weight"])
        if moving:
            tuner.choose_({"lm_head.weight": torch.arange(50)})
        with torch.no_grad():
            tuner.trained()["lm_head.weight"].normal_(generator=torch.Generator().manual_seed(0))
        tuner.follow_()
        places = penalty.places(0)
        batches = given.batches([TEXTS[place] for place in places], len(places))
        found = sum(penalty.loss(batch, places, 1) for batch in batches)
        expected = dense_term("kl", model, base, [TEXTS[place] for place in places])
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        assert expected > 0.01
        torch.testing.assert_close(found / labels, expected, rtol=1e-6, atol=0.0)
        assert told.kl(model) == pytest.approx(float(dense_term("kl", model, base, TEXTS).detach()), rel=1e-6)


def test_a_pull_has_the_scale_that_the_optimizer_takes_off(batches):
    model = finepoint.sparsify(tiny_llama().eval(), density=0.2, protect=batches)
    entries = next(iter(finepoint.tuner_of(model).entries.values()))
    with torch.no_grad():
        entries.delta.fill_(0.5)
    optimizer = Plain([entries.delta], {})
    optimizer.grad_scale = torch.tensor(4.0)
    entries.delta.grad = torch.ones_like(entries.delta)
    pull = entries.pull
    assert pull.max() > 0
    optimizer.step()
    torch.testing.assert_close(0.5 - entries.delta.detach(), 1 + 4 * 0.5 * pull)


def test_a_model_that_writes_nothing_cannot_be_held(batches):
    classifier = transformers.LlamaForSequenceClassification(tiny_llama().config)
    with pytest.raises(FinepointError, match="LlamaForSequenceClassification is none"):
        finepoint.sparsify(classifier, protect=batches)
    model = finepoint.sparsify(tiny_llama(), density=0.2, protect=batches, refreshable=True)
    tuner = finepoint.tuner_of(model)
    with pytest.raises(FinepointError, match="are chosen once; leave out protect"):
        tuner.choose_({name: entries.indices for name, entries in tuner.entries.items()})
    loose = finepoint.sparsify(tiny_llama(), density=0.2, protect=batches, protect_strength=0)
    assert all(entries.pull is None for entries in finepoint.tuner_of(loose).entries.values())


def test_rules_are_given_the_information_of_whole_weights(batches, monkeypatch):
    model = tiny_llama(torch.float64).eval()
    dense = dense_fisher(tiny_llama(torch.float64).eval(), batches, 5, each=False)
    seen = {}

    def look(weight, kept_squared_gradient, kept_mean, kept_input_norm):
        seen[weight.shape, float(weight.detach().sum())] = kept_squared_gradient, kept_mean, kept_input_norm
        return kept_squared_gradient

    monkeypatch.setitem(RULES, "look", finepoint.register("look", look))
    for memory in (1.0, 1e-6):
        finepoint.select(model, rule="look", density=0.1, kept=batches, seed=5, scoring_memory=memory)
        weights = finepoint.target_weights(model)
        entries = sum(weight.numel() for weight in weights.values())
        mean = sum(dense[name].sum() for name in weights) / entries
        assert len(seen) == len(weights)
        for name, weight in weights.items():
            found, average, norm = seen[weight.shape, float(weight.detach().sum())]
            torch.testing.assert_close(found, dense[name], rtol=1e-5, atol=1e-12)
            torch.testing.assert_close(average, mean, rtol=1e-5, atol=0.0)
            assert norm.shape == (1, weight.shape[1])


def test_the_labels_of_what_is_kept_do_not_matter_and_the_seed_does(batches):
    model = tiny_llama(torch.float64).eval()
    others = [dict(batch, labels=batch["labels"].where(batch["labels"] == -100, 7)) for batch in batches]
    told, same, redrawn = (drawn(model, given, seed) for given, seed in ((batches, 1), (others, 1), (batches, 2)))
    for first, second, third in zip(told, same, redrawn, strict=True):
        assert torch.equal(first["labels"], second["labels"])
        assert not torch.equal(first["labels"], third["labels"])
        assert torch.equal(first["labels"] == -100, third["labels"] == -100)


def test_labels_of_encoder_decoders_are_drawn_position_by_position():
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8,
                                   decoder_start_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.arange(3, 9)[None], "labels": torch.tensor([[5, 6, -100, 7]])}
    (found,) = drawn(model, [batch], 3)
    logits = model(**batch).logits[0][[0, 1, 3]]
    assert torch.equal(found["labels"][0, [0, 1, 3]], drawing(torch.Generator().manual_seed(3))(logits))
    assert found["labels"][0, 2] == -100


def test_a_rule_may_weigh_what_is_learned_against_what_is_kept(batches):
    """Entries of gain: what the formula says, and others than those of the gradient alone."""
    model = tiny_llama(torch.float64).eval()
    learned = random_batches(2)

    def chosen(rule, **given):
        found = finepoint.select(model, learned, rule=rule, density=0.05, **given)
        return {(name, int(place)) for name, places in found.items() for place in places}

    gain = chosen("gain", kept=batches)
    assert gain == chosen("g**2 / (k + 0.1 * k_mean)", kept=batches)
    assert gain != chosen("gain", kept=batches, rule_options={"floor": 1e9})
    assert chosen("gradient") == chosen("gain", kept=batches, rule_options={"floor": 1e9})  # F counts for nothing
    assert chosen("abs(w) * k_x", kept=batches) != chosen("abs(w) * x", kept=batches)
    with pytest.raises(FinepointError, match="what is to be kept; give text of it by --protect"):
        chosen("gain")
    with pytest.raises(FinepointError, match="needs data"):
        finepoint.select(model, rule="gain", density=0.05, kept=batches)


TEXTS = [Row(ids, [-100, *ids[1:]]) for ids in ([5, 9, 12, 30, 7], [8, 8, 40, 3, 21, 33, 6], [50, 4, 4, 9])]


def protected(model, tuner, strength, head=()):
    place = TrainingContext(model, None, [], [], Collator.of_any(model, 0))
    return Protected(place, tuner, head, TEXTS, strength, 2, seed=3)


def text_batches():
    return [{"input_ids": torch.tensor([row.ids]), "labels": torch.tensor([row.labels])} for row in TEXTS]


def dense_term(name, model, base, texts):
    """What a protection adds to the loss, written plainly, without its strength."""
    if name in ("anchor", "empirical", "l2"):
        fisher = dense_fisher(copy.deepcopy(base), text_batches(), 3 if name == "anchor" else None)
        pairs = [(weight - base.get_parameter(key), fisher[key]) for key, weight in model.named_parameters()]
        return sum((change.square() * (1 if name == "l2" else f)).sum() for change, f in pairs) / 2
    terms = []
    for row in texts:
        ids = torch.tensor([row.ids])
        ours, theirs = (one(input_ids=ids).logits[0, :-1].log_softmax(-1) for one in (model, base))
        terms.append(kl_div(ours, theirs.detach(), reduction="none", log_target=True).sum(-1) if name == "kl" else
                     cross_entropy(ours, ids[0, 1:], reduction="none"))  # fmt: skip
    return torch.cat(terms).mean()


@pytest.mark.parametrize("targets", ["linear", "all"])  # all: the output layer is trained as well, and is tied
@pytest.mark.parametrize("name", PROTECTIONS)
def test_every_protection_is_its_term_beside_the_loss_of_whole_weights(name, targets, batches):
    model, base = tiny_llama(torch.float64).eval(), tiny_llama(torch.float64).eval()
    dense = copy.deepcopy(base)
    indices = dict(finepoint.select(model, rule="random", density=0.2, targets=targets))
    with finepoint.SparseTuner(model, indices, audit=False) as tuner:
        penalty = PROTECTIONS[name].make(protected(model, tuner, 2.0))
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for step, batch in enumerate(batches):
            model(**batch).loss.backward()
            penalty.add_(step)
            optimizer.step()
            optimizer.zero_grad()
        tuner.follow_()
        for step, batch in enumerate(batches):
            dense.zero_grad()
            texts = [TEXTS[place] for place in Beside(protected(model, tuner, 1.0), None).places(step)]
            (dense(**batch).loss + 2.0 * dense_term(name, dense, base, texts)).backward()
            with torch.no_grad():
                for key, positions in indices.items():
                    weight = dense.get_parameter(key)
                    weight.view(-1)[positions] -= 0.1 * weight.grad.view(-1)[positions]
        found = dict(model.named_parameters())
        for key in indices:
            torch.testing.assert_close(found[key], dense.get_parameter(key), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("whole", [False, True], ids=["entries", "weights"])
def test_earlier_tasks_pull_to_what_each_has_left(whole, tmp_path):
    """By the sum over the tasks of s F_t (w - w_t), of whole weights of copies of the model after each task."""
    model, after = tiny_llama(torch.float64).eval(), {}
    tasks = {"one": TEXTS[:2], "two": TEXTS[1:], "three": TEXTS[::2]}
    for seed, task in enumerate(tasks):
        with finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.3, seed=seed)) as tuner:
            for delta in tuner.parameters():
                delta.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
            adapter = tuner.adapter()
            tuner.revert_()
        adapter.apply(model)
        after[task] = copy.deepcopy(model)
    batches = {task: [{"input_ids": torch.tensor([row.ids]), "labels": torch.tensor([row.labels])} for row in rows]
               for task, rows in tasks.items()}  # fmt: skip
    before = snapshot(model)
    positions = {
        name: torch.arange(before[name].numel()) for name in ("model.norm.weight", "model.embed_tokens.weight")
    }
    positions = positions if whole else dict(finepoint.select(model, rule="random", density=0.3, seed=9))
    tuner = DenseTuner(model, positions) if whole else finepoint.SparseTuner(model, positions, audit=False)
    anchors = EarlierTasks(tasks, 7.0, 3).anchors(Method(tuner), Collator.of_any(model, 0), tmp_path)
    assert_same_bits(before, {name: weight for name, weight in snapshot(model).items() if name in before})
    with torch.no_grad():
        for value in tuner.trained().values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=value.dtype) / 30)
    tuner.follow_()
    for anchor in anchors:
        anchor.add_()
    fisher = {task: dense_fisher(copy.deepcopy(one), batches[task], 3) for task, one in after.items()}
    for name, value in tuner.trained().items():
        weight = model.get_parameter(name).detach()
        pull = sum(7.0 * fisher[task][name] * (weight - one.get_parameter(name)) for task, one in after.items())
        torch.testing.assert_close(value.grad.reshape(-1), pull.reshape(-1)[positions[name]], rtol=1e-8, atol=1e-14)
        assert value.grad.abs().max() > 0
    assert (tmp_path / "earlier.safetensors").is_file() != whole
    tuner.close()


def test_the_information_is_read_from_few_and_short_texts(monkeypatch):
    monkeypatch.setattr(texts, "TOKENS_READ", 4)
    model = tiny_llama(torch.float64).eval()
    indices = dict(finepoint.select(model, rule="random", density=0.2))
    batches = [{"input_ids": torch.tensor([row.ids[-4:]]), "labels": torch.tensor([row.labels[-4:]])} for row in TEXTS]
    dense = dense_fisher(tiny_llama(torch.float64).eval(), batches[:2], 3)
    with finepoint.SparseTuner(model, indices, audit=False) as tuner:
        given = protected(model, tuner, 1.0)
        given = replace(given, texts_read=2, context=replace(given.context, tokenizer=make_tokenizer()))
        found = PROTECTIONS["anchor"].make(given).fisher
    for name, fisher in found.items():
        torch.testing.assert_close(fisher, dense[name].reshape(-1)[indices[name]], rtol=1e-9, atol=1e-20)


def test_all_texts_take_part_before_any_comes_again():
    model = tiny_llama()
    with finepoint.SparseTuner(model, {"lm_head.weight": torch.arange(3)}, audit=False) as tuner:
        beside = Beside(protected(model, tuner, 1.0), None)
    met = [place for step in range(6) for place in beside.places(step)]
    assert all(sorted(met[at : at + 3]) == [0, 1, 2] for at in range(0, 12, 3))
    assert met[:3] != met[3:6] or met[3:6] != met[6:9]


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    text = write_lines(tmp_path / "text.jsonl", [{"text": "hello you " * 3}, {"text": "abc abc"}])
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.2, lr=1e-2,
                       steps=6, batch_size=8, protect=str(text), dtype="float32")  # fmt: skip


def trained(config, **changes):
    config = replace(config, **changes)
    train(config)
    return SparseAdapter.load(config.output)


def size(adapter):
    return sum(float(change.numbers.double().square().sum()) for change in adapter.changes.values())


def test_strength_0_is_no_protection_and_more_moves_less(config, tmp_path):
    found = {
        strength: trained(config, output=str(tmp_path / f"s{strength}"), protect_strength=strength)
        for strength in (0.0, 1e3, 1e7)
    }
    free = trained(config, protect=None)
    assert all(found[0.0].changes[name].equals(free.changes[name]) for name in free)
    assert size(free) > size(found[1e3]) > size(found[1e7])
    assert found[1e3].info["protect_strength"] == 1e3


@pytest.mark.parametrize("changes", [
    *({"protect_by": name} for name in PROTECTIONS),
    {"refresh": "every:2", "rule": "saft"},
    {"refresh": "every:2", "dropped": "keep", "protect_by": "kl"},
    {"baseline": "full", "density": None},
    {"baseline": "lora", "density": None, "protect_by": "kl"},
    {"protect_steps": True},
    {"baseline": "full", "density": None, "protect_by": "replay", "protect_steps": True},
], ids=str)  # fmt: skip
def test_a_resumed_run_is_held_back_alike(config, tmp_path, changes):
    changes = changes | ({"protect": None} if changes.get("protect_by") == "l2" else {})
    config = replace(config, save_every=3, **changes)
    train(replace(config, output=str(tmp_path / "whole")))
    with interrupted_at(6):
        train(config)
    train(replace(config, resume=True))
    assert_same_tensors(config.output, tmp_path / "whole")


def test_a_gradient_whose_norm_overflows_stops_the_run(config):
    """Its numbers are finite, and clipped by an infinite norm they would all be 0."""
    with pytest.raises(FinepointError, match=r"norm of the gradient became infinite at step \d.*and a weaker hold"):
        train(replace(config, protect_strength=1e24, steps=6))


@pytest.mark.parametrize("by", ["anchor", "kl"])
def test_steps_are_those_of_whole_weights_by_what_the_text_needs(by, batches):
    """Of AdamW in float64: each moves an entry by c / sqrt(F + mean F / 10), on average 1, of what it would have."""
    model, dense = tiny_llama(torch.float64).eval(), tiny_llama(torch.float64).eval()
    needed = dense_fisher(copy.deepcopy(dense), text_batches(), 3)
    indices = dict(finepoint.select(model, rule="random", density=0.2))
    start = {name: dense.get_parameter(name).detach().clone() for name in indices}
    with finepoint.SparseTuner(model, indices, audit=False) as tuner:
        given = protected(model, tuner, 0.0)
        sizes = step_sizes(given, PROTECTIONS[by].make(given))
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.01, weight_decay=0.1)
        scale_steps_(optimizer, tuner.trained(), sizes)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found = {name: model.get_parameter(name).detach().clone() for name in indices}

    every = torch.cat([needed[name].view(-1)[indices[name]] for name in indices])
    wide = 1 / (every + every.mean() / 10).sqrt()
    deltas = {name: torch.zeros(len(places), dtype=torch.float64) for name, places in indices.items()}
    moving = {name: torch.nn.Parameter(delta.clone()) for name, delta in deltas.items()}
    optimizer = torch.optim.AdamW(moving.values(), lr=0.01, weight_decay=0.1)
    for batch in batches:
        dense.zero_grad()
        dense(**batch).loss.backward()
        for name, places in indices.items():
            moving[name].data.copy_(deltas[name])
            moving[name].grad = dense.get_parameter(name).grad.view(-1)[places].clone()
        optimizer.step()
        with torch.no_grad():
            for name, places in indices.items():
                share = 1 / (needed[name].view(-1)[places] + every.mean() / 10).sqrt() / wide.mean()
                deltas[name] += share * (moving[name] - deltas[name])
                dense.get_parameter(name).copy_(start[name])
                dense.get_parameter(name).view(-1)[places] += deltas[name]
    for name in indices:
        torch.testing.assert_close(found[name], dense.get_parameter(name), rtol=1e-9, atol=1e-12)
    assert float(wide.max() / wide.min()) > 1.5  # else it would be no other training


def test_steps_of_one_size_are_those_of_the_optimizer(config, tmp_path, monkeypatch):
    """To the bit; and what the text needs gives others, of chosen entries and of whole weights."""
    whole = {"baseline": "full", "density": None, "lr": 1e-3}
    for changes in ({}, whole):
        plain = trained(config, output=str(tmp_path / "plain"), overwrite=True, **changes)
        other = trained(config, output=str(tmp_path / "steps"), overwrite=True, protect_steps=True, **changes)
        assert other.info["protect_steps"] is True
        assert "protect_steps" not in plain.info
        assert any(not other.changes[name].equals(plain.changes[name]) for name in plain)
        with monkeypatch.context() as patch:
            alike = lambda given, penalty: {name: torch.ones_like(x) for name, x in given.tuner.trained().items()}  # noqa: E731
            patch.setattr("finepoint.training.run.step_sizes", alike)
            ones = trained(config, output=str(tmp_path / "ones"), overwrite=True, protect_steps=True, **changes)
        assert all(ones.changes[name].equals(plain.changes[name]) for name in plain)


@pytest.mark.parametrize(("changes", "each"), [
    ({}, 4), ({"protect_steps": True}, 8), ({"protect_by": "l2", "protect": None}, 0), ({"protect_by": "replay"}, 0),
    ({"baseline": "full", "density": None}, 8),
], ids=str)  # fmt: skip
def test_the_record_says_what_holding_costs(config, changes, each):
    """F and the size of steps of each entry; of whole weights where they began, too. Not where nothing is held."""
    found = train(replace(config, steps=1, **changes))
    told = found["protection"]
    assert told["bytes"] == pytest.approx(each * found["trained"], abs=100)  # l2 has one number a weight
    assert told["bytes_an_entry"] == pytest.approx(each, abs=0.1)
    assert 0 <= told["share"] <= 1
    assert "protection" not in train(replace(config, steps=1, protect=None, overwrite=True))


def test_a_run_goes_on_with_the_same_texts_alone(config, tmp_path):
    trained(config, save_every=3)
    other = write_lines(tmp_path / "other.jsonl", [{"text": "quite another text"}])
    with pytest.raises(FinepointError, match="was trained with other examples"):
        trained(config, steps=9, resume=True, protect=str(other))
    with pytest.raises(FinepointError, match="was trained with protect_strength"):
        trained(config, steps=9, resume=True, protect_strength=1.0)


@pytest.mark.parametrize("changes", [
    {"protect_by": "kl"}, {"protect_by": "replay"}, {"protect_by": "l2", "protect": None},
    {"baseline": "lora", "density": None, "protect_by": "kl"}, {"baseline": "bitfit", "density": None},
    {"baseline": "dora", "density": None, "protect_by": "replay"},
    {"baseline": "mofo", "density": None, "protect_by": "empirical"},
], ids=str)  # fmt: skip
def test_every_method_can_be_protected(config, tmp_path, changes):
    """Strength 0 adds nothing, to the bit; much of it moves the model less, or at least elsewhere."""
    found = [differences(replace(config, output=str(tmp_path / f"s{strength}"), protect_strength=strength, **changes))
             for strength in (0.0, 100.0)]  # fmt: skip
    free = changes | {"protect": None, "protect_by": "anchor"}
    assert all(torch.equal(found[0][name], other) for name, other in differences(replace(config, **free)).items())
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def differences(config):
    """What training makes of every weight it changes."""
    _, adapter = fit(config)
    return {name: change.numbers for name, change in adapter.changes.items()}


def test_full_training_with_the_texts_own_labels_is_ewc(config, tmp_path):
    config, text = replace(config, density=None, dtype="float64", lr=1e-3), config.protect
    ours = differences(replace(config, baseline="full", protect_by="empirical", protect_strength=50.0))
    config = replace(config, protect=None, overwrite=True)
    free = differences(replace(config, baseline="full"))
    theirs = differences(replace(config, baseline="ewc", fisher_data=text, baseline_options={"strength": 50.0}))
    for name, numbers in theirs.items():
        torch.testing.assert_close(ours[name], numbers, rtol=1e-5, atol=1e-8)
    assert any((free[name] - numbers).abs().max() > 1e-6 for name, numbers in theirs.items())


def test_entries_chosen_on_the_way_are_held_back_by_what_the_base_says_of_them(batches):
    model, base = tiny_llama(torch.float64).eval(), tiny_llama(torch.float64).eval()
    first, then = (dict(finepoint.select(model, rule="random", density=0.2, seed=seed)) for seed in (0, 1))
    rows = [{"input_ids": torch.tensor([row.ids]), "labels": torch.tensor([row.labels])} for row in TEXTS]
    dense = dense_fisher(base, rows, 3)
    with finepoint.SparseTuner(model, first, audit=False) as tuner:
        anchor = PROTECTIONS["anchor"].make(replace(protected(model, tuner, 10.0), moving=True))
        for indices in (first, then):
            tuner.choose_(indices)
            for delta in tuner.parameters():
                delta.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
            model(**batches[0]).loss.backward()
            before = {name: (delta.detach().clone(), delta.grad.clone()) for name, delta in tuner.trained().items()}
            anchor.add_(0)
            for name, delta in tuner.trained().items():
                value, gradient = before[name]
                pull = 10.0 * dense[name].reshape(-1)[indices[name]] * value
                torch.testing.assert_close(delta.grad, gradient + pull, rtol=1e-9, atol=1e-15)
                assert torch.equal(delta, value)
            tuner.model.zero_grad()


@pytest.mark.parametrize("loss", ["dft", "eaft", "talr"])
def test_a_run_minimises_the_loss_it_is_told(config, tmp_path, loss):
    ours = trained(config, protect=None, loss=loss)
    usual = trained(config, protect=None, output=str(tmp_path / "usual"))
    assert (ours.info["loss"], usual.info.get("loss")) == (loss, None)
    assert any(not torch.equal(ours.changes[name].numbers, usual.changes[name].numbers) for name in usual)
    with pytest.raises(FinepointError, match="the losses: nll, dft, eaft, talr"):
        trained(config, protect=None, loss="focal")


def test_what_cannot_be_protected_is_refused(config, tmp_path):
    classes = write_lines(tmp_path / "c.jsonl", [{"text": "ab", "label": "x"}, {"text": "ba", "label": "y"}])
    for changes, message in (
        ({"baseline": "lora", "density": None}, "trains factors of them; give --protect-by kl or replay"),
        ({"baseline": "rosa", "protect_by": "l2", "protect": None}, "trains factors of them"),
        ({"baseline": "ewc", "density": None, "fisher_data": config.protect}, "has its own pull"),
        ({"protect": None, "protect_by": "kl"}, "give --protect FILE"),
        ({"protect": None, "protect_strength": 1.0}, "give --protect FILE"),
        ({"protect": None, "protect_examples": 8}, "protect_examples says something of --protect, which is not given"),
        ({"protect": None, "protect_read": 8, "protect_by": "l2"}, "leave out --protect-read"),
        ({"protect": None, "protect_share": 0.5}, "leave out --protect-share"),
        ({"protect_by": "kl", "protect_read": 8}, "reads all of the texts; leave out --protect-read"),
        ({"protect_by": "l2"}, "reads no text"),
        ({"protect": "newz"}, "there is no file newz; did you mean 'news'"),
        ({"rule": "gain", "rule_options": {"floor": -0.1}}, "floor is -0.1; give 0 or more"),
        ({"output": config.model}, "is the base model itself"),
        ({"protect_by": "ancor"}, "did you mean 'anchor'"),
        ({"protect": str(classes)}, "c.jsonl, line 1: --protect .* these texts have classes; give them alone"),
        ({"protect": f"{config.protect}=0.5"}, "takes equal parts of its files, and .* has a share"),
        ({"protect": [f"{config.protect}=0.5", f"{classes}=0.5"]}, "equal parts of its files, and .* has a share"),
        ({"answers": 5}, "answers is given without examples; give --validation"),
        ({"data": str(classes)}, "classifiers write nothing"),
        ({"protect_strength": -1.0}, "at least 0"),
        ({"protect_share": 0.7}, "leave out --protect-share"),
        ({"protect": None, "protect_by": "l2", "protect_steps": True}, "protect_steps says something of --protect"),
        ({"baseline": "lora", "density": None, "protect_by": "kl", "protect_steps": True}, "leave it out"),
        ({"refresh": "every:2", "protect_steps": True}, "leave out --refresh"),
    ):
        with pytest.raises(FinepointError, match=message):
            train(replace(config, overwrite=True, **changes))


def test_entries_are_chosen_and_held_back_by_the_same_text(config, tmp_path, capsys):
    words = ["train", "--model", config.model, "--data", config.data, "--density", "0.2", "--steps", "2", "--rule",
             "gain", "--protect", config.protect, "--json"]  # fmt: skip
    assert main([*words, "--output", str(tmp_path / "gain")]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["protect"] == config.protect
    chosen = ["select", *words[1:6], "--density", "0.2", "--protect", config.protect, "--output", str(tmp_path / "s")]
    assert main([*chosen, "--rule", "gain"]) == 0
    one, other = SparseAdapter.load(tmp_path / "gain"), SparseAdapter.load(tmp_path / "s")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main([*chosen, "--overwrite"]) == 2
    assert "rule 'random' looks at no text that is to be kept; leave out --protect" in capsys.readouterr().err


def test_a_rule_may_read_the_text_and_the_pull_do_without(config, tmp_path):
    """Entries are those of the rule, and the pull is l2's over them."""
    rule = {"rule": "gain", "output": str(tmp_path / "l2"), "protect_by": "l2"}
    ours, other = trained(config, **rule), trained(config, rule="gain")
    assert all(torch.equal(ours[name], other[name]) for name in other)
    alone = trained(config, protect=None, protect_by="l2", indices=rule["output"], output=str(tmp_path / "alone"))
    assert all(ours.changes[name].equals(alone.changes[name]) for name in alone)
    trained(config, rule="gain", protect_by="kl", protect_read=1, output=str(tmp_path / "read"))  # by the rule


def test_settings_of_text_to_keep_are_refused_without_it_wherever_they_are(config, capsys, batches):
    for command in (["select", "--model", config.model, "--output", config.output],
                    ["eval", "--model", config.model, "--probe", f"x={config.protect}"]):  # fmt: skip
        assert main([*command, "--protect-examples", "8"]) == 2
        assert "give --protect FILE, or leave out --protect-examples" in capsys.readouterr().err
    with pytest.raises(FinepointError, match="none are given; give protect, or leave it out"):
        finepoint.sparsify(tiny_llama(), density=0.1, protect_strength=10.0)


def test_from_the_command_line(config, capsys):
    words = ["train", "--model", config.model, "--data", config.data, "--density", "0.2", "--steps", "2",
             "--protect", config.protect, "--output", config.output, "--json"]  # fmt: skip
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["protect"] == config.protect
    assert Path(config.output, "finepoint.safetensors").is_file()


def test_a_text_may_be_named_and_is_made_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path))
    made = []

    def write(folder):
        made.append(folder)
        write_lines(folder / "news.jsonl", [{"text": "something happened"}])

    monkeypatch.setitem(table.RECIPES, "vader", replace(table.RECIPES["vader"], writer="test_keep:written"))
    monkeypatch.setattr("test_keep.written", write, raising=False)
    assert [example.text for example in examples_to_keep("news", 3) + examples_to_keep("news", None)] == 2 * [
        "something happened"
    ]
    assert len(made) == 1
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "news", [{"text": "a file of that name"}])
    assert examples_to_keep("news", 3)[0].text == "a file of that name"
