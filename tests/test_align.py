"""`finepoint align`: DPO and GRPO on chosen entries and on low-rank factors, measured before and after."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

import finepoint
from conftest import assert_same_bits, make_tokenizer, random_batches, snapshot, write_lines
from finepoint.alignment.align import Steps, align
from finepoint.alignment.methods import DPO, exact, line, number
from finepoint.alignment.settings import AlignConfig
from finepoint.baselines.peft import PeftTuner
from finepoint.cli import main
from finepoint.data.examples import Completion, read_pairs
from finepoint.data.tokens import encode_preferences
from finepoint.errors import FinepointError
from finepoint.huggingface.reference import Reference
from finepoint.models.loading import load_model, load_tokenizer
from finepoint.training.callbacks import read_log
from finepoint.training.writing import Written

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
PAIRS = [{"prompt": f"a{c}:", "chosen": " yes", "rejected": " no"} for c in "abcdefgh"]
SUMS = [{"prompt": f"{c}:", "completion": f" {i}"} for i, c in enumerate("abcdefgh")]


def test_openais_pairs_are_pairs_of_conversations(tmp_path):
    turns, told = [{"role": "user", "content": "a"}], ("yes", "no")
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in told)
    theirs = {"input": {"messages": turns}, "preferred_output": chosen, "non_preferred_output": rejected}
    ours = {"prompt": turns, "chosen": chosen, "rejected": rejected}
    found = read_pairs(write_lines(tmp_path / "theirs.jsonl", [theirs]))
    assert found == read_pairs(write_lines(tmp_path / "ours.jsonl", [ours]))


@pytest.fixture
def pairs(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def sums(tmp_path):
    return write_lines(tmp_path / "sums.jsonl", SUMS)


def first_letter(answer, reference):
    """A reward that a tiny model can find: words with many an `a`."""
    return float(answer.count("a"))


def settings(model_folder, tmp_path, method, data, **more):
    given = {"model": str(model_folder), "output": str(tmp_path / "out"), "method": method, "data": data, "steps": 6,
             "batch_size": 8, "lr": 3e-2, "schedule": "constant", "new_tokens": 6}  # fmt: skip
    given |= {} if more.get("baseline") else {"density": 0.1}
    return AlignConfig(**given | more)


@pytest.mark.parametrize("arm", [{"rule": "gallop"}, {"rule": "random"}, {"baseline": "lora"}])
def test_dpo_makes_chosen_answers_likelier(arm, model_folder, tmp_path, pairs):
    record = align(settings(model_folder, tmp_path, "dpo", pairs, **arm))
    assert record["after"]["margin"] > record["before"]["margin"] + 1
    assert record["after"]["reward_accuracy"] == 1.0
    assert record["after"]["margin_gain"] == pytest.approx(record["after"]["margin"] - record["before"]["margin"])
    assert [row["step"] for row in record["log"]] == list(range(1, 7))
    assert record["log"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the reference is the policy, at first
    assert record["log"][-1]["rewards/margins"] > 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["after"] == record["after"]
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "out" / "checkpoints").exists() or not any((tmp_path / "out" / "checkpoints").iterdir())


@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize("warmup", [0.1, 1.0])
def test_a_run_of_one_step_takes_it(method, warmup, model_folder, tmp_path, pairs, sums):
    data, reward = (pairs, "number") if method == "dpo" else (sums, f"{__name__}:first_letter")
    given = settings(model_folder, tmp_path, method, data, steps=1, warmup=warmup, schedule="linear", reward=reward)
    record = align(replace(given, rule="random"))
    assert record["changed"] > 0
    with pytest.raises(FinepointError, match="warmup is 1.5"):
        align(replace(given, warmup=1.5, overwrite=True))


def test_the_adapter_is_what_was_measured(model_folder, tmp_path, pairs, tokenizer):

    config = settings(model_folder, tmp_path, "dpo", pairs, rule="random")
    record = align(config)
    model = load_model(str(model_folder))
    base = snapshot(model)
    adapter = finepoint.SparseAdapter.load(str(tmp_path / "out"))
    with adapter.applied(model):
        found = DPO(config).measure(model, tokenizer, read_pairs(pairs)).means
    assert found["margin"] == pytest.approx(record["after"]["margin"], rel=1e-5)
    assert_same_bits(base, snapshot(model))
    assert adapter.info["method"] == "dpo"
    assert adapter.count == record["trained"]
    results = adapter.info["results"]["pairs"]
    assert results["margin"] == record["after"]["margin"]


def test_the_reference_of_low_rank_factors_is_the_base(llama):
    batch = random_batches(1)[0]
    expected = llama(**batch).logits
    tuner = PeftTuner(llama, ["model.layers.0.self_attn.q_proj"], rank=2, alpha=4)
    ref = Reference(llama, tuner.disabled)
    with torch.no_grad():
        for parameter in tuner.trained().values():
            parameter.add_(0.3)
    assert torch.equal(ref(**batch).logits, expected)
    assert not torch.equal(llama(**batch).logits, expected)  # negative control
    assert all(parameter.requires_grad for parameter in tuner.trained().values())
    tuner.close()


@pytest.mark.parametrize("arm", [{"rule": "random"}, {"rule": "gallop", "beta": 0.05}, {"baseline": "lora"}])
def test_grpo_raises_the_reward(arm, model_folder, tmp_path, sums):
    config = settings(model_folder, tmp_path, "grpo", sums, reward="test_align:first_letter", steps=30, lr=5e-2, **arm)
    record = align(replace(config, density=None if arm.get("baseline") else 0.3))
    rewards = [row["reward"] for row in record["log"]]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
    assert record["changed"] > 0
    assert record["beta"] == arm.get("beta", 0.0)
    assert ("kl" in record["log"][-1]) == bool(record["beta"])


def test_the_same_settings_give_the_same_adapter(model_folder, tmp_path, sums):
    found = []
    for name in ("a", "b"):
        config = settings(
            model_folder, tmp_path, "grpo", sums, reward="test_align:first_letter", rule="random", steps=3
        )
        align(replace(config, output=str(tmp_path / name)))
        adapter = finepoint.SparseAdapter.load(str(tmp_path / name))
        found.append(torch.cat([change.numbers for change in adapter.changes.values()]))
    assert torch.equal(*found)
    assert found[0].any()


class Killed(BaseException):
    """What a test ends a run by, as a signal would."""


def test_answers_are_sampled_without_the_settings_of_the_checkpoint(model_folder, tmp_path, sums):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    leaking = {"suppress_tokens": list(range(3, 40)), "no_repeat_ngram_size": 1, "repetition_penalty": 9.0}
    (other / "generation_config.json").write_text(json.dumps(leaking))
    found = []
    for folder in (model_folder, other):
        output = tmp_path / folder.name / "run"
        config = settings(folder, tmp_path, "grpo", sums, reward="test_align:first_letter", rule="random", steps=3)
        align(replace(config, output=str(output)))
        found.append(finepoint.SparseAdapter.load(str(output)))
    assert found[0].changes.keys() == found[1].changes.keys()
    assert all(found[0].changes[name].equals(found[1].changes[name]) for name in found[0])


@pytest.mark.parametrize("arm", [{"method": "dpo"}, {"method": "grpo"}, {"method": "dpo", "baseline": "lora"}])
def test_a_resumed_run_is_the_uninterrupted_one(arm, model_folder, tmp_path, pairs, sums, monkeypatch):
    data = pairs if arm["method"] == "dpo" else sums
    config = settings(model_folder, tmp_path, data=data, reward="test_align:first_letter", save_every=2, **arm)
    whole = align(replace(config, output=str(tmp_path / "whole")))

    monkeypatch.setattr(Steps, "on_step_end", killed_after(5))
    with pytest.raises(Killed):
        align(config)
    monkeypatch.undo()
    assert len(read_log(tmp_path / "out" / "log.jsonl")) in (4, 5)  # step 5, if it is there, will be done again
    resumed = align(replace(config, resume=True))
    assert [steady(row) for row in resumed["log"]] == [steady(row) for row in whole["log"]]
    assert resumed["after"] == whole["after"]
    name = "adapter_model.safetensors" if "baseline" in arm else "finepoint.safetensors"
    assert_same_tensors(tmp_path / "out" / name, tmp_path / "whole" / name)
    held = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-6" / "deltas.safetensors")
    assert sum(tensor.numel() for tensor in held.values()) == whole["trained"]
    assert not list((tmp_path / "out" / "checkpoints").rglob("model*.safetensors"))
    with pytest.raises(FinepointError, match="has done its 6 steps"):
        align(replace(config, resume=True))


def steady(row):
    """A row of the log without times, and without TRL's count of the tokens since its process began."""
    return {key: value for key, value in row.items() if "time" not in key and key != "num_tokens"}


def killed_after(steps):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == steps:
            raise Killed

    return on_step_end


def assert_same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [(" 125", " 125", (1, 1, 1)), (" 125\nQuestion: 3", " 125", (1, 1, 0)), ("1,250 apples", "1250", (1, 0, 0)),
     ("It is -3.0.", "-3", (1, 0, 0)), ("124", "125", (0, 0, 0)), ("", "125", (0, 0, 0)), ("12", "125", (0, 0, 0))],
)  # fmt: skip
def test_rewards(answer, reference, expected):
    assert (number(answer, reference), line(answer, reference), exact(answer, reference)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "dpo"], "give --data"),
        (["--method", "dpo", "--data", "SUMS"], "line 1: the keys"),
        (["--method", "grpo", "--data", "PAIRS"], "expected"),
        (["--method", "grpo", "--data", "SUMS", "--batch-size", "6"], "a multiple of the 8 generations"),
        (["--method", "grpo", "--data", "SUMS", "--reward", "nmber"], "known rewards: number, line, exact"),
        (["--method", "grpo", "--data", "SUMS", "--reward", "no.such:thing"], "cannot import reward"),
        (["--method", "grpo", "--data", "SUMS", "--generations", "1"], "at least 2"),
        (["--method", "dpo", "--data", "PAIRS", "--baseline-options", "rank=1"], "without a baseline"),
        (["--method", "ppo", "--data", "PAIRS"], "ppo"),
        (["--method", "dpo", "--data", "PAIRS", "--protect-by", "kl"], "give --protect FILE"),
        (
            ["--method", "dpo", "--data", "PAIRS", "--protect", "SUMS", "--baseline", "lora"],
            "--protect-by kl or replay",
        ),
        (["--method", "dpo", "--data", "PAIRS", "--baseline", "lora", "--density", "0.1"], "leave out --density"),
        (["--method", "dpo", "--data", "PAIRS", "--patience", "2"], "--patience"),
    ],
)
def test_mistakes_are_one_line(flags, message, model_folder, tmp_path, pairs, sums, capsys):
    flags = [{"SUMS": sums, "PAIRS": pairs}.get(flag, flag) for flag in flags]
    assert main(["align", "--model", str(model_folder), "--output", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("finepoint align: ")


def test_on_the_command_line(model_folder, tmp_path, pairs, capsys):
    command = ["align", "--model", str(model_folder), "--output", str(tmp_path / "out"), "--method", "dpo", "--data",
               pairs, "--steps", "2", "--density", "0.1", "--rule", "random", "--batch-size", "4"]  # fmt: skip
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["steps"] == 2
    assert main([*command, "--overwrite"]) == 0
    assert "margin" in capsys.readouterr().out


def test_without_trl_the_way_out_is_told(model_folder, tmp_path, pairs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(FinepointError, match=r"finepoint\[trl\]"):
        align(settings(model_folder, tmp_path, "dpo", pairs))


def test_a_launcher_is_refused(model_folder, tmp_path, pairs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FinepointError, match="alignment runs in one process"):
        align(settings(model_folder, tmp_path, "dpo", pairs))


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_its_steps_are_looked_at_and_followed_like_those_of_train(method, model_folder, tmp_path, pairs, sums):
    """A tracker follows; a weight that the loop uses behind the model's back is found; what is learned is measured."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from finepoint.tuner.spot_checks import SpotChecks

    data = pairs if method == "dpo" else sums
    config = settings(model_folder, tmp_path, method, data, reward="test_align:first_letter", steps=4)
    with pytest.MonkeyPatch.context() as patch:
        looked, begin = [], SpotChecks._begin
        patch.setattr(SpotChecks, "_begin", lambda *args: looked.append(1) or begin(*args))
        record = align(replace(config, report_to=["tensorboard"]))
    assert looked
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    unseen = align(replace(config, no_audit=True, overwrite=True))
    assert [steady(row) for row in unseen["log"]] == [steady(row) for row in record["log"]]  # and change nothing


def drift(base, adapter, tokenizer):
    """KL(base || model) over the texts of SUMS; of low-rank factors none is asked."""
    if not (adapter / "finepoint.safetensors").is_file():
        return None
    model, adapter = load_model(str(base)), finepoint.SparseAdapter.load(str(adapter))
    total = 0.0
    with torch.no_grad():
        for row in SUMS[:4]:
            ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]])
            before = model(input_ids=ids).logits.log_softmax(-1)
            with adapter.applied(model):
                after = model(input_ids=ids).logits.log_softmax(-1)
            total += float((before.exp() * (before - after)).sum(-1).mean())
    return total


@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize("by", [{}, {"protect_by": "kl"}, {"protect_by": "kl", "baseline": "lora"}])
def test_what_is_to_be_kept_holds_it_back(method, by, model_folder, tmp_path, pairs, sums, tokenizer):
    data = pairs if method == "dpo" else sums
    config = settings(model_folder, tmp_path, method, data, reward="test_align:first_letter", steps=8, lr=5e-3,
                      overwrite=True, baseline=by.get("baseline"))  # fmt: skip
    free = align(config)
    far = drift(model_folder, tmp_path / "out", tokenizer)
    config = replace(config, protect=sums, protect_examples=4, **by)
    idle = align(replace(config, protect_strength=0.0))
    assert (idle["update_norm"], idle["after"]) == (free["update_norm"], free["after"])
    held = align(replace(config, protect_strength=1e4))
    assert held["update_norm"] != free["update_norm"]
    if "baseline" not in by:
        assert drift(model_folder, tmp_path / "out", tokenizer) < 0.2 * far
        info = finepoint.SparseAdapter.load(str(tmp_path / "out")).info
        assert (info["protect_by"], info["protect_strength"]) == (by.get("protect_by", "anchor"), 1e4)


def test_a_loss_that_is_no_number_leaves_the_last_good_step(model_folder, tmp_path, pairs, monkeypatch):
    from trl import DPOTrainer

    step, done = DPOTrainer.training_step, []

    def poisoned(self, *args, **kwargs):
        done.append(1)
        loss = step(self, *args, **kwargs)
        if len(done) == 3:
            next(iter(self.method.tuner.trained().values())).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(DPOTrainer, "training_step", poisoned)
    with pytest.raises(FinepointError, match=r"is not finite at step 3; the adapter of step 2 is in .*; try a smaller"):
        align(settings(model_folder, tmp_path, "dpo", pairs))
    assert finepoint.SparseAdapter.load(str(tmp_path / "out")).info["unfinished"] == "step 2 of 6"


def saved_with(folder, place, tokenizer):
    """A model folder with another tokenizer."""
    shutil.copytree(folder, place)
    tokenizer.save_pretrained(place)
    return place


def test_a_tokenizer_without_end_is_one_line(model_folder, tmp_path, pairs, sums):
    endless = make_tokenizer()
    endless.eos_token = None
    place = saved_with(model_folder, tmp_path / "endless", endless)
    for method, data in (("dpo", pairs), ("grpo", sums)):
        with pytest.raises(FinepointError, match="has no end token, .* set tokenizer.eos_token"):
            align(settings(place, tmp_path, method, data))


def test_a_tokenizer_that_ends_every_text_learns_and_is_asked_the_same(model_folder, tmp_path, pairs, sums):
    ending = make_tokenizer()
    ending.chat_template = "{{ raise_exception('not for chats') }}"
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    place = saved_with(model_folder, tmp_path / "ending", ending)
    assert load_tokenizer(str(place))("a")["input_ids"][-1] == 2
    for method, data in (("dpo", pairs), ("grpo", sums)):
        more = {"reward": "test_align:first_letter", "steps": 2, "rule": "random", "overwrite": True}
        found = [align(settings(folder, tmp_path, method, data, **more)) for folder in (model_folder, place)]
        assert found[0]["after"] == found[1]["after"]
        assert steady(found[0]["log"][-1]) == steady(found[1]["log"][-1])


def test_rewards_see_a_reference_without_its_end(model_folder, tmp_path, tokenizer, monkeypatch):
    from finepoint.alignment import methods

    monkeypatch.setattr(
        methods, "written", lambda model, tokenizer, prompts, *_, **__: [Written(" 3", False) for _ in prompts]
    )
    config = settings(model_folder, tmp_path, "grpo", "", reward="exact")
    rows = [Completion("a:", " 3</s>"), Completion("<s>b:", " 4</s>")]
    assert methods.GRPO(config).measure(load_model(str(model_folder)), tokenizer, rows).rows == [1.0, 0.0]


def test_pairs_of_conversations_are_learned_behind_the_chat_template(model_folder, tmp_path, tokenizer):
    def turn(role, content):
        return {"role": role, "content": content}

    rows = [{"prompt": [turn("user", f"a{c}")], "chosen": [turn("assistant", "yes")], "rejected": "no", "score": 1}
            for c in "abcdefgh"]  # fmt: skip
    data = write_lines(tmp_path / "chats.jsonl", rows)
    prompt, chosen, rejected = encode_preferences(tokenizer, read_pairs(data))[0]
    assert tokenizer.decode(prompt) == "user: aa\nassistant: "
    assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == ("yes\n", "no\n")
    model = load_model(str(model_folder))
    margins = DPO(settings(model_folder, tmp_path, "dpo", data)).measure(model, tokenizer, read_pairs(data)).rows
    with torch.no_grad():
        found = [model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
                 .gather(1, torch.tensor([answer]).T).sum().item() for answer in (chosen, rejected)]  # fmt: skip
    assert margins[0] == pytest.approx(found[0] - found[1], abs=1e-4)
    record = align(settings(model_folder, tmp_path, "dpo", data, rule="gallop"))
    assert record["after"]["margin"] > record["before"]["margin"] + 1
