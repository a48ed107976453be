"""What a model in training carries, and what can be asked of it: its tuner, its adapter, a report, a way to the hub."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from finepoint.adapters.adapter import SparseAdapter, applied_to
from finepoint.adapters.hub import push
from finepoint.data.leaks import Seen
from finepoint.errors import FinepointError
from finepoint.runtime.files import write_atomic
from finepoint.tuner.tuner import CONTAINER, SparseTuner

SESSION = "_finepoint_session"  # the attribute of a model in training
WEIGHTS = "model.safetensors"  # where transformers looks for what to resume from
ATTACHED = ("save_pretrained", "push_to_hub", "print_trainable_parameters")
Results = Mapping[str, Mapping[str, float]]
"""What was measured: data -> metric -> value."""


@dataclass
class Session:
    """What a model in training carries: its tuner, what is known of it, and methods in the place of the model's own."""

    tuner: SparseTuner
    info: dict[str, Any]
    whole: tuple[str, ...] = ()
    seen: Seen | None = None
    """digests of the examples that entries were chosen by"""
    hook: RemovableHandle = None  # type: ignore[assignment]  # set as soon as the model is known to have this session

    def adapter(self) -> SparseAdapter:
        """What has been trained, as it stands.

        Raises:
            FinepointError: something is trained besides, which the adapter would not hold.
        """
        self.tuner.end_check()
        owned = {id(parameter) for parameter in self.tuner.parameters()}
        others = [name for name, parameter in self.tuner.model.named_parameters()
                  if parameter.requires_grad and id(parameter) not in owned]  # fmt: skip
        if others:
            raise FinepointError(f"weights are trained that an adapter of chosen entries does not hold: "
                                 f"{', '.join(others[:3])}{', ..' if len(others) > 3 else ''} ({len(others)}); freeze "
                                 "them, or name them in sparsify's whole=..")  # fmt: skip
        return self.tuner.adapter(full=self.whole, info=self.info)

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None,
        push_to_hub: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        """In the place of the model's own: the adapter, and the deltas where a stock Trainer resumes from.

        The latter lie in `model.safetensors` by the names they have in the model, with their indices. No config.json is
        beside it, so that nothing takes the folder for a whole model.
        """
        if is_main_process:
            folder = self.adapter().save(save_directory, overwrite=True)
            if self.seen:
                self.seen.save(folder)
            kept = {f"{CONTAINER}.{name.replace('.', '/')}.{what}": getattr(entries, what).detach().cpu()
                    for name, entries in self.tuner.entries.items() for what in ("delta", "indices")}  # fmt: skip
            kept |= {f"{CONTAINER}.{name}": tensor for name, tensor in self.tuner.kept().items()}
            write_atomic(folder / WEIGHTS, lambda path: save_file(kept, path, {"format": "pt"}))
            if push_to_hub:
                self.push_to_hub(kwargs.get("repo_id") or folder.name, token=kwargs.get("token"))

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None, **_: Any) -> str:
        """In the place of the model's own: sends the adapter alone."""
        return push_to_hub(self.tuner.model, repo_id, private=private, token=token)

    def print_trainable_parameters(self) -> None:
        """PEFT's habit: one line on stdout."""
        print(trainable_parameters(self.tuner.model))

    def after_load(self, model: nn.Module, result: Any) -> None:
        """The frozen weights are not missing from a state dict of deltas: they are the base's."""
        if not any(name.startswith(f"{CONTAINER}.") for name in result.missing_keys):
            result.missing_keys.clear()


def session_of(model: nn.Module) -> Session:
    """The session of a model in training.

    Raises:
        FinepointError: it has none.
    """
    if SESSION not in vars(model):
        raise FinepointError("the model is not in training by finepoint.sparsify or finepoint.load(.., trainable=True)")
    session: Session = vars(model)[SESSION]
    return session


def attach(model: nn.Module, session: Session) -> None:
    """Hangs a session and its methods on a model: on the object, not its class, so that a deep copy has its own."""
    session.hook = model.register_load_state_dict_post_hook(session.after_load)
    vars(model)[SESSION] = session
    for name in ATTACHED:
        vars(model)[name] = getattr(session, name)


def tuner_of(model: nn.Module) -> SparseTuner:
    """The tuner behind a model that `sparsify` or `load` made trainable.

    Raises:
        FinepointError: there is none.
    """
    return session_of(model).tuner


def adapter_of(model: nn.Module, results: Results | None = None) -> SparseAdapter:
    """The change of a model in training, or the one adapter that is applied to it.

    Raises:
        FinepointError: there is none, or several adapters are applied.
    """
    if SESSION in vars(model):
        adapter = session_of(model).adapter()
    else:
        applied = applied_to(model)
        if len(applied) != 1:
            said = f"{len(applied)} adapters are" if applied else "no adapter is"
            raise FinepointError(f"the model is not in training (finepoint.sparsify) and {said} applied to it "
                                 "(finepoint.load); there is no one change to save")  # fmt: skip
        (adapter,) = applied
    extra = {"results": _plain(results)} if results else {}
    return replace(adapter, info=adapter.info | extra)


def trainable_parameters(model: nn.Module) -> str:
    """How much of a model is trained, in the words of PEFT's `print_trainable_parameters`.

    Raises:
        FinepointError: the model is not in training.
    """
    tuner = tuner_of(model)
    owned = {id(parameter) for parameter in tuner.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in owned)
    return f"trainable params: {tuner.count:,} || all params: {total:,} || trainable%: {100 * tuner.count / total:.4f}"


def push_to_hub(
    model: nn.Module | SparseAdapter | str | Path, repo_id: str, *, results: Results | None = None,
    base_model: str | None = None, license: str | None = None,  # noqa: A002 - as the hub calls it
    private: bool | None = None, message: str = "Upload adapter", token: str | None = None,
) -> str:  # fmt: skip
    """Sends an adapter with its model card to the hub; returns the commit's address.

    Args:
        model: a model with a change (see `save`), an adapter, or an adapter folder.
        results: what was measured, for the model card: data -> metric -> value.
        base_model: the base's id on the hub, where the adapter knows it by another name.
        license: as the hub calls it, e.g. `apache-2.0`.

    Raises:
        FinepointError: there is no adapter, or the hub refuses.
    """
    if isinstance(model, nn.Module):
        adapter = adapter_of(model, results)
    else:
        adapter = model if isinstance(model, SparseAdapter) else SparseAdapter.load(str(model))
    extra: dict[str, Any] = {"results": _plain(results)} if results else {}
    extra |= {key: value for key, value in (("base_model", base_model), ("license", license)) if value}
    with TemporaryDirectory() as folder:
        path = replace(adapter, info=adapter.info | extra).save(folder)
        return push(path, repo_id, private=private, message=message, token=token)


def _plain(results: Results | None) -> dict[str, dict[str, float]]:
    """Results as plain numbers, ready for JSON."""
    return {data: {metric: float(value) for metric, value in metrics.items()}
            for data, metrics in (results or {}).items()}  # fmt: skip
