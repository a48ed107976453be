"""Adapters on the Hugging Face hub: fetching by id, sending a folder, and the model card, which its README is."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finepoint.errors import FinepointError, reason_of

if TYPE_CHECKING:
    from finepoint.adapters.change import Contents

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PEFT_CONFIG = "adapter_config.json"
FILES = ("finepoint.safetensors", "finepoint_config.json", "README.md")


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean something on the hub: `owner/name`, where no such folder is on disk."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def refuse_no_adapter(folder: str | Path) -> None:
    """Refuses what is no adapter folder.

    Raises:
        FinepointError: it is none; what it is rather, where that can be seen.
    """
    if (Path(folder) / FILES[0]).exists():
        return
    theirs = (Path(folder) / PEFT_CONFIG).exists()
    hint = "; PEFT's adapters are taken by eval, export --format merged and import" if theirs else ""
    if theirs and (Path(folder) / "adapter_model.bin").exists():
        hint = "; adapter_model.bin is a pickle, which finepoint does not open: save it as safetensors"
    if Path(folder).is_file():
        raise FinepointError(f"{folder} is a file; give the folder that it is in: {Path(folder).parent}")
    raise FinepointError(f"{folder} is not an adapter folder: it has no {FILES[0]}{hint}")


def refuse_other_names(repo_id: str) -> None:
    """Refuses what cannot be a repository's name.

    Raises:
        FinepointError: it is not of the form `owner/name`.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise FinepointError(f"{repo_id!r} is no repository of the hub; its name is OWNER/NAME, as you/my-adapter")


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The folder of an adapter on the hub, in the hub's cache; its three files alone are fetched.

    Raises:
        FinepointError: the hub has no such adapter, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FinepointError(
            f"there is no folder {repo_id}, and it cannot be fetched from the hub: {reason_of(error)}"
        ) from error


def copy_adapter(place: Path, into: Path) -> None:
    """Copies an adapter's three files, as far as they are there."""
    for name in FILES:
        if (place / name).is_file():
            shutil.copyfile(place / name, into / name)


def push(folder: Path, repo_id: str, *, private: bool | None, message: str, token: str | None) -> str:
    """Sends an adapter folder's three files to the hub, making the repository if need be; returns the commit's address.

    Raises:
        FinepointError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, allow_patterns=list(FILES)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FinepointError(f"the hub did not take {repo_id}: {reason_of(error)}") from error
    return str(done.commit_url)


TASK = "text-generation"
MEASURED = ("accuracy", "macro_f1", "nll", "kl", "kl_prompts")  # of an evaluation's figures


def card(adapter: "Contents") -> str:
    """The model card: what was trained on what, by which rule, with what results, and how to load it.

    The base is named in the header where it is a hub id, which is what the hub can link; elsewhere a folder's name is
    all that is told of where it lay. `info["results"]` is a mapping from data to metric to value.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    info = adapter.info
    base = str(info.get("base_model") or "")
    known = HUB_ID.fullmatch(base) is not None
    shown = base if known else Path(base).name
    results = [
        EvalResult(task_type=TASK, dataset_type=Path(data).stem, dataset_name=data, metric_type=metric,
                   metric_value=value)
        for data, metrics in results_of(info).items() for metric, value in metrics.items()
    ]  # fmt: skip
    header = ModelCardData(
        base_model=base if known else None,
        license=info.get("license"),
        library_name="finepoint",
        tags=["finepoint", "sparse-fine-tuning"],
        model_name=f"finepoint adapter of {shown or 'a model'}" if results else None,
        eval_results=results or None,
        ignore_metadata_errors=True,
        base_model_relation="adapter",
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{_body(adapter, shown)}"))


def results_of(info: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The results that an adapter's `info` holds, where they are of the form data -> metric -> value."""
    found = info.get("results")
    if not isinstance(found, dict):
        return {}
    return {str(data): dict(metrics) for data, metrics in found.items() if isinstance(metrics, dict)}


def results_measured(found: Mapping[str, Any], adapter: str, file: str) -> dict[str, dict[str, float]]:
    """The results of an adapter, data -> metric -> value, in what `finepoint eval` has written.

    Args:
        found: the content of that file.
        adapter: its folder; where another was measured alone, under another path, it is not taken.

    Raises:
        FinepointError: the file holds something else, or nothing of this adapter.
    """
    adapters = found.get("adapters")
    if not isinstance(adapters, dict):
        raise FinepointError(f"{file} is not what `finepoint eval --output` writes")
    same = [scores for name, scores in adapters.items() if Path(name).resolve() == Path(adapter).resolve()]
    if not same:
        raise FinepointError(f"{file} has no scores of {adapter}; it has those of {', '.join(adapters) or 'none'}")
    sets = {name: score for kind in ("id", "ood", "probe") for name, score in same[0].get(kind, {}).items()}
    chosen = {name: {key: float(score[key]) for key in MEASURED if isinstance(score.get(key), int | float)}
              for name, score in sets.items()}  # fmt: skip
    tasks = {name: {key: float(value) for key, value in metrics.items()
                    if isinstance(value, int | float) and key != "n" and "_stderr" not in key}
             for name, metrics in same[0].get("tasks", {}).items()}  # fmt: skip
    return chosen | tasks


def _body(adapter: "Contents", base: str) -> str:
    """What the card says to people."""
    from finepoint.adapters.inspection import in_a_line

    left_out = ("base_model", "data")
    facts = {key: value for key, value in in_a_line(adapter.info).items() if key not in left_out}
    data = adapter.info.get("data")
    facts |= {"data": Path(data).name} if isinstance(data, str) else {}
    rows = "".join(
        f"| {key} | {f'{value:.6g}' if isinstance(value, float) else value} |\n" for key, value in facts.items()
    )
    measured = "".join(
        f"| {data} | {metric} | {value:g} |\n"
        for data, metrics in results_of(adapter.info).items() for metric, value in metrics.items()
    )  # fmt: skip
    results = f"\n## Results\n\n| data | metric | value |\n| --- | --- | --- |\n{measured}" if measured else ""
    left = adapter.info.get("unfinished")
    warning = f"**Unfinished**: its training was left at {left}.\n\n" if left else ""
    return (
        f"# A sparse adapter\n\n{warning}{adapter.count:,} trained entries in {len(adapter)} weights of "
        f"`{base}`; the rest is the base's.\n\n| | |\n| --- | --- |\n{rows}{results}\n## Use\n\n"
        "```python\nimport finepoint\n\n# model: the base, as transformers loads it, in the dtype that was trained\n"
        "model = finepoint.load(model, 'this folder or hub id')\n```\n"
    )
