"""A budget of disturbance: KL beside the dense formula, and the largest scale that keeps it beside a fine grid."""

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import finepoint
from conftest import interrupted_at, tiny_gemma, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.scaling import scale_by_depth, wise_ft
from finepoint.cli import main
from finepoint.data.batches import Collator, encode_all
from finepoint.data.examples import Completion, Text, read_examples
from finepoint.errors import FinepointError
from finepoint.runtime.interruption import BrokenOff
from finepoint.training import budget, divergence, keep
from finepoint.training.budget import search
from finepoint.training.divergence import BasePredictions
from finepoint.training.run import fit, train
from finepoint.training.settings import TrainConfig
from test_scaling import make_adapter

TEXTS = [{"text": "hello you, abc abd"}, {"text": "abc " * 5}, {"text": "hgfedcba"}]
BUDGET = 0.01


def dense_kl(model, tokenizer, adapter, examples):
    """One unpadded pass a text with and without the adapter; the mean over the positions that predict a label."""
    total, count = 0.0, 0
    for row in encode_all(tokenizer, examples, 64):
        wanted = [at - 1 for at in range(1, len(row.ids)) if row.labels[at] != -100]
        with torch.no_grad():
            base = model(torch.tensor([row.ids])).logits[0, wanted].double().log_softmax(-1)
            with adapter.applied(model):
                adapted = model(torch.tensor([row.ids])).logits[0, wanted].double().log_softmax(-1)
        total += float((base.exp() * (base - adapted)).sum())
        count += len(wanted)
    return total / count


def capped():
    model = tiny_gemma()
    model.config.final_logit_softcapping = 5.0
    return model


MODELS = {"tied": tiny_llama, "untied": lambda: tiny_llama(tied=False), "capped": capped}


@pytest.mark.parametrize("kind", ["delta", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_divergence_is_that_of_its_formula_whatever_the_adapter_changes(name, kind, tokenizer):
    model = MODELS[name]()
    adapter = make_adapter(model, kind)  # of every weight, the head among them
    examples = [Completion("abc ab", "d e"), Completion("hgf", " bade"), Completion("c" * 30, "a")]
    rows = encode_all(tokenizer, examples, 64)
    kept = BasePredictions.of(model, Collator.of(model, tokenizer), rows, changing=adapter)
    assert kept.kl(model) == 0
    with adapter.applied(model):
        found = kept.kl(model)
    assert found == pytest.approx(dense_kl(model, tokenizer, adapter, examples), rel=1e-4)
    assert found > 1e-3
    assert kept.tokens == sum(label != -100 for row in rows for label in row.labels)


def test_logits_that_must_be_kept_whole_are_of_fewer_texts(tokenizer, monkeypatch, caplog):
    model = capped()
    rows = encode_all(tokenizer, [Text("abcdefg")] * 4, 64)
    monkeypatch.setattr(divergence, "LIMIT", 2 * (len(rows[0].ids) - 1) * 64 * 4)
    assert BasePredictions.of(model, Collator.of(model, tokenizer), rows).texts == 2
    assert "on the first 2 of 4 texts" in caplog.text
    assert BasePredictions.of(tiny_llama(), Collator.of(model, tokenizer), rows).texts == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("by", "scaled"), [("wise-ft", wise_ft), ("depth", scale_by_depth)])
@pytest.mark.parametrize("kind", ["delta", "value", "full"])
def test_the_scale_is_the_largest_that_keeps_the_budget(kind, by, scaled, dtype, tokenizer):
    model = tiny_llama(dtype, layers=4)
    adapter = make_adapter(model, kind)
    examples = [Text(text["text"]) for text in TEXTS]
    most = (0.5 if by == "depth" else 0.1) * dense_kl(model, tokenizer, adapter, examples)
    found = finepoint.scale_to_budget(adapter, model, tokenizer, TEXTS, most, by)
    assert 0 < found.scale < 1
    close = 1e-3 if dtype == torch.float32 else 2e-2  # which is rounded otherwise in a batch
    assert found.kl == pytest.approx(dense_kl(model, tokenizer, found.adapter, examples), rel=close)
    assert found.kl <= most < found.kl_before
    larger = scaled(adapter, model, min(1, found.scale * 1.05))
    assert dense_kl(model, tokenizer, larger, examples) > most
    assert found.adapter.equals(scaled(adapter, model, found.scale))
    assert found.adapter.info["scaled"]["scale"] == found.scale
    assert len(found.tries) < 12


def test_what_keeps_the_budget_keeps_its_bits(tokenizer, llama):
    adapter = make_adapter(llama, "delta")
    found = finepoint.scale_to_budget(adapter, llama, tokenizer, TEXTS, 1e3)
    assert found.adapter is adapter
    assert found.scale == 1
    assert found.kl == found.kl_before
    assert len(found.tries) == 1


def test_a_budget_that_is_none_or_cannot_be_met_is_refused(tokenizer, llama):
    adapter = make_adapter(llama, "delta")
    for most in (0, -1.0, 1e-7, float("nan"), float("inf")):
        with pytest.raises(FinepointError, match="at least 1e-06"):
            finepoint.scale_to_budget(adapter, llama, tokenizer, TEXTS, most)
    half = tiny_llama(torch.bfloat16)
    next_up = {name: torch.nextafter(weight, torch.tensor(torch.inf, dtype=weight.dtype)).detach()
               for name, weight in half.named_parameters()}  # fmt: skip
    steps = SparseAdapter({name: Change.whole(weight) for name, weight in next_up.items()})
    with pytest.raises(FinepointError, match=r"no part of the change keeps KL at 1e-06: at scale 0\.5"):
        finepoint.scale_to_budget(steps, half, tokenizer, TEXTS, 1e-6)
    with pytest.raises(FinepointError, match="is .*; give --by wise-ft"):
        finepoint.scale_to_budget(adapter, llama, tokenizer, TEXTS, 1e-6, by="depth")
    classifier = SparseAdapter(adapter.changes, {"task": "classification"})
    with pytest.raises(FinepointError, match="is a classifier's"):
        finepoint.scale_to_budget(classifier, llama, tokenizer, TEXTS, BUDGET)
    with pytest.raises(FinepointError, match="have classes; give them alone"):
        finepoint.scale_to_budget(adapter, llama, tokenizer, [{"text": "a", "label": "b"}], BUDGET)
    with adapter.applied(llama), pytest.raises(FinepointError, match="revert it first"):
        finepoint.scale_to_budget(adapter, llama, tokenizer, TEXTS, BUDGET)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("most", [0.9, 0.1, 1e-3])
def test_the_search_finds_where_a_growing_curve_crosses(power, most):
    tries = search(lambda scale: scale**power, most)
    scale = max(scale for scale, kl in tries if kl <= most)
    assert scale == pytest.approx(most ** (1 / power), rel=0.06)
    assert len(tries) < 30


def test_from_the_command_line(model_folder, choice_file, tmp_path, capsys):
    text = write_lines(tmp_path / "text.jsonl", TEXTS)
    base = ["--model", str(model_folder), "--density", "0.2", "--steps", "4"]
    whole = str(tmp_path / "whole")
    assert main(["train", *base, "--data", choice_file, "--lr", "0.05", "--rule", "random", "--output", whole]) == 0
    common = ["scale", whole, "--model", str(model_folder), "--protect", text]
    capsys.readouterr()
    assert main([*common, "--disturb-at-most", "1e-4", "--output", str(tmp_path / "scaled"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] <= 1e-4 < found["kl_before"]
    assert found["tries"][0] == {"scale": 1.0, "kl": found["kl_before"]}
    assert SparseAdapter.load(tmp_path / "scaled").info["scaled"]["kl"] == found["kl"]
    said = f"by {found['scale']:.4g}, the change that was trained, for a KL of at most 0.0001"
    assert said in (tmp_path / "scaled" / "README.md").read_text()
    assert main(["inspect", str(tmp_path / "scaled")]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["scale", str(tmp_path / "scaled"), *common[2:], "--disturb-at-most", "1e-4",
                 "--output", str(tmp_path / "again")]) == 0  # fmt: skip
    assert "at scale 1: KL to the base on 3 texts" in capsys.readouterr().out
    assert SparseAdapter.load(tmp_path / "again").equals(SparseAdapter.load(tmp_path / "scaled"))
    assert main([*common, "--disturb-at-most", "0", "--output", str(tmp_path / "x")]) == 2
    assert "give at least 1e-06" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# While training


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    rows = [{"text": text * count} for text in ("hello you ", "abc ab", "gfh, ", "bcd") for count in (2, 3)]
    text = write_lines(tmp_path / "text.jsonl", rows)
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.2, lr=2e-2,
                       steps=16, batch_size=8, protect=text, dtype="float32", disturb_at_most=1e-3,
                       protect_strength=10.0)  # fmt: skip


def held_out(config):
    """The texts that a run measures on."""
    examples = read_examples(config.protect)
    chosen = random.Random(config.seed).sample(range(len(examples)), 2)
    return [examples[at] for at in sorted(chosen)]


def run(config, **changes):
    config = replace(config, **changes)
    return train(config), SparseAdapter.load(config.output)


@pytest.mark.parametrize("most", [1e-2, 1e-3, 1e-5])
def test_training_keeps_its_budget_and_uses_it(config, tokenizer, most):
    record, adapter = run(config, disturb_at_most=most)
    found = record["disturbed"]
    kl = dense_kl(tiny_llama(), tokenizer, adapter, held_out(config))
    assert found["kl"] == pytest.approx(kl, rel=1e-3, abs=2e-7)  # log-probabilities of about 4, rounded to float32
    assert most / 10 < kl <= most
    assert adapter.info["disturb_at_most"] == most
    assert adapter.info["disturbed"] == found["kl"]
    assert found["texts"] == 2
    log = [json.loads(line) for line in Path(config.output, "log.jsonl").read_text().splitlines()]
    along = [line for line in log if "disturbed" in line]
    assert [line["step"] for line in along] == [2, 4, 6, 8, 10, 12, 14]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 17))
    assert "unfinished" not in adapter.info
    strength = 10.0
    for before, line in pairwise([None, *along]):
        if line["step"] > 4:
            shares = [1 - (1 - record["step"] / 16) ** 2 for record in (before, line)]
            ahead = (line["disturbed"] / before["disturbed"]) ** ((1 - shares[1]) / (shares[1] - shares[0]))
            end = line["disturbed"] * min(max(ahead, 1 / 4), 4)
            strength = min(strength * min(max((end / most) ** 0.7, 1 / 3), 10), 10.0 * 1e4)
        assert line["protect_strength"] == pytest.approx(strength)
    assert found["strength"] == pytest.approx(strength)


def test_a_change_that_is_above_the_budget_at_the_end_is_scaled(config, monkeypatch, caplog):
    monkeypatch.setattr(budget, "STEPWISE", (1.0, 1.0))  # the strength stays
    record, adapter = run(config, output=config.output + "1", validation=config.data)
    assert record["validation_loss"] > record["last_validation_loss"]  # of what is saved, and before the scaling
    assert record["disturbed"]["kl"] <= 1e-3 < record["disturbed"]["kl_before"]
    assert 0 < record["disturbed"]["scale"] < 1
    assert "the change is scaled by" in caplog.text
    whole = run(config, output=config.output + "2", disturb_at_most=1e3)[1]
    for name, change in adapter.changes.items():
        torch.testing.assert_close(change.numbers, whole.changes[name].numbers * record["disturbed"]["scale"])


METHODS = {
    "full": {"baseline": "full", "density": None, "lr": 3e-3},
    "lora": {"baseline": "lora", "density": None, "protect_by": "kl"},
    "dora": {"baseline": "dora", "density": None, "protect_by": "replay"},
    "rosa": {"baseline": "rosa", "protect_by": "kl"},
    "anew": {"refresh": "every:2"},
    "grown": {"refresh": "drop-grow:0.5 every:2", "targets": "all"},
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("dora", "rosa", "grown")))
                                  for name in METHODS])  # fmt: skip
def test_every_method_keeps_a_budget(config, tokenizer, name):
    """What is left of it is measured by itself: the KL is that of the adapter that was returned, and scaled."""
    if name in ("lora", "dora", "rosa"):
        pytest.importorskip("peft")
    config = replace(config, **{"steps": 6, "protect_strength": 1e-6, "disturb_at_most": 1e-5} | METHODS[name])
    record, adapter = fit(config)
    found = record["disturbed"]
    assert found["kl"] <= 1e-5 < found["kl_before"]
    assert 0 < found["scale"] < 1
    assert dense_kl(tiny_llama(), tokenizer, adapter, held_out(config)) == pytest.approx(found["kl"], rel=0.02)


def test_several_processes_go_by_what_the_first_one_finds(config, monkeypatch):
    monkeypatch.setattr(budget.distributed, "on_first", lambda work: (work(), 7.0)[1])
    base = BasePredictions([], [], None, {}, 0, 1)
    assert budget.Holding._kl(SimpleNamespace(tuner=SimpleNamespace(model=tiny_llama())), base) == 7.0


@pytest.mark.parametrize("by", ["kl", "replay"])
def test_the_strength_of_any_protection_is_adapted(config, by):
    record, _ = run(config, protect_by=by, protect_strength=None, disturb_at_most=1e-2)
    assert record["disturbed"]["kl"] <= 1e-2
    assert record["disturbed"]["strength"] != 1


def test_the_strength_has_a_bound_that_is_said(config, monkeypatch, caplog):
    """Against text that does not respond, as where the pull is elsewhere than what the text needs."""
    monkeypatch.setattr(budget, "STRONGEST", 20.0)
    record, _ = run(config, protect_by="l2", disturb_at_most=1e-6, protect_strength=1e-9)
    assert record["disturbed"]["strength"] == pytest.approx(20e-9)
    assert caplog.text.count("the text does not respond") == 1
    assert record["disturbed"]["kl"] <= 1e-6


def test_a_resumed_run_keeps_the_budget_alike(config):
    whole = run(config, save_every=5, output=config.output + "-whole")
    with interrupted_at(12):
        run(config, save_every=5)
    resumed = run(config, save_every=5, resume=True)
    assert all(resumed[1].changes[name].equals(whole[1].changes[name]) for name in whole[1])
    for told in ("disturbed", "first_loss", "loss", "last_loss"):
        assert resumed[0][told] == whole[0][told]


def test_an_interruption_is_felt_after_a_measurement_and_marks_what_is_not_yet_scaled(config, monkeypatch):
    with interrupted_at(5):  # KL was measured in the step before
        run(config)
    assert SparseAdapter.load(config.output).info["unfinished"] == "step 4 of 16"

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, "search", interrupted)
    with pytest.raises(BrokenOff, match="after the last step, before its KL was measured; the adapter, marked as"):
        run(config, overwrite=True)
    assert SparseAdapter.load(config.output).info["unfinished"].startswith("step 16 of 16, and not yet measured")


def test_a_head_that_is_trained_is_measured_too(config, tokenizer):
    record, adapter = run(config, targets="all")
    assert "model.embed_tokens.weight" in adapter
    kl = dense_kl(tiny_llama(), tokenizer, adapter, held_out(config))
    assert record["disturbed"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_what_is_measured_on_neither_holds_back_nor_chooses(config, monkeypatch):
    seen, fisher_at = [], keep.fisher_at

    def measure(tuner, model, batches, seed):
        seen.extend(batches)
        return fisher_at(tuner, model, batches, seed)

    monkeypatch.setattr(keep, "fisher_at", measure)
    run(config)
    assert len(seen) == 6  # of eight
    with pytest.raises(FinepointError, match="give at least two with --protect"):
        run(config, protect_examples=1, overwrite=True)


def test_budgets_that_nothing_could_keep_are_refused(config):
    for changes, message in (
        ({"protect": None}, "give --protect FILE"),
        ({"disturb_at_most": 0.0}, "give at least 1e-06"),
        ({"protect_strength": 0.0}, "needs a --protect-strength above 0"),
        ({"refresh": "every:2", "dropped": "keep"}, "give --dropped revert"),
    ):
        with pytest.raises(FinepointError, match=message):
            train(replace(config, **changes))
