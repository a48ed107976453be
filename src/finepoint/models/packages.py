"""Files of other people's packages: fetched by name and version with pip or apt-get, checked, cached."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from hashlib import file_digest
from pathlib import Path

from finepoint.errors import FinepointError
from finepoint.runtime.files import alone, partial_folder


def cache_folder() -> Path:
    """Where finepoint keeps what it fetched: $FINEPOINT_CACHE, or `finepoint` in the user's cache folder."""
    if own := os.environ.get("FINEPOINT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finepoint"


def fetch(requirement: str, sha256: str, source: bool = False) -> Path:
    """The archive of a Python package, e.g. `vaderSentiment==3.3.2`, from the cache or from the package registry.

    Args:
        requirement: name and exact version.
        sha256: of the archive; another one is refused.
        source: the source archive instead of the wheel.

    Raises:
        FinepointError: pip cannot fetch it, or the checksum differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", requirement]
    if source:
        command += ["--no-binary", ":all:"]
    return _cached(requirement.replace("==", "-"), sha256, command, "is a package registry reachable?")


def fetch_debian(requirement: str, sha256: str) -> Path:
    """A Debian package, e.g. `wordnet-base=1:3.0-37`, from the cache or from apt's sources.

    Args:
        requirement: name and exact version.
        sha256: of the package; another one is refused.

    Raises:
        FinepointError: there is no apt-get, it cannot fetch the package, or the checksum differs.
    """
    name = requirement.replace("=", "-").replace(":", "_") + ".deb"
    by_hand = f"or put the .deb with the SHA-256 {sha256} at {_place(name)}"
    if not _place(name).exists() and shutil.which("apt-get") is None:
        raise FinepointError(
            f"{requirement} is a Debian package and there is no apt-get here; use Debian 12, {by_hand}"
        )
    command = ["apt-get", "download", "--quiet", requirement]
    return _cached(name, sha256, command, f"run `apt-get update` on Debian 12, {by_hand}")


def debian_file(package: Path, name: str) -> bytes:
    """The content of a file in a Debian package: a tar archive inside an ar archive.

    Args:
        package: the `.deb` file.
        name: path of the file without its leading slash.

    Raises:
        FinepointError: this is no Debian package, or it has no such file.
    """
    data = package.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise FinepointError(f"{package} is no Debian package")
    at = 8
    while at < len(data):
        member, size = data[at : at + 16].decode().strip(" /"), int(data[at + 48 : at + 58])
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size])) as archive:
                if f"./{name}" in archive.getnames() and (file := archive.extractfile(f"./{name}")):
                    return file.read()
        at += 60 + size + size % 2
    raise FinepointError(f"{package} holds no file {name}")


def _cached(name: str, sha256: str, command: list[str], hint: str) -> Path:
    """The file in the cache; where it is not there, `command` must leave it in its working folder."""
    place = _place(name)
    if place.exists() and digest(place) == sha256:
        return place
    with alone(place.parent), partial_folder(place.parent) as temporary:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=temporary)
        files = list(temporary.iterdir())
        if done.returncode or len(files) != 1:
            said = [line for line in done.stderr.strip().splitlines() if not line.startswith("W:")]  # apt's warnings
            reason = (said or ["no reason given"])[-1]
            raise FinepointError(f"{command[0]} could not fetch {command[-1]}: {reason}; {hint}")
        if digest(files[0]) != sha256:
            raise FinepointError(f"{files[0].name} has the wrong checksum {digest(files[0])}; expected {sha256}")
        files[0].replace(place)
    return place


def _place(name: str) -> Path:
    return cache_folder() / "packages" / name


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
