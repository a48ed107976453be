"""PeftTuner: LoRA and DoRA through PEFT, with the interface of the other tuners; PEFT's layers do the work."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.fingerprint import FINGERPRINT
from finepoint.adapters.format import CONFIG
from finepoint.adapters.peft import PEFT_TENSORS, transposed_layers, updates
from finepoint.errors import FinepointError, needing, reason_of
from finepoint.runtime.devices import in_float64, norm_of
from finepoint.runtime.files import move_files, partial_folder, write_json, writing
from finepoint.runtime.tensor_files import opened
from finepoint.tuner.interface import Tuner
from finepoint.tuner.tuner import CONTAINER, SparseTuner


class PeftTuner(Tuner):
    """Puts low-rank factors beside linear layers' weights; the model stays the same object, with layers wrapped.

    Args:
        model: frozen until `close`, which gives back its own layers.
        layers: names of the linear layers to adapt.
        head: names of the weights of a new classification head, which is trained whole.
        seed: of the factors' first values.
        dora: DoRA instead of LoRA.
        beside: a tuner of the same model, which trains entries of its weights at the same time and is closed later.

    Raises:
        FinepointError: PEFT is not installed, or the model has another tuner.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], head: Sequence[str] = (), *, rank: int, alpha: float,
        dropout: float = 0.0, dora: bool = False, seed: int = 0, beside: SparseTuner | None = None,
    ) -> None:  # fmt: skip
        with needing("a LoRA or DoRA baseline", "peft"):
            import peft
        if hasattr(model, CONTAINER) and beside is None:
            raise FinepointError("the model has a tuner already; close that one first")
        self.model = model
        self.scaling = alpha / rank
        self.transposed = transposed_layers(model)
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._attributes = set(vars(model))
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, target_modules=list(layers),
            modules_to_save=sorted({name.rpartition(".")[0] for name in head}) or None,
            fan_in_fan_out=layers[0] in self.transposed,
        )  # fmt: skip
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going
            torch.manual_seed(seed)
            try:
                self._peft: Any = peft.get_peft_model(model, config)
            except ValueError as error:  # a layer that PEFT does not wrap in such a model
                self._unwrap()
                said = reason_of(error)
                raise FinepointError(f"PEFT cannot put factors there: {said}; give other --targets") from error
        self._marks = beside is None
        if beside is None:
            setattr(model, CONTAINER, nn.ModuleDict())  # marks the model as being trained
        else:
            for delta in beside.parameters():  # PEFT freezes all that is not its own
                delta.requires_grad_(True)
        self._open = True
        self._start = {name: parameter.detach().clone() for name, parameter in self.trained().items()}

    def _unwrap(self) -> None:
        """Takes off what PEFT had wrapped when it stopped halfway."""
        for name, layer in [*self.model.named_modules()]:
            if isinstance(base := getattr(layer, "base_layer", None), nn.Module):
                self.model.set_submodule(name, base)
        self._leave_nothing()

    def _leave_nothing(self) -> None:
        """Has the model have the attributes that it had, and the flags of its parameters."""
        for attribute in set(vars(self.model)) - self._attributes:
            delattr(self.model, attribute)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags[name])

    def trained(self) -> dict[str, nn.Parameter]:
        """The factors, magnitudes and a new head's weights, by PEFT's names in the model."""
        return {name: parameter for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and not name.startswith(f"{CONTAINER}.")}  # fmt: skip

    def merged(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """The name, base, wide new value and stored new value of each adapted weight, one at a time."""
        from peft import get_peft_model_state_dict

        weights = {name.replace(".base_layer", "").replace(".original_module", ""): parameter
                   for name, parameter in self.model.named_parameters(remove_duplicate=False)}  # fmt: skip
        tensors = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        found = updates(tensors, lambda *_: self.scaling, self.transposed)
        for name in (name for name in weights if name in found):
            yield name, weights[name].detach(), *found[name].of(weights[name])

    def changed(self) -> int:
        """How many entries of the weights, factors folded in, hold another value than the base's."""
        return sum(int((stored != base).sum()) for _, base, _, stored in self.merged())

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of the change of all adapted weights, factors folded in, but the excluded ones."""
        left_out = set(exclude)
        return norm_of(
            in_float64(wide) - in_float64(base) for name, base, wide, _ in self.merged() if name not in left_out
        )

    def adapter(
        self, store: str = "auto", full: Iterable[str] = (), info: Mapping[str, Any] | None = None
    ) -> SparseAdapter:
        """Whole weights, factors folded in, as an adapter on the CPU; `store` and `full` change nothing here."""
        return SparseAdapter({name: Change.whole(stored) for name, _, _, stored in self.merged()}, dict(info or {}))

    def save(self, folder: Path, adapter: SparseAdapter, compact: bool = False) -> list[Path]:
        """Writes PEFT's files, and what the adapter says of itself beside them; returns the file with the tensors."""
        self._peft.peft_config["default"].base_model_name_or_path = adapter.info.get("base_model")
        with partial_folder(folder) as made, writing(folder):
            self._peft.save_pretrained(str(made), save_embedding_layers=False)
            write_json(made / CONFIG, {"info": adapter.info, **self._known(adapter)})
            move_files(made, folder)
        return [folder / PEFT_TENSORS]

    def scaler(self) -> Callable[[float], None]:
        """What scales LoRA's change as it is now, by its second factor; of DoRA also the way of the magnitudes."""
        now = {name: value.detach().clone() for name, value in self.trained().items()}

        @torch.no_grad()
        def scale_(scale: float) -> None:
            for name, value in self.trained().items():
                first = "lora_A" in name or "lora_embedding_A" in name  # the second one starts at 0
                value.copy_(now[name] if scale == 1 or first else self._start[name].lerp(now[name], scale))

        return scale_

    def start_from_(self, folder: Path) -> None:
        """Goes on from the factors that `save` wrote.

        Raises:
            FinepointError: they are of other layers, or another rank.
        """
        from peft import set_peft_model_state_dict

        with opened(folder / PEFT_TENSORS) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        try:
            missed = set_peft_model_state_dict(self._peft, tensors).unexpected_keys
        except RuntimeError as error:
            raise FinepointError(f"{folder} cannot be gone on from: {reason_of(error)}") from error
        if missed:
            raise FinepointError(f"{folder} cannot be gone on from: it is of another layer, {missed[0]}")

    def _known(self, adapter: SparseAdapter) -> dict[str, Any]:
        """What is written of the base beneath the factors."""
        dtype = str(next(iter(self.model.parameters())).dtype).removeprefix("torch.")
        known = adapter.base.get(FINGERPRINT)
        return {"base": {FINGERPRINT: known, "dtype": dtype}} if known else {}

    def as_it_is(self) -> Callable[[], AbstractContextManager[None]]:
        """Contexts in which the factors take no part; before they are trained they change nothing."""
        return self.disabled

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what the base computes."""
        with self._peft.disable_adapter():
            yield

    def revert_(self) -> None:
        """Sets the factors, magnitudes and a new head back to where they began, where they change nothing."""
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(self._start[name])

    def close(self) -> None:
        """Gives back the plain base model: PEFT's layers go, with what they learned; closing twice is harmless."""
        if not self._open:
            return
        self._open = False
        self._peft.unload()
        if self._marks:
            delattr(self.model, CONTAINER)
        self._leave_nothing()
