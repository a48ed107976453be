"""What a model answers: `generate` and `chat` against a plain loop over a dense copy; the base stays bit for bit."""

import copy
import io
import json
import logging

import pytest
import torch

import finepoint
from conftest import assert_same_bits, make_tokenizer, snapshot, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum
from finepoint.cli import main, output
from finepoint.data.examples import read_parts
from finepoint.errors import FinepointError
from finepoint.evaluation.chat import Conversation, conversation, short_names
from finepoint.evaluation.generate import generate, read_prompts
from finepoint.evaluation.settings import ChatConfig
from finepoint.evaluation.subjects import Subjects
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig
from finepoint.training.writing import Pieces, Sampling, Written


def changed(model, seed, **info):
    """An adapter that moves some entries far enough to be heard, and a dense copy of the model with it."""
    generator = torch.Generator().manual_seed(seed)
    changes, dense = {}, copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            where = torch.randperm(weight.numel(), generator=generator)[:60].sort().values
            flat = dense.get_parameter(name).data.view(-1)
            before = checksum(flat[where])
            flat[where] += torch.randn(60, generator=generator)
            changes[name] = Change(tuple(weight.shape), "float32", "value", where, flat[where].clone(), before)
    return SparseAdapter(changes, info), dense


def plain(model, tokenizer, text, count, temperature=0.0, seed=0):
    """Token after token, one whole pass each."""
    ids, start = tokenizer(text, add_special_tokens=False)["input_ids"], 0
    start = len(ids)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[:, -1]
            drawn = (
                torch.multinomial((logits / (temperature or 1)).softmax(-1), 1) if temperature else logits.argmax(-1)
            )
            ids.append(int(drawn))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def spoken():
    model, tokenizer = tiny_llama(), make_tokenizer()
    adapters = {"a": changed(model, 1), "b": changed(model, 2)}
    return model, tokenizer, {n: a for n, (a, _) in adapters.items()}, {n: d for n, (_, d) in adapters.items()}


def test_answers_are_those_of_a_dense_copy_and_the_base_is_left(spoken):
    model, tokenizer, adapters, dense = spoken
    before, prompts = snapshot(model), ["ab", "hello you", "c"]
    found = generate(model, prompts, adapters, tokenizer=tokenizer, base=True, raw=True, new_tokens=9)
    for name, reference in {"base": model, **dense}.items():
        assert found.by[name] == [plain(reference, tokenizer, prompt, 9) for prompt in prompts], name
    assert found.by["a"] != found.by["base"] != found.by["b"]
    assert_same_bits(before, snapshot(model))
    assert finepoint.generate is generate
    alone = finepoint.generate(model, "ab", adapters["a"], tokenizer=tokenizer, raw=True, new_tokens=9)
    assert alone.texts == found.by["a"][:1]
    with pytest.raises(FinepointError, match="several have answered: base, a, b"):
        _ = found.texts


def test_drawn_answers_depend_on_their_own_prompt_and_the_seed_alone(spoken):
    model, tokenizer, adapters, dense = spoken
    asked = {"tokenizer": tokenizer, "raw": True, "new_tokens": 8, "temperature": 0.7}
    state = torch.get_rng_state()
    found = generate(model, ["ab", "hello you", "abc"], adapters["a"], seed=3, **asked).texts
    assert torch.equal(state, torch.get_rng_state())
    assert found == [plain(dense["a"], tokenizer, text, 8, 0.7, 3) for text in ("ab", "hello you", "abc")]
    assert generate(model, "hello you", adapters["a"], seed=3, **asked).texts == found[1:2]
    assert generate(model, ["ab", "hello you", "abc"], adapters["a"], seed=4, **asked).texts != found


def test_no_setting_of_the_checkpoint_narrows_what_is_drawn(spoken):
    _, tokenizer, _, _ = spoken
    model = tiny_llama()
    asked = {"tokenizer": tokenizer, "raw": True, "new_tokens": 8, "temperature": 2.0}
    expected = generate(model, "ab", **asked).texts
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1
    assert generate(model, "ab", **asked).texts == expected == [plain(model, tokenizer, "ab", 8, 2.0)]


def test_texts_go_through_the_template_unless_told_or_trained_otherwise(spoken):
    model, tokenizer, adapters, dense = spoken
    asked = {"tokenizer": tokenizer, "new_tokens": 6}
    through = plain(dense["a"], tokenizer, "user: ab\nassistant: ", 6)
    as_it_is = plain(dense["a"], tokenizer, "ab", 6)
    assert through != as_it_is
    assert generate(model, "ab", adapters["a"], **asked).texts == [through]
    assert generate(model, [{"role": "user", "content": "ab"}], adapters["a"], raw=True, **asked).texts == [through]
    assert generate(model, "ab", adapters["a"], raw=True, **asked).texts == [as_it_is]
    for form, expected in (("chat", through), ("completion", as_it_is), ("text", as_it_is)):
        trained = SparseAdapter(adapters["a"].changes, {"form": form})
        assert generate(model, "ab", trained, **asked).texts == [expected], form
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    found = generate(model, "ab", adapters["a"], tokenizer=tokenizer, new_tokens=6)
    assert (found.texts, found.template) == ([as_it_is], False)


READY = {
    "alpaca": ({"instruction": "ab", "output": "c"}, "### Instruction:\nab\n\n### Response:\n"),
    "question": ({"question": "ab", "answer": "c"}, "Question: ab\nAnswer:"),
    "choices": ({"question": "ab", "choices": ["c", "d"], "answer": 0}, "Question: ab\nAnswer:"),
    "plain": ({"prompt": "ab", "completion": "c"}, "ab"),
}


@pytest.mark.parametrize("kind", READY)
def test_an_adapter_is_asked_in_the_form_that_its_rows_had(spoken, model_folder, tmp_path, kind, monkeypatch):
    row, asked = READY[kind]
    config = TrainConfig(model=str(model_folder), data=[row, row], output=str(tmp_path / "a"), count=20, steps=1)
    train(config)
    assert SparseAdapter.load(config.output).info["keys"] == list(as_parts(row))
    model, tokenizer, _, _ = spoken
    expected = tokenizer(asked)["input_ids"]
    given = []

    def write(model, tokenizer, rows, *more, **words):
        given.extend(rows)
        return [Written("", True)]

    monkeypatch.setattr("finepoint.evaluation.generate.written", write)
    monkeypatch.setattr("finepoint.evaluation.chat.written", write)
    file = write_lines(tmp_path / "p.jsonl", [row])
    for prompt in ("ab", asked, *read_prompts(file)):
        generate(model, prompt, config.output, tokenizer=tokenizer)
    assert given == [expected] * 3
    generate(model, "ab", config.output, tokenizer=tokenizer, raw=True)
    assert given[-1] == tokenizer("ab")["input_ids"]
    with conversation(ChatConfig(model=str(model_folder), adapter=[config.output])) as talk:
        talk.answers("ab")
    assert given[-1] == expected


def as_parts(row):
    return next(part.taken.keys for part in read_parts([row]))


def test_an_adapter_says_the_form_it_was_trained_on(model_folder, tmp_path, capsys):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "b", "completion": "d"}])
    arguments = ["--model", str(model_folder), "--data", data, "--output", str(tmp_path / "a"), "--count", "20"]
    assert main(["train", *arguments, "--steps", "1", "--json"]) == 0
    adapter = SparseAdapter.load(tmp_path / "a")
    assert adapter.info["form"] == "completion"
    capsys.readouterr()
    asked = ["generate", "--model", str(model_folder), "--adapter", str(tmp_path / "a"), "--prompt", "ab", "[b"]
    assert main([*asked, "--json", "--base", "--new-tokens", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == ["ab", "[b"]
    assert found["template"] is False
    assert list(found["answers"]) == ["base", str(tmp_path / "a")]
    model = tiny_llama()
    assert found["answers"]["base"][0] == plain(model, make_tokenizer(), "ab", 3)
    assert main([*asked[:-1], "--new-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert said.out == generate(model, "ab", adapter, tokenizer=make_tokenizer(), new_tokens=3).texts[0] + "\n"
    assert "without the chat template" in said.err


def test_prompts_come_from_files_and_stdin(model_folder, tmp_path, capsys, monkeypatch):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = write_lines(
        tmp_path / "p.jsonl", [{"prompt": "x", "choices": ["y", "z"], "answer": 0}, "w", {"messages": turns}]
    )
    assert list(read_prompts(tmp_path / "p.jsonl")) == ["x", "w", turns[:1]]
    (tmp_path / "p.txt").write_text("one\n\ntwo: {}\n")
    assert list(read_prompts(tmp_path / "p.txt")) == ["one", "two: {}"]
    asked = ["generate", "--model", str(model_folder), "--new-tokens", "1", "--json"]
    assert main([*asked, "--prompts", rows, "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == ["x", "w"]
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\ncd\n"))
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == ["ab", "cd"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "bad.jsonl").write_text('{"body": "a"}\n')
    for more, message in (([], "there is nothing to answer"), (["--prompt", "", "x"], "a prompt is empty"),
                          (["--temperature", "-1"], "temperature is -1"),
                          (["--prompts", str(tmp_path / "bad.jsonl")], "line 1: an object with the keys"),
                          (["--prompts", str(tmp_path / "no")], "cannot read")):  # fmt: skip
        assert main([*asked, *more]) == 2
        assert message in capsys.readouterr().err


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def batch_decode(self, rows, **_):
        return [bytes(row).decode(errors="replace") for row in rows]


def test_pieces_are_whole_characters_and_together_the_text():
    text, said = "a\n \u00e9\u20ac \U0001f600b ", []
    pieces = Pieces(Bytes(), said.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in text.encode():
        pieces.put(torch.tensor([byte]))
    pieces.end()
    assert "".join(said) == text
    assert len(said) == len(text)


def test_a_conversation_goes_on_whoever_is_asked(spoken):
    model, _, adapters, dense = spoken
    tokenizer, known = make_tokenizer(), {"base": copy.deepcopy(model), **dense}
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    before = snapshot(model)
    talk = Conversation(Subjects(model, tokenizer, adapters), True, 4, 64, Sampling(), "xy")
    assert talk.asked == ["b"]
    heard, pieces = "sxy\n", []
    for names, text in ((("b",), "ab"), (("base",), "c"), (("base", "a"), "de"), (("b",), "f")):
        talk.ask(*names)
        pieces.clear()
        found = talk.answers(text, pieces.append)
        heard += f"u{text}\n"
        assert found == {name: plain(known[name], tokenizer, f"{heard}a", 4) for name in names}
        assert "".join(pieces) == "".join(found.values())
        if said := found[names[-1]].strip():
            heard += f"a{said}\n"
    talk.reset()
    assert talk.answers("ab") == {"b": plain(dense["b"], tokenizer, "sxy\nuab\na", 4)}
    with pytest.raises(FinepointError, match="there is no 'c'"):
        talk.ask("c")
    talk.adapters.disable()
    assert_same_bits(before, snapshot(model))


def test_chat_takes_piped_lines_and_slips_do_not_end_it(spoken, model_folder, tmp_path, capsys, monkeypatch):
    model, tokenizer, adapters, dense = spoken
    folder = adapters["a"].save(tmp_path / "mine")
    lines = [
        "ab",
        "/base",
        "ab\\",
        "c",
        "/adapter nobody",
        "/both",
        "d",
        "/dance",
        "/reset",
        "/adapter",
        "ab",
        "/quit",
        "z",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    asked = ["chat", "--model", str(model_folder), "--adapter", str(folder), "--new-tokens", "4", "--any-base"]
    assert main([*asked, "--raw"]) == 0
    said = capsys.readouterr()
    with_it, without = (plain(each, tokenizer, "ab", 4) for each in (dense["a"], model))
    assert said.out.startswith(with_it + "\n" + plain(model, tokenizer, "ab\nc", 4) + "\nbase")
    assert said.out.endswith("\n" + with_it + "\n")
    assert without != with_it
    for part in ("mine answers; every text is a prompt of its own", "base answers, switched in", "mine answers, sw",
                 "base and mine answer", "there is no 'nobody'", "no command /dance", "begins anew"):  # fmt: skip
        assert part in said.err, part


def test_who_cannot_answer_is_refused_in_a_line(spoken):
    model, tokenizer, adapters, _ = spoken
    classifier = SparseAdapter(adapters["a"].changes, {"task": "classification", "labels": ["x", "y"]})
    for given, message in (({"adapter": classifier}, "is a classifier's, which writes nothing"),
                           ({"prompts": []}, "there is no prompt"), ({"prompts": ""}, "a prompt is empty"),
                           ({"tokenizer": None}, "give its tokenizer as well"),
                           ({"adapter": [classifier, adapters["a"]]}, "different tasks or classes")):  # fmt: skip
        with pytest.raises(FinepointError, match=message):
            generate(**{"model": model, "prompts": "a", "tokenizer": tokenizer} | given)


def test_answers_print_small(spoken):
    model, tokenizer, adapters, _ = spoken
    found = generate(model, ["a<b", "c" * 500], adapters, tokenizer=tokenizer, new_tokens=3)
    assert len(repr(found).splitlines()) == 6
    assert max(map(len, repr(found).splitlines())) < 250
    assert "a&lt;b" in found._repr_html_()
    assert found._repr_html_().count("<tr>") == 3
    assert output.harmless("a\x1b[31mb\n\tc") == "a\\x1b[31mb\n\tc"
    assert short_names(["x/a", "y/b/"]) == ["a", "b"]
    assert short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert short_names(["x/base"]) == ["x/base"]
    assert logging.getLogger("finepoint").handlers == []


def test_prompts_are_read_from_whatever_training_reads(tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    forms = {
        "alpaca": ({"instruction": "x", "input": "", "output": "y"}, "### Instruction:\nx\n\n### Response:\n"),
        "question": ({"question": "x", "answer": "y"}, "Question: x\nAnswer:"),
        "sharegpt": ({"conversations": turns}, asked),
        "pair": ({"prompt": "x", "chosen": "y", "rejected": "z"}, "x"),
        "text": ({"text": "x"}, "x"),
    }
    for row, expected in forms.values():
        (tmp_path / "p.json").write_text(json.dumps([row] * 2))
        assert list(read_prompts(tmp_path / "p.json")) == [expected] * 2
    (tmp_path / "p.csv").write_text("frage,nr\r\n007,1\r\n", newline="")
    assert list(read_prompts(tmp_path / "p.csv", {"prompt": "frage"})) == ["007"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.csv").rename(tmp_path / "folder" / "p.csv")
    assert list(read_prompts(str(tmp_path / "folder"), {"prompt": "frage"})) == ["007"]
    (tmp_path / "p.jsonl").write_text('{"promt": "a", "completion": "b"}')
    with pytest.raises(FinepointError, match="line 1: there is 'promt'; did you mean 'prompt'"):
        list(read_prompts(tmp_path / "p.jsonl"))
    (tmp_path / "p.jsonl").write_text("3")
    with pytest.raises(FinepointError, match="line 1: a int; expected a text"):
        list(read_prompts(tmp_path / "p.jsonl"))


def test_on_a_quantised_base_a_conversation_attaches_one_adapter_at_a_time():
    pytest.importorskip("torchao")
    from finepoint.models.quantised import float_values, quantise_, quantised_layers

    model, wide = tiny_llama(), tiny_llama()
    quantise_(model, "int8", [name for name, _ in model.named_modules() if name.endswith("proj")])
    for name, layer in quantised_layers(model).items():
        wide.get_parameter(name).data.copy_(float_values(layer.weight))
    made = {name: changed(wide, seed) for name, seed in (("one", 1), ("two", 2))}
    before = snapshot(model)
    adapters = {name: adapter for name, (adapter, _) in made.items()}
    talk = Conversation(Subjects(model, make_tokenizer(), adapters), False, 4, 64, Sampling(0.0, 0), None)
    dense = {"base": wide, **{name: copy for name, (_, copy) in made.items()}}
    for name in ("two", "base", "one", "two"):
        talk.ask(name)
        assert talk.answers("ab") == {name: plain(dense[name], make_tokenizer(), "ab", 4)}
    talk.adapters.disable()
    assert before.keys() == snapshot(model).keys()
