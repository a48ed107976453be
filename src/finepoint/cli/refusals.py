"""What is refused at once: mistakes that can be seen without torch, by the functions that would refuse them later.

Importing torch and transformers and loading a model take seconds; nobody should wait for them to learn of a misspelt
word.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def refuse_at_once(command: str, config: Any) -> None:
    """Refuses a rule, data, a model, an adapter or a target that a command names and that do not exist.

    Raises:
        FinepointError: one of them is so.
    """
    if rule := getattr(config, "rule", None):
        from finepoint.selection.rules import checked_options, rule_named

        checked_options(rule_named(rule), getattr(config, "rule_options", {}))
    for data in _data(config):
        from finepoint.data.sources import refuse_absent

        refuse_absent(data)
    if model := getattr(config, "model", None):
        from finepoint.models.names import refuse_absent as refuse_no_model

        refuse_no_model(model)
    for folder in _adapters(command, config):
        from finepoint.adapters.hub import is_hub_id, refuse_no_adapter

        if not Path(folder).exists() and not is_hub_id(folder):
            refuse_no_adapter(folder)
    if model and (targets := getattr(config, "targets", None)):
        _refuse_targets(model, targets)


def _data(config: Any) -> Iterable[Any]:
    """What a command's settings name as data."""
    yield from filter(None, (getattr(config, name, None) for name in ("data", "validation", "fisher_data", "prompts")))
    for named in [*getattr(config, "id", []), *getattr(config, "ood", []), *getattr(config, "probe", [])]:
        if place := named.partition("=")[2]:
            yield place
    if protect := getattr(config, "protect", None):
        from finepoint.data.recipes.table import OWN, TEXTS, text_file

        named = [protect] if isinstance(protect, str) else protect
        yield [text_file(name) for name in named if name not in (*TEXTS, OWN)]


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
