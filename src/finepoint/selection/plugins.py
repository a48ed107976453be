"""Rules that other packages bring along, by the entry point group `finepoint.rules`.

A package offers a rule by two lines of its pyproject.toml; the name is the rule's, the function is the rule:

    [project.entry-points."finepoint.rules"]
    largest-row = "my_package:largest_row"

Nothing of a plug-in is imported before its rule is asked for.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from finepoint.errors import FinepointError

GROUP = "finepoint.rules"


def offered() -> dict[str, list[EntryPoint]]:
    """What installed packages offer, by the name of the rule: more than one where packages disagree."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def package_of(point: EntryPoint) -> str:
    """The package that an entry point belongs to, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package without a name"


def function_of(name: str, points: list[EntryPoint]) -> Callable[..., Any]:
    """The function behind a rule's name.

    Raises:
        FinepointError: several packages offer the name, or it cannot be imported, or is no function.
    """
    if len(points) > 1:
        packages = ", ".join(package_of(point) for point in points)
        ways = " or ".join(point.value for point in points)
        raise FinepointError(f"rule {name!r} is offered by several packages: {packages}; say which: --rule {ways}")
    (point,) = points
    try:
        function = point.load()
    except Exception as error:  # whatever a stranger's module does while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise FinepointError(
            f"rule {name!r} of {package_of(point)} cannot be imported from {point.value}: {reason}"
        ) from error
    if not callable(function):
        raise FinepointError(f"rule {name!r} of {package_of(point)}: {point.value} is no function")
    return function
