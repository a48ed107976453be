"""DenseTuner: whole weights trained in place, as full fine-tuning does; what SparseTuner is compared with.

Weights of float32 and float64 are trained themselves. Half-precision weights get float32 masters, which hang on the
model where optimizers and gradient clipping find them: a gradient moves onto its master as soon as it is made, and the
weight takes the master's value, rounded, after each step. The base waits in a temporary file, not in memory, so that
the memory a run takes is what its method takes.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.change import Change
from finepoint.adapters.fingerprint import form_of
from finepoint.errors import FinepointError
from finepoint.models.weights import Master, Masters
from finepoint.runtime.devices import in_float64, norm_of
from finepoint.runtime.files import writing
from finepoint.tuner.interface import Tuner
from finepoint.tuner.optimizer_hooks import follow_after_steps, stop_following
from finepoint.tuner.tuner import CONTAINER


class DenseTuner(Tuner):
    """Makes whole weights of a model trainable, in place; the model stays the same object.

    Args:
        model: all its other parameters are frozen until `close`.
        names: the weights to train, of any shape; a tied weight under any of its names.

    Raises:
        FinepointError: no weight at all, an unknown one, one that is not floating point, a model with a tuner.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        if hasattr(model, CONTAINER):
            raise FinepointError("the model has a tuner already; close that one first")
        self.model = model
        self.weights = _found(model, names)
        self.whole = self.weights.keys()
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._base = _kept({name: weight.detach().cpu().contiguous() for name, weight in self.weights.items()})

        model.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        masters = {name: Master(weight) for name, weight in self.weights.items() if weight.itemsize == 2}
        self.masters = Masters({name.replace(".", "/"): master for name, master in masters.items()})
        self._trained = {name: masters[name].value if name in masters else w for name, w in self.weights.items()}
        setattr(model, CONTAINER, self.masters)
        follow_after_steps(self.masters)
        self._open = True

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights themselves, or their masters, by weight name."""
        return dict(self._trained)

    def follow_(self) -> None:
        """Writes the masters into their weights now. Only needed after changing masters by hand."""
        for master in self.masters.values():
            master.follow_()  # type: ignore[operator]

    def base(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights as they were before, one after the other, on their devices."""
        for name, weight in self.weights.items():
            yield name, self._base.get_tensor(name).to(weight.device)

    def changed(self) -> int:
        """How many entries of the trained weights hold another value than the base's."""
        self.follow_()
        return sum(int((self.weights[name] != base).sum()) for name, base in self.base())

    def norm(self, exclude: Iterable[str] = ()) -> float:
        """The Euclidean norm of the change of all trained weights but the excluded ones."""
        left_out = set(exclude)
        return norm_of(
            in_float64(self._trained[name].detach()) - in_float64(base)
            for name, base in self.base()
            if name not in left_out
        )

    def adapter(
        self, store: str = "auto", full: Iterable[str] = (), info: Mapping[str, Any] | None = None
    ) -> SparseAdapter:
        """The trained weights, whole, as an adapter on the CPU; `store` and `full` change nothing here."""
        self.follow_()
        changes = {name: Change.whole(weight.detach().cpu().clone()) for name, weight in self.weights.items()}
        return SparseAdapter(changes, dict(info or {}), form_of(self.model))

    def scaler(self) -> Callable[[float], None]:
        """What scales the change of whole weights as it is now; it waits in a temporary file, as the base does."""
        now = _kept({name: value.detach().cpu().contiguous() for name, value in self._trained.items()})

        @torch.no_grad()
        def scale_(scale: float) -> None:
            for name, base in self.base():
                wide = now.get_tensor(name).to(base.device)
                self._trained[name].copy_(wide if scale == 1 else base.to(wide).lerp(wide, scale))
            self.follow_()

        return scale_

    def round_(self, dtype: torch.dtype) -> None:
        """Rounds all that is trained to a narrower dtype, as if nothing wider were kept: the control to masters."""
        with torch.no_grad():
            for value in self._trained.values():
                value.copy_(value.to(dtype))
        self.follow_()

    def revert_(self) -> None:
        """Restores the base's exact bits."""
        with torch.no_grad():
            for name, base in self.base():
                self.weights[name].copy_(base)
                if self._trained[name] is not self.weights[name]:
                    self._trained[name].copy_(base)

    def close(self) -> None:
        """Gives back the plain model with the trained values in its weights; closing twice is harmless."""
        if not self._open:
            return
        self._open = False
        self.follow_()
        for master in self.masters.values():
            master.handle.remove()  # type: ignore[union-attr, operator]
        stop_following(self.masters)
        delattr(self.model, CONTAINER)
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(self._flags[name])
        del self._base


def _kept(tensors: dict[str, Tensor]) -> Any:
    """Tensors on disk, open for reading; the file has no name any more and goes with whoever holds it."""
    with tempfile.TemporaryDirectory(prefix="finepoint-", ignore_cleanup_errors=True) as folder, writing(Path(folder)):
        save_file(tensors, Path(folder) / "base.safetensors")
        return safe_open(Path(folder) / "base.safetensors", framework="pt")


def _found(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The weights by their first names, in the model's order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = set()
    for name in names:
        if name not in parameters:
            raise FinepointError(f"the model has no weight {name!r} to train")
        if not parameters[name].is_floating_point():
            raise FinepointError(f"{name} is {parameters[name].dtype}: a quantised weight cannot be trained in place")
        wanted.add(id(parameters[name]))
    if not wanted:
        raise FinepointError("there is no weight to train")
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
