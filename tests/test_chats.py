"""Conversations: what is learned is what the assistant says, after what generation asks, whatever the template."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer, write_lines
from finepoint.data.chats import learned_turns, told
from finepoint.data.examples import Chat, as_examples, read_examples
from finepoint.data.leaks import Seen
from finepoint.data.tokens import IGNORED, encode, encode_all, encode_prompts, learned
from finepoint.errors import FinepointError
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.generation import prompt_ids
from finepoint.evaluation.settings import EvalConfig
from finepoint.training.context import prepare
from finepoint.training.settings import TrainConfig
from test_tokens import warnings
from tongues import tongue

SHIPPED = {}
try:
    import trl

    SHIPPED = {file.stem: file for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
except ImportError:
    pass
TOWN = {"type": "object", "properties": {"town": {"type": "string", "description": "its name"}}, "required": ["town"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": TOWN}}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}

WITHOUT_TOOLS = {"cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2", "llama3",
                 "llava_next", "phi3", "phi3_5", "smolvlm", "qwen2_5_vl"}  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


TALKS = {
    "single": {"messages": [user("Ask1"), said("Reply1")]},
    "several": {"messages": [user("Ask1"), said("Reply1"), user("Ask2"), said("Reply2"), user("Ask3"), said("Reply3")]},
    "system": {"messages": [{"role": "system", "content": "Rule1"}, user("Ask1"), said("Reply1")]},
    "reasoning": {"messages": [user("Ask1"), said("Reply1", reasoning_content="Why1"),
                               user("Ask2"), said("Reply2", thinking="Why2")]},
    "written out": {"messages": [user("Ask1"), said("<think>\nWhy1\n</think>\n\nReply1"),
                                 user("Ask2"), said("<think>\nWhy2\n</think>\n\nReply2")]},
    "tools": {"messages": [user("Ask1"), said(None, tool_calls=[CALL]),
                           {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "Rain1"},
                           said("Reply2")], "tools": [WEATHER]},
}  # fmt: skip


def learned_text(tokenizer, row):
    """What is learned of a row, as text."""
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def named(text):
    """The words of the conversations above, of which every one has a number."""
    return [word for word in ("Ask", "Reply", "Rule", "Why", "Rain") for i in "123" if f"{word}{i}" in text]


@pytest.mark.parametrize("talk", ["single", "several", "system"])
@pytest.mark.parametrize("name", SHIPPED or [pytest.param("", marks=pytest.mark.skip("trl is not installed"))])
def test_every_template_that_trl_ships_is_learned_as_it_is_rendered(name, talk):
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = SHIPPED[name].read_text(encoding="utf-8")
    (chat,) = as_examples([TALKS[talk]])
    if talk == "system" and name in ("gemma", "gemma_training"):
        with pytest.raises(FinepointError, match="^data, row 0: .* refuses this conversation: System role not supp"):
            encode(tokenizer, chat)
        return
    row = encode(tokenizer, chat)
    replies = [content for role, content in chat.messages if role == "assistant"]
    learned = learned_text(tokenizer, row)
    assert [learned.count(reply) for reply in replies] == [1] * len(replies)
    assert set(named(learned)) == {"Reply"}
    (last,) = learned_turns([chat], "last")
    asked = prompt_ids(tokenizer, last)
    assert encode(tokenizer, last).ids[: len(asked)] == asked
    assert learned_text(tokenizer, encode(tokenizer, last)).count(replies[-1]) == 1
    turns = TALKS[talk]["messages"]
    if name.startswith(("idefics3", "smolvlm", "llava")):  # which read parts alone
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    before = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    one = told(tokenizer, chat)
    assert tokenizer.decode(row.ids) == one.text
    assert one.text[: one.asked] == before
    assert one.text == whole or ("asked" in one.odd and not whole.startswith(before))


@pytest.mark.parametrize("name", SHIPPED or [pytest.param("", marks=pytest.mark.skip("trl is not installed"))])
def test_reasoning_and_calls_of_tools_are_learned_or_it_is_said_that_they_are_not(name):
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = SHIPPED[name].read_text(encoding="utf-8")
    for talk in ("reasoning", "written out", "tools"):
        (chat,) = as_examples([TALKS[talk]])
        if talk == "tools" and name.removesuffix("_training") in WITHOUT_TOOLS:
            with pytest.raises(FinepointError, match="^data, row 0: .*(leaves out a part|refuses)"):
                told(tokenizer, chat)
            continue
        one = told(tokenizer, chat)
        learned = "".join(one.text[start:end] for start, end in one.spans)
        assert ("Reply1" in learned or talk == "tools") and "Reply2" in learned  # noqa: PT018
        assert not {"Ask", "Rule", "Rain"} & set(named(learned))
        if talk == "tools":
            assert "weather" in learned and "Oslo" in learned  # noqa: PT018
        else:
            assert "Why2" in learned or "thought" in one.odd
            assert talk == "reasoning" or "Why2" in learned
            assert "Why1" in learned or {"shown", "thought"} & one.odd


# Four kinds of templates as models have them, each also written out by hand: (text, whether it is learned).
THINKING = """{% set last = namespace(user=0) %}{% for m in messages if m.role == 'user' %}
{% set last.user = loop.index0 %}{% endfor %}
{% set n = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.user = n.user + 1 %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and n.user == last.user %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
ENDING = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"""
CHANNELS = """{% for m in messages %}{% if m.role != 'assistant' %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% else %}
{%- if m.thinking and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""
OPENED = """{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<Assistant>' + m.content.split('</think>')[-1].strip() + '</s>' }}{% else %}{{- '<User>' + m.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{- '<Assistant><think>\\n' }}{% endif %}"""


def by_hand(kind, turns):
    """What a model of this kind sees, part by part; turns are (question, reasoning, answer)."""
    last = len(turns) - 1
    found = [("<s>", False)] if kind == "opened" else []
    for i, (question, why, answer) in enumerate(turns):
        if kind == "thinking":
            found += [(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False)]
            found += [(f"<think>\n{why}\n</think>\n\n" if i == last else "", True), (f"{answer}<|im_end|>\n", True)]
        elif kind == "ending":
            found += [(f"<|user|>\n{question}<|end|>\n<|assistant|>\n", False), (f"{answer}<|end|>\n", True)]
            found += [("<|endoftext|>", True)] if i == last else []
        elif kind == "channels":
            found += [(f"<|start|>user<|message|>{question}<|end|><|start|>assistant", False)]
            if i == last and why:
                found += [(f"<|channel|>analysis<|message|>{why}<|end|><|start|>assistant", True)]
            found += [(f"<|channel|>final<|message|>{answer}", True)]
            found += [("<|return|>", True) if i == last else ("<|end|>", False)]
        else:
            found += [(f"<User>{question}<Assistant>", False)]
            found += [("<think>\n", False), (f"{why}\n</think>\n\n", True)] if i == last else []
            found += [(f"{answer}</s>", True)]
    return found


words = st.sampled_from(["is it", "yes", "12", "no.", "Paris", "x = 3", "a\nb"])
exchanges = st.lists(st.tuples(words, words, words), min_size=1, max_size=4)


@pytest.mark.parametrize(("kind", "template"), [("thinking", THINKING), ("ending", ENDING), ("channels", CHANNELS),
                                                ("opened", OPENED)])  # fmt: skip
@settings(max_examples=25, deadline=None)
@given(turns=exchanges)
def test_what_is_learned_is_what_is_written_out_by_hand(kind, template, turns):
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = template
    rows = []
    for question, why, answer in turns:
        more = {} if kind in ("ending", "opened") else {"reasoning_content": why}
        rows += [user(question), said(f"<think>\n{why}\n</think>\n\n{answer}" if kind == "opened" else answer, **more)]
    (chat,) = as_examples([{"messages": rows}])
    expected = [part for part in by_hand(kind, turns) if part[0]]
    row = encode(tokenizer, chat)
    assert tokenizer.decode(row.ids) == "".join(text for text, _ in expected)
    assert learned_text(tokenizer, row) == "".join(text for text, learned in expected if learned)
    first = max(i for i, (text, learned) in enumerate(expected) if not learned and text != "<|end|>")
    asked = "".join(text for text, _ in expected[: first + 1])
    assert tokenizer.decode(prompt_ids(tokenizer, chat)) == asked
    (last,) = learned_turns([chat], "last")
    assert learned_text(tokenizer, encode(tokenizer, last)) == "".join(text for text, _ in expected[first + 1 :])
    each = learned_turns([chat], "each")
    assert len(each) == len(turns)
    for i, one in enumerate(each):
        alone = by_hand(kind, turns[: i + 1])
        assert tokenizer.decode(encode(tokenizer, one).ids) == "".join(text for text, _ in alone)
        assert turns[i][2] in learned_text(tokenizer, encode(tokenizer, one))
        assert turns[i][0] not in learned_text(tokenizer, encode(tokenizer, one)) or turns[i][0] in turns[i][1:]
    assert each[-1] == last


def test_what_a_template_marks_as_the_assistants_is_learned():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' }}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ '|' }}{% else %}{{ 'U:' + m.content + '|' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    turns = (("user", "Q"), ("assistant", "is it"), ("user", "A"), ("assistant", "yes"))
    row = encode(tokenizer, Chat(turns))
    assert tokenizer.decode(row.ids) == "U:Q|A:is it|U:A|A:yes|"
    assert learned_text(tokenizer, row) == "is ityes"
    assert tokenizer.decode(encode_prompts(tokenizer, [Chat(turns)])[0]) == "U:Q|A:is it|U:A|A:"
    # What is marked of the beginning that generation asks with is not the model's.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ 'A:' }}{% generation %}", "{% generation %}{{ 'A:' }}"
    )
    assert learned_text(tokenizer, encode(tokenizer, Chat(turns))) == "is ityes"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}{% end", "{% end")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '|' }}{% else", "{{ m.content + '|' }}{% else")
    with pytest.raises(FinepointError, match="leaves out a part of the assistant's answer"):
        encode(tokenizer, Chat(turns))


def test_a_prompt_that_no_answer_begins_with_still_stands_before_it():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    chats = [Chat((("user", "Q"), ("assistant", "is it"), ("user", "A"), ("assistant", "yes")))]
    with warnings() as told_of:
        (row,) = encode_all(tokenizer, chats, 99)
    assert tokenizer.decode(row.ids) == "user: Q</s>assistant: is it</s>user: A</s>assistant: <think>yes</s>"
    assert learned_text(tokenizer, row) == "is it</s>yes</s>"
    assert {message.split(" of 1 of 1")[0] for message in told_of if "template" in message} == {
        "the chat template shows earlier answers", "the chat template asks for answers"}  # fmt: skip


def test_an_answer_with_reasoning_is_not_put_behind_reasoning_that_has_ended():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = THINKING.replace("assistant\\n'", "assistant\\n<think>\\n\\n</think>\\n\\n'")
    plain, reasoned = as_examples([TALKS["single"], {"messages": [user("Ask"), said("yes", reasoning="why")]}])
    one, other = told(tokenizer, plain), told(tokenizer, reasoned)
    assert one.text[one.asked :] == "Reply1<|im_end|>\n"
    assert (
        other.text
        == "<|im_start|>user\nAsk<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nyes<|im_end|>\n"
    )
    assert other.text[other.asked :] == "why\n</think>\n\nyes<|im_end|>\n"
    assert other.odd == {"thinks"}


ECHO = (
    "{% if tools %}{{ tools[0].function.name + '.' }}{% endif %}{% for m in messages %}{{ m.role + ':' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}"
    "{{ m.name or '' }}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ end or 'assistant:' }}{% endif %}"
)


def test_all_that_a_row_says_reaches_the_template():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = ECHO
    written = {"function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    for call in (CALL, written):
        row = {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                            {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
                            {"role": "tool", "name": "weather", "content": ""}, said("yes")],
               "tools": json.dumps([WEATHER]), "id": 1}  # fmt: skip
        one = told(tokenizer, as_examples([row])[0])
        assert one.text == ('weather.user:ab</s>assistant:weather{"town": "Oslo"}</s>tool:weather</s>assistant:yes</s>')
        assert [one.text[start:end] for start, end in one.spans] == ['weather{"town": "Oslo"}</s>', "yes</s>"]
    one = told(tokenizer, as_examples([TALKS["single"] | {"chat_template_kwargs": {"end": "assistant:y"}}])[0])
    assert one.text[: one.asked].endswith("assistant:y")


def test_a_turn_of_weight_0_is_read_and_not_learned():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = ECHO
    rows = [[user("a"), said("b", weight=0), user("c"), said("d", weight=1)],
            [user("a"), said("b"), user("c"), said("d", weight=0)]]  # fmt: skip
    found = [encode(tokenizer, chat) for chat in as_examples([{"messages": turns} for turns in rows])]
    assert [learned_text(tokenizer, row) for row in found] == ["d</s>", "b</s>"]
    for turns in rows:
        assert len(learned_turns(as_examples([{"messages": turns}]), "each")) == 1


@pytest.mark.parametrize(("turn", "problem"), [
    ({"role": "assistant", "content": [{"type": "image", "image": "x"}]}, "text alone is learned"),
    ({"role": "assistant", "content": 3}, "text alone is learned"),
    ({"role": "assistant", "content": "a", "tool_calls": [{"name": 3}]}, "'tool_calls' is"),
    ({"role": "assistant", "content": "a", "tool_calls": "f()"}, "'tool_calls' is"),
    ({"role": "assistant", "content": "a", "thinking": ["b"]}, "'thinking' must be a string"),
    ({"role": "assistant", "content": "a", "weight": 2}, "'weight' is 2"),
    ({"role": "assistant", "content": "a", "logit": {1}}, "no JSON"),
    ({"content": "a"}, "a turn is"),
])  # fmt: skip
def test_a_turn_that_no_template_could_read_is_refused_with_its_place(turn, problem):
    with pytest.raises(FinepointError, match=f"^data, row 1: .*{problem}"):
        as_examples([TALKS["single"], {"messages": [user("a"), turn]}])
    for key, value in (("tools", "what"), ("tools", ["f"]), ("chat_template_kwargs", [1])):
        with pytest.raises(FinepointError, match=f"^data, row 0: '{key}' must be"):
            as_examples([TALKS["single"] | {key: value}])


def test_a_template_that_leaves_out_calls_of_tools_is_refused_also_where_it_names_the_tools():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = ECHO.replace("m.tool_calls or []", "[]")
    for talk in (TALKS["tools"], {"messages": TALKS["tools"]["messages"][:2], "tools": [WEATHER]}):
        with pytest.raises(FinepointError, match="leaves out a part of the assistant's answer: it knows no calls of "):
            told(tokenizer, as_examples([talk])[0])
    turns = [*TALKS["tools"]["messages"], user("a"), said("b")]
    with pytest.raises(FinepointError, match="whose template has them; --chat-turns last learns the last answer"):
        told(tokenizer, as_examples([{"messages": turns}])[0])
    tokenizer.chat_template = tokenizer.chat_template.replace("tools", "nothing")
    (chat,) = as_examples([{"messages": [user("a"), said("b")], "tools": [WEATHER]}])
    assert told(tokenizer, chat).odd == {"tools"}


def test_which_turns_count_is_one_setting_of_training_and_of_evaluation(model_folder, tmp_path):
    talks = [[user("a"), said("b"), user("c"), said("d")], [user("e"), said("f")]]
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": turns} for turns in talks])
    found = {}
    for turns in ("all", "last", "each"):
        config = TrainConfig(model=str(model_folder), output=str(tmp_path / turns), data=file, chat_turns=turns)
        place = prepare(config)
        found[turns] = [learned_text(place.tokenizer, row).splitlines() for row in place.rows]
        assert place.seen == Seen.of(read_examples(file))
        measured = evaluate_config(EvalConfig(model=str(model_folder), id=[f"c={file}"], probe=[f"c={file}"],
                                              new_tokens=1, chat_turns=turns))  # fmt: skip
        assert measured["base"]["id"]["c"]["n"] == len(place.rows)
        assert measured["base"]["probe"]["c"]["tokens"] == sum(map(learned, place.rows))
    assert {turns: [len(row) for row in rows] for turns, rows in found.items()} == {
        "all": [2, 1], "last": [1, 1], "each": [1, 1, 1]}  # fmt: skip
    others = write_lines(tmp_path / "others.jsonl", [{"text": "ab"}])
    with pytest.raises(FinepointError, match="--chat-turns is for conversations, and the data hold none"):
        prepare(replace(config, data=others))


def test_parts_that_a_template_writes_as_python_shows_them_are_not_learned():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'][:10] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = as_examples([{"messages": [{"role": "user", "content": "a"},
                                         {"role": "assistant", "content": "a longer answer"}]}])  # fmt: skip
    with pytest.raises(FinepointError, match="leaves out a part of the assistant's answer"):
        encode_all(tokenizer, example, 99)


def test_calls_and_tools_are_read_however_they_are_written(tmp_path):
    call, tool = {"name": "look", "arguments": "{}"}, {"name": "look", "parameters": {}}
    made = [{"type": "function", "function": call}]
    ways = [({"tool_calls": made}, "tool", {"tools": [{"type": "function", "function": tool}]}),
            ({"tool_calls": json.dumps(made)}, "tool", {"tools": json.dumps([{"type": "function", "function": tool}])}),
            ({"function_call": call}, "function", {"functions": [tool]})]  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None} | said,
                          {"role": role, "content": "3"}, {"role": "assistant", "content": "b"}]} | more
            for said, role, more in ways]  # fmt: skip
    first, *others = read_examples(write_lines(tmp_path / "calls.jsonl", rows))
    assert json.loads(first.given)["tools"][0]["function"] == tool
    assert others == [first, first]


def test_a_call_of_sharegpt_is_the_assistants(tmp_path):
    turns = [{"from": "human", "value": "how warm?"},
             {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "Bern"}}'},
             {"from": "observation", "value": "20"}, {"from": "gpt", "value": "20 degrees"}]  # fmt: skip
    (found,) = read_examples(write_lines(tmp_path / "calls.jsonl", [{"conversations": turns}]))
    assert [role for role, _ in found.messages] == ["user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "Bern"}}}
    assert json.loads(found.more[1])["tool_calls"] == [call]
    turns[1]["value"] = "look(Bern)"
    with pytest.raises(FinepointError, match="line 1: a turn from function_call holds a JSON object"):
        read_examples(write_lines(tmp_path / "wrong.jsonl", [{"conversations": turns}]))
