"""finepoint: train a chosen handful of a model's own weights, in place.

The public names, imported when first used, so that `import finepoint` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finepoint.adapters.adapter import SparseAdapter
    from finepoint.adapters.interpolation import lines, wise_ft
    from finepoint.adapters.merging import merge
    from finepoint.adapters.switching import AdapterSet
    from finepoint.adapters.widening import rebased, widened
    from finepoint.choosing.rules import RULES, register
    from finepoint.choosing.selection import Selection, select
    from finepoint.choosing.weights import target_weights
    from finepoint.config import TrainConfig
    from finepoint.errors import FinepointError
    from finepoint.exchange.extract import extract
    from finepoint.exchange.formats import export, import_adapter
    from finepoint.integrations.reference import reference
    from finepoint.integrations.session import push_to_hub, report, tuner_of
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
    "lines": "finepoint.adapters.interpolation",
    "load": "finepoint.integrations.sparsify",
    "merge": "finepoint.adapters.merging",
    "push_to_hub": "finepoint.integrations.session",
    "rebased": "finepoint.adapters.widening",
    "reference": "finepoint.integrations.reference",
    "register": "finepoint.choosing.rules",
    "report": "finepoint.integrations.session",
    "save": "finepoint.integrations.sparsify",
    "select": "finepoint.choosing.selection",
    "sparsify": "finepoint.integrations.sparsify",
    "target_weights": "finepoint.choosing.weights",
    "train": "finepoint.training.run",
    "tuner_of": "finepoint.integrations.session",
    "unload": "finepoint.integrations.sparsify",
    "widened": "finepoint.adapters.widening",
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
    "lines",
    "load",
    "merge",
    "push_to_hub",
    "rebased",
    "reference",
    "register",
    "report",
    "save",
    "select",
    "sparsify",
    "target_weights",
    "train",
    "tuner_of",
    "unload",
    "widened",
    "wise_ft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finepoint' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
