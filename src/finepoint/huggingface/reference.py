"""The reference model of DPO and GRPO: the policy's own weights, with what was trained taken out while it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from finepoint.huggingface.session import tuner_of
from finepoint.tuner.interface import Tuner

Without = Callable[[], AbstractContextManager[None]]
"""Inside such a context a model computes what the reference computes."""


def reference(model: nn.Module) -> "Reference":
    """What TRL takes for a reference model, without a second copy: the model as it is now (new: the base).

    For `DPOTrainer(model, ref_model=finepoint.reference(model), ..)`. GRPOTrainer loads a copy of its own where
    `beta` is set; give it `beta=0`, then `trainer.beta, trainer.ref_model = 0.04, finepoint.reference(model)`.

    Raises:
        FinepointError: the model is not in training by `sparsify` or `load(.., trainable=True)`.
    """
    return Reference(model, tuner_of(model).as_it_is())


def as_it_is(tuner: Tuner) -> Without:
    """Contexts in which the tuner's model computes what it computes now."""
    return tuner.as_it_is()


class Reference(nn.Module):
    """Calls another model inside a context that makes it the reference, in eval mode; owns no parameter.

    The context is entered and left by hooks, which run whoever replaces `forward`, as TRL and accelerate do.
    """

    def __init__(self, model: nn.Module, without: Without) -> None:
        super().__init__()
        self._policy = (model,)  # in a tuple: its parameters are not this module's
        self._without = without
        self._inside: list[AbstractContextManager[None]] = []
        self._training: list[nn.Module] = []
        self.register_forward_pre_hook(Reference._enter)
        self.register_forward_hook(Reference._leave, always_call=True)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._policy[0](*args, **kwargs)

    # What TRL asks of a model beside its forward.

    @property
    def config(self) -> Any:
        return self._policy[0].config

    @property
    def base_model(self) -> nn.Module:
        return self._policy[0].base_model  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self._policy[0].device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self._policy[0].dtype  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Module:
        return self._policy[0].get_output_embeddings()  # type: ignore[operator]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The policy's, so that what is kept by a digest of the reference is not taken for another model's."""
        return self._policy[0].state_dict(*args, **kwargs)

    def _enter(self, args: Any) -> None:
        inside = self._without()
        inside.__enter__()
        self._inside.append(inside)
        self._training = [module for module in self._policy[0].modules() if module.training]
        self._policy[0].eval()

    def _leave(self, args: Any, output: Any) -> None:
        for module in self._training:
            module.training = True
        self._training = []
        while self._inside:
            self._inside.pop().__exit__(None, None, None)
