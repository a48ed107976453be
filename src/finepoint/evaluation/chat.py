"""A conversation with a model whose adapters are switched on and off in milliseconds: `finepoint chat`."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.adapter_set import AdapterSet
from finepoint.data.batches import context_length
from finepoint.errors import FinepointError
from finepoint.evaluation.generate import BASE, prompt_tokens, templated, trained_keys
from finepoint.evaluation.settings import ChatConfig
from finepoint.evaluation.subjects import Given, Subjects
from finepoint.runtime.settings import named, refuse_out_of_range
from finepoint.training.writing import Sampling, written

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


class Attached:
    """Adapters of a quantised model, whose entries cannot be set: one at a time is attached."""

    def __init__(self, model: Any) -> None:
        self.model, self.known, self.on = model, dict[str, SparseAdapter](), ExitStack()

    def add(self, name: str, adapter: SparseAdapter) -> None:
        with adapter.applied(self.model):  # refused now, not in the middle of a conversation
            self.known[name] = adapter

    def set(self, name: str | None) -> None:
        self.disable()
        if name is not None:
            self.on.enter_context(self.known[name].applied(self.model))

    def disable(self) -> None:
        self.on.close()


class Conversation:
    """One conversation, in which whoever is asked hears all that was said so far.

    Without a chat template (`template` false) there are no turns: every text is a prompt of its own.

    Args:
        subjects: the model with its adapters.
        new_tokens, limit, sampling: as for `written`.
        system: what the template puts before the first turn.
        keys: of the form that texts are put in where there is no template.
    """

    def __init__(
        self, subjects: Subjects, template: bool, new_tokens: int, limit: int, sampling: Sampling, system: str | None,
        keys: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.tokenizer = subjects.tokenizer
        self.model = subjects.model
        quantised = any(adapter.quantised_in(self.model) for adapter in subjects.adapters.values())
        self.adapters: AdapterSet | Attached = (Attached if quantised else AdapterSet)(self.model)
        for name, adapter in subjects.adapters.items():
            self.adapters.add(name, adapter)
        self.names = [BASE, *subjects.adapters]
        self.asked = self.names[-1:] if subjects.adapters else [BASE]
        self.template, self.keys = template, keys
        self.new_tokens, self.limit, self.sampling = new_tokens, limit, sampling
        self.first = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []

    def ask(self, *names: str) -> float:
        """Has these be asked from now on; returns the seconds that switching to the last of them took.

        Raises:
            FinepointError: an unknown name.
        """
        known = {name: name for name in self.names}
        self.asked = [named(known, name, "there is no", "there are") for name in names]
        started = time.perf_counter()
        self._switch(self.asked[-1])
        return time.perf_counter() - started

    def reset(self) -> None:
        """Begins anew."""
        self.turns = []

    def answers(self, text: str, say: Say = lambda piece: None) -> dict[str, str]:
        """What each of those asked answers; the conversation goes on from the last one's answer.

        Args:
            say: called with each piece of an answer as it is written.

        Raises:
            FinepointError: the text is empty, or the template refuses the conversation, which stays as it was.
        """
        turns = [*self.first, *self.turns, {"role": "user", "content": text}]
        ids = prompt_tokens(self.tokenizer, turns if self.template else text, self.template, self.keys)
        found = {}
        for name in self.asked:
            self._switch(name)
            (answer,) = written(self.model, self.tokenizer, [ids], self.limit, self.new_tokens,
                                sampling=self.sampling, say=say)  # fmt: skip
            found[name] = answer.text
        if self.template and answer.text.strip():
            self.turns += [turns[-1], {"role": "assistant", "content": answer.text.strip()}]
        return found

    def _switch(self, name: str) -> None:
        self.adapters.set(None if name == BASE else name)


@contextmanager
def conversation(config: ChatConfig) -> Iterator[Conversation]:
    """The conversation that `finepoint chat` holds.

    Raises:
        FinepointError: whatever the user can mend.
    """
    refuse_out_of_range(config)
    given = Given.of(dict(zip(short_names(config.adapter), config.adapter, strict=True)))
    if given.labels():
        raise FinepointError("the adapter is a classifier's, which does not talk; `finepoint eval` measures it")
    subjects = given.on(config.model, None, config.dtype, config.quantise, config.any_base, config.any_dtype)
    template = templated(subjects.tokenizer, given.infos, config.raw)
    if config.system and not template:
        raise FinepointError("--system needs the chat template, and texts are given as they are here; leave it out")
    limit = context_length(subjects.model, config.max_length)
    keys = () if template or config.raw else trained_keys(given.infos)
    talk = Conversation(subjects, template, config.new_tokens, limit, Sampling(config.temperature, config.seed),
                        config.system, keys)  # fmt: skip
    try:
        yield talk
    finally:
        talk.adapters.disable()


def short_names(folders: Sequence[str]) -> list[str]:
    """The last parts of the folders' names where they differ, else the folders as given."""
    last = [PurePath(folder).name for folder in folders]
    usable = len(set(last)) == len(last) and BASE not in last and all(last)
    return last if usable else list(folders)
