"""Adapters on the Hugging Face hub: fetching by id, sending a folder."""

import re
from pathlib import Path

from finepoint.errors import FinepointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("finepoint.safetensors", "finepoint_config.json", "README.md")


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean something on the hub: `owner/name`, where no such folder is on disk."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


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
        reason = " ".join(str(error).split())[:300]
        raise FinepointError(
            f"there is no folder {repo_id}, and it cannot be fetched from the hub: {reason}"
        ) from error


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
        reason = " ".join(str(error).split())[:300]
        raise FinepointError(f"the hub did not take {repo_id}: {reason}") from error
    return str(done.commit_url)
