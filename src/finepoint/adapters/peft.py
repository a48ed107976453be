"""LoRA and DoRA as PEFT writes them, folded into whole weights, so that all methods are applied and measured alike."""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.calls import used_beside_calls
from finepoint.adapters.change import Change
from finepoint.adapters.fingerprint import FINGERPRINT, is_fingerprint
from finepoint.adapters.format import CONFIG, TENSORS, check_info, say_unfinished
from finepoint.adapters.hub import PEFT_CONFIG as PEFT_CONFIG
from finepoint.adapters.peft_config import LORA, check_fields, check_targets, saved_whole, scaling_of
from finepoint.errors import FinepointError
from finepoint.models.quantised import is_quantised
from finepoint.models.weights import names_of_weights
from finepoint.runtime.files import read_json
from finepoint.runtime.tensor_files import DTYPES, Form, forms, opened

logger = logging.getLogger(__name__)
PEFT_TENSORS = "adapter_model.safetensors"
SPARSE = "sparse"  # folder beside PEFT's files, with the chosen entries that were trained along (RoSA)
PREFIX = "base_model.model."  # of every name in PEFT's file
# What follows `.lora_` in a name.
KINDS = ("A.weight", "B.weight", "magnitude_vector", "embedding_A", "embedding_B")


@dataclass(frozen=True)
class Update:
    """What a PEFT adapter makes of one weight: factors are added to it, or another takes its place, or both."""

    name: str
    whole: Tensor | None = None
    """replaces the base's"""
    a: Tensor | None = None
    b: Tensor | None = None
    """(rank, in) and (out, rank) of a matrix (out, in)"""
    scaling: float = 1.0
    magnitude: Tensor | None = None
    """(out,) of DoRA"""
    transposed: bool = False
    """the weight is kept (in, out)"""

    def of(self, base: Tensor) -> tuple[Tensor, Tensor]:
        """The wide new value, and the value as stored in the base's dtype.

        LoRA, arXiv:2106.09685: W + scaling BA. DoRA, arXiv:2402.09353: its rows scaled to the trained magnitudes.

        Raises:
            FinepointError: the weight has another shape.
        """
        base = base.detach()
        new = base if self.whole is None else self.whole.detach().to(base.device)
        if self.a is not None and self.b is not None:
            new = _sum(new.T if self.transposed else new, self.a, self.b.to(base.device), self.scaling, self.name)
            if self.magnitude is not None:
                new = new * (self.magnitude.detach().to(new) / new.norm(dim=1))[:, None]
            new = new.T if self.transposed else new
        if new.shape != base.shape:
            raise FinepointError(f"the adapter does not fit this model: {self.name} is {tuple(base.shape)} there, "
                                 f"{tuple(new.shape)} in the adapter")  # fmt: skip
        return new, torch.where(new == base, base, new.to(base.dtype)).contiguous()


def is_peft(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in PEFT's form."""
    return (Path(folder) / PEFT_TENSORS).is_file()


def info_of(folder: str | Path) -> dict[str, Any]:
    """What finepoint wrote of a PEFT adapter's origin: base model, task, labels, ..; empty where it wrote nothing."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return {}
    info: dict[str, Any] = read_json(path).get("info", {})
    check_info(path, info)
    return info


def base_of(folder: str | Path) -> dict[str, Any]:
    """What a PEFT adapter knows of its base, fingerprint and dtype, where finepoint wrote it; empty of others.

    Raises:
        FinepointError: what is written there is none.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return {}
    base = read_json(path).get("base", {})
    known = base.get(FINGERPRINT) if isinstance(base, dict) else base
    if known is None:
        logger.warning("%s does not know its base (an earlier finepoint wrote it): another one would not be noticed",
                       folder)  # fmt: skip
        return {}
    if not is_fingerprint(known) or not isinstance(base.get("dtype"), str):
        raise FinepointError(f"{path}: what it says of the base is damaged")
    return {FINGERPRINT: known, "dtype": base["dtype"]}


def sparse_beside(folder: str | Path) -> SparseAdapter | None:
    """The chosen entries that were trained along with the factors of a PEFT folder, if any were."""
    place = Path(folder) / SPARSE
    return SparseAdapter.load(place) if (place / TENSORS).is_file() else None


def forget_others(folder: Path, written: Sequence[Path]) -> None:
    """Takes away what an earlier run, by another method, has left beside the files that were written."""
    methods = ([TENSORS], [PEFT_TENSORS, PEFT_CONFIG], [f"{SPARSE}/{TENSORS}"])
    for tensors, *others in methods:
        if folder / tensors not in written:
            for name in (tensors, *others):
                (folder / name).unlink(missing_ok=True)


def load_merged(folder: str | Path, model: nn.Module) -> SparseAdapter:
    """A PEFT folder's LoRA or DoRA adapter as whole weights of `model`, which stays as it is.

    Chosen entries that were trained along belong to it.

    Raises:
        FinepointError: a damaged file, a kind of adapter other than plain LoRA and DoRA, a model it does not fit.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = read_peft(folder, model)
    if quantised := [name for name in found if name in weights and is_quantised(weights[name])]:
        raise FinepointError(
            f"{quantised[0]} is quantised, and {folder} is merged into float weights; give a float base"
        )
    if strange := set(found) - set(weights):
        raise FinepointError(f"{folder} does not fit this model, which has no weight {min(strange)!r}")
    beside = sparse_beside(folder)
    changes = dict(beside.changes) if beside else {}
    with beside.applied(model) if beside else nullcontext():
        for name in (name for name in weights if name in found):
            changes[name] = Change.whole(found[name].of(weights[name])[1])
    return SparseAdapter(changes, info_of(folder), base_of(folder))


def read_peft(folder: str | Path, model: nn.Module) -> dict[str, Update]:
    """What a PEFT folder's adapter makes of each weight, by name; those of a new head may be none of the model's.

    Args:
        model: the base, of which names, types of layers and ties are looked at, and no number.

    Raises:
        FinepointError: a damaged file; a field of its configuration whose value is not computed here as PEFT does.
    """
    source = str(folder)
    path = Path(folder) / PEFT_TENSORS
    say_unfinished(folder, info_of(folder))
    config = read_json(Path(folder) / PEFT_CONFIG)
    check_fields(config, LORA, source)
    with opened(path) as file:
        _check_factors(path, forms(file))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FinepointError(f"{path}: {key}: a number is not finite")
    found = updates(tensors, lambda module, rank: scaling_of(config, module, rank, source), transposed_layers(model))
    adapted = {name.removesuffix(".weight"): update for name, update in found.items() if update.a is not None}
    check_targets(config, list(adapted), source)
    _check_kinds(adapted, tensors, bool(config.get("use_dora")), model, source)
    _check_whole(found, config, model, source)
    _check_calls(adapted, model, source)
    return found


def _check_calls(adapted: Collection[str], model: nn.Module, source: str) -> None:
    """Refuses factors of a layer whose weight the model uses by itself: there PEFT's factors have no part."""
    layers = [name for name, module in model.named_modules() if name in adapted and hasattr(module, "weight")]
    if found := used_beside_calls(model, layers):
        raise FinepointError(f"{source}: target_modules adapts {found[0]}, whose weight {type(model).__name__} uses "
                             "without calling the layer: PEFT's factors have no part in that, and merged ones would; "
                             "train it without that module")  # fmt: skip


def _check_kinds(
    adapted: Mapping[str, Update], tensors: Mapping[str, Tensor], dora: bool, model: nn.Module, source: str
) -> None:
    """Whether each layer has the factors of its kind, which are those that PEFT looks for there."""
    modules = dict(model.named_modules())
    for module, update in adapted.items():
        embedding = f"{PREFIX}{module}.lora_embedding_A" in tensors
        if module in modules and embedding != isinstance(modules[module], nn.Embedding):
            raise FinepointError(
                f"{source}: the factors of {module} are not those of a {type(modules[module]).__name__}"
            )
        if dora and embedding:
            raise FinepointError(f"{source}: use_dora is not computed here for an embedding, {module}")
        if dora != (update.magnitude is not None):
            raise FinepointError(f"{source}: use_dora is {dora}, and the magnitudes of {module} are "
                                 f"{'missing' if dora else 'there'}")  # fmt: skip


def _check_whole(found: Mapping[str, Update], config: Mapping[str, Any], model: nn.Module, source: str) -> None:
    """Whether modules that were saved whole are there, and no change is of one of several tied weights alone."""
    whole = saved_whole(config, [name for name, _ in model.named_modules()], source)
    for module in whole:
        names = [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]
        if missing := sorted(set(names) - set(found)):
            raise FinepointError(f"{source}: modules_to_save names {module}, and the file lacks {missing[0]}")
    for group in names_of_weights(model):
        changed = [found[name] for name in group if name in found]
        if len(group) == 1 or not changed:
            continue
        field = next((field for update in changed if (field := _apart(update, whole))), None)
        alike = len(changed) == len(group) and all(_same(changed[0], update) for update in changed)
        if (field or len(changed) > 1) and not alike:
            raise FinepointError(
                f"{source}: {field or 'save_embedding_layers'} changes {changed[0].name}, which is tied to "
                f"{next(name for name in group if name != changed[0].name)} in the base; PEFT changes one of the two, "
                "here both would change: untie the base (tie_word_embeddings) or merge with PEFT"
            )


def _apart(update: Update, whole: Collection[str]) -> str | None:
    """The field by which PEFT gives a weight's module numbers of its own; None where it writes into the shared one."""
    if update.a is not None:
        return "target_modules"
    places = update.name.split(".")
    return "modules_to_save" if any(".".join(places[:n]) in whole for n in range(1, len(places))) else None


def _same(one: Update, other: Update) -> bool:
    factors = one.a is not None or other.a is not None
    return not factors and one.whole is not None and other.whole is not None and torch.equal(one.whole, other.whole)


def _check_factors(path: Path, known: Mapping[str, Form]) -> None:
    """Whether every factor has its partner, in a form that can be multiplied."""
    for key, (dtype, shape) in known.items():
        if dtype not in DTYPES:
            raise FinepointError(f"{path}: {key} is stored as {dtype}; expected floating-point numbers")
        stem, low_rank, kind = key.partition(".lora_")
        if not low_rank:
            continue
        if kind not in KINDS:
            raise FinepointError(f"{path}: {key} is nothing that plain LoRA or DoRA of a linear layer has")
        embedding = f"{stem}.lora_embedding_A" in known or f"{stem}.lora_embedding_B" in known
        factors = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        a, b = (known.get(f"{stem}.lora_{factor}", ("", ()))[1] for factor in factors)
        fits = len(a) == len(b) == 2 and a[0] == b[1]
        if not fits or (kind == "magnitude_vector" and shape != b[:1]):
            raise FinepointError(f"{path}: the factors of {stem} have shapes {a} and {b}, which do not go together")


def transposed_layers(model: nn.Module) -> set[str]:
    """The layers whose matrices the model keeps as (in, out): GPT-2's Conv1D, and embeddings."""
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D | nn.Embedding)}


def updates(
    tensors: Mapping[str, Tensor], scaling: Callable[[str, int], float], transposed: Collection[str]
) -> dict[str, Update]:
    """What each weight becomes, by its name.

    Args:
        tensors: by PEFT's names; what is no factor replaces a whole weight (a new classification head, a bias).
        scaling: of a module's product, from its name and the factors' rank.
        transposed: names of the layers that keep (in, out) matrices.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        path, _, kind = key.removeprefix(PREFIX).replace(".base_layer.", ".").partition(".lora_")
        name = f"{path}.weight" if kind else path
        part = kind.removeprefix("embedding_")[:1] if kind else "whole"
        if part in parts[name]:
            raise FinepointError(f"the adapter holds {name} twice")
        parts[name][part] = tensor
    found = {}
    for name, own in parts.items():
        module = name.rpartition(".")[0]
        a, b = own.get("A"), own.get("B")
        factor = scaling(module, len(a)) if a is not None else 1.0
        found[name] = Update(name, own.get("whole"), a, b, factor, own.get("m"), module in transposed)
    return found


def _sum(base: Tensor, a: Tensor, b: Tensor, scaling: float, name: str) -> Tensor:
    if (b.shape[0], a.shape[1]) != tuple(base.shape):
        raise FinepointError(f"{name} is {tuple(base.shape)} in the model, {b.shape[0]} x {a.shape[1]} in the adapter")
    wide = torch.promote_types(base.dtype, torch.float32)
    return base.to(wide) + scaling * (b.detach().to(wide) @ a.to(wide))
