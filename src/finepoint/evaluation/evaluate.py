"""Evaluation of a model and of adapters on it: in distribution, out of distribution, and probes for forgetting."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.scaling import wise_ft
from finepoint.data.batches import context_length
from finepoint.data.chats import learned_turns
from finepoint.data.examples import Example, Labelled, Text, as_examples, read_examples, refuse_other_task, some
from finepoint.data.leaks import Seen, leaks, warn_of_leaks
from finepoint.errors import FinepointError
from finepoint.evaluation.divergence import kl_of_prompts, kl_of_protected, mean_kl
from finepoint.evaluation.generation import frequent_answers, generated
from finepoint.evaluation.harness import Harness
from finepoint.evaluation.metrics import changes
from finepoint.evaluation.scores import Scores
from finepoint.evaluation.scoring import accuracy, mean_nll
from finepoint.evaluation.settings import EvalConfig, files_by_name, refuse_unmeasurable
from finepoint.evaluation.subjects import Adapters, Given
from finepoint.runtime.files import claim_file
from finepoint.runtime.progress import progress
from finepoint.runtime.settings import refuse_out_of_range
from finepoint.training.texts import CLASSIFIERS, examples_to_keep, protected_files, to_measure

logger = logging.getLogger(__name__)
Sets = Mapping[str, Sequence[Example]]
Rows = str | Path | Sequence[Any]
"""a file, or rows in memory"""
Data = Rows | Mapping[str, Rows]


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate on: example sets by name."""

    id: Sets = field(default_factory=dict)
    ood: Sets = field(default_factory=dict)
    probe: Sets = field(default_factory=dict)
    max_length: int | None = None
    new_tokens: int = 64
    generate: int = 0
    """so many examples of each set are answered by generation too"""
    harness: Harness | None = None
    protect: Sequence[Example] = ()
    """whose predictions were to be kept"""
    trained_answers: Sequence[str] = ()
    """of the task trained on; see `frequent_answers`"""

    def scores(self, model: Any, tokenizer: Any, what: str = "model") -> dict[str, Any]:
        """{"id": {name: {"accuracy", ..}}, "ood": {..}, "probe": {name: {"nll", "tokens"}}} of the model as it is.

        With a harness also "tasks": {name: {"acc", ..}}.
        """
        found: dict[str, Any] = {}
        for kind in ("id", "ood", "probe"):
            found[kind] = {}
            for name, examples in getattr(self, kind).items():
                with progress(f"{what}: {kind} {name}", len(examples)) as advance:
                    if kind == "probe":
                        found[kind][name] = mean_nll(
                            model, tokenizer, examples, max_length=self.max_length, advance=advance
                        )
                    else:
                        found[kind][name] = accuracy(
                            model, tokenizer, examples,
                            max_length=self.max_length, new_tokens=self.new_tokens, advance=advance,
                        )  # fmt: skip
                        if self.generate and not isinstance(examples[0], Labelled):
                            found[kind][name]["generated"] = self._generated(model, tokenizer, examples)
        if self.harness:
            logger.info("%s: %s, by lm-evaluation-harness", what, ", ".join(self.harness.tasks))
            found["tasks"] = self.harness.scores(model, tokenizer, context_length(model, self.max_length))
        return found

    def _generated(self, model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Any]:
        limit = context_length(model, self.max_length)
        sample = some(list(examples), self.generate)
        return generated(model, tokenizer, sample, self.trained_answers, limit, self.new_tokens)

    def compared(
        self, model: Any, tokenizer: Any, base: Mapping[str, Any], adapter: SparseAdapter, what: str
    ) -> dict[str, Any]:
        """The scores with an adapter on, their changes against the base's scores, and the KL to the base: on the
        probes, on each set's own prompts (`kl_prompts`), on the protected text.

        Args:
            model: the base model; it is so again afterwards.
        """
        with adapter.applied(model):
            scores = self.scores(model, tokenizer, what)
        with adapter.alternating(model) as switch:
            for name, examples in self.probe.items():
                with progress(f"{what}: KL {name}", len(examples)) as advance:
                    scores["probe"][name]["kl"] = mean_kl(model, tokenizer, examples, switch, advance=advance)["kl"]
            for kind in ("id", "ood"):
                for name, examples in getattr(self, kind).items():
                    kl = kl_of_prompts(model, tokenizer, examples, switch)
                    scores[kind][name] |= {} if kl is None else {"kl_prompts": kl}
        if self.protect:
            scores["protected"] = kl_of_protected(model, tokenizer, self.protect, adapter)
        return scores | changes(base, scores)


def read_sets(
    named_files: Sequence[str], kind: str, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> dict[str, list[Example]]:
    """Example sets from `NAME=FILE` strings, at most `limit` examples each (always the same random ones).

    Raises:
        FinepointError: a string of another form, a name given twice, a bad file, or a form that does not fit.
    """
    sets: dict[str, list[Example]] = {}
    for name, path in files_by_name(named_files, kind).items():
        examples = some(read_examples(path, columns), limit)
        if isinstance(examples[0], Text) and kind != "probe":
            told = f"{name}={path}"
            raise FinepointError(f"--{kind} {told!r}: plain text has no accuracy; give it as --probe {told}")
        sets[name] = examples
    return sets


def measured(
    model: Any,
    tokenizer: Any,
    evaluation: Evaluation,
    adapters: Mapping[str, SparseAdapter],
    strengths: Sequence[float] = (),
) -> Scores:
    """{"base": scores, "adapters": {name: scores and changes}}; the base is measured with every adapter off.

    Args:
        strengths: each adapter is measured at these too (WiSE-FT), as `name x strength`.
    """
    for name, adapter in adapters.items():
        if problems := adapter.problems(model):
            raise FinepointError(f"adapter {name} does not fit this model: {problems[0]}")
        if adapter.changes_nothing():
            logger.warning("adapter %s changes nothing: no value differs from the base", name)
    base = evaluation.scores(model, tokenizer, "base")
    found = Scores({"base": base, "adapters": {}})
    for name, adapter in adapters.items():
        found["adapters"][name] = evaluation.compared(model, tokenizer, base, adapter, name)
        found["adapters"][name] |= {key: adapter.info[key] for key in ("unfinished",) if key in adapter.info}
        for strength in strengths:
            named = f"{name} x {strength:g}"
            weakened = wise_ft(adapter, model, strength)
            found["adapters"][named] = evaluation.compared(model, tokenizer, base, weakened, named)
    return found


def evaluate(
    model: Any,
    adapter: Adapters = None,
    *,
    tokenizer: Any = None,
    id: Data = (),  # noqa: A002 - as the flag
    ood: Data = (),
    probe: Data = (),
    protect: str | None = None,
    **settings: Any,
) -> Scores:
    """Measures a model, and adapters on it, as `finepoint eval` does; the model is afterwards what it was.

    Args:
        model: one in memory, or what `--model` takes: a folder, a hub id, `smollm2`, ..
        adapter: a folder, a `SparseAdapter`, several of them, or several by name; each is measured on its own.
        tokenizer: where not given, that of the place the model was loaded from.
        id, ood, probe: sets by name, or one: a file, or rows in memory as `{"prompt", "completion"}`, ..
        protect: a file of text whose predictions were to be kept.
        settings: any others of `EvalConfig`, e.g. `limit=100`, `new_tokens=64`, `generate=20`, `scale=[0.5]`.

    Returns:
        {"base": scores, "adapters": {name: scores and changes}}, a dictionary that prints as a table, with errors.

    Raises:
        FinepointError: whatever the user can mend: no such model, an adapter that does not belong to it, bad data.
    """
    name = str(model) if isinstance(model, str | Path) else "the model"
    config = EvalConfig(model=name, protect=protect, **settings)
    refuse_out_of_range(config)
    sets = {kind: {n: some(_examples(kind, n, rows), config.limit) for n, rows in _named(kind, data)}
            for kind, data in (("id", id), ("ood", ood), ("probe", probe))}  # fmt: skip
    return _carried_out(config, model, tokenizer, Given.of(adapter), sets)


def evaluate_config(config: EvalConfig) -> Scores:
    """Runs the whole of `finepoint eval`.

    Raises:
        FinepointError: whatever the user can mend.
    """
    refuse_out_of_range(config)
    if config.output:
        claim_file(config.output, config.overwrite)
    sets = {
        kind: read_sets(getattr(config, kind), kind, config.limit, config.columns) for kind in ("id", "ood", "probe")
    }
    return _carried_out(config, config.model, None, None, sets)


def _carried_out(
    config: EvalConfig, model: Any, tokenizer: Any, given: Given | None, sets: dict[str, dict[str, list[Example]]]
) -> Scores:
    """What is to be measured, on what the sets call for.

    Args:
        given: the adapters; those of the settings where None.
    """
    refuse_unmeasurable(config, any(sets.values()), bool(config.adapter or (given and given.adapters)))
    if config.protect:
        protected_files(config.protect)  # refused, or fetched, before a model is loaded
    harness = Harness.of(config.tasks, config.include_path, config.limit) if config.tasks else None
    given = given or Given.of(config.adapter)
    labels = given.labels()
    if not labels and any(isinstance(s[0], Labelled) for kind in sets.values() for s in kind.values()):
        raise FinepointError("labelled texts need a classifier: give the --adapter that holds its trained head")
    if labels and harness:
        raise FinepointError("the adapter is a classifier's, and tasks ask a language model; leave out --tasks")
    if labels and config.protect:
        raise FinepointError(CLASSIFIERS)
    for named in sets.values():
        for name, examples in named.items():
            refuse_other_task(name, examples, labels)
    leaked = _leaks(given, sets)
    found = given.on(model, tokenizer, config.dtype, config.quantise, config.any_base, config.any_dtype)
    writer = to_measure(found.model, found.tokenizer)
    protect = examples_to_keep(config.protect, config.protect_examples, writer) if config.protect else []
    trained = [example for examples in sets["id"].values() for example in examples]
    sets = {kind: {name: learned_turns(examples, config.chat_turns) for name, examples in of.items()}
            for kind, of in sets.items()}  # fmt: skip
    evaluation = Evaluation(**sets, max_length=config.max_length, new_tokens=config.new_tokens, harness=harness,
                            protect=protect, generate=config.generate,
                            trained_answers=frequent_answers(trained))  # fmt: skip
    scores = measured(found.model, found.tokenizer, evaluation, found.adapters, config.scale)
    for folder in leaked:
        scores["adapters"][folder]["leaks"] = leaked[folder]
    return scores


def _named(kind: str, data: Data) -> list[tuple[str, Rows]]:
    """Sets by name: as given, or one, by its kind."""
    if isinstance(data, Mapping):
        return list(data.items())
    return [(kind, data)] if isinstance(data, str | Path) or len(data) else []


def _examples(kind: str, name: str, rows: Rows) -> list[Example]:
    examples = read_examples(rows) if isinstance(rows, str | Path) else as_examples(rows)
    if isinstance(examples[0], Text) and kind != "probe":
        raise FinepointError(f"{kind} {name!r}: plain text has no accuracy; give it as probe")
    return examples


def _leaks(given: Given, sets: Mapping[str, Sets]) -> dict[str, dict[str, dict[str, int]]]:
    """Of each adapter that it is known of: which sets hold examples that it was trained on; a line says so."""
    named = {f"{kind} {name}": examples for kind, of in sets.items() for name, examples in of.items()}
    seen = {name: Seen.beside(str(folder)) for name, folder in given.folders.items()}
    found = {name: leaks(digests, named) for name, digests in seen.items() if digests}
    for name, leaked in found.items():
        warn_of_leaks(leaked, name)
    return found
