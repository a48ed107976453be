"""What an adapter remembers of its base's form, beyond the values at its entries: tied weights and the vocabulary.

A tied weight and an untied one may hold the same values, yet a change of one then is, or is not, a change of the other.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn


def form_of(model: nn.Module) -> dict[str, Any]:
    """The names of weights that are tied to each other, and how many token embeddings there are; JSON-ready."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        groups[id(weight)].append(name)
    form: dict[str, Any] = {"tied": sorted(sorted(group) for group in groups.values() if len(group) > 1)}
    with suppress(AttributeError, NotImplementedError, IndexError):  # no language model of transformers'
        form["vocabulary"] = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return form


def differences(form: Mapping[str, Any], model: nn.Module, names: Iterable[str]) -> list[str]:
    """How the model's form differs from the base's, as far as a change of these weights is concerned.

    Args:
        form: the base's, as `form_of` gives it; empty where it is not known.
    """
    if "tied" not in form:
        return []
    here = form_of(model)
    found = []
    if "vocabulary" in form and here.get("vocabulary", form["vocabulary"]) != form["vocabulary"]:
        found.append(f"the model has {here['vocabulary']} token embeddings, the adapter's base {form['vocabulary']}")
    for name in names:
        base, model_ = (_tied_to(name, one) for one in (form, here))
        if base != model_:
            told = [" and ".join(sorted(others)) or "no other weight" for others in (model_, base)]
            found.append(f"{name}: tied to {told[0]} in the model, to {told[1]} in the adapter's base")
    return found


def _tied_to(name: str, form: Mapping[str, Any]) -> set[str]:
    return {other for group in form.get("tied", ()) if name in group for other in group} - {name}
