import json
import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch

from conftest import assert_same_bits, assert_same_tensors, interrupted_at, snapshot, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.cli import main
from finepoint.data import chats
from finepoint.data.examples import Chat, Completion, Text, read_examples
from finepoint.errors import FinepointError
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.models.loading import load_model, load_tokenizer
from finepoint.selection.settings import SelectConfig
from finepoint.training.context import prepare, rows_of, scoring_rows
from finepoint.training.loss import completion_loss
from finepoint.training.run import choose, train
from finepoint.training.settings import TrainConfig
from finepoint.training.trainer import LengthBuckets, SparseTrainer
from test_adapter import assert_same_adapter


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=0.05, lr=1e-2,
                       rule="gallop", steps=6, batch_size=8)  # fmt: skip


def run(config, **changes):
    config = replace(config, **changes)
    return train(config), SparseAdapter.load(config.output)


def test_same_configuration_and_seed_give_the_same_adapter(config, tmp_path):
    first, a = run(config)
    torch.manual_seed(99)
    _, b = run(config, output=str(tmp_path / "again"))
    a.info.pop("selection"), b.info.pop("selection")
    assert_same_adapter(a, b)
    _, other = run(config, output=str(tmp_path / "other"), seed=1)
    assert any(
        not torch.equal(change.numbers, other.changes[name].numbers)
        for name, change in a.changes.items()
        if name in other
    )
    assert first["trained"] == a.count == round(0.05 * 2 * (16 * 16 * 2 + 16 * 8 * 2 + 16 * 24 * 3))
    assert first["changed"] > 0


def test_it_learns_and_evaluation_says_so(config, choice_file):
    record, _ = run(config, steps=120, density=0.5, rule="saft", lr=2e-2)
    assert record["last_loss"] < record["first_loss"]
    from finepoint.evaluation.settings import EvalConfig

    found = evaluate_config(EvalConfig(model=config.model, adapter=[config.output], id=[f"x={choice_file}"]))
    adapted = found["adapters"][config.output]
    assert adapted["id_change"]["x"] == adapted["id"]["x"]["accuracy"] - found["base"]["id"]["x"]["accuracy"]
    assert adapted["id_change"]["x"] > 0.15


def test_the_log_and_the_record_are_written(config):
    run(config)
    from pathlib import Path

    folder = Path(config.output)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "learning_rate", "seconds", "tokens_per_second", "padding"} <= set(log[0])
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["density"] == 0.05
    assert record["versions"]["torch"] == torch.__version__
    assert record["selection"]["chosen"] == record["trained"]
    assert record["peak_bytes"] > 0
    assert record["tokens_per_second"] > 0
    assert record["padding"] == 0  # all examples have one length


def test_a_run_of_one_step_takes_it(config):
    record, _ = run(config, steps=1)  # with the default warm-up, whose first step has the rate 0
    assert record["changed"] > 0


def test_accumulation_equals_the_larger_batch(config, tmp_path):
    _, whole = run(config, batch_size=16, steps=4, warmup=0.0)
    # The same four batches of 16, each in two halves: the sampler's order must not differ for this comparison.
    import finepoint.training.trainer as trainer_module

    class InOrder(LengthBuckets):
        def __iter__(self):
            return iter(range(len(self)))

    original = trainer_module.LengthBuckets
    trainer_module.LengthBuckets = InOrder
    try:
        _, whole = run(
            config, batch_size=16, steps=4, output=str(tmp_path / "a"), dtype="float64", rule="magnitude-low"
        )
        _, halves = run(config, batch_size=8, accumulation=2, steps=4, output=str(tmp_path / "b"), dtype="float64",
                        rule="magnitude-low")  # fmt: skip
    finally:
        trainer_module.LengthBuckets = original
    for name, change in whole.changes.items():
        torch.testing.assert_close(change.numbers, halves.changes[name].numbers, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_adapter(config, tmp_path):
    _, a = run(config, dtype="float64")
    _, b = run(config, gradient_checkpointing=True, output=str(tmp_path / "b"), dtype="float64")
    for name, change in a.changes.items():
        torch.testing.assert_close(change.numbers, b.changes[name].numbers, rtol=1e-5, atol=1e-7)


def test_bfloat16_weights_train_with_float32_deltas(config):
    record, adapter = run(config, dtype="bfloat16", store="value")
    assert {change.dtype for change in adapter.changes.values()} == {"bfloat16"}
    assert record["adapter_bytes"] > 6 * record["trained"]
    model = load_model(config.model, "bfloat16")
    before = snapshot(model)
    with adapter.applied(model):
        changed = sum(
            int((value != before[name]).sum()) for name, value in snapshot(model).items() if name != "lm_head.weight"
        )
    assert 0 < changed <= adapter.count
    assert_same_bits(before, snapshot(model))


def test_resume_equals_the_uninterrupted_run_bit_for_bit(config, tmp_path):
    _, whole = run(config, steps=9, save_every=3, output=str(tmp_path / "whole"))

    with interrupted_at(8):
        run(config, steps=9, save_every=3)
    _, resumed = run(config, steps=9, save_every=3, resume=True)
    for name, change in whole.changes.items():
        assert torch.equal(change.indices, resumed.changes[name].indices)
        assert torch.equal(change.numbers, resumed.changes[name].numbers)


def test_a_run_whose_template_writes_the_date_goes_on_on_another_day(config, tmp_path, monkeypatch):
    tokenizer, folder = load_tokenizer(config.model), tmp_path / "dated"
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %m') }}{% endif %}{% for m in messages %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": said}] * 6)
    chat, of_days = Chat((("user", "ab"), ("assistant", "c"))), []
    config = replace(config, model=str(folder), data=data, batch_size=2)
    monkeypatch.setattr(chats.clock, "at", datetime(2030, 1, 2))
    _, whole = run(config, output=str(tmp_path / "whole"), save_every=2)
    with interrupted_at(5):
        run(config, save_every=2)
    for at in (chats.clock.at, datetime(2031, 10, 20)):
        monkeypatch.setattr(chats.clock, "at", at)
        of_days.append(chats.told(tokenizer, chat).text)
    assert [text[:5] for text in of_days] == ["02 01", "20 10"]
    _, resumed = run(config, save_every=2, resume=True)
    assert_same_adapter(whole, resumed)
    assert chats.told(tokenizer, chat).text == of_days[0]


def test_checkpoints_are_sparse(config, tmp_path):
    run(config, steps=4, save_every=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    assert (checkpoint / "deltas.safetensors").is_file()
    assert not list(checkpoint.glob("model*"))
    model_bytes = sum(parameter.numel() * 4 for parameter in tiny_llama().parameters())
    assert (checkpoint / "deltas.safetensors").stat().st_size < model_bytes


def test_a_finished_run_is_not_resumed_unless_it_gets_more_steps(config):
    run(config, steps=4, save_every=2)
    with pytest.raises(FinepointError, match="has done its 4 steps; give more --steps"):
        run(config, steps=4, resume=True)
    record, _ = run(config, steps=6, resume=True)
    assert record["steps"] == 6


def test_resume_without_a_checkpoint_says_so(config):
    with pytest.raises(FinepointError, match="has no checkpoint to go on from; start afresh with --overwrite"):
        run(config, resume=True)


def test_a_selection_can_be_trained_later(config, tmp_path):
    selection = choose(SelectConfig(model=config.model, data=config.data, output=str(tmp_path / "s"), density=0.05))
    record, adapter = run(config, indices=str(tmp_path / "s"))
    assert record["trained"] == selection.count
    assert all(torch.equal(adapter[name], selection[name]) for name in selection)
    untouched = SparseAdapter.load(tmp_path / "s")
    assert all(not change.numbers.any() for change in untouched.changes.values())


def test_exclude_keeps_adapters_apart(config, tmp_path):
    _, a = run(config)
    _, b = run(config, output=str(tmp_path / "b"), exclude=[config.output])
    assert not any(torch.isin(a[name], b[name]).any() for name in set(a) & set(b))


def test_validation_is_evaluated_while_training(config, choice_file, tmp_path):
    record, _ = run(config, validation=choice_file, eval_every=2)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "eval_loss" in row] == [2, 4, 6]
    assert record["validation_loss"] == [row["eval_loss"] for row in log if "eval_loss" in row][-1]


def test_the_validation_loss_is_the_mean_over_labels_whatever_the_batch_size(config, tmp_path):
    texts = ["ab", "abcdefgh hgf", "a b c d e f g h", "ab cd", "hgfedcba", "c:", "de", "defabc def abc def"]
    file = write_lines(tmp_path / "v.jsonl", [{"text": text} for text in [*texts, "x"]])  # the last has no label
    losses = [run(config, validation=file, batch_size=size, rule="random", steps=1, lr=1e-12, warmup=0.0,
                  dtype="float64", output=str(tmp_path / str(size)))[0]["validation_loss"]
              for size in (1, 3, 9)]  # fmt: skip
    model, tokenizer = load_model(config.model, "float64"), load_tokenizer(config.model)
    total, labels = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        labels += ids.shape[1] - 1
    assert losses == [pytest.approx(total / labels, rel=1e-6)] * 3


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_is_never_the_best(config, choice_file, monkeypatch):
    losses = iter([3.0, float("nan"), 1.0])
    monkeypatch.setattr(SparseTrainer, "_validation_sums", lambda self: (next(losses), 1))
    with pytest.raises(FinepointError, match="validation loss became nan after step 4; the adapter of step 4 is in"):
        run(config, validation=choice_file, eval_every=2, keep="best")


def test_epochs_and_default_evaluations(config, choice_file, tmp_path):
    record, _ = run(config, steps=None, epochs=0.5, batch_size=16, accumulation=2, validation=choice_file)
    assert record["steps"] == 256 / 16 / 2 * 0.5
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "eval_loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("form", [Completion, Chat, Text])
def test_every_causal_form_trains(config, tmp_path, form):
    rows = {
        Completion: {"prompt": "ab:", "completion": " cd"},
        Chat: {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        Text: {"text": "hello you"},
    }
    path = write_lines(tmp_path / "f.jsonl", [rows[form]] * 8)
    assert isinstance(read_examples(path)[0], form)
    record, _ = run(config, data=path, steps=10, rule="random", density=0.3)
    assert record["last_loss"] < record["first_loss"]


def test_classification_trains_the_head_whole_and_stores_it(config, tmp_path):
    rows = [{"text": f"{a}{b} is {'good' if a < 'e' else 'bad'}", "label": "pos" if a < "e" else "neg"}
            for a in "abcdefgh" for b in "abcdefgh"]  # fmt: skip
    path = write_lines(tmp_path / "labels.jsonl", rows)
    record, adapter = run(config, data=path, steps=60, density=0.1, lr=2e-2)
    assert adapter.changes["score.weight"].kind == "full"
    assert adapter.changes["score.weight"].shape == (2, 16)
    assert adapter.info["labels"] == ["neg", "pos"]
    from finepoint.evaluation.settings import EvalConfig

    found = evaluate_config(EvalConfig(model=config.model, adapter=[config.output], id=[f"x={path}"]))
    assert found["adapters"][config.output]["id"]["x"]["accuracy"] > 0.9
    assert record["trained"] == adapter.count
    with pytest.raises(FinepointError, match="labelled texts need a classifier"):
        evaluate_config(EvalConfig(model=config.model, id=[f"x={path}"]))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapter(config, monkeypatch):
    from finepoint.training.trainer import SparseTrainer

    compute = SparseTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(SparseTrainer, "compute_loss", poisoned)
    with pytest.raises(FinepointError, match=r"became nan at step 4; the adapter of step 3 is in .*try a smaller --lr"):
        run(config)
    monkeypatch.undo()
    adapter = SparseAdapter.load(config.output)
    assert all(torch.isfinite(change.numbers).all() for change in adapter.changes.values())
    assert any(change.numbers.any() for change in adapter.changes.values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(config, monkeypatch):
    import finepoint.tuner.autograd as trained_module

    monkeypatch.setattr(
        trained_module, "sampled_gradient", lambda dy, x, indices: torch.full((len(indices),), float("inf"))
    )
    with pytest.raises(FinepointError, match="the gradient of .* is not finite at step 1"):
        run(config, no_audit=True)  # which would see it and do without that kernel


def test_a_run_that_changes_nothing_is_an_error(config):
    with pytest.raises(FinepointError, match="training changed none of the .* give a larger --lr than 1e-12"):
        run(config, lr=1e-12, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "give --data"),
        ({"density": 2.0}, "density is 2.0"),
        ({"targets": "nothing_like_it"}, "no weight matches 'nothing_like_it'"),
        ({"rule": "galop"}, "did you mean 'gallop'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"warmup": 2.0}, "warmup is 2.0"),
        ({"scoring_examples": -3}, "scoring_examples is -3"),
        ({"eval_every": 3}, "give --validation"),
        ({"model": "/no/such/folder"}, "there is no folder /no/such/folder"),
        ({"exclude": ["/no/such/adapter"]}, "not an adapter folder"),
    ],
)
def test_bad_configurations_are_refused(config, changes, message):
    with pytest.raises(FinepointError, match=message):
        run(config, **changes)


def test_an_occupied_output_folder_is_refused_before_any_work(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("x")
    with pytest.raises(FinepointError, match="not empty"):
        run(config)
    run(config, overwrite=True)
    assert (tmp_path / "run" / "precious.txt").read_text() == "x"


def test_scoring_rows_are_a_seeded_sample(config):
    place = prepare(config)
    some = scoring_rows(place.rows, 10, 0)
    assert len(some) == 10
    assert some == scoring_rows(place.rows, 10, 0)
    assert some != scoring_rows(place.rows, 10, 1)
    assert len(scoring_rows(place.rows, 0.25, 0)) == len(place.rows) // 4
    assert len(scoring_rows(place.rows, 10**6, 0)) == len(place.rows)


def test_length_buckets_are_a_permutation_in_batches_of_one_length():
    lengths = [(i * 7919) % 50 for i in range(1003)]
    buckets = LengthBuckets(lengths, 8, seed=0)
    order = list(buckets)
    assert sorted(order) == list(range(1003))
    assert order == list(buckets)
    spread = [
        max(lengths[i] for i in order[at : at + 8]) - min(lengths[i] for i in order[at : at + 8])
        for at in range(0, 1000, 8)
    ]
    assert sum(spread) / len(spread) < 5
    buckets.set_epoch(1)
    assert list(buckets) != order


def test_a_base_model_and_its_tokenizer_load_without_noise(model_folder, capfd):
    load_model(str(model_folder))
    load_tokenizer(str(model_folder))
    assert capfd.readouterr() == ("", "")


def rounded_place(config):
    """A context whose base lies on bfloat16's grid, as that of a bfloat16 checkpoint does."""
    place = prepare(config)
    for parameter in place.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return place


@pytest.mark.parametrize("method", [{"lr": 1e-2}, {"baseline": "full", "rule": "random", "density": None, "lr": 1e-3}])
def test_rounding_after_each_step_keeps_nothing_wider(config, method):
    """The control to float32 deltas: what is trained lies on bfloat16's grid after every step."""
    config = replace(config, **method)
    place = rounded_place(config)
    before = {name: parameter.detach().clone() for name, parameter in place.model.named_parameters()}
    wide = train(config, place)
    record = train(replace(config, round_to="bfloat16", overwrite=True), place)
    assert record["changed"] > 0
    assert record["update_norm"] != wide["update_norm"]
    with SparseAdapter.load(config.output).applied(place.model):
        for name, parameter in place.model.named_parameters():
            assert torch.equal(parameter, parameter.bfloat16().float()), name
    assert_same_bits(before, dict(place.model.named_parameters()))


def test_rounding_loses_steps_that_deltas_keep(config):
    small = replace(config, lr=1e-5, rule="magnitude-high", overwrite=True)
    place = rounded_place(small)
    assert train(small, place)["changed"] > 0
    with pytest.raises(FinepointError, match="lost to rounding"):
        train(replace(small, round_to="bfloat16"), place)
    with pytest.raises(FinepointError, match="trained in place"):
        train(replace(config, rule="random", density=None, baseline="lora", round_to="bfloat16", overwrite=True))


def test_from_run_train_to_the_formula_are_four_files_and_eight_calls(model_folder, choice_file, tmp_path):
    """The way that a reader takes from `run_train` of cli/runs.py on, as docs/design.md says; the console script adds
    cli/__init__.py."""
    from finepoint.tuner import autograd, tuner

    met = []

    def attach(*given):
        frame = sys._getframe(1)
        while frame:
            met.append((frame.f_code.co_filename, frame.f_code.co_qualname))
            frame = frame.f_back
        return autograd.attach(*given)

    words = ["train", "--model", str(model_folder), "--data", choice_file, "--output", str(tmp_path / "run"),
             "--rule", "magnitude-low", "--density", "0.05", "--steps", "1", "--no-audit"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "attach", attach)
        assert main(words) == 0
    ours = [(Path(file), name) for file, name in met if f"{os.sep}finepoint{os.sep}" in file and "<" not in name]
    ours = list(dict.fromkeys(ours))[: [name for _, name in dict.fromkeys(ours)].index("train") + 1]
    hooks = [(Path(autograd.__file__), name) for name in ("attach", "_Output.of_linear", "_SampledLinear.backward")]
    assert [name for _, name in ours] == ["SparseTuner.__init__", "_method", "begun", "_fit", "train"]
    assert len(ours) + len(hooks) == 8
    assert len({file for file, _ in ours + hooks}) + 1 == 4  # and the command's own


def test_with_an_average_the_adapter_is_the_mean_of_all_steps(config, tmp_path):
    """Each run of fewer steps stands where the longer one stood; a step counts 0.7 times as much as the next."""
    config = replace(config, schedule="constant", warmup=0.0, dtype="float32", rule="random")
    states = [run(config, steps=step, output=str(tmp_path / f"{step}"))[1] for step in (1, 2, 3, 4)]
    record, averaged = run(config, steps=4, ema=0.7, validation=config.data, validation_limit=8)
    weights = torch.tensor([0.7**3, 0.7**2, 0.7, 1.0], dtype=torch.float64)
    for name, change in averaged.changes.items():
        told = torch.stack([state.changes[name].numbers.double() for state in states])
        expected = (told * (weights / weights.sum())[:, None]).sum(0)
        torch.testing.assert_close(change.numbers.double(), expected, rtol=1e-5, atol=1e-8)
        assert (change.numbers - states[-1].changes[name].numbers).abs().max() > 1e-4
    assert averaged.info["ema"] == 0.7
    assert record["update_norm"] == pytest.approx(
        sum(float(change.numbers.double().square().sum()) for change in averaged.changes.values()) ** 0.5
    )
    place = prepare(config)
    rows = rows_of(config, place, config.data, "example", 8)
    with averaged.applied(place.model), torch.no_grad():
        loss = completion_loss(place.model, place.collator(rows))
    assert record["validation_loss"] == pytest.approx(float(loss), rel=1e-5)  # of what is left, not of the last step


@pytest.mark.parametrize("changes", [{}, {"keep": "best"}, {"baseline": "lora", "density": None, "rule": "random"}],
                         ids=str)  # fmt: skip
def test_an_average_goes_on_where_it_stopped(config, tmp_path, changes):
    config = replace(config, ema=0.9, save_every=2, validation=config.data, validation_limit=8, eval_every=2, **changes)
    train(replace(config, output=str(tmp_path / "whole")))
    with interrupted_at(6):
        train(config)
    train(replace(config, resume=True))
    assert_same_tensors(config.output, tmp_path / "whole")
    with pytest.raises(FinepointError, match="was trained with ema 0.9"):
        train(replace(config, resume=True, ema=0.8, steps=9))
    with pytest.raises(FinepointError, match="a budget is kept by what is trained"):
        train(replace(config, baseline=None, density=0.1, protect=config.data, disturb_at_most=0.1, resume=True))
    with pytest.raises(FinepointError, match="leave out --ema or --refresh"):
        train(replace(config, refresh="every:2", baseline=None, density=0.1, overwrite=True, baseline_options={}))
