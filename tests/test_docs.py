"""The pages run as they stand, the site builds without a warning and asks nothing of the network."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import finepoint
from browser import CHROMIUM, Browser
from documents import blocks
from finepoint.cli import COMMANDS, command_named
from finepoint.cli.options import flags

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    DOCS / "index.md",
    DOCS / "how-it-works.md",
    DOCS / "peft.md",
    DOCS / "questions.md",
    *sorted(DOCS.glob("how-to/*.md")),
]
RUNNER = Path(__file__).parent / "documents.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, warm, given, tmp_path):
    folder = shutil.copytree(given, tmp_path / "reader")
    done = warm.run("python", RUNNER, page, folder=folder)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count("\n-- ") + done.stdout.startswith("-- ") == len(blocks(page.read_text(), "python", "sh"))


def test_no_block_trains_the_real_model():
    for page in PAGES:
        for block in blocks(page.read_text(), "python", "sh"):
            assert block.is_marked or "smollm2" not in block.code, (
                f"{page.name}, line {block.line}: say my-model, or mark the block '# takes minutes'"
            )


def test_the_diffs_of_contributing_are_of_the_code_as_it_is():
    found = 0
    for block in blocks((ROOT / "CONTRIBUTING.md").read_text(), "diff"):
        for part in block.code.split("--- a/")[1:]:
            file, _, *lines = part.splitlines()
            before = [line[1:] for line in lines if line[:1] in (" ", "-")]
            assert "\n".join(before) in (ROOT / file).read_text(), (file, before)
            found += 1
    assert found > 5


def test_messages_explained_are_those_of_the_code():
    # Strings that continue on the next line are joined, what is filled in becomes `..` as on the page.
    code = "".join(path.read_text() for path in sorted(Path(finepoint.__file__).parent.rglob("*.py")))
    code = re.sub(r"\{[^{}\"]*\}|%[ds]", "..", re.sub(r"\"\s*\n\s*f?\"", "", code))
    quoted = re.findall(r"^### `(.*)`$", (DOCS / "questions.md").read_text(), re.MULTILINE)
    assert len(quoted) > 15
    missing = [part for message in quoted for part in message.split("..") if part.strip() not in code]
    assert missing == []


def test_files_that_pages_name_exist():
    files = [
        path
        for folder in ("src", "tests", "benchmarks", "docs", "examples", "studies")
        for path in (ROOT / folder).rglob("*.py")
    ]
    name = r"((?:[a-z_]+/)*[a-z_0-9]+\.py)"
    pages = [path.read_text() for path in DOCS.rglob("*.md")]
    named = {found for page in pages for found in re.findall(rf"`{name}`", page)}
    design = (DOCS / "design.md").read_text()
    for room in design.split("\n### ")[1:]:  # a line for each file, under its room
        home = "" if "," in room.split(":")[0] else f"{room.split(':')[0]}/"
        named |= {home + found for found in re.findall(rf"^    {name}  ", room, re.MULTILINE)}
    assert len(named) > 140
    missing = {found for found in named if not any(str(path).endswith(f"/{found}") for path in files)}
    assert missing == {"convert_hf_to_gguf.py"}  # llama.cpp's
    house = ROOT / "src" / "finepoint"
    ours = {str(path.relative_to(house)) for path in house.rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in ours if path not in named | set(re.findall(r"`(\w+\.py)`", design))} == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Requests(HTMLParser):
    """What a browser asks for by itself, on reading a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag != "a":
            self.found += [given[key] for key in ("src", "href", "srcset", "data") if given.get(key)]


def test_pages_ask_nothing_of_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    reader = Requests()
    for page in pages:
        reader.feed(page.read_text())
    assert len(reader.found) > len(pages)
    assert [address for address in reader.found if re.match(r"(https?:)?//", address)] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*", styles) == []


def test_the_reference_has_every_command_flag_and_name(site):
    commands = (site / "reference" / "commands.html").read_text()
    for command in COMMANDS:
        section = re.split(rf"<h2[^>]*>(?:<code>)?finepoint {command}<", commands)[1].split("<h2")[0]
        for flag, _, _ in flags(command_named(command).config):
            assert f"<code>{flag}</code>" in section, (command, flag)
    python = (site / "reference" / "python.html").read_text()
    for name in finepoint.__all__:
        assert re.search(rf'id="finepoint\.([\w.]+\.)?{name}"', python), name


def test_every_how_to_is_in_the_navigation(site):
    start = (site / "index.html").read_text()
    for page in DOCS.glob("how-to/*.md"):
        assert f'href="how-to/{page.stem}.html"' in start, page.name


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_pages_in_a_browser(site):
    with served(site) as address, Browser() as browser:
        for page, width, scheme in (("index.html", 1280, "light"), ("how-it-works.html", 390, "dark"),
                                    ("reference/python.html", 390, "light"), ("peft.html", 1280, "dark")):  # fmt: skip
            browser.look(width, scheme)
            browser.visit(f"{address}/{page}")
            assert all(url.startswith((address, "data:")) for url in browser.requests())
            assert browser.complaints() == []
            assert browser.value("document.documentElement.scrollWidth") <= width, page


@contextmanager
def served(folder):
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_sections_that_the_gpus_benchmark_does_not_have_are_refused():
    script = ROOT / "benchmarks" / "gpu.py"
    done = subprocess.run(
        [sys.executable, script, "--only", "stepp,memory"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.match(r"there is no section (memory, )?stepp; there are ", done.stderr)
