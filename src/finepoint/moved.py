"""Modules under their former names: scripts that import them go on working, and one line says the new name."""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
ROOMS = {
    "choosing": "selection",
    "measuring": "evaluation",
    "integrations": "huggingface",
    "recipes": "data.recipes",
    "training.kernels": "tuner.kernels",
}
FILES = {
    "adapters.alignment": "adapters.union",
    "adapters.base": "adapters.fingerprint",
    "adapters.card": "adapters.hub",
    "adapters.form": "adapters.fingerprint",
    "adapters.gaps": "adapters.format",
    "adapters.interpolation": "adapters.scaling",
    "adapters.lowrank": "adapters.peft",
    "adapters.merging": "adapters.combining",
    "adapters.other_bases": "adapters.bases",
    "adapters.switching": "adapters.adapter_set",
    "adapters.verification": "adapters.bases",
    "adapters.widening": "adapters.bases",
    "alignment.rewards": "alignment.methods",
    "batches": "data.batches",
    "choosing.activations": "selection.input_norms",
    "choosing.expressions": "selection.formula",
    "choosing.selection": "selection.select",
    "choosing.weights": "selection.targets",
    "data.recipes.generator_process": "data.recipes.generators",
    "data.recipes.gsm8k": "data.recipes.texts",
    "data.recipes.novels": "data.recipes.texts",
    "evaluation.samples": "training.samples",
    "exchange.folded_in_memory": "exchange.folded",
    "exchange.gguf": "exchange.folded",
    "exchange.in_memory": "exchange.folded",
    "exchange.merged": "exchange.folded",
    "exchange.patch": "exchange.vllm_patch",
    "extras": "errors",
    "files": "runtime.files",
    "inputs": "data.small_input",
    "integrations.align": "alignment.align",
    "integrations.given": "huggingface.scoring_data",
    "integrations.methods": "alignment.methods",
    "integrations.rewards": "alignment.methods",
    "interruption": "runtime.interruption",
    "leaks": "data.leaks",
    "measuring.coefficients": "evaluation.combining_weights",
    "measuring.evaluation": "evaluation.evaluate",
    "measuring.prompts": "evaluation.shared_prompts",
    "memory.settings": "training.settings",
    "models.master": "models.weights",
    "models.offloaded": "models.weights",
    "offloaded": "models.weights",
    "packages": "models.packages",
    "packed": "models.bitsandbytes",
    "precision": "runtime.devices",
    "probing": "models.probing",
    "progress": "runtime.progress",
    "quantised": "models.quantised",
    "ranks": "runtime.distributed",
    "reporting.intervals": "reporting.views",
    "reporting.settings": "studies.settings",
    "reporting.wording": "reporting.text",
    "runtime.extras": "errors",
    "runtime.peak": "runtime.devices",
    "runtime.precision": "runtime.devices",
    "studies.crews": "studies.executors",
    "studies.hired": "studies.worker",
    "tensors": "runtime.tensor_files",
    "tokens": "data.tokens",
    "training.adamw": "tuner.optimizers",
    "training.aged": "tuner.optimizers",
    "training.arguments": "training.trainer",
    "training.audit": "tuner.audit",
    "training.baselines": "baselines.registry",
    "training.boundaries": "models.probing",
    "training.dense": "baselines.dense",
    "training.filtered": "tuner.optimizers",
    "training.finite": "tuner.finite",
    "training.following": "tuner.optimizer_hooks",
    "training.hooks": "tuner.autograd",
    "training.hybrid": "baselines.rosa",
    "training.inputs": "data.small_input",
    "training.interface": "tuner.interface",
    "training.interrupted": "training.callbacks",
    "training.ledger": "memory.tracker",
    "training.log": "training.callbacks",
    "training.lowrank": "baselines.peft",
    "training.memory": "runtime.devices",
    "training.plan": "memory.plan",
    "training.refreshing": "training.refresh",
    "training.sharding": "training.context",
    "training.spot_checks": "tuner.spot_checks",
    "training.together": "tuner.deltas",
    "training.trained": "tuner.sparse_weight",
    "training.tuner": "tuner.tuner",
    "training.unfinished": "training.callbacks",
    "training.workplace": "training.context",
    "tuner.kernels.compiled": "tuner.kernels",
    "tuner.kernels.following": "tuner.kernels",
    "tuner.kernels.threads": "tuner.kernels.numba",
    "tuner.kernels.together": "tuner.kernels.all_weights",
}
COMMANDS = {
    f"cli.{name}": f"cli.{file}"
    for file, names in {
        "runs": "demo train align select plan eval", "studies": "compare sequence report", "lists": "data rules schema",
        "adapters": "inspect verify merge scale extract export import import_",
    }.items() for name in names.split()
}  # fmt: skip
FILES |= COMMANDS | {"cli.watching": "cli.runs"}
CONFIG = "config"  # the settings of all commands stood in one file
SETTINGS = {
    "selection.settings": "DEFAULT_RULE SelectConfig",
    "training.settings": "TrainConfig Tracker PlanConfig",
    "alignment.settings": "AlignConfig",
    "evaluation.settings": "DemoConfig EvalConfig",
    "studies.settings": "CompareConfig SequenceConfig ReportConfig",
    "cli.adapters": "InspectConfig VerifyConfig MergeConfig ExtractConfig ExportConfig ImportConfig ScaleConfig",
    "cli.lists": "DataConfig RulesConfig",
    "runtime.settings": "DType Quantise TargetsOption fits spelled",
}


def new_name(name: str) -> str | None:
    """Where a module of ours that was moved is now; None of all others."""
    if not name.startswith("finepoint."):
        return None
    old = name.removeprefix("finepoint.")
    if old in FILES or old in ROOMS:
        return "finepoint." + (FILES.get(old) or ROOMS[old])
    room, _, module = old.rpartition(".")
    return f"finepoint.{ROOMS[room]}.{module}" if room in ROOMS else None


class Alias(Loader):
    """Gives the module that has another name now."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.name == f"finepoint.{CONFIG}":
            return Settings(spec.name)
        name = new_name(spec.name)
        assert name is not None
        if spec.name.removeprefix("finepoint.") not in ROOMS:
            logger.warning("%s is called %s now", spec.name, name)
        if spec.name.removeprefix("finepoint.") in COMMANDS:
            return Command(spec.name)
        module = import_module(name)
        self.own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if not isinstance(module, Settings | Command):
            module.__spec__ = self.own  # which the import system has taken for the alias's


class Settings(ModuleType):
    """Each command's settings stand beside what they configure."""

    def __getattr__(self, name: str) -> Any:
        for home, names in SETTINGS.items():
            if name in names.split():
                logger.warning("%s.%s is finepoint.%s.%s now", self.__name__, name, home, name)
                return getattr(import_module(f"finepoint.{home}"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class Command(ModuleType):
    """A command, each of which was a module of its own, with its settings as CONFIG."""

    def __getattr__(self, name: str) -> Any:
        command = self.__name__.rpartition(".")[2].rstrip("_")
        made = import_module("finepoint.cli").command_named(command)
        own = {"CONFIG": made.config, "run": made.run, "after_help": made.after_help}.get(name)
        return own or getattr(import_module(f"finepoint.{FILES[f'cli.{command}']}"), name)


class Finder(MetaPathFinder):
    """Finds what was moved."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == f"finepoint.{CONFIG}" or new_name(name):
            return ModuleSpec(name, Alias())
        return None


def install() -> None:
    """Has the old names found, before a folder of the new names could be taken for one of the old."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
