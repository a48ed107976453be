"""Every figure has its error and says what it is: by hand, by simulation, and by scikit-learn where it is installed."""

import json
import random
from importlib.util import find_spec
from statistics import mean, stdev

import pytest

import finepoint
from conftest import make_tokenizer, tiny_llama, write_lines
from finepoint.cli import main
from finepoint.cli.runs import print_demo
from finepoint.data.examples import Chat, Choices, Completion, Text
from finepoint.errors import FinepointError
from finepoint.evaluation import scoring
from finepoint.evaluation.metrics import by_class, confusion, ratio_error
from finepoint.evaluation.scores import Scores, confusions, table
from finepoint.evaluation.scoring import accuracy, mean_nll


def test_the_demos_table_has_the_error_of_every_share_and_likelihood(capsys):
    def scored(share, nll, **more):
        sets = {"id": {"movies": {"accuracy": share, "stderr": 0.03}},
                "ood": {"nyt": {"accuracy": share, "stderr": 0.04}},
                "probe": {"news": {"nll": nll, "stderr": None, "kl": 0.5}}}  # fmt: skip
        return sets | more

    changes = {f"{kind}_change": {name: 0.125} for kind, name in (("id", "movies"), ("ood", "nyt"), ("probe", "news"))}
    costs = dict.fromkeys(("trained", "adapter_bytes", "selection_seconds", "train_seconds", "peak_bytes", "lr"), 1)
    run = scored(0.875, 3.5, **changes, **costs, ood_mean={"base": 0.75, "adapted": 0.875, "change": 0.125})
    settings = {"density": 0.001, "columns": 0.01, "steps": 2, "dtype": "float32", "seed": 0}
    print_demo({"base": scored(0.75, 3.375), "runs": {"lora": run, "columns, held": run}, "settings": settings})
    lines = capsys.readouterr().out.splitlines()
    for row, found in (("movies (ID)", "0.875 ± 0.030 (+0.125)"), ("nyt (OOD)", "0.875 ± 0.040 (+0.125)"),
                       ("news (probe), nats", "3.500 (+0.125)")):  # fmt: skip
        assert next(line for line in lines if row in line).count(found) == 2


def test_of_texts_as_long_as_each_other_the_error_is_that_of_their_means():
    sums = [3.0, 5.5, 2.0, 4.0]
    assert ratio_error(sums, [5] * 4) == pytest.approx(stdev(s / 5 for s in sums) / 2)
    assert ratio_error([3.0], [5]) is None
    assert ratio_error([], []) is None


def test_the_error_of_a_loss_is_the_spread_that_other_texts_would_give():
    draw = random.Random(0)

    def sample():
        """30 texts of 1 to 20 tokens; the tokens of one have a mean of its own, which errors over tokens do not see."""
        counts = [draw.randint(1, 20) for _ in range(30)]
        means = [draw.gauss(2, 0.5) for _ in counts]
        return [sum(draw.gauss(m, 1) for _ in range(c)) for m, c in zip(means, counts, strict=True)], counts

    found = [sample() for _ in range(400)]
    spread = stdev(sum(sums) / sum(counts) for sums, counts in found)
    told = mean(ratio_error(*each) for each in found)
    over_tokens = mean((1.25 / sum(counts)) ** 0.5 for _, counts in found)
    assert told == pytest.approx(spread, rel=0.12)
    assert over_tokens < 0.75 * spread


def test_a_loss_is_grouped_by_the_example_its_tokens_come_from():
    model, tokenizer = tiny_llama(), make_tokenizer()
    texts = ["abcdefgh" * 3, "hello you", "x", "abc"]
    found = mean_nll(model, tokenizer, [Text(text) for text in texts], max_length=7)  # windows, and one of no token
    each = [mean_nll(model, tokenizer, [Text(text)], max_length=7) for text in texts if len(text) > 1]
    sums, counts = [e["nll"] * e["tokens"] for e in each], [e["tokens"] for e in each]
    assert found["stderr"] == pytest.approx(ratio_error(sums, counts), rel=1e-4)
    assert found["nll"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_what_is_written_is_an_exact_match_with_its_loss_beside_it(monkeypatch, caplog):
    model, tokenizer = tiny_llama(), make_tokenizer()
    chats = [Chat((("user", a), ("assistant", b))) for a, b in (("a", "bc"), ("ab", "d"))]
    for examples in ([Completion("ab", " c"), Completion("a", "de")], chats):
        found = accuracy(model, tokenizer, examples, new_tokens=2)
        assert found["measure"] == "exact match"
        assert found["loss"] == mean_nll(model, tokenizer, examples)
    assert "measure" not in accuracy(model, tokenizer, [Choices("a", ("b", "c"), 0)])

    def refused(*_, **__):
        raise FinepointError("the probability 0")

    monkeypatch.setattr(scoring, "mean_nll", refused)
    assert accuracy(model, tokenizer, examples, new_tokens=2)["loss"] is None
    assert "no loss beside the accuracy: the probability 0" in caplog.text


def test_figures_by_class_are_those_of_the_definitions():
    draw, labels = random.Random(1), ["a", "b", "c", "never", "answered only"]
    right = [draw.choice("aabc") for _ in range(60)]
    answered = [draw.choice([r, r, *"abc", labels[4]]) for r in right]
    found = by_class(confusion(*([labels.index(x) for x in each] for each in (right, answered)), 5), labels)
    pairs = list(zip(right, answered, strict=True))
    for i, label in enumerate(labels):
        own, hits = found["classes"][label], sum(r == a == label for r, a in pairs)
        assert (own["n"], own["answered"], own["right"]) == (right.count(label), answered.count(label), hits)
        assert own["recall"] == (hits / right.count(label) if label in right else None)
        assert own["precision"] == (hits / answered.count(label) if label in answered else None)
        assert found["confusion"][i] == [sum(pair == (label, other) for pair in pairs) for other in labels]
    assert found["classes"]["never"]["f1"] is None
    assert found["classes"][labels[4]]["f1"] == 0
    if find_spec("sklearn"):
        from sklearn.metrics import f1_score

        assert found["macro_f1"] == pytest.approx(f1_score(right, answered, average="macro"))
    harmonic = [2 / (1 / own["precision"] + 1 / own["recall"]) for own in list(found["classes"].values())[:3]]
    assert found["macro_f1"] == pytest.approx(sum(harmonic) / 4)


@pytest.fixture(scope="module")
def classifier(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    data = write_lines(folder / "d.jsonl", [{"text": f"{a}{b}", "label": "xyz"["abc".index(a)]} for a in "abc"
                                            for b in "defg"])  # fmt: skip
    arguments = ["--model", str(model_folder), "--data", data, "--output", str(folder / "a"), "--density", "0.1"]
    assert main(["train", *arguments, "--steps", "3", "--lr", "0.01"]) == 0
    return str(folder / "a"), data


def test_a_classifier_is_shown_class_by_class(classifier, model_folder, capsys):
    adapter, data = classifier
    capsys.readouterr()
    asked = ["eval", "--model", str(model_folder), "--adapter", adapter, "--id", f"d={data}"]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["adapters"][adapter]["id"]["d"]
    assert found["labels"] == ["x", "y", "z"]
    assert [sum(row) for row in found["confusion"]] == [4, 4, 4]
    assert sum(found["confusion"][i][i] for i in range(3)) == found["accuracy"] * 12
    assert main(asked) == 0
    out = capsys.readouterr().out
    for part in ("macro F1", "± is one standard error", "precision", "as z", f"{adapter}, id d"):
        assert part in out


def test_evaluate_in_python_is_the_command(classifier, model_folder, tmp_path, capsys):
    adapter, data = classifier
    text = write_lines(tmp_path / "t.jsonl", [{"text": "hello you"}, {"text": "abc"}])
    command = ["eval", "--model", str(model_folder), "--json"]
    capsys.readouterr()
    assert main([*command, "--adapter", adapter, "--id", f"d={data}", "--limit", "7"]) == 0
    assert json.loads(capsys.readouterr().out) == finepoint.evaluate(
        str(model_folder), adapter, id={"d": data}, limit=7
    )
    sums = [{"prompt": "ab", "completion": "c"}, {"prompt": "b", "completion": "d"}]
    model, tokenizer = tiny_llama(), make_tokenizer()
    found = finepoint.evaluate(model, tokenizer=tokenizer, id=sums, probe=text, new_tokens=2)
    assert isinstance(found, Scores)
    assert main([*command, "--id", f"id={write_lines(tmp_path / 's.jsonl', sums)}", "--probe", f"probe={text}",
                 "--new-tokens", "2"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out) == found
    for message, given in (("nothing to evaluate on", {}), ("plain text has no accuracy", {"id": text}),
                           ("limit is 0", {"id": sums, "limit": 0})):  # fmt: skip
        with pytest.raises(FinepointError, match=message):
            finepoint.evaluate(model, tokenizer=tokenizer, **given)


def test_scores_print_as_a_table_with_errors():
    base = {"accuracy": 0.5, "stderr": 0.125, "n": 16, "measure": "exact match", "loss": None}
    own = base | {"accuracy": 0.75, "loss": {"nll": 1.0, "stderr": None, "tokens": 9}}
    probe = {"nll": 2.0, "stderr": 0.25, "tokens": 40}
    adapted = {"id": {"x": own}, "ood": {}, "probe": {"p": probe | {"nll": 1.5, "kl": 0.1}}}
    base_scores = {"id": {"x": base}, "ood": {}, "probe": {"p": probe}}
    found = Scores({"base": base_scores, "adapters": {"<a>": adapted}})
    assert table(found) == (["set", "measure", "n", "base", "<a>"], [
        ["id x", "exact match", 16, "0.500 ± 0.125", "0.750 ± 0.125 (+0.250)"],
        ["probe p", "loss, nats a token", 40, "2.000 ± 0.250", "1.500 ± 0.250 (-0.500)"],
        ["probe p", "KL to the base", "", "-", "0.1000"],
    ])  # fmt: skip
    assert confusions(found) == []
    assert "0.750 ± 0.125 (+0.250)" in repr(found)
    assert "one standard error" in repr(found)
    assert "&lt;a&gt;" in found._repr_html_()
    assert json.loads(json.dumps(found)) == found
