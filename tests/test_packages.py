"""Debian packages: taken apart by hand, fetched with a stand-in for apt-get."""

import io
import tarfile
from hashlib import sha256

import pytest

from finepoint.errors import FinepointError
from finepoint.models import packages
from finepoint.models.packages import debian_file, fetch_debian


def debian_package(files):
    """The bytes of a .deb: an ar archive with a tar archive of files in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("control.tar.xz", b"abc"), ("data.tar.xz/", data.getvalue())):
        packed += f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        packed += b"\n" * (len(content) % 2)
    return packed


def test_a_file_comes_out_of_a_package(tmp_path):
    package = tmp_path / "p.deb"
    package.write_bytes(debian_package({"usr/share/a": b"one", "usr/share/b": b"two"}))
    assert debian_file(package, "usr/share/b") == b"two"
    with pytest.raises(FinepointError, match="holds no file usr/share/c"):
        debian_file(package, "usr/share/c")
    package.write_bytes(b"PK")
    with pytest.raises(FinepointError, match="is no Debian package"):
        debian_file(package, "usr/share/b")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def stand_in(folder, script):
    program = folder / "bin" / "apt-get"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_package_is_fetched_once(own_cache):
    stand_in(own_cache, f'echo "$@" >> {own_cache}/calls; printf abc > some_1.deb')
    place = fetch_debian("some=1:2", sha256(b"abc").hexdigest())
    assert place == own_cache / "cache" / "packages" / "some-1_2.deb"
    assert place.read_bytes() == b"abc"
    fetch_debian("some=1:2", sha256(b"abc").hexdigest())
    assert (own_cache / "calls").read_text() == "download --quiet some=1:2\n"


def test_what_goes_wrong_is_said_with_a_way_out(own_cache, monkeypatch):
    stand_in(own_cache, "echo 'E: Unable to locate package some' >&2; echo 'W: unsandboxed' >&2; exit 100")
    with pytest.raises(FinepointError, match=r"could not fetch some=1: E: Unable .*`apt-get update`.*some-1\.deb"):
        fetch_debian("some=1", "0" * 64)
    stand_in(own_cache, "printf abc > some_1.deb")
    with pytest.raises(FinepointError, match="wrong checksum"):
        fetch_debian("some=1", "0" * 64)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(FinepointError, match="there is no apt-get here.*put the .deb"):
        fetch_debian("some=1", "0" * 64)
