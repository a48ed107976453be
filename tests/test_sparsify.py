"""Two lines: sparsify, save, load, the hub; what a user of LoRA would change."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import finepoint
from conftest import assert_same_bits, make_tokenizer, random_batches, snapshot, tiny_llama, write_lines
from finepoint.cli import main
from finepoint.data.tokens import Row
from finepoint.errors import FinepointError
from finepoint.huggingface.scoring_data import token_row
from standin_hub import hub

ROWS = [{"prompt": f"a{c}:", "completion": " yes" if c > "d" else " no"} for c in "abcdefgh"]


def move_(model, steps=3, lr=1e-2):
    """Trains a model in training as any loop would."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in random_batches(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same_selection(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].indices, b[name].indices) for name in a)


def test_it_is_the_same_model_and_the_entries_are_those_of_select(llama, tmp_path, tokenizer):
    batches = random_batches()
    expected = finepoint.select(copy.deepcopy(llama), batches, rule="gallop", density=0.02)
    assert finepoint.sparsify(llama, rule="gallop", density=0.02, data=batches) is llama
    entries = finepoint.tuner_of(llama).entries
    assert {name: e.indices.tolist() for name, e in entries.items()} == {n: i.tolist() for n, i in expected.items()}
    trainable = sum(p.numel() for p in llama.parameters() if p.requires_grad)
    assert trainable == expected.count


def test_a_file_rows_and_tokens_of_the_same_examples_choose_the_same_entries(tmp_path, tokenizer):
    from finepoint.data.batches import encode_all
    from finepoint.data.examples import as_examples

    file = write_lines(tmp_path / "rows.jsonl", ROWS)
    tokens = encode_all(tokenizer, as_examples(ROWS), 64)
    ready = [{"input_ids": row.ids, "labels": row.labels} for row in tokens]
    found = []
    for data in (file, Path(file), ROWS, as_examples(ROWS), iter(ROWS), ready):
        model = finepoint.sparsify(tiny_llama(), "saft", 0.02, data=data, tokenizer=tokenizer, seed=3)
        found.append(finepoint.tuner_of(model).entries)
    assert all(same_selection(found[0], other) for other in found[1:])
    without = finepoint.sparsify(tiny_llama(), "saft", 0.02, data=ready, seed=3)
    assert same_selection(found[0], finepoint.tuner_of(without).entries)
    other = finepoint.sparsify(tiny_llama(), "saft", 0.02, data=ROWS[:2], tokenizer=tokenizer)
    assert not same_selection(found[0], finepoint.tuner_of(other).entries)  # negative control: data matter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "gallop"}, "scores by examples and needs some; give data="),
        ({"rule": "gallop", "data": ROWS}, "give tokenizer="),
        ({"rule": "gallop", "data": []}, "nothing to score on"),
        ({"rule": "gallop", "data": [{"x": 1}], "tokenizer": make_tokenizer()}, "data, row 0: .* expected"),
        ({"rule": "gallop", "data": [ROWS[0], {"text": "a"}], "tokenizer": make_tokenizer()}, "row 1: a text example"),
        ({"rule": "galop"}, "did you mean 'gallop'"),
        ({"within": 0.1}, "within is 0.1; it is columns:SHARE"),
        ({"density": "0.01"}, "density is '0.01'; it is a share of the target entries"),
        ({"indices": {}, "density": 0.01}, "indices are trained as they are; leave out density, or indices"),
        ({"indices": {}, "structure": "column"}, "indices are trained as they are; leave out structure, or indices"),
        ({"indices": "nowhere"}, "nowhere is not an adapter folder"),
    ],
)
def test_mistakes_are_told(llama, arguments, message):
    before = snapshot(llama)
    with pytest.raises(FinepointError, match=message):
        finepoint.sparsify(llama, **arguments)
    assert_same_bits(before, snapshot(llama))
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_the_entries_of_a_folder_are_trained(tmp_path):
    chosen = finepoint.sparsify(tiny_llama(), density=0.02, seed=3)
    chosen.save_pretrained(tmp_path)
    for given in (str(tmp_path), tmp_path, finepoint.SparseAdapter.load(tmp_path)):
        again = finepoint.sparsify(tiny_llama(), indices=given)
        assert same_selection(*(finepoint.tuner_of(model).entries for model in (chosen, again)))


def test_the_report_counts_what_is_trained(llama, capsys):
    total = sum(parameter.numel() for parameter in llama.parameters())
    finepoint.sparsify(llama, "random", count=50)
    llama.print_trainable_parameters()
    expected = f"trainable params: 50 || all params: {total:,} || trainable%: {100 * 50 / total:.4f}"
    assert capsys.readouterr().out == expected + "\n"
    assert finepoint.trainable_parameters(llama) == expected
    with pytest.raises(FinepointError, match="already"):
        finepoint.sparsify(llama, "random")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_loaded_it_is_bit_for_bit_what_was_trained(dtype, tmp_path):
    model = finepoint.sparsify(tiny_llama(dtype), "random", 0.05, targets="all")
    move_(model)
    finepoint.save(model, tmp_path / "a", results={"movies": {"accuracy": 0.5}})
    trained = snapshot(finepoint.unload(model))
    fresh = tiny_llama(dtype)
    base = snapshot(fresh)
    assert finepoint.load(fresh, tmp_path / "a") is fresh
    assert_same_bits(trained, snapshot(fresh))
    finepoint.save(fresh, tmp_path / "again")  # of a model that only has the adapter applied
    for name in ("finepoint.safetensors", "finepoint_config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert any(not torch.equal(base[name], trained[name]) for name in base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_from_a_loaded_adapter(dtype, tmp_path):
    model = finepoint.sparsify(tiny_llama(dtype), "random", 0.05, targets="all")
    move_(model)
    finepoint.save(model, tmp_path / "a")
    trained = {name: value.clone() for name, value in snapshot(model).items() if "finepoint" not in name}
    again = finepoint.load(tiny_llama(dtype), tmp_path / "a", trainable=True)
    state = snapshot(again)
    assert_same_bits(trained, {name: state[name] for name in trained})
    assert finepoint.tuner_of(again).count == finepoint.tuner_of(model).count
    if dtype == torch.float32:  # in half precision the wider deltas are not stored
        for mine, theirs in zip(
            finepoint.tuner_of(model).parameters(), finepoint.tuner_of(again).parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)
    move_(again)
    assert any(not torch.equal(trained[name], value) for name, value in snapshot(again).items() if name in trained)
    assert_same_bits(snapshot(tiny_llama(dtype)), snapshot(finepoint.unload(again, revert=True)))


def test_an_adapter_of_another_base_is_refused_and_the_model_left_alone(tmp_path):
    model = finepoint.sparsify(tiny_llama(), "random", 0.05)
    move_(model)
    finepoint.save(model, tmp_path / "a")
    other = tiny_llama(seed=1)
    before = snapshot(other)
    for trainable in (False, True):
        with pytest.raises(FinepointError, match="not those of the base"):
            finepoint.load(other, tmp_path / "a", trainable=trainable)
    assert_same_bits(before, snapshot(other))
    with pytest.raises(FinepointError, match="no one change to save"):
        finepoint.save(other, tmp_path / "b")
    with pytest.raises(FinepointError, match="not empty"):
        finepoint.save(model, tmp_path / "a")


def test_unload_leaves_nothing_behind(llama, tmp_path):
    keys, flags = set(vars(llama)), [p.requires_grad for p in llama.parameters()]
    finepoint.sparsify(llama, "random", 0.05)
    move_(llama)
    finepoint.unload(llama)
    assert set(vars(llama)) == keys
    assert [p.requires_grad for p in llama.parameters()] == flags
    assert not llama._load_state_dict_post_hooks
    llama.save_pretrained(tmp_path)
    assert_same_bits(snapshot(llama), snapshot(AutoModelForCausalLM.from_pretrained(tmp_path)))
    with pytest.raises(FinepointError, match="not in training"):
        finepoint.unload(llama)


def test_a_deep_copy_has_its_own_session(llama, tmp_path):
    finepoint.sparsify(llama, "random", 0.05)
    twin = copy.deepcopy(llama)
    move_(twin)
    twin.save_pretrained(tmp_path / "twin")
    adapter = finepoint.SparseAdapter.load(tmp_path / "twin")
    assert any(change.numbers.any() for change in adapter.changes.values())
    assert_same_bits(snapshot(tiny_llama()), snapshot(finepoint.unload(llama)))


def test_the_head_of_a_classifier_is_trained_and_stored_whole(tmp_path, tokenizer):
    from transformers import LlamaForSequenceClassification

    def make():
        torch.manual_seed(0)
        config = tiny_llama().config
        config.num_labels, config.id2label, config.label2id = 2, {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
        return LlamaForSequenceClassification(config)

    rows = [{"text": "abc", "label": "good"}, {"text": "bcd", "label": "bad"}]
    model = finepoint.sparsify(make(), "gallop", 0.01, data=rows, tokenizer=tokenizer, whole=["score.weight"])
    ids = torch.tensor([[5, 6, 7], [7, 8, 9]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    finepoint.save(model, tmp_path / "a")
    assert finepoint.SparseAdapter.load(tmp_path / "a").changes["score.weight"].kind == "full"
    trained = snapshot(finepoint.unload(model))
    assert_same_bits(trained, snapshot(finepoint.load(make(), tmp_path / "a")))


def test_the_model_card(tmp_path):
    from huggingface_hub import ModelCard

    model = tiny_llama()
    model.config._name_or_path = "some-org/base-model"
    finepoint.sparsify(model, "random", 0.05)
    move_(model)
    finepoint.save(model, tmp_path / "a", results={"movies": {"accuracy": 0.75}})
    card = ModelCard.load(tmp_path / "a" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "some-org/base-model"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "finepoint"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("movies", "accuracy", 0.75)
    assert "| rule | random |" in card.text
    assert "| movies | accuracy | 0.75 |" in card.text


def test_a_card_does_not_tell_where_things_lay(tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "/home/somebody/models/tiny"
    (tmp_path / "private").mkdir()
    file = write_lines(tmp_path / "private" / "rows.jsonl", ROWS)
    finepoint.sparsify(model, "random", 0.05, data=file)
    finepoint.save(model, tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in header
    assert "tiny" in text
    assert "somebody" not in text
    assert "private" not in text
    assert "| data | rows.jsonl |" in text


SENDER = """
import finepoint, torch, json, sys
sys.path.insert(0, sys.argv[1])
from conftest import tiny_llama
from test_sparsify import move_
model = finepoint.sparsify(tiny_llama(), "random", 0.05)
move_(model)
address = finepoint.push_to_hub(model, "me/tuned", results={"movies": {"accuracy": 0.75}}, base_model="org/base")
finepoint.save(model, sys.argv[2])
finepoint.push_to_hub(sys.argv[2], "me/folder")
fresh = finepoint.load(tiny_llama(), "me/tuned")
trained = finepoint.unload(model)
same = all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), fresh.state_dict().values()))
again = finepoint.SparseAdapter.load("me/folder")
try:
    finepoint.load(tiny_llama(), "me/nothing")
except finepoint.FinepointError as error:
    message = str(error)
from finepoint.cli import main
news = {"nll": 2.5, "kl": 0.01, "tokens": 9}
scores = {"id": {"movies": {"accuracy": 0.75, "n": 4}}, "ood": {}, "probe": {"news": news}}
json.dump({"base": {}, "adapters": {sys.argv[2]: scores}}, open("eval.json", "w"))
push = ["push", sys.argv[2], "--to", "me/command", "--results", "eval.json", "--license", "apache-2.0"]
assert main(push) == 0
assert main(["pull", "me/command", "--output", "back"]) == 0
print(json.dumps({"same": same, "address": address, "count": again.count, "message": message}))
"""


def test_to_a_hub_and_back(tmp_path):
    with hub() as (address, files):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test",
                                    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
        code = [sys.executable, "-c", SENDER, str(Path(__file__).parent), str(tmp_path / "a")]
        done = subprocess.run(code, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"]
    assert "me/tuned" in found["address"]
    assert "there is no folder me/nothing, and it cannot be fetched from the hub" in found["message"]
    assert set(files) == {"me/tuned", "me/folder", "me/command"}
    for repository in files.values():  # what was uploaded, and nothing else
        assert set(repository) - {".gitattributes"} == {"finepoint.safetensors", "finepoint_config.json", "README.md"}
    header = yaml.safe_load(files["me/tuned"]["README.md"].decode().split("---")[1])
    assert header["base_model"] == "org/base"
    assert header["base_model_relation"] == "adapter"
    assert files["me/folder"]["finepoint.safetensors"] == (tmp_path / "a" / "finepoint.safetensors").read_bytes()
    header = yaml.safe_load(files["me/command"]["README.md"].decode().split("---")[1])
    assert header["license"] == "apache-2.0"
    results = {(each["dataset"]["name"], metric["type"]): metric["value"]
               for each in header["model-index"][0]["results"] for metric in each["metrics"]}  # fmt: skip
    assert results == {("movies", "accuracy"): 0.75, ("news", "nll"): 2.5, ("news", "kl"): 0.01}
    for name, data in files["me/command"].items():
        assert (tmp_path / "back" / name).read_bytes() == data


def test_what_cannot_be_sent_or_fetched_is_one_line(tmp_path, capsys):
    model = finepoint.sparsify(tiny_llama(), "random", 0.05)
    move_(model)
    finepoint.save(model, tmp_path / "a")
    (tmp_path / "other.json").write_text(json.dumps({"base": {}, "adapters": {"b": {}}}))
    for command, message in (
        (["push", str(tmp_path / "a"), "--to", "nowhere"], "'nowhere' is no repository of the hub"),
        (["push", str(tmp_path / "a"), "--to", "me/it", "--results", str(tmp_path / "other.json")], "has no scores of"),
        (["push", str(tmp_path / "none"), "--to", "me/it"], "none"),
        (["pull", "nowhere", "--output", str(tmp_path / "x")], "'nowhere' is no repository of the hub"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def padded(rows, width, left=False):
    """Tokenised rows as a tokenizer pads them, with the mask that says so."""
    found = []
    for row in rows:
        fill = width - len(row["input_ids"])
        around = (lambda values, f, fill=fill: [f] * fill + values) if left else (
            lambda values, f, fill=fill: values + [f] * fill)  # fmt: skip
        more = {key: around(values, 0) for key, values in row.items() if key != "input_ids"}
        ids, mask = around(row["input_ids"], 0), around([1] * (width - fill), 0)
        found.append(more | {"input_ids": ids, "attention_mask": mask})
    return found


def test_masks_of_tokenised_rows_leave_out_what_they_mask(tokenizer):
    texts = [f"Q: {a} + {b} ?\nA: {a + b}" for a in range(5) for b in range(5)]
    plain = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    cuts = [text.index("A:") + 2 for text in texts]
    masks = [[0] * cut + [1] * (len(text) - cut) for text, cut in zip(texts, cuts, strict=True)]
    pairs = list(zip(plain, masks, strict=True))
    labels = [row | {"labels": [i if m else -100 for i, m in zip(row["input_ids"], mask, strict=True)]}
              for row, mask in pairs]  # fmt: skip

    def chosen(rows):
        return finepoint.tuner_of(finepoint.sparsify(tiny_llama(), "saft", 0.02, data=rows)).entries

    whole, answers = chosen(plain), chosen(labels)
    assert not same_selection(whole, answers)  # negative control
    for left in (True, False):
        assert same_selection(whole, chosen(padded(plain, 30, left)))
    for key in ("completion_mask", "assistant_masks"):
        rows = [row | {key: mask} for row, mask in pairs]
        assert same_selection(answers, chosen(rows))
        assert same_selection(answers, chosen(padded(rows, 30)))
    assert same_selection(
        answers, chosen([row | {"assistant_masks": m} for row, (_, m) in zip(labels, pairs, strict=True)])
    )
    tensors = [{"input_ids": torch.tensor(row["input_ids"]), "completion_mask": torch.tensor(mask).bool(),
                "token_type_ids": [0] * len(mask), "id": "x"} for row, mask in pairs]  # fmt: skip
    assert same_selection(answers, chosen(tensors))
    # Ready batches, whose padding was given labels.
    batches = []
    for left in (True, False):
        rows = padded([row | {"completion_mask": mask} for row, mask in pairs], 30, left)
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        batches.append(batch | {"labels": batch["input_ids"].clone()})
    halves = [{key: value[half] for key, value in batch.items()}
              for batch, half in zip(batches, (slice(13), slice(13, None)), strict=True)]  # fmt: skip
    assert same_selection(answers, chosen(halves))
    with pytest.raises(FinepointError, match=r"a 'completion_mask' of \(25, 29\) for labels of \(25, 30\)"):
        chosen([batches[0] | {"completion_mask": batches[0]["completion_mask"][:, 1:]}])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"position_ids": [0, 1, 2]}, r"row 0: the keys \['position_ids'\]; expected rows of"),
        ({"text": "abc"}, r"the keys \['text'\]"),
        ({"completion_mask": [0, 1]}, "'completion_mask' has 2 numbers for 3 tokens"),
        ({"assistant_masks": [0, 1, 2]}, "'assistant_masks' holds 2"),
        ({"token_type_ids": [0, 1, 1]}, "'token_type_ids' holds 1"),
        ({"attention_mask": [1, 0, 1]}, "'attention_mask' has a gap"),
        ({"attention_mask": [0, 0, 0]}, "'attention_mask' leaves out every token"),
        ({"attention_mask": [[1, 1, 1]]}, "'attention_mask' is no list of whole numbers"),
        ({"labels": "abc"}, "'labels' is no list of whole numbers"),
        ({"labels": [-100] * 3}, "no row of data has a token to learn"),
        ({"completion_mask": [1, 0, 0]}, "no row of data has a token to learn"),  # nothing predicts the first
        ({"input_ids": [5, 6, 99]}, r"token \(99\) is beyond the model's 64 embeddings"),
        ({"input_ids": [[5, 6, 7]]}, "'input_ids' is no list of whole numbers"),
        ({"input_ids": []}, "'input_ids' is no list of whole numbers"),
    ],
)
def test_tokenised_rows_that_cannot_be_read_are_one_line(llama, more, message):
    with pytest.raises(FinepointError, match=message) as caught:
        finepoint.sparsify(llama, "saft", 0.02, data=[{"input_ids": [5, 6, 7]} | more])
    assert "\n" not in str(caught.value)


def test_labels_of_an_encoder_decoder_are_a_text_of_their_own():
    row = {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [8, 9]}
    assert token_row(row, "row 0", apart=True) == Row([5, 6, 7], [8, 9])
    with pytest.raises(FinepointError, match="there are no 'labels'"):
        token_row({"input_ids": [5, 6]}, "row 0", apart=True)
    with pytest.raises(FinepointError, match=r"the keys \['completion_mask'\]"):
        token_row(row | {"completion_mask": [1] * 4}, "row 0", apart=True)
    assert token_row({"input_ids": [5, 6, 0], "labels": 1, "attention_mask": [1, 1, 0]}, "row 0") == Row([5, 6], 1)


@pytest.mark.parametrize("rows", [
    [{"input_ids": [5, 6, 7], "labels": [5, 6, 99]}],
    [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 99, 7]])}],
])  # fmt: skip
def test_labels_that_are_no_tokens_of_the_model_are_one_line(rows):
    with pytest.raises(FinepointError, match=r"token \(99\) is beyond the model's 64 embeddings"):
        finepoint.sparsify(tiny_llama(), "gradient", 0.1, data=rows)
