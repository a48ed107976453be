"""What pyproject.toml admits is what the two constraint files test: its lower bounds, and the newest."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Tools that check the code, what its benchmarks and trackers compare with, and vLLM, run in one version only.
NEWEST_ALONE = {"ruff", "mypy", "types-pyyaml", "peft-sparta", "wandb", "mlflow", "vllm"}
UNTRIED = {"torch"}  # the bound is what its interface promises; PyPI has no older build for the CPU to try


def bounds():
    """Every package that finepoint names, with its lower bound."""
    stated = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    for text in stated:
        requirement = Requirement(text)
        if requirement.name != "finepoint":
            found = re.search(r">=([\d.]+)", str(requirement.specifier))
            yield canonicalize_name(requirement.name), Version(found[1]) if found else None


def pinned(name):
    lines = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): Version(version) for package, version in lines}


def test_the_lower_bounds_are_the_versions_of_make_test_oldest():
    oldest = pinned("constraints-oldest.txt")
    for package, bound in bounds():
        if package not in NEWEST_ALONE | UNTRIED:
            assert oldest.get(package) == bound, package


def test_every_package_of_the_development_environment_is_pinned():
    newest = pinned("constraints.txt")
    for package, bound in bounds():
        if package not in {"peft-sparta", "wandb", "mlflow", "vllm"}:
            assert newest[package] >= (bound or newest[package]), package


def test_reliability_states_them():
    page = (ROOT / "docs" / "reliability.md").read_text()
    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    for package in ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "peft", "trl"):
        name = canonicalize_name(package)
        assert f"| {package} | {oldest[name]} | {newest[name]} |" in page, package
