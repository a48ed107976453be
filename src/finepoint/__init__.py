"""finepoint: train a chosen handful of a model's own weights, in place.

The public names, imported when first used, so that `import finepoint` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.interpolation import scale_by_depth, wise_ft
    from finepoint.adapters.merging import merge
    from finepoint.adapters.switching import AdapterSet
    from finepoint.adapters.widening import in_wider_dtype, rebased
    from finepoint.choosing.rules import RULES, register
    from finepoint.choosing.selection import Selection, select
    from finepoint.choosing.weights import target_weights
    from finepoint.config import TrainConfig
    from finepoint.errors import FinepointError
    from finepoint.exchange.extract import extract
    from finepoint.exchange.formats import export, import_adapter
    from finepoint.integrations.reference import reference
    from finepoint.integrations.session import push_to_hub, trainable_parameters, tuner_of
    from finepoint.integrations.sparsify import load, save, sparsify, unload
    from finepoint.models import from_bitsandbytes_
    from finepoint.training.aged import AgedAdamW
    from finepoint.training.run import train
    from finepoint.training.tuner import SparseTuner

__version__ = "0.1.0"

_HOMES = {
    "AdapterSet": "finepoint.adapters.switching",
    "AgedAdamW": "finepoint.training.aged",
    "FinepointError": "finepoint.errors",
    "RULES": "finepoint.choosing.rules",
    "Selection": "finepoint.choosing.selection",
    "SparseAdapter": "finepoint.adapters.adapter",
    "SparseTuner": "finepoint.training.tuner",
    "TrainConfig": "finepoint.config",
    "export": "finepoint.exchange.formats",
    "extract": "finepoint.exchange.extract",
    "from_bitsandbytes_": "finepoint.models",
    "import_adapter": "finepoint.exchange.formats",
    "in_wider_dtype": "finepoint.adapters.widening",
    "load": "finepoint.integrations.sparsify",
    "merge": "finepoint.adapters.merging",
    "push_to_hub": "finepoint.integrations.session",
    "rebased": "finepoint.adapters.widening",
    "reference": "finepoint.integrations.reference",
    "register": "finepoint.choosing.rules",
    "save": "finepoint.integrations.sparsify",
    "scale_by_depth": "finepoint.adapters.interpolation",
    "select": "finepoint.choosing.selection",
    "sparsify": "finepoint.integrations.sparsify",
    "target_weights": "finepoint.choosing.weights",
    "train": "finepoint.training.run",
    "trainable_parameters": "finepoint.integrations.session",
    "tuner_of": "finepoint.integrations.session",
    "unload": "finepoint.integrations.sparsify",
    "wise_ft": "finepoint.adapters.interpolation",
}

__all__ = [
    "RULES",
    "AdapterSet",
    "AgedAdamW",
    "FinepointError",
    "Selection",
    "SparseAdapter",
    "SparseTuner",
    "TrainConfig",
    "export",
    "extract",
    "from_bitsandbytes_",
    "import_adapter",
    "in_wider_dtype",
    "load",
    "merge",
    "push_to_hub",
    "rebased",
    "reference",
    "register",
    "save",
    "scale_by_depth",
    "select",
    "sparsify",
    "target_weights",
    "train",
    "trainable_parameters",
    "tuner_of",
    "unload",
    "wise_ft",
]


_RENAMED = {"lines": "scale_by_depth", "report": "trainable_parameters", "widened": "in_wider_dtype"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        from warnings import warn

        warn(f"finepoint.{name} is called finepoint.{_RENAMED[name]} now", FutureWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _HOMES:
        raise AttributeError(f"module 'finepoint' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
