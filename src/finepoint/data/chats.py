"""Conversations as a model's chat template renders them, and where in that text the assistant speaks.

What stands before an answer is what generation asks: the turns so far with the template's generation prompt. So a
conversation is what is asked for its last answer, and then that answer as the template renders it. Nearly always this
is the rendered conversation itself. Templates are other people's programs, and where they show an earlier answer
otherwise than the last one, or ask for one otherwise than they show it, places are found by rendering the conversation
again with a word put into a turn: the text around that word is the same in both.
"""

import json
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import product
from typing import Any

from finepoint.data.examples import REASONING, Chat, Example
from finepoint.errors import FinepointError, reason_of
from finepoint.runtime.settings import ChatTurns

REWRITES = "rewrites earlier turns, so the assistant's cannot be located"
LEAVES_OUT = "leaves out a part of the assistant's answer"
NO_CALLS = f"{LEAVES_OUT}: it knows no calls of tools; give a model whose template has them"
LAST = "--chat-turns last learns the last answer alone, with the others as the template shows them"
CLOCK = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PIECES = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|\w+|.", re.DOTALL)
"""what a text is compared by, so that no half of a word or of what looks like a special token is taken for the same"""
THOUGHT = "</think>"  # what ends the model's thinking, where it is written into an answer
CLOSERS = 64  # letters between the last argument of a call and a further one

Span = tuple[int, int]


@dataclass
class Clock:
    """The time that templates are told: one through all of a process, and in a resumed run that at which it began."""

    at: datetime | None = None

    def now(self) -> datetime:
        self.at = self.at or datetime.now().replace(microsecond=0)
        return self.at

    def in_place(self, template: str) -> str:
        """A template with the time written into it where it asks for it."""
        return CLOCK.sub(lambda call: json.dumps(self.now().strftime(call[1][1:-1]), ensure_ascii=False), template)


clock = Clock()


def tells_time(tokenizer: Any) -> bool:
    """Whether the chat template writes the time at which it is rendered."""
    return "strftime_now" in json.dumps(getattr(tokenizer, "chat_template", None) or "")


@dataclass(frozen=True)
class Told:
    """A conversation as the model sees it."""

    text: str
    asked: int
    """the text up to here is what generation asks for the last answer"""
    spans: list[Span]
    """from where to where in the text it is learned, in order"""
    odd: frozenset[str]
    """what is to be said of it: see `ODD`"""


ODD = {
    "unseen": "the chat template leaves out a turn, such as the system's, of %d of %d conversations, which the model "
              "will not see",
    "tools": "the chat template leaves out the tools that %d of %d conversations give, which the model will not see",
    "thought": "the chat template leaves out the reasoning before answers of %d of %d conversations, which is not "
               "learned",
    "shown": "the chat template shows earlier answers of %d of %d conversations otherwise than the model is to write "
             "them, e.g. without reasoning; they are learned as shown (--chat-turns each: every one as it is written; "
             "last: none of them)",
    "thinks": "answers of %d of %d conversations reason, and the chat template asks for them without; they are learned "
              "behind the beginning of reasoning, and are to be asked for so (enable_thinking)",
    "endless": "the chat template puts nothing behind answers of %d of %d conversations, so that the model does not "
               "learn to end one",
    "asked": "the chat template asks for answers of %d of %d conversations otherwise than it shows them, e.g. with a "
             "beginning of reasoning; the last one of each is learned right behind what generation asks",
}  # fmt: skip


def learned_turns(examples: Sequence[Example], turns: ChatTurns) -> list[Example]:
    """The examples, of conversations with those answers to be learned: `all`, the `last`, or `each` in a conversation
    of its own that ends there, as the model is asked for it."""
    found: list[Example] = []
    for chat in examples:
        if turns == "all" or not isinstance(chat, Chat):
            found.append(chat)
            continue
        count = len(chat.messages)
        learned = [not rest or bool(json.loads(rest).get("weight", 1)) for rest in chat.more or [""] * count]
        ends = [i + 1 for i, (role, _) in enumerate(chat.messages) if role == "assistant" and learned[i]]
        for end in ends if turns == "each" else [count]:
            found.append(replace(chat, messages=chat.messages[:end], more=chat.more[:end], last=True))
    return found


def chat_text(tokenizer: Any, messages: Sequence[tuple[str, str]], prompting: bool = False, where: str = "") -> str:
    """A conversation as the model sees it; `prompting` adds the beginning of the assistant's next turn.

    Raises:
        FinepointError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    turns = tuple({"role": role, "content": content} for role, content in messages)
    return Talk(tokenizer, turns, {}, where).text(None, prompting)


def told(tokenizer: Any, chat: Chat) -> Told:
    """A conversation as the model sees it, and from where to where in it what is learned stands.

    Raises:
        FinepointError: the tokenizer has no chat template; the template refuses the conversation, leaves out a part of
            an answer, or rewrites earlier turns so that they cannot be located.
    """
    talk, whole = _as_taken(tokenizer, chat)
    last = len(talk.turns) - 1
    odd: set[str] = set()
    asked = talk.text(last, True)
    spans = [] if chat.last else _earlier(talk, asked, odd)
    start, kept = _begins(talk, last, whole, (None, False))
    if THOUGHT in asked[kept:]:  # asked for without reasoning, and it has some
        odd.add("thinks")
        asked = asked[:kept]
    answer = _with_reasoning(talk.turns[last], whole[start:], asked)
    restored = answer != whole[start:]
    if kept < len(asked) and not restored:
        odd.add("asked")
    marks = [] if restored else talk.marks(None, False)
    own = [(max(a, start), b) for a, b in marks if b > start] if marks else [(start, start + len(answer))]
    text, shift = asked + answer, len(asked) - start
    own = [(a + shift, b + shift) for a, b in own]
    said = _parted(talk.turns[last])[1]
    talk.refuse_missing(last, "".join(text[a:b] for a, b in own), LEAVES_OUT)
    if _one_after_another(answer, [talk.turns[last].get("reasoning_content", ""), said]) < 2:
        odd.add("thought")
    if answer.endswith(said.strip() or answer + "."):
        odd.add("endless")
    if not all(_holds(text, _parted(turn)[1]) for turn in talk.turns):
        odd.add("unseen")
    if not all(_holds(text, tool.get("function", tool).get("name", "")) for tool in talk.given.get("tools", [])):
        odd.add("tools")
    return Told(text, len(asked), spans + (own if talk.learns(last) else []), frozenset(odd))


@dataclass(frozen=True)
class Talk:
    """A conversation and the template that renders it."""

    tokenizer: Any
    turns: tuple[dict[str, Any], ...]
    given: dict[str, Any]
    where: str
    made: dict[tuple[int | None, bool], str] = field(default_factory=dict)
    """texts that were rendered"""

    def refused(self, reason: str) -> FinepointError:
        return FinepointError(f"{f'{self.where}: ' if self.where else ''}{reason}")

    def text(self, count: int | None, prompting: bool) -> str:
        """The first turns as the model sees them; `prompting` adds the beginning of the assistant's next one."""
        if not self.tokenizer.chat_template:
            raise FinepointError(
                "the data are conversations and the tokenizer has no chat template; use an instruct model"
            )
        if (count, prompting) in self.made:
            return self.made[count, prompting]
        turns = [dict(turn) for turn in self.turns[:count]]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompting, **self.template(), **self.given
            )
        except Exception as error:  # the template is other people's program
            reason, line = reason_of(error) or type(error).__name__, _line_of_template(error)
            place = f" (line {line} of the template)" if line else ""
            raise self.refused(f"the model's chat template refuses this conversation: {reason}{place}") from error
        return self.made.setdefault((count, prompting), text)

    def template(self) -> dict[str, str]:
        """The template, where it asks for the time; the tokenizer's own else."""
        if not tells_time(self.tokenizer):
            return {}
        template = self.tokenizer.get_chat_template(None, self.given.get("tools"))
        return {"chat_template": clock.in_place(template)}

    def marks(self, count: int | None, prompting: bool) -> list[Span]:
        """What the template itself marks as the assistant's, by `{% generation %}`; nothing where it marks nothing."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(None, self.given.get("tools"))
        if not MARKED.search(template):
            return []
        turns = [dict(turn) for turn in self.turns[:count]]
        words = {**self.tokenizer.special_tokens_map, **self.given}
        _, (spans,) = render_jinja_template(
            [turns], chat_template=clock.in_place(template), return_assistant_tokens_mask=True,
            add_generation_prompt=prompting, **words,
        )  # fmt: skip
        return [(start, end) for start, end in spans if start < end]

    def answers(self) -> list[int]:
        """Which of the turns are the assistant's."""
        return [i for i, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    def learns(self, i: int) -> bool:
        return bool(self.turns[i].get("weight", 1))

    def refuse_missing(self, i: int, text: str, problem: str) -> None:
        """Refuses a template that leaves out of a text what the assistant is to say in turn i."""
        last = i == len(self.turns) - 1
        said, called = _parted(self.turns[i])[0 if last else 1 :], _called(self.turns[i])
        if all(_holds(text, part) for part in (*said, *called)):
            return
        if problem == LEAVES_OUT and all(_holds(text, part) for part in said):
            problem = NO_CALLS
        raise self.refused(f"the chat template {problem}{'' if last else f'; {LAST}'}")

    def rewritten(self, i: int) -> FinepointError:
        """What is to be said where turn i cannot be found in a later text."""
        way_out = "" if i == len(self.turns) - 1 else f"; {LAST}"
        return self.refused(f"the chat template {REWRITES}{way_out}")


def _line_of_template(error: Exception) -> int | None:
    """In which line of the template an error was raised, where its traceback tells."""
    lines = [number for frame, number in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename in ("<template>", "<unknown>")]  # fmt: skip
    return lines[-1] if lines else getattr(error, "lineno", None)


PARTS_SHOWN = "{'type': "


def _as_taken(tokenizer: Any, chat: Chat) -> tuple[Talk, str]:
    """The conversation in the spelling of which the template renders most, and that rendering.

    Some templates take a turn's text as a string, others as parts; the arguments of a call as an object or as JSON; a
    turn without text as one that is empty, or that has none. The first spelling that is rendered whole is taken.
    """
    best: tuple[int, Talk, str] | None = None
    problem: FinepointError | None = None
    for turns in _spellings(chat):
        talk = Talk(tokenizer, turns, json.loads(chat.given) if chat.given else {}, chat.where)
        try:
            whole = talk.text(None, False)
        except FinepointError as error:
            problem = problem or error
            continue
        needed = [part for turn in turns for part in (_parted(turn)[1], *_called(turn))]
        if PARTS_SHOWN in whole and PARTS_SHOWN not in " ".join(content for _, content in chat.messages):
            continue  # the template takes texts, and has written the parts as Python shows them
        found = _one_after_another(whole, needed)
        if best is None or found > best[0]:
            best = found, talk, whole
        if found == len(needed):
            break
    if best is None:
        assert problem is not None
        raise problem
    return best[1], best[2]


def _spellings(chat: Chat) -> Iterator[tuple[dict[str, Any], ...]]:
    more = [json.loads(rest) if rest else {} for rest in chat.more or [""] * len(chat.messages)]
    calls, empty = any("tool_calls" in rest for rest in more), any(not content for _, content in chat.messages)
    for parts, written, absent in product((False, True), (False, True)[: 1 + calls], (False, True)[: 1 + empty]):
        yield tuple(
            _turn(role, content, rest, parts, written, absent)
            for (role, content), rest in zip(chat.messages, more, strict=True)
        )


def _turn(role: str, content: str, rest: dict[str, Any], parts: bool, written: bool, absent: bool) -> dict[str, Any]:
    """A turn as a template is given it.

    Args:
        parts: its text as parts; `written`: arguments of calls as JSON; `absent`: no text where it is empty.
    """
    turn: dict[str, Any] = {"role": role}
    if content or not absent:
        turn["content"] = [{"type": "text", "text": content}] if parts else content
    if reasoning := next((rest[key] for key in REASONING if key in rest), None):
        turn |= {"thinking": reasoning, "reasoning_content": reasoning}
    turn |= rest
    if "tool_calls" in rest:
        turn["tool_calls"] = [_call(call, written) for call in rest["tool_calls"]]
    return turn


def _call(call: dict[str, Any], written: bool) -> dict[str, Any]:
    """A call of a tool with its arguments as an object, or `written` as JSON."""
    if "function" in call:
        return call | {"function": _call(call["function"], written)}
    arguments = _arguments(call)
    if not isinstance(arguments, dict):
        return call
    return call | {"arguments": json.dumps(arguments, ensure_ascii=False) if written else arguments}


def _arguments(function: dict[str, Any]) -> Any:
    given = function.get("arguments", {})
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _called(turn: dict[str, Any]) -> list[str]:
    """What a rendered turn says of the tools that it calls: their names, and those of the arguments."""
    functions = [call.get("function", call) for call in turn.get("tool_calls", [])]
    arguments = [_arguments(function) for function in functions]
    return [function["name"] for function in functions] + [key for given in arguments for key in given
                                                           if isinstance(given, dict)]  # fmt: skip


def _parted(turn: dict[str, Any]) -> tuple[str, str]:
    """What an answer's text says of the model's thinking, and what it says else; of other turns all is the latter."""
    content = turn.get("content", "")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if turn["role"] != "assistant" or THOUGHT not in text:
        return "", text
    thought, _, said = text.rpartition(THOUGHT)
    return thought.split("<think>")[-1], said


def _holds(text: str, content: str) -> bool:
    """Whether a text says all of a turn, spaces and case aside, which templates trim and add."""
    return _bare(content) in _bare(text)


def _one_after_another(text: str, parts: Sequence[str]) -> int:
    """How many of the parts a text says, in their order: tools are named before they are called."""
    bare, place, found = _bare(text), 0, 0
    for part in map(_bare, parts):
        if (at := bare.find(part, place)) >= 0:
            place, found = at + len(part), found + 1
    return found


def _bare(text: str) -> str:
    return "".join(text.casefold().split())


View = tuple[int | None, bool]
"""so many turns, and whether the assistant's next one is asked for: what `Talk.text` is given"""


def _begins(talk: Talk, i: int, text: str, view: View) -> tuple[int, int]:
    """Where in a text turn i begins, and behind how much of what generation asks for it: all, or so far they agree.

    Args:
        view: which text it is.
    """
    asked = talk.text(i, True)
    if text.startswith(asked):
        return len(asked), len(asked)
    for before in reversed(range(i)):
        one, other = _inside(talk, before, (i, True)), _inside(talk, before, view)
        if one is not None and other is not None:
            shared = _shared_pieces(asked[one:], text[other:])
            return other + shared, one + shared
    raise talk.rewritten(i)


def _earlier(talk: Talk, asked: str, odd: set[str]) -> list[Span]:
    """Where in what is asked for the last answer the answers before it stand, but for those that are only read."""
    *answers, last = talk.answers()
    view: View = (last, True)
    begins = {i: _begins(talk, i, asked, view) for i in answers}
    marks, found = talk.marks(*view), []
    following = [*(begins[i][0] for i in answers[1:]), len(asked)]
    for i, most in zip(answers, following, strict=False):
        start, kept = begins[i]
        before, after = talk.text(i, True), talk.text(i + 1, False)
        if talk.learns(i):
            talk.refuse_missing(i, after[kept:], LEAVES_OUT)
        if marks:
            own = [(max(a, start), b) for a, b in marks if start < b <= most]
        else:
            own = [(start, _ends(talk, i, asked, view))]
        if not talk.learns(i) or not own:
            continue
        talk.refuse_missing(i, "".join(asked[a:b] for a, b in own), REWRITES)
        if kept < len(before) or not after[kept:].startswith(asked[start : own[-1][1]]):
            odd.add("shown")
        found += own
    return found


def _ends(talk: Talk, i: int, text: str, view: View) -> int:
    """Where in a text turn i ends, so far as it ends there as it does at the end of a conversation."""
    after = talk.text(i + 1, False)
    if text.startswith(after):
        return len(after)
    one, other = _inside(talk, i, (i + 1, False)), _inside(talk, i, view)
    if one is None or other is None:
        raise talk.rewritten(i)
    # What ends the last turn alone, spaces or an end token, is not part of an earlier one.
    return other + _shared_pieces(after[one:], text[other:])


def _inside(talk: Talk, i: int, view: View) -> int | None:
    """A place in a text that lies in what turn i says, or at its end: where it changes as a word is put there.

    None where the turn is not in the text, or not once.
    """
    text = talk.text(*view)
    mark = next(word for number in range(10**6) if (word := f"QZX{number}J") not in text)
    turns = (*talk.turns[:i], _with_word(talk.turns[i], mark), *talk.turns[i + 1 :])
    try:
        other = replace(talk, turns=turns, made={}).text(*view)
    except FinepointError:
        return None
    if other.count(mark) != 1:
        return None
    found = other.index(mark)
    place = min(found, _shared(text, other))
    return place if found - place <= (0 if _parted(talk.turns[i])[1].strip() else CLOSERS) else None


def _with_word(turn: dict[str, Any], word: str) -> dict[str, Any]:
    """A turn that says one word more: behind its text, or where there is none as an argument of its last call."""
    content, calls = turn.get("content", ""), turn.get("tool_calls")
    if calls and not _parted(turn)[1].strip():
        *most, last = calls
        function = dict(last.get("function", last))
        arguments = _arguments(function)
        arguments = {**(arguments if isinstance(arguments, dict) else {}), word: 0}
        function["arguments"] = json.dumps(arguments) if isinstance(function.get("arguments"), str) else arguments
        return turn | {"tool_calls": [*most, last | {"function": function} if "function" in last else function]}
    if isinstance(content, str):
        return turn | {"content": content.rstrip() + word}
    return turn | {"content": [{"type": "text", "text": content[0]["text"].rstrip() + word}]}


def _with_reasoning(turn: dict[str, Any], answer: str, asked: str) -> str:
    """An answer with the thinking that its text begins with and the template leaves out, as it does in earlier turns.

    The model is to write it, and it is learned as it is written.
    """
    thought, said = _parted(turn)
    at = answer.find(said.strip())
    if not thought or at < 0 or answer[:at].strip() or _one_after_another(answer, [thought, said]) == 2:
        return answer
    content = turn["content"] if isinstance(turn["content"], str) else turn["content"][0]["text"]
    before = content[: content.rindex(THOUGHT) + len(THOUGHT)]
    between = said[: len(said) - len(said.lstrip())]
    if asked.rstrip().endswith("<think>") and before.lstrip().startswith("<think>"):
        before = before.lstrip().removeprefix("<think>")
        before = before.removeprefix(asked[len(asked.rstrip()) :])
    return before + between + answer[at:]


def _shared(one: str, other: str) -> int:
    """With how many letters two texts begin alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _shared_pieces(one: str, other: str) -> int:
    """With how many letters two texts begin alike, in whole pieces."""
    if other.startswith(one):
        return len(one)
    shared = 0
    for a, b in zip(PIECES.finditer(one), PIECES.finditer(other), strict=False):
        if a.group() != b.group():
            break
        shared = a.end()
    return shared
