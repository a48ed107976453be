"""One contract for text and tokens, over a family of tokenizers: what is trained, scored and asked is the text."""

import hashlib
import json
import logging
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template

from conftest import make_tokenizer, tiny_llama
from finepoint.data.batches import IGNORED, Row
from finepoint.data.examples import Chat, Choices, Completion, Labelled, Pair, Text
from finepoint.data.tokens import (
    asking,
    encode,
    encode_all,
    encode_each,
    encode_pair,
    encode_preferences,
    padding_id,
    without_special,
)
from finepoint.errors import FinepointError
from finepoint.evaluation import generation
from finepoint.evaluation.generation import generation_hits, prompt_ids
from finepoint.evaluation.scoring import choice_likelihoods
from finepoint.models.loading import load_tokenizer
from finepoint.models.packages import cache_folder
from finepoint.training.checkpoints import digest_of
from finepoint.training.writing import Written
from tongues import EXACT, MAKERS, tongue

BROAD = 1 << 30
PIECES = [
    "the", " ", "  ", "\n", "\n\n", "cap", "ital", "Paris", ":", " is", "A:", "12", "3 ", ".", "é", "e", "\u0301", "ï",
    "東", "京へ", "🙂", "☃", "👩‍🚀", "don", "'t", "n't", "(", '"hi")', "//", "http", "\t", "play", "ing", " yes", "</",
    "x", "\u00a0", "\u200b", "ﬁ", "###", " Response", ":\n", "\nA",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
family = pytest.mark.parametrize("name", MAKERS)


@contextmanager
def warnings():
    """What finepoint warns of inside."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    log = logging.getLogger("finepoint.data.tokens")
    log.addHandler(handler)
    log.propagate = False
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = True


def read(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def bare(tokenizer, text):
    """The tokens of a text and nothing else."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def specials(tokenizer):
    """What the tokenizer puts in front of a text and behind it."""
    whole, inside = tokenizer("Q:")["input_ids"], bare(tokenizer, "Q:")
    front = next(i for i in range(len(whole)) if whole[i : i + len(inside)] == inside)
    return whole[:front], whole[front + len(inside) :]


def parted(row):
    """A row's tokens before those that are learned, and these, which must be all the rest."""
    first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    assert row.labels[first:] == row.ids[first:]
    return row.ids[:first], row.ids[first:]


def vanishes(tokenizer, prompt, answer):
    """Whether a tokenizer makes the same of a prompt with and without its answer."""
    return read(tokenizer, bare(tokenizer, prompt)) == read(tokenizer, bare(tokenizer, prompt + answer))


def check(tokenizer, prompt, answer, exact):
    """The contract of one prompt and its answer."""
    front, behind = specials(tokenizer)
    example = Completion(prompt, answer)
    if vanishes(tokenizer, prompt, answer):
        assert not exact
        with pytest.raises(FinepointError, match="no token of its own"):
            encode(tokenizer, example)
        return
    with warnings() as said:
        (row,) = encode_all(tokenizer, [example], BROAD)
    context, learnt = parted(row)
    # The row is the text, and one end token.
    assert learnt[-1] == tokenizer.eos_token_id
    assert learnt[-2] != tokenizer.eos_token_id
    assert row.ids[: len(front)] == front
    text = prompt + answer
    possible = {text, read(tokenizer, bare(tokenizer, text))}
    assert read(tokenizer, row.ids[len(front) : -1]) in ({text} if exact else possible)
    # What generation is asked is what the tokenizer makes of the prompt, without what would end it.
    asked = prompt_ids(tokenizer, example)
    assert asked + behind == tokenizer(prompt)["input_ids"]
    if context == asked:
        assert not exact or read(tokenizer, learnt[:-1]) == answer
    else:  # a token spans the end of the prompt, and is learned
        assert not exact
        before = read(tokenizer, asked[len(front) :])
        assert before.startswith(read(tokenizer, context[len(front) :]))
        assert not before.startswith(read(tokenizer, [*context[len(front) :], learnt[0]]))
    # Where a user's own call gives other tokens, that is said.
    assert len(said) == (context != tokenizer(prompt)["input_ids"])
    assert all(message.startswith("1 of 1 examples are learned after other tokens") for message in said)
    # A choice is scored after the tokens that it is trained after.
    assert encode_pair(tokenizer, prompt, answer) == (context, learnt[:-1])
    assert encode(tokenizer, Choices(prompt, (answer, "?"), 0)).ids == context + learnt[:-1]


@family
@settings(max_examples=60, deadline=None)
@given(prompt=texts, answer=texts)
def test_what_is_trained_and_asked_is_the_text(name, prompt, answer):
    check(tongue(name), prompt, answer, name in EXACT)


@pytest.mark.slow  # fetches the models
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_what_is_trained_and_asked_is_the_text_with_real_tokenizers(name):
    if not cache_folder().is_dir():
        pytest.skip("the model is not in the cache")
    tokenizer = load_tokenizer(name)

    @settings(max_examples=300, deadline=None)
    @given(prompt=texts, answer=texts)
    def holds(prompt, answer):
        check(tokenizer, prompt, answer, exact=True)

    holds()


@family
def test_boundaries_inside_a_token(name):
    pairs = [("Paris is the cap", "ital of France"), ("def ad", "d(a, b):"), ("I do", "n't know it"), ("x = [", "]\n"),
             ("see https:", "//example.org"), ("### Response:\n", "\nyes"), ("### Response:\n", "y"),
             ('print(', '"hi")'), ("Sentiment: ", "positive"), ("Sentiment:", " positive"),
             ("A: ", " two")]  # fmt: skip
    for prompt, answer in pairs:
        check(tongue(name), prompt, answer, name in EXACT)


@family
def test_a_batch_is_what_each_is_alone(name):
    tokenizer = tongue(name)
    examples = [Completion("Paris is the cap", "ital"), Completion("Q:", " yes"), Text("play"), Text("is it?"),
                Choices("see https:", ("//a.org", "/a.org"), 1), Completion("A: ", "no")]  # fmt: skip
    assert encode_all(tokenizer, examples, BROAD) == [encode(tokenizer, example) for example in examples]


def test_spaces_that_end_a_prompt_stay_there():
    for name in EXACT:
        tokenizer = tongue(name)
        context, answer = encode_pair(tokenizer, "Sentiment: ", "positive")
        assert read(tokenizer, answer) == "positive"
        assert read(tokenizer, context).endswith("Sentiment: ")


@family
def test_special_tokens_that_are_written_out_are_not_doubled(name):
    tokenizer = tongue(name)
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token
    front, behind = specials(tokenizer)
    written = encode(tokenizer, Completion(f"{begin}Q:", f" yes{end}"))
    assert written.ids.count(tokenizer.eos_token_id) == 1 + front.count(tokenizer.eos_token_id)
    assert read(tokenizer, written.ids).replace(" ", "").lower() == f"{begin}q:yes{end}"
    if front and front == [tokenizer.bos_token_id]:
        asked = prompt_ids(tokenizer, Completion(f"{begin}Q:", " yes"))
        assert asked == bare(tokenizer, f"{begin}Q:")
        assert asked.count(front[0]) == written.ids.count(front[0]) == 1
        assert encode(tokenizer, Text(f"{begin}Q: is{end}")).ids.count(front[0]) == 1
        with warnings() as said:
            encode_all(tokenizer, [Completion(f"{begin}Q:", " yes"), Completion("Q:", " no")], BROAD)
        assert [message.split(",")[0] for message in said] == [
            f"{2 if behind else 1} of 2 examples are learned after other tokens than tokenizer(prompt) gives"
        ]
    for text in (f"is it{end}", "is it"):
        ids = encode(tokenizer, Text(text)).ids
        assert ids[-len(behind) :] == behind if behind else ids == front + bare(tokenizer, text)
        assert ids.count(tokenizer.eos_token_id) <= 1 + front.count(tokenizer.eos_token_id)


@family
def test_all_choices_of_a_prompt_are_scored_after_the_same_tokens(name):
    if name == "slow bytes":
        pytest.skip("its vocabulary is another size")
    tokenizer = tongue(name)
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    examples = [Choices(f"{c}see https:", ("//a.org", "/a.org"), i % 2) for i, c in enumerate(("", "A: ", "12 "))]
    found = choice_likelihoods(model, tokenizer, examples, 64)
    for example, values in zip(examples, found, strict=True):
        for choice, value in zip(example.choices, values, strict=True):
            context, answer = encode_pair(tokenizer, example.prompt, choice)
            assert context == prompt_ids(tokenizer, example)
            logits = model(torch.tensor([context + answer])).logits[0].detach().log_softmax(-1)
            expected = sum(logits[len(context) + i - 1, token] for i, token in enumerate(answer))
            assert value == pytest.approx(float(expected), rel=1e-4)
        assert values[0] != values[1]


TEMPLATES = {
    "ends in a space": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                       "{% if add_generation_prompt %}assistant: {% endif %}",
    "ends in a colon": "{% for m in messages %}{{ m.role }}:{{ m.content }}\n\n{% endfor %}"
                       "{% if add_generation_prompt %}assistant:{% endif %}",
    "ends turns in nothing": "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
                             "{% if add_generation_prompt %}[assistant] {% endif %}",
    "special tokens": "{{ '<s>' }}{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
                      "{% if add_generation_prompt %}assistant\n{% endif %}",
}  # fmt: skip
chats = st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
    lambda turns: Chat(tuple(turn for user, said in turns for turn in (("user", user), ("assistant", said))))
)


def rendered(template, messages, prompting=False):
    turns = [{"role": role, "content": content} for role, content in messages]
    return Template(template, keep_trailing_newline=True).render(messages=turns, add_generation_prompt=prompting)


@family
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@settings(max_examples=15, deadline=None)
@given(chat=chats)
def test_every_token_of_an_assistants_turn_is_learned_and_no_other(name, template, chat):
    tokenizer = tongue(name)
    tokenizer.chat_template = template
    text = rendered(template, chat.messages)
    if name not in EXACT:  # of a text that the tokenizer changes, the letters of a turn cannot be counted
        assert read(tokenizer, encode(tokenizer, chat).ids) in {text, read(tokenizer, bare(tokenizer, text))}
        return
    with warnings() as said:
        (row,) = encode_all(tokenizer, [chat], BROAD)
    assert read(tokenizer, row.ids) == text
    wanted = set()
    for i in range(1, len(chat.messages), 2):
        before, after = (len(rendered(template, chat.messages[:j], prompting).encode())
                         for j, prompting in ((i, True), (i + 1, False)))  # fmt: skip
        wanted |= set(range(before, after))
    ends = byte_ends(tokenizer, row.ids)
    for start, end, label in zip([0, *ends], ends, row.labels, strict=False):
        assert (label != IGNORED) == bool(wanted & set(range(start, end)))
    asked = prompt_ids(tokenizer, chat)
    assert asked == bare(tokenizer, rendered(template, chat.messages[:-1], prompting=True))
    assert bool(said) == (row.ids[: len(asked)] != asked)
    if len(chat.messages) == 2:
        assert not said


def byte_ends(tokenizer, ids):
    """How many bytes of the text lie before the end of each token: of byte-level tokens, and of `▁` and `<0x..>`."""
    ends, special = [0], set(tokenizer.all_special_ids)
    for token, word in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token in special or "▁" in word:
            size = len(word.replace("▁", " ").encode())
        else:
            size = 1 if word.startswith("<0x") else len(word)
        ends.append(ends[-1] + size)
    return ends[1:]


def test_a_template_that_ends_the_last_turn_alone_is_learned_to_that():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last and not add_generation_prompt %}</s>"
        "{% else %}{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = encode(tokenizer, Chat((("user", "Q"), ("assistant", "is it"), ("user", "A"), ("assistant", "yes"))))
    assert read(tokenizer, row.ids) == "user: Q\nassistant: is it\nuser: A\nassistant: yes</s>"
    assert read(tokenizer, [label for label in row.labels if label != IGNORED]) == "is ityes</s>"


ASKS = "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for m in messages %}{{ m.role }}: {{ m.content.split('|')[-1] }}</s>{% endfor %}" + ASKS,
     "leaves out a part of the assistant's answer"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '' }}</s>{% endfor %}" + ASKS,
     "rewrites earlier turns.*; --chat-turns last learns the last answer alone"),
])  # fmt: skip
def test_a_template_that_does_not_say_an_answer_is_refused(template, reason):
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = template
    turns = (("user", "Q"), ("assistant", "is it"), ("user", "A"), ("assistant", "so | yes"))
    with pytest.raises(FinepointError, match=f"^c.jsonl, line 1: the chat template {reason}"):
        encode(tokenizer, Chat(turns, where="c.jsonl, line 1"))


def test_turns_that_a_template_leaves_out_are_counted():
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}</s>{% endfor %}" + ASKS
    )
    chat = (("user", "Q"), ("assistant", "is it"))
    with warnings() as said:
        encode_all(tokenizer, [Chat(chat), Chat((("system", "be brief"), *chat))], BROAD)
    assert [message.split(", which")[0] for message in said] == [
        "the chat template leaves out a turn, such as the system's, of 1 of 2 conversations"
    ]


def test_a_template_that_refuses_is_one_line_with_file_and_line():
    tokenizer = make_tokenizer()
    for template, reason in (
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ messages[7].role }}", "has no element 7"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{%- if true -%}\n\n{{ raise_exception('no system') }}{% endif %}", r"no system \(line 3 of the template\)"),
    ):
        tokenizer.chat_template = template
        chat = Chat((("user", "a"), ("assistant", "b")), where="c.jsonl, line 7")
        with pytest.raises(FinepointError, match=f"^c.jsonl, line 7: .* refuses this conversation: .*{reason}"):
            encode_all(tokenizer, [chat], BROAD)


def test_answers_that_a_tokenizer_does_not_see_are_refused():
    with pytest.raises(FinepointError, match=r"^d.jsonl, line 2: the answer ' ' has no token of its own"):
        encode_all(tongue("wordpiece"), [Completion("a", "b"), Completion("a", " ", where="d.jsonl, line 2")], BROAD)


def test_exact_match_can_match_an_answer_that_writes_its_end(monkeypatch):
    tokenizer = tongue("gpt2")
    ids = [*bare(tokenizer, " yes"), tokenizer.eos_token_id]
    said = Written(tokenizer.batch_decode([ids], skip_special_tokens=True)[0], False)
    monkeypatch.setattr(generation, "written", lambda model, tokenizer, prompts, *_: [said] * len(prompts))
    examples = [Completion("Q:", " yes</s>"), Completion("Q:", " yes!</s>"), Completion("Q:", " yes")]
    assert generation.generation_hits(None, tokenizer, examples, 64, 8) == [True, False, True]
    choices = [Choices("Q:", (" yes</s>", " no</s>"), 0)]
    found = generation.generated(None, tokenizer, choices, [" maybe</s>"], 64, 8)
    assert (found["accuracy"], found["format_failures"], found["memorised"]) == (1, 0, 0)
    assert without_special(tokenizer, "<s>a</s>b") == "ab"


@family
@settings(max_examples=20, deadline=None)
@given(prompt=texts, answer=texts)
def test_who_writes_exactly_what_is_learned_is_right(name, prompt, answer):
    tokenizer = tongue(name)
    example = Completion(prompt, answer)
    if vanishes(tokenizer, prompt, answer):
        return
    ids = [label for label in encode(tokenizer, example).labels if label != IGNORED]
    text = tokenizer.batch_decode([ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    unknown = "<unk>" in tokenizer.convert_ids_to_tokens(ids)  # which may be anything
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "written", lambda *_: [Written(text, False)])
        (right,) = generation_hits(None, tokenizer, [example], 64, 64)
        assert right or unknown or not text.strip()
        assert generation_hits(None, tokenizer, [Completion(prompt, f"{answer} x")], 64, 64) == [False]


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}",  # without a generation prompt
    "{% for m in messages %}{{ m.role }}:{% if m.role != 'user' %}[x]\n{% endif %}{{ m.content | upper }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
])  # fmt: skip
def test_an_answer_that_a_chat_template_dresses_up_can_be_matched(template, monkeypatch):
    tokenizer = tongue("gpt2")
    tokenizer.chat_template = template
    chat = Chat((("user", "Q"), ("assistant", "is it")))
    learnt = [label for label in encode(tokenizer, chat).labels if label != IGNORED]
    for ids, right in ((learnt, True), (bare(tokenizer, "is it"), True), (learnt[1:], False)):
        said = Written(tokenizer.decode(ids, skip_special_tokens=True), False)
        monkeypatch.setattr(generation, "written", lambda *_, said=said: [said])
        assert generation_hits(None, tokenizer, [chat], 64, 64) == [right]


def test_tokens_beyond_the_embedding_are_one_line():
    tokenizer, model = make_tokenizer(), tiny_llama()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<x{i}>" for i in range(20)]})
    beyond = tokenizer.convert_tokens_to_ids("<x19>")
    count = model.get_input_embeddings().num_embeddings
    assert beyond >= count
    examples = [Completion("a", "b"), Completion("<x19>", "b", where="d.jsonl, line 2")]
    message = rf"^d.jsonl, line 2: token '<x19>' \({beyond}\) is beyond the model's {count} embeddings"
    with pytest.raises(FinepointError, match=message):
        encode_all(tokenizer, examples, BROAD, model=model)
    with pytest.raises(FinepointError, match="is beyond the model's"):
        choice_likelihoods(model, tokenizer, [Choices("a<x19>", ("b", "c"), 0)], 64)
    with pytest.raises(FinepointError, match="is beyond the model's"):
        generation_hits(model, tokenizer, [Completion("a<x19>", "b")], 64, 2)
    tokenizer.add_special_tokens({"pad_token": "<other>"})
    assert tokenizer.pad_token_id >= count
    assert padding_id(tokenizer, model) == tokenizer.eos_token_id
    assert asking(tokenizer, model).pad_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token == "<other>"


@family
def test_a_tokenizer_for_others_ends_no_prompt(name):
    tokenizer = tongue(name)
    _, behind = specials(tokenizer)
    if name == "slow bytes":
        with pytest.raises(FinepointError, match="ends every text with"):
            asking(tokenizer, tiny_llama())
        return
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    copy = asking(tokenizer, model)
    assert (copy is tokenizer) == (not behind)
    for text in ("Q: is it", "### Response:\n", "naïve"):
        assert copy(text)["input_ids"] + behind == tokenizer(text)["input_ids"]


@family
def test_preferences_are_the_rows_of_both_answers(name):
    tokenizer = tongue(name)
    ((prompt, chosen, rejected),) = encode_preferences(tokenizer, [Pair("Paris is the cap", "ital", " is")])
    assert prompt + chosen == encode(tokenizer, Completion("Paris is the cap", "ital")).ids
    assert prompt + rejected == encode(tokenizer, Completion("Paris is the cap", " is")).ids
    assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id


@family
def test_what_stands_in_front_of_every_text_stays_where_its_beginning_is_lost(name):
    tokenizer = tongue(name)
    front, behind = specials(tokenizer)
    example = Labelled("play the playing play the play", "a")
    whole = encode(tokenizer, example, ["a"]).ids
    (row,) = encode_all(tokenizer, [example], 6, ["a"])
    assert row == Row(front + whole[len(front) - 6 :], 0)
    assert row.ids[6 - len(behind) :] == behind
    pair = Completion("play the playing play the play", " is")
    whole = encode(tokenizer, pair)
    (row,) = encode_all(tokenizer, [pair], 8)
    assert row.ids == front + whole.ids[len(front) - 8 :]
    assert row.labels == [IGNORED] * len(front) + whole.labels[len(front) - 8 :]


def test_choices_are_scored_after_what_stands_in_front(monkeypatch):
    tokenizer = tongue("llama3")
    asked = []

    def scored(model, tokenizer, requests, *_):
        asked.extend(requests)
        return [torch.zeros(1) for _ in requests]

    monkeypatch.setattr("finepoint.evaluation.scoring.token_log_likelihoods", scored)
    choice_likelihoods(None, tokenizer, [Choices("play the playing", (" is", " the"), 0)], 4)
    front, _ = specials(tokenizer)
    assert len(front) == 1
    assert all(context[:1] == front and len(context) + len(answer) - 1 <= 4 for context, answer in asked)
    assert asked[0][0] == asked[1][0]


def test_classes_see_the_whole_text():
    tokenizer = tongue("wordpiece")
    assert encode(tokenizer, Labelled("the play", "b"), ["a", "b"]) == Row(tokenizer("the play")["input_ids"], 1)


def test_many_examples_are_the_same_rows_in_parts(tokenizer, monkeypatch):
    examples = [Completion("ab" * (i % 5 + 1), "c d") for i in range(23)] + [Text("abc")] * 4
    whole = encode_each(tokenizer, examples)
    monkeypatch.setattr("finepoint.data.tokens.PART", 5)
    assert encode_each(tokenizer, examples) == whole
    plain = hashlib.sha256(json.dumps(whole, default=asdict).encode()).hexdigest()[:16]
    assert digest_of(whole) == plain  # of the whole list at once, as earlier checkpoints have it
    assert digest_of([]) == hashlib.sha256(b"[]").hexdigest()[:16]
