"""What targets are called: presets, short names and globs, as far as names tell. Without torch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from finepoint.errors import FinepointError

PRESET_NAMES = ("linear", "attention", "mlp", "linear-everywhere", "all")


def pattern_list(targets: str | Sequence[str] | Mapping[str, float]) -> list[str]:
    """The patterns of `targets`: a string is split at its commas, of a mapping the keys count."""
    patterns = targets.split(",") if isinstance(targets, str) else list(targets)
    patterns = [pattern.strip() for pattern in patterns if pattern.strip()]
    if not patterns:
        raise FinepointError(f"targets is empty; give a preset ({', '.join(PRESET_NAMES)}) or patterns like '*.v_proj'")
    return patterns


def stands_for(pattern: str) -> Callable[[str], bool]:
    """Whether a pattern that is no preset stands for the weight of a name."""
    if any(character in pattern for character in "*?[."):
        return lambda name: fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    # A short name stands for the weights of modules called that, so `v` does not pick up `v_proj.bias`.
    owners = (pattern, f"{pattern}_proj")
    return lambda name: name == pattern or (name.endswith(".weight") and name.split(".")[-2] in owners)


def refuse_unmatched(
    targets: str | Sequence[str] | Mapping[str, float], names: Sequence[str], words: Collection[str]
) -> None:
    """Refuses a pattern that no model can have a weight for whose names are made of these words.

    Args:
        names: of stored weights, which those of the model may differ from.
        words: see `models.names.words_of`; none where nothing is known.

    Raises:
        FinepointError: there is such a pattern.
    """
    for pattern in pattern_list(targets):
        parts = [part for part in pattern.split(".") if part.isidentifier()]
        possible = all(part in words or f"{part}_proj" in words or part in ("weight", "bias") for part in parts)
        if (
            names
            and words
            and pattern not in PRESET_NAMES
            and not possible
            and not any(map(stands_for(pattern), names))
        ):
            raise no_weight(pattern, names)


def no_weight(pattern: str, names: Sequence[str]) -> FinepointError:
    """What is said of a pattern that matches none of these weights: names that may be meant."""
    close = get_close_matches(pattern, names, n=3, cutoff=0.5)
    owners = sorted({name.split(".")[-2] for name in names if name.count(".") >= 1})
    close = close or get_close_matches(pattern, [*owners, *PRESET_NAMES], n=3, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else f"names look like {example(names)}; presets are "
    return FinepointError(f"no weight matches {pattern!r}; {hint}" + ("" if close else ", ".join(PRESET_NAMES)))


def example(names: Sequence[str]) -> str:
    """One of the names, to show what they look like."""
    return repr(names[len(names) // 2]) if names else "none: the model has no weights"
