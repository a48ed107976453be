"""Files of other people's packages: fetched by name and version with pip, checked, cached."""

import os
import subprocess
import sys
import tempfile
from hashlib import file_digest
from pathlib import Path

from finepoint.errors import FinepointError


def cache_folder() -> Path:
    """Where finepoint keeps what it fetched: $FINEPOINT_CACHE, or `finepoint` in the user's cache folder."""
    if own := os.environ.get("FINEPOINT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finepoint"


def fetch(requirement: str, sha256: str, source: bool = False) -> Path:
    """The archive of a package, e.g. `vaderSentiment==3.3.2`, from the cache or from the package registry.

    Args:
        requirement: name and exact version.
        sha256: of the archive; another one is refused.
        source: the source archive instead of the wheel.

    Raises:
        FinepointError: pip cannot fetch it, or the checksum differs.
    """
    folder = cache_folder() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / requirement.replace("==", "-")
    if place.exists() and digest(place) == sha256:
        return place
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, requirement]
        if source:
            command += ["--no-binary", ":all:"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(temporary).iterdir())
        if done.returncode or len(files) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise FinepointError(f"pip could not fetch {requirement}: {reason}; is a package registry reachable?")
        if digest(files[0]) != sha256:
            raise FinepointError(f"{files[0].name} has the wrong checksum {digest(files[0])}; expected {sha256}")
        files[0].replace(place)
    return place


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
