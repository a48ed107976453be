"""What a configuration of PEFT's says, field by field: what is computed here as PEFT computes it, all else refused.

The lists allow; they do not forbid. A field that is not listed, of this or a later PEFT, must be as good as absent.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finepoint.errors import FinepointError

WAY_OUT = "where PEFT can merge it (merge_and_unload), save the merged model instead"
ANY = None  # in place of the values that are computed rightly: all of them are
ORIGIN = dict.fromkeys(
    ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"), ANY
)
# Where the adapter sits; what is checked against the file's tensors, or computed with.
LORA: dict[str, tuple[Any, ...] | None] = ORIGIN | {
    "peft_type": ("LORA",),
    "target_modules": ANY, "exclude_modules": ANY, "layers_to_transform": ANY, "layers_pattern": ANY,
    "modules_to_save": ANY, "r": ANY, "lora_alpha": ANY, "rank_pattern": ANY, "alpha_pattern": ANY,
    "use_rslora": (True, False, None), "use_dora": (True, False, None), "ensure_weight_tying": (True, False, None),
    # Told by the layers themselves, as PEFT does.
    "fan_in_fan_out": (True, False, None),
    # All biases of the file are taken as they are.
    "bias": ("none", "all", "lora_only", None),
    # These draw factors that the file replaces; others change the base's weights or the forward pass.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    # Of training alone, or without a meaning while another field is off.
    "lora_dropout": ANY, "runtime_config": ANY, "eva_config": ANY, "loftq_config": ANY, "corda_config": ANY,
    "lora_ga_config": ANY, "megatron_core": ANY, "qalora_group_size": ANY,
}  # fmt: skip
SPARSE: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "shira": ORIGIN | {
        "peft_type": ("SHIRA",), "target_modules": ANY,
        # Both decide positions and first values, which the file holds; PEFT takes linear layers only.
        "r": ANY, "mask_type": ANY, "random_seed": ANY, "init_weights": ANY, "fan_in_fan_out": ANY,
    },
    "supertuning": ORIGIN | {
        "peft_type": ("SUPERTUNING",), "target_modules": ANY, "sparsity": ANY, "select_top": ANY, "init_weights": ANY,
        "save_precomputed_indices": ANY, "lora_dropout": ANY, "lora_alpha": ANY,  # the last two are the low-rank part's
    },
}  # fmt: skip


def check_fields(config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None], source: str) -> None:
    """Refuses every field whose value is not known to be computed here as PEFT computes it.

    Raises:
        FinepointError: such a field, by name.
    """
    kind = config.get("peft_type")
    if kind not in (known["peft_type"] or ()):
        raise FinepointError(f"{source}: peft_type is {_short(kind)}, which is not read here; {WAY_OUT}")
    for field, value in config.items():
        allowed = known.get(field, ())
        if allowed is ANY or _absent(value) or any(type(value) is type(a) and value == a for a in allowed):
            continue
        plain = f" (known: {', '.join(map(repr, allowed))})" if allowed else ""
        raise FinepointError(f"{source}: {field} is {_short(value)}, which is not computed here as PEFT does{plain}; "
                             f"{WAY_OUT}")  # fmt: skip


def _absent(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | dict) and not value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def scaling_of(config: Mapping[str, Any], module: str, rank: int, source: str) -> float:
    """The factor of one module's product: alpha / r, or alpha / sqrt(r), each by the patterns that match its name.

    Args:
        rank: of the factors in the file.

    Raises:
        FinepointError: they have another rank than the configuration says; a number or pattern that is none.
    """
    said = _by_pattern(config, "rank_pattern", module, config.get("r"), source)
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"), source)
    if type(said) is not int or said < 1 or type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise FinepointError(f"{source}: lora_alpha is {alpha!r} and r is {said!r}; expected numbers, r at least 1")
    if rank != said:
        raise FinepointError(f"{source}: the factors of {module} have rank {rank}, and its configuration says {said}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], field: str, module: str, otherwise: Any, source: str) -> Any:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise FinepointError(f"{source}: {field} is {_short(patterns)}; expected numbers by the names of modules")
    for pattern, value in patterns.items():
        if _matches(rf"(.*\.)?({pattern})$", module, field, source):
            return value
    return otherwise


def _matches(pattern: str, module: str, field: str, source: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise FinepointError(f"{source}: {field} holds {_short(pattern)}, which is no regular expression") from error


def check_targets(config: Mapping[str, Any], modules: Sequence[str], source: str) -> None:
    """Refuses factors of modules that the configuration does not adapt: PEFT would leave them out.

    Raises:
        FinepointError: such a module; a field that is no list of names.
    """
    for field in ("target_modules", "exclude_modules"):
        named = config.get(field)
        if not isinstance(named, str) and (named or field == "target_modules"):
            _names(named, field, source)
    for module in modules:
        if not _named(config["target_modules"], module, "target_modules", source) or not _layer(config, module, source):
            raise FinepointError(f"{source}: target_modules and layers_to_transform leave out {module}, whose factors "
                                 "the file holds")  # fmt: skip
        if config.get("exclude_modules") and _named(config["exclude_modules"], module, "exclude_modules", source):
            raise FinepointError(f"{source}: exclude_modules leaves out {module}, whose factors the file holds")


def _named(names: Any, module: str, field: str, source: str) -> bool:
    if isinstance(names, str):
        return _matches(rf"(?:{names})\Z", module, field, source)
    return module in names or any(module.endswith(f".{name}") for name in names)


def _layer(config: Mapping[str, Any], module: str, source: str) -> bool:
    """Whether the module belongs to one of `layers_to_transform`, told as PEFT tells it: by the first number."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == [] or module in config["target_modules"]:
        return True
    given = config.get("layers_pattern") or r"[^.]*"
    for pattern in [given] if isinstance(given, str) else given:
        start = r".*?\." if given == r"[^.]*" else r"(?:^|.*?\.)"
        if _matches(rf"{start}{pattern}\.\d+\.", module, "layers_pattern", source):
            found = re.match(rf"{start}{pattern}\.(\d+)\.", module)
            return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def saved_whole(config: Mapping[str, Any], modules: Sequence[str], source: str) -> set[str]:
    """The modules that PEFT replaces by a copy of their own (`modules_to_save`), of all those of a model.

    Raises:
        FinepointError: the field is no list of names.
    """
    names = config.get("modules_to_save")
    if not names:
        return set()
    ends = tuple(_names(names, "modules_to_save", source))
    return {module for module in modules if module.endswith(ends)}


def _names(names: Any, field: str, source: str) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise FinepointError(f"{source}: {field} is {_short(names)}; expected names of modules")
    return names
