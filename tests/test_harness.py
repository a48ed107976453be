"""lm-evaluation-harness on local tasks: the same numbers as our own scorer, item by item."""

import json
from contextlib import nullcontext

import pytest
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from conftest import VOCABULARY, make_tokenizer, snapshot, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum
from finepoint.data.examples import Choices, read_examples
from finepoint.errors import FinepointError
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.harness import Harness
from finepoint.evaluation.scoring import choice_accuracy, choice_likelihoods
from finepoint.evaluation.settings import EvalConfig

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # other people's: deprecations in datasets, dill, lm_eval

ROWS = [
    {"prompt": f"{a} {b} abc g" + " :"[: 2 * (i % 3)], "choices": ["ood bad", " bad", "abba  abc d"][: 2 + i % 2],
     "answer": i % 2}
    for i, (a, b) in enumerate((a, b) for a in ("ab", "a", "good", "c:") for b in ("ba", "cab", "x", "bad and good"))
]  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def merging_tokenizer():
    """Tokens of several letters that reach over spaces, so that where prompt and choice meet is a question."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Of three letters at most: a choice that melts into the prompt's last token is an error in lm-evaluation-harness.
    texts = [row["prompt"] + choice for row in ROWS for choice in row["choices"]]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, max_token_length=3)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")  # fmt: skip


def spans(tokenizer, prompt, choice):
    """Whether a token of the text begins in the prompt and ends in the choice."""
    begun, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + choice)["input_ids"]
    return whole[: len(begun)] != begun


def task(folder, name, file, **more):
    folder.mkdir(exist_ok=True)
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], **more,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return str(folder)


def moved_adapter(model, entries=400):
    """An adapter that changes one weight enough to change answers."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight = dict(model.named_parameters())[name]
    indices = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(3))[:entries].sort().values
    base, deltas = checksum(weight.detach().view(-1)[indices]), torch.ones(len(indices))
    return SparseAdapter({name: Change(tuple(weight.shape), "float32", "delta", indices, deltas, base)})


def test_every_item_scores_as_with_our_own_scorer_unless_a_token_spans_its_boundary(tmp_path):
    file = write_lines(tmp_path / "items.jsonl", ROWS)
    harness = Harness.of(["items"], task(tmp_path / "tasks", "items", file))
    tokenizer, model = merging_tokenizer(), tiny_llama()
    examples = read_examples(file)
    assert isinstance(examples[0], Choices)
    adapter = moved_adapter(model)
    before = snapshot(model)

    found, agreed = [], []
    for place in (nullcontext(), adapter.applied(model)):
        with place:
            results = harness.results(model, tokenizer, 64)
            ours = choice_likelihoods(model, tokenizer, examples, 64)
        theirs = [[float(answer[0][0]) for answer in s["resps"]] for s in results["samples"]["items"]]
        assert len(theirs) == len(ours) == len(ROWS)
        for row, their, our in zip(ROWS, theirs, ours, strict=True):
            for choice, one, other in zip(row["choices"], their, our, strict=True):
                # Where a token spans the end of the prompt, its left part is all that the harness leaves of it.
                same = one == pytest.approx(other, abs=1e-4)
                assert same or spans(tokenizer, row["prompt"], choice)
                agreed.append(same)
        found.append(theirs)
    assert len(agreed) / 2 < sum(agreed) < len(agreed)
    assert found[0] != found[1]
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_a_damaged_model_is_not_measured_and_the_mode_is_given_back(tmp_path):
    harness = Harness.of(["items"], task(tmp_path / "tasks", "items", write_lines(tmp_path / "items.jsonl", ROWS[:2])))
    model = tiny_llama().train()
    harness.scores(model, merging_tokenizer(), 64)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FinepointError, match="NaN or infinite, so that nothing can be measured"):
        harness.scores(model, merging_tokenizer(), 64)


def test_the_harness_gets_a_tokenizer_that_ends_no_prompt(tmp_path):
    rows = [{"prompt": f"{a}{b}:", "choices": [" x", " yy"], "answer": int(a > "d")} for a in "abcdefgh" for b in "ab"]
    harness = Harness.of(["ends"], task(tmp_path / "tasks", "ends", write_lines(tmp_path / "x.jsonl", rows)))
    plain, ending, model = make_tokenizer(), make_tokenizer(), tiny_llama()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert ending("a")["input_ids"][-1] == 2
    expected = harness.scores(model, plain, 64)
    assert harness.scores(model, ending, 64) == expected
    assert (
        expected["ends"]["acc"]
        == choice_accuracy(
            model, ending, [Choices(row["prompt"], tuple(row["choices"]), row["answer"]) for row in rows], 64
        )["accuracy"]
    )


def test_tasks_stand_beside_our_own_sets(tmp_path, model_folder):
    rows = [{"prompt": f"{a}{b}:", "choices": [" x", " yy"], "answer": int(a > "d")} for a in "abcdefgh" for b in "ab"]
    file = write_lines(tmp_path / "x.jsonl", rows)
    folder = task(tmp_path / "tasks", "letters", file)
    task(tmp_path / "tasks", "spelled", file, output_type="generate_until", doc_to_choice=None,
         doc_to_target="{{choices[answer]}}", generation_kwargs={"until": ["\n"], "max_gen_toks": 3},
         metric_list=[{"metric": "exact_match"}])  # fmt: skip
    (tmp_path / "tasks" / "both.yaml").write_text(
        json.dumps({"group": "both", "task": ["letters"], "aggregate_metric_list": [{"metric": "acc"}]})
    )
    adapter = str(moved_adapter(tiny_llama()).save(tmp_path / "a"))
    found = evaluate_config(EvalConfig(model=str(model_folder), adapter=[adapter], id=[f"own={file}"],
                                       tasks=["both,spelled"], include_path=folder))  # fmt: skip
    base, adapted = found["base"], found["adapters"][adapter]
    assert base["tasks"]["letters"]["acc"] == base["id"]["own"]["accuracy"]
    assert base["tasks"]["letters"]["n"] == 16
    assert base["tasks"]["both"]["acc"] == base["tasks"]["letters"]["acc"]
    assert "exact_match" in base["tasks"]["spelled"]
    assert adapted["tasks"]["letters"]["acc"] == adapted["id"]["own"]["accuracy"]
    assert adapted["tasks_change"]["letters"]["acc"] == adapted["id_change"]["own"]
    assert set(adapted["tasks_change"]["letters"]) == {"acc", "acc_norm"}
    json.dumps(found, allow_nan=False)
    first = evaluate_config(EvalConfig(model=str(model_folder), tasks=["letters"], include_path=folder, limit=5))
    assert first["base"]["tasks"]["letters"]["n"] == 5
    assert "tasks" not in evaluate_config(EvalConfig(model=str(model_folder), id=[f"own={file}"]))["base"]


@pytest.mark.slow  # the list of lm-evaluation-harness's own tasks is made from 13,000 files
def test_an_unknown_task_is_refused_with_the_closest_names(tmp_path):
    folder = task(tmp_path / "tasks", "letters", "x.jsonl")
    for name, hint in (("leters", "letters"), ("helaswag", "hellaswag")):
        with pytest.raises(FinepointError, match=f"no task '{name}'; did you mean .*{hint}"):
            Harness.of([name], folder)


def test_mistakes_are_refused_before_the_model_is_loaded(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", ROWS)
    folder = task(tmp_path / "tasks", "letters", file)
    task(tmp_path / "tasks", "lost", tmp_path / "no-such-file.jsonl")
    for changes, message in (
        ({"tasks": ["letters"], "include_path": "/no/such"}, "--include-path /no/such is no folder"),
        ({"include_path": folder}, "give --tasks NAME"),
        ({"tasks": ["lost"], "include_path": folder}, "cannot load the tasks lost: FileNotFoundError"),
    ):
        with pytest.raises(FinepointError, match=message):
            evaluate_config(EvalConfig(model="/no/such/model", **changes, id=[f"own={file}"]))
