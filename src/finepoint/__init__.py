"""finepoint: train a chosen handful of a model's own weights, in place.

The public names, imported when first used, so that `import finepoint` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from finepoint import moved
from finepoint.runtime import noise
from finepoint.version import __version__ as __version__

if TYPE_CHECKING:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.adapter_set import AdapterSet
    from finepoint.adapters.bases import in_wider_dtype, rebased
    from finepoint.adapters.combining import merge
    from finepoint.adapters.scaling import scale_by_depth, wise_ft
    from finepoint.errors import FinepointError
    from finepoint.evaluation.evaluate import evaluate
    from finepoint.evaluation.generate import generate
    from finepoint.exchange.extract import extract
    from finepoint.exchange.formats import export, import_adapter
    from finepoint.huggingface.reference import reference
    from finepoint.huggingface.session import push_to_hub, trainable_parameters, tuner_of
    from finepoint.huggingface.sparsify import load, save, sparsify, unload
    from finepoint.models.loading import from_bitsandbytes_
    from finepoint.selection.rules import RULES, register
    from finepoint.selection.select import Selection, select
    from finepoint.selection.targets import target_weights
    from finepoint.training.budget import scale_to_budget
    from finepoint.training.run import train
    from finepoint.training.samples import samples
    from finepoint.training.settings import TrainConfig
    from finepoint.tuner.optimizers import PerEntryAdamW
    from finepoint.tuner.tuner import SparseTuner


_HOMES = {
    "AdapterSet": "finepoint.adapters.adapter_set",
    "PerEntryAdamW": "finepoint.tuner.optimizers",
    "FinepointError": "finepoint.errors",
    "RULES": "finepoint.selection.rules",
    "Selection": "finepoint.selection.select",
    "SparseAdapter": "finepoint.adapters.adapter",
    "SparseTuner": "finepoint.tuner.tuner",
    "TrainConfig": "finepoint.training.settings",
    "evaluate": "finepoint.evaluation.evaluate",
    "export": "finepoint.exchange.formats",
    "extract": "finepoint.exchange.extract",
    "from_bitsandbytes_": "finepoint.models.loading",
    "generate": "finepoint.evaluation.generate",
    "import_adapter": "finepoint.exchange.formats",
    "in_wider_dtype": "finepoint.adapters.bases",
    "load": "finepoint.huggingface.sparsify",
    "merge": "finepoint.adapters.combining",
    "push_to_hub": "finepoint.huggingface.session",
    "rebased": "finepoint.adapters.bases",
    "reference": "finepoint.huggingface.reference",
    "register": "finepoint.selection.rules",
    "samples": "finepoint.training.samples",
    "save": "finepoint.huggingface.sparsify",
    "scale_by_depth": "finepoint.adapters.scaling",
    "scale_to_budget": "finepoint.training.budget",
    "select": "finepoint.selection.select",
    "sparsify": "finepoint.huggingface.sparsify",
    "target_weights": "finepoint.selection.targets",
    "train": "finepoint.training.run",
    "trainable_parameters": "finepoint.huggingface.session",
    "tuner_of": "finepoint.huggingface.session",
    "unload": "finepoint.huggingface.sparsify",
    "wise_ft": "finepoint.adapters.scaling",
}

__all__ = [
    "RULES",
    "AdapterSet",
    "FinepointError",
    "PerEntryAdamW",
    "Selection",
    "SparseAdapter",
    "SparseTuner",
    "TrainConfig",
    "evaluate",
    "export",
    "extract",
    "from_bitsandbytes_",
    "generate",
    "import_adapter",
    "in_wider_dtype",
    "load",
    "merge",
    "push_to_hub",
    "rebased",
    "reference",
    "register",
    "samples",
    "save",
    "scale_by_depth",
    "scale_to_budget",
    "select",
    "sparsify",
    "target_weights",
    "train",
    "trainable_parameters",
    "tuner_of",
    "unload",
    "wise_ft",
]


_RENAMED = {
    "AgedAdamW": "PerEntryAdamW",
    "lines": "scale_by_depth",
    "report": "trainable_parameters",
    "widened": "in_wider_dtype",
}


moved.install()
noise.drop()


def __getattr__(name: str) -> Any:
    if name == "sync":  # a room that is used by its own name
        return import_module("finepoint.sync")
    if name in _RENAMED:
        moved.logger.warning("finepoint.%s is called finepoint.%s now", name, _RENAMED[name])
        name = _RENAMED[name]
    if name not in _HOMES:
        raise AttributeError(f"module 'finepoint' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
