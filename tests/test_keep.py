"""What `--protect` keeps: the Fisher information at the chosen entries, and the pull that it gives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import finepoint
from conftest import interrupted_at, random_batches, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.selection.passes import drawing, drawn
from finepoint.selection.rules import RULES
from finepoint.training.keep import fisher_at
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig
from finepoint.tuner.anchor import Anchor


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


def dense_fisher(model, batches, seed):
    """The mean squared gradient a token, of whole weights, by autograd."""
    draw, total, tokens = drawing(torch.Generator().manual_seed(seed)), {}, 0
    for batch in batches:
        wanted = batch["labels"][0, 1:] != -100
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1][wanted]
        model.zero_grad()
        cross_entropy(logits, draw(logits.detach()), reduction="sum").backward()
        for name, weight in model.named_parameters():
            total[name] = total.get(name, 0) + weight.grad.square()
        tokens += len(logits)
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


def test_rules_are_given_the_information_of_whole_weights(batches, monkeypatch):
    model = tiny_llama(torch.float64).eval()
    dense = dense_fisher(tiny_llama(torch.float64).eval(), batches, 5)
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


def test_a_resumed_run_is_held_back_alike(config, tmp_path):
    whole = trained(config, save_every=3, output=str(tmp_path / "whole"))
    with interrupted_at(5):
        trained(config, save_every=3)
    resumed = trained(config, save_every=3, resume=True)
    assert all(resumed.changes[name].equals(whole.changes[name]) for name in whole)
    other = write_lines(tmp_path / "other.jsonl", [{"text": "quite another text"}])
    with pytest.raises(FinepointError, match="was trained with examples"):
        trained(config, steps=9, resume=True, protect=str(other))
    with pytest.raises(FinepointError, match="was trained with protect_strength"):
        trained(config, steps=9, resume=True, protect_strength=1.0)


def test_what_cannot_be_protected_is_refused(config, tmp_path):
    classes = write_lines(tmp_path / "c.jsonl", [{"text": "ab", "label": "x"}, {"text": "ba", "label": "y"}])
    for changes, message in (
        ({"baseline": "lora", "density": None}, "ewc holds back whole weights"),
        ({"refresh": "every:2"}, "leave out --protect or --refresh"),
        ({"protect": str(classes)}, "classifiers write nothing"),
        ({"data": str(classes)}, "classifiers write nothing"),
        ({"protect_strength": -1.0}, "at least 0"),
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


def test_from_the_command_line(config, capsys):
    words = ["train", "--model", config.model, "--data", config.data, "--density", "0.2", "--steps", "2",
             "--protect", config.protect, "--output", config.output, "--json"]  # fmt: skip
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["protect"] == config.protect
    assert Path(config.output, "finepoint.safetensors").is_file()
