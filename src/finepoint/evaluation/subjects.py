"""Who is asked or measured: a model with its tokenizer, and adapters on it, from folders or from memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.bases import in_wider_dtype, rebased
from finepoint.adapters.peft import info_of, is_peft, load_merged
from finepoint.data.tokens import padding_id
from finepoint.errors import FinepointError
from finepoint.models.loading import load_model, load_tokenizer
from finepoint.runtime.settings import DType, Quantise

Adapter = str | Path | SparseAdapter
Adapters = Adapter | Sequence[Adapter] | Mapping[str, Adapter] | None
"""a folder (also LoRA's or DoRA's as PEFT writes them), an adapter in memory, several of them, or several by name"""


@dataclass(frozen=True)
class Subjects:
    """A model, its tokenizer, and adapters of it by name; none of them is applied."""

    model: Any
    tokenizer: Any
    adapters: dict[str, SparseAdapter]


@dataclass(frozen=True)
class Given:
    """Adapters by name before their model is there: LoRA's factors can be folded in only then."""

    adapters: dict[str, SparseAdapter | Path]
    infos: dict[str, Mapping[str, Any]]
    """what each says of itself"""
    folders: dict[str, str | Path]
    """where those that were read lie"""

    @staticmethod
    def of(adapters: Adapters) -> "Given":
        """Reads them.

        Raises:
            FinepointError: a folder that holds none, a damaged file; two of one name.
        """
        found: dict[str, SparseAdapter | Path] = {}
        folders: dict[str, str | Path] = {}
        for name, adapter in _named(adapters):
            if name in found:
                raise FinepointError(f"the adapter {name} is given twice")
            if isinstance(adapter, SparseAdapter):
                found[name] = adapter
            else:
                folders[name] = adapter
                found[name] = Path(adapter) if is_peft(adapter) else SparseAdapter.load(adapter)
        return Given(found, {name: each.info if isinstance(each, SparseAdapter) else info_of(each)
                             for name, each in found.items()}, folders)  # fmt: skip

    def labels(self) -> tuple[str, ...]:
        """The classes, where the adapters are a classifier's.

        Raises:
            FinepointError: they are for different tasks or classes.
        """
        tasks = {(info.get("task", "causal"), tuple(info.get("labels") or ())) for info in self.infos.values()}
        if len(tasks) > 1:
            raise FinepointError("the adapters are for different tasks or classes; evaluate them one at a time")
        return next(iter(tasks))[1] if tasks else ()

    def on(
        self, model: Any, tokenizer: Any = None, dtype: DType = "auto", quantise: Quantise | None = None,
        any_base: bool = False, any_dtype: bool = False,
    ) -> Subjects:  # fmt: skip
        """The adapters with their model.

        Args:
            model: one in memory, or what `load_model` takes, which is loaded.
            tokenizer: where not given, that of the model's folder or hub id.
            any_base, any_dtype: the adapters are taken on another base, and on wider weights.

        Raises:
            FinepointError: there is no such model or tokenizer, or PEFT's factors do not fit the model.
        """
        if isinstance(model, str | Path):
            tokenizer = tokenizer or load_tokenizer(str(model))
            labels = self.labels()
            model = load_model(str(model), dtype, labels, quantise=quantise)
            if labels:
                model.config.pad_token_id = padding_id(tokenizer, model)
        tokenizer = tokenizer or _tokenizer_of(model)
        found = {}
        for name, adapter in self.adapters.items():
            whole = adapter if isinstance(adapter, SparseAdapter) else load_merged(adapter, model)
            whole = rebased(whole, model) if any_base else whole
            found[name] = in_wider_dtype(whole, model) if any_dtype else whole
        return Subjects(model, tokenizer, found)


def _named(adapters: Adapters) -> list[tuple[str, Adapter]]:
    """Adapters with their names: as given, a folder's own, or `adapter` and a number."""
    if adapters is None:
        return []
    several: Any = [adapters] if isinstance(adapters, str | Path | SparseAdapter) else adapters
    if isinstance(several, Mapping):
        return list(several.items())
    return [(_name(number, each), each) for number, each in enumerate(several)]


def _name(number: int, adapter: Adapter) -> str:
    if not isinstance(adapter, SparseAdapter):
        return str(adapter)
    return f"adapter {number + 1}" if number else "adapter"


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer of the place that a model in memory was loaded from."""
    place = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    if not place:
        raise FinepointError("the model does not tell where it was loaded from; give its tokenizer as well")
    try:
        return load_tokenizer(place)
    except FinepointError as error:
        raise FinepointError(f"{error}; give the model's tokenizer as well") from error
