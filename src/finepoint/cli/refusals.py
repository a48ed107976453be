"""What is refused at once: mistakes that can be seen without torch, by the functions that would refuse them later.

Importing torch and transformers and loading a model take seconds; nobody should wait for them to learn of a misspelt
word.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.runtime.settings import default_of, refuse_unregistered, sections


def refuse_at_once(command: str, config: Any) -> None:
    """Refuses a name, data, a model, an adapter or a target that a command is told and that do not exist, and settings
    that do not go together.

    Raises:
        FinepointError: one of them is so.
    """
    _refuse_words(config)
    for data in _data(config):
        from finepoint.data.sources import refuse_absent

        refuse_absent(data)
    for model in filter(None, (getattr(config, name, None) for name in ("model", "base", "tuned"))):
        from finepoint.models.names import refuse_absent as refuse_no_model

        if isinstance(model, str):  # `generate --base` is a switch
            refuse_no_model(model)
    for folder in _adapters(command, config):
        from finepoint.adapters.hub import PEFT_CONFIG, is_hub_id, refuse_no_adapter

        others = [PEFT_CONFIG] + ["gguf-patch.safetensors"] * (command == "patch")  # which is taken as it is
        if not is_hub_id(folder) and not any((Path(folder) / name).is_file() for name in others):
            refuse_no_adapter(folder)
    if getattr(config, "model", None) and (targets := getattr(config, "targets", None)):
        _refuse_targets(config.model, targets)
    if command in TOGETHER:
        TOGETHER[command](config)
    if command in WRITING and config.output and not getattr(config, "resume", False) and distributed.is_first():
        from finepoint.runtime.files import refuse_occupied

        refuse_occupied(config.output, config.overwrite)


def _refuse_words(config: Any) -> None:
    """Refuses names of nothing, and what is spelled in a way that means nothing."""
    if rule := getattr(config, "rule", None):
        from finepoint.selection.rules import checked_options, rule_named

        checked_options(rule_named(rule), getattr(config, "rule_options", {}))
    refuse_unregistered(config)
    if structure := getattr(config, "structure", None):
        from finepoint.selection.settings import check_structure, share_within

        check_structure(structure)
        share_within(config.within, structure, config.density)
    if getattr(config, "indices", None) and not getattr(config, "refresh", None):  # which chooses anew
        _refuse_a_choice(config)


def _refuse_a_choice(config: Any) -> None:
    """Refuses what says how entries are chosen, beside entries that are given."""
    looked_at = ("indices", "exclude")
    for known in dict(sections(type(config)))["which entries"]:
        if known.name not in looked_at and getattr(config, known.name) not in (default_of(known), "auto"):
            raise FinepointError(f"--indices trains the entries of {config.indices} as they are; leave out "
                                 f"--{known.name.replace('_', '-')}, or --indices")  # fmt: skip


def _data(config: Any) -> Iterable[Any]:
    """What a command's settings name as data."""
    yield from filter(None, (getattr(config, name, None) for name in ("data", "validation", "fisher_data", "prompts")))
    for kind in ("id", "ood", "probe"):
        if named := getattr(config, kind, []):
            from finepoint.evaluation.settings import files_by_name

            yield from files_by_name(named, kind).values()
    for files in (*getattr(config, "tasks", {}).values(), getattr(config, "probes", {})) if _is_study(config) else ():
        yield from files.values()
    if protect := getattr(config, "protect", None):
        from finepoint.data.recipes.table import OWN, TEXTS, text_file

        named = [protect] if isinstance(protect, str) else protect
        yield [text_file(name) for name in named if name not in (*TEXTS, OWN)]


def _is_study(config: Any) -> bool:
    """Whether `tasks` are files by name, and not names of lm-evaluation-harness."""
    return isinstance(getattr(config, "tasks", None), dict)


def _adapters(command: str, config: Any) -> Iterable[str]:
    """The adapter folders that it names; a run that goes on has its entries already."""
    names = ["adapter", "exclude"]
    names += ["indices"] if not getattr(config, "resume", False) else []
    names += ["folder"] if command in ("inspect", "verify") else []
    for name in names:
        found = getattr(config, name, None) or []
        yield from [found] if isinstance(found, str) else found


def _refuse_targets(model: str, targets: Any) -> None:
    """Refuses targets that a model at hand cannot have."""
    from finepoint.models.names import folder_of, stored_weights, words_of
    from finepoint.selection.patterns import PRESET_NAMES, pattern_list, refuse_unmatched

    if set(pattern_list(targets)) - set(PRESET_NAMES):
        folder = folder_of(model)
        names = stored_weights(folder)
        refuse_unmatched(targets, names, words_of(folder, names))


def _train(config: Any) -> None:
    from finepoint.training.resolve import resolve

    density = None if config.density == "auto" else config.density
    resolve(replace(config, density=density, fit=False))
    if config.density != "auto":  # a search goes on with its trials
        _refuse_no_checkpoint(config)


def _align(config: Any) -> None:
    from finepoint.alignment.resolve import resolve

    resolve(config)
    _refuse_no_checkpoint(config)


def _refuse_no_checkpoint(config: Any) -> None:
    from finepoint.training.resolve import has_checkpoint, no_checkpoint

    folder = Path(config.output)
    if config.resume and distributed.is_first() and not has_checkpoint(folder):
        raise no_checkpoint(folder)


def _compare(config: Any) -> None:
    from finepoint.studies.study import make_study

    make_study(config)


def _sequence(config: Any) -> None:
    from finepoint.studies.ways import check

    check(config)


def _select(config: Any) -> None:
    from finepoint.selection.settings import check_select

    check_select(config)


def _eval(config: Any) -> None:
    from finepoint.evaluation.settings import refuse_unmeasurable

    refuse_unmeasurable(config, bool(config.id or config.ood or config.probe), bool(config.adapter))


TOGETHER: dict[str, Callable[[Any], None]] = {
    "train": _train, "align": _align, "compare": _compare, "sequence": _sequence, "select": _select, "eval": _eval,
}  # fmt: skip
"""By command: what its settings must have and be together."""
WRITING = ("train", "align", "select", "merge", "scale", "extract", "export", "import", "pull", "demo")
"""Those whose output must be an empty folder, or told to be overwritten."""
