"""The report: what is written, what becomes of hostile names and half a study, how the page looks in a browser."""

import csv
import io
import json
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import CHROMIUM, Browser
from conftest import tiny_llama, write_lines
from finepoint import save, sparsify, train
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.evaluation.before_after import keep_answers
from finepoint.evaluation.generate import generate
from finepoint.reporting import figures
from finepoint.reporting.report import write_report
from finepoint.reporting.tables import (
    GROUPS,
    by_task,
    bytes_shown,
    escape_latex,
    escape_markdown,
    table,
    text,
    to_csv,
    to_latex,
)  # fmt: skip
from finepoint.reporting.text import headline
from finepoint.reporting.views import paths, summary
from finepoint.studies.results import read_results
from finepoint.studies.settings import ReportConfig
from finepoint.training.run import ANSWERS
from finepoint.training.settings import TrainConfig
from studies import arm, put, write_study

FIGURES = ["id-ood", "density", "ood-change", "forgetting", "loss-kl", "places", "overlap", "cost", "losses"]
HOSTILE = "<script>alert('x')</script> & $x^2$ \\input{a} _%|`"


FEW = [arm("random", 0.1), arm("gallop", 0.1), arm("lora", kind="baseline")]


def report(folder):
    return write_report(ReportConfig(folder=[str(folder)]))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study") / "s")
    put(
        folder / "cells" / "z.error.json",
        {"task": "movies", "arm": "full", "lr": 0.1, "seed": 0, "error": "out of memory"},
    )
    return folder


@pytest.fixture(scope="module")
def written(study):
    return report(study)


def page_of(found):
    return Path(found["report"]).read_text()


# What is written


def test_everything_is_drawn_and_every_figure_has_its_data(study, written):
    assert written["figures"] == FIGURES
    assert written["left_out"] == {}
    page = page_of(written)
    linked = set(re.findall(r'href="(data/\w+\.csv)"', page))
    assert {str(path.relative_to(study / "report")) for path in (study / "report" / "data").iterdir()} == linked
    for name in FIGURES:
        assert f'id="figure-{name}"' in page
        assert list((study / "report" / "figures").glob(f"{name}-*.svg"))


def test_the_csv_holds_the_rows(study, written):
    with (study / "report" / "data" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = summary(read_results(study))
    assert [row["arm"] for row in rows] == [row["arm"] for row in expected]
    assert [float(row["id"]) for row in rows] == [row["id"] for row in expected]


def test_the_page_says_numbers_failures_and_configuration(study, written):
    page = page_of(written)
    for said in (*written["warnings"], *written["headline"], "out of memory", "Pareto front", "batch_size: 16"):
        assert escaped(said) in page
    best = max((row for row in written["summary"] if row["lr"] is None), key=lambda row: row["id"])
    assert f"{best['arm']} learned most: {best['id']:.3f}" in " ".join(headline(read_results(study)))


def escaped(words):
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;")


def test_the_page_needs_nothing_but_itself(written):
    page = page_of(written)
    assert not re.search(r'(src|href)="(?!#|data/|data:|tables\.tex|report\.md|\.\./(cells|adapters)/)[^"]', page)
    assert "url(" not in re.sub(r"url\(#", "", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)  # which sorts tables, and asks nobody
    assert not re.search(r"https?:|fetch|import|XMLHttp|innerHTML|eval", script)


def test_markers_show_their_numbers(written, study):
    page = page_of(written)
    shown = set(re.findall(r"<g><title>(.*?)</title>", page))
    for row in summary(read_results(study)):
        assert f"{row['arm']}: {row['id']:.4g}, {row['ood']:.4g}" in shown
    for row in paths(read_results(study)):
        assert f"{row['arm']}, rate {row['lr']:g}: {row['validation_loss']:.4g}, {row['kl']:.4g}" in shown


def test_ids_are_the_page_s_own(written):
    ids = re.findall(r'\bid="([^"]+)"', page_of(written))
    assert len(ids) == len(set(ids))


def test_the_page_nests_as_html_should(written):
    open_tags = []

    class Nesting(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Nesting().feed(page_of(written))
    assert open_tags == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A study that is quick to draw."""
    return write_study(tmp_path_factory.mktemp("small") / "s", arms=FEW, tasks=("movies",), tests=("movies", "news"))


def test_the_same_study_gives_the_same_page(small):
    before = page_of(report(small))
    assert page_of(report(small)) == before


def test_a_second_report_replaces_the_first_and_nothing_else(small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FinepointError, match="no report"):
        write_report(ReportConfig(folder=[str(small)], output=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    found = write_report(ReportConfig(folder=[str(small)], output=str(tmp_path / "r")))
    (tmp_path / "r" / "data" / "old.csv").write_text("old")
    write_report(ReportConfig(folder=[str(small)], output=str(tmp_path / "r")))
    assert not (tmp_path / "r" / "data" / "old.csv").exists()
    assert found["report"].endswith("r/index.html")


def test_the_command_prints_one_json_object(small, capsys):
    assert main(["report", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"][0] == "id-ood"
    assert main(["report", str(small)]) == 0
    assert "learned most" in capsys.readouterr().out
    assert main(["report", str(small / "cells")]) == 2
    assert "no study" in capsys.readouterr().err


def test_without_its_packages_the_report_says_what_to_install(small):
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom finepoint.cli import main\n"
        f"sys.exit(main(['report', {str(small)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'finepoint[report]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# Hostile names


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    arms = [FEW[0], FEW[1] | {"name": HOSTILE}, FEW[2]]
    folder = tmp_path_factory.mktemp("hostile") / "s"
    tasks = ("mo<b>vies", "a & b | $c$", "新闻")
    return report(write_study(folder, arms=arms, tasks=tasks[:2], tests=tasks))


def test_hostile_names_stay_words_in_the_page(hostile):
    page = page_of(hostile)
    assert "<script>alert" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page


def test_hostile_names_stay_words_in_latex(hostile):
    lines = Path(hostile["report"]).with_name("tables.tex").read_text()
    assert r"\input{a}" not in lines
    assert r"\textbackslash{}input\{a\}" in lines
    for block in re.findall(r"\\toprule.*?\\bottomrule", lines, re.DOTALL):
        rows = [line.removesuffix(r" \\") for line in block.splitlines() if line.endswith(r" \\")]
        bare = [re.sub(r"\\[a-z]+(\{\}|\$)|\\.", "", row) for row in rows]  # without commands and escaped letters
        assert len({row.count("&") for row in bare}) == 1
        assert not re.search(r"[%#_^~]", "".join(bare))
    assert lines.count(r"\toprule") > 4
    assert lines.count("{") == lines.count("}")


def test_hostile_names_stay_in_their_cell_in_markdown(hostile):
    lines = Path(hostile["report"]).with_name("report.md").read_text()
    lines, _, settings = lines.partition("```yaml")  # inside the fence all is text
    assert settings.count("```") == 1
    assert "<script>" not in lines
    blocks = [block.splitlines() for block in lines.split("\n\n") if block.startswith("| ")]
    assert blocks
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block}) == 1


def test_escapes():
    assert escape_latex("50 % & a_b #1 {x} \\y ~ ^\n\x00") == (
        r"50 \% \& a\_b \#1 \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{}"
    )
    assert escape_markdown("a|b\n<i>*") == r"a\|b \<i\>\*"
    assert list(csv.reader(io.StringIO(to_csv([{"a": 'x,"y"\n', "b": None}])))) == [["a", "b"], ['x,"y"\n', ""]]


def test_latex_tables_are_by_task():
    rows = [{"task": task, "arm": name} for task in ("m", "t") for name in ("a", "b")]
    found = by_task(table("t", "T", "C", rows, [text(GROUPS, "task"), text("arm", "arm")]))
    assert [(one.title, one.header, one.rows) for one in found] == [
        ("T, m", ["arm"], [["a"], ["b"]]), ("T, t", ["arm"], [["a"], ["b"]]),
    ]  # fmt: skip
    assert to_latex(found[0]).splitlines()[7:13] == [
        r"\toprule", r"arm \\", r"\midrule", r"a \\", r"b \\", r"\bottomrule",
    ]  # fmt: skip


def test_tables_leave_out_empty_columns_and_show_sizes():
    found = table("t", "T", "", [{"a": "x", "b": None}], [text("A", "a"), text("B", "b")])
    assert (found.header, found.rows) == (["A"], [["x"]])
    assert [bytes_shown(size) for size in (12, 1234, 5_000_000, 7e9)] == ["12 B", "1.23 kB", "5 MB", "7 GB"]


# Half a study


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"tasks": ("movies",), "tests": ("movies",), "probes": ()}, {"id-ood", "ood-change", "forgetting", "loss-kl"}),
        ({"arms": [arm("gallop", 0.1)], "seeds": (0,)}, {"density", "overlap"}),
        ({"arms": [arm("full", kind="baseline")], "tasks": ("movies",)}, {"density", "places", "overlap"}),
        ({"kept": lambda task, name, lr, seed: (task, name, lr, seed) == ("movies", "lora", 3e-4, 0)},
         {"density", "places", "overlap"}),
        ({"arms": FEW, "tasks": ("movies",), "kept": lambda task, name, lr, seed: seed == 0 and lr < 2e-4},
         {"density"}),
    ],
    ids=["one task, no probes", "one rule, one seed", "a baseline alone", "one cell", "the first rate alone"],
)  # fmt: skip
def test_half_a_study_is_reported_as_far_as_it_is(tmp_path, options, left_out):
    found = report(write_study(tmp_path / "s", **options))
    assert set(found["left_out"]) == left_out
    page = page_of(found)
    for name, why in found["left_out"].items():
        assert f'id="figure-{name}"' not in page
        assert escaped(why) in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).split()
    json.dumps(found, allow_nan=False)


def test_legends_name_the_arms_that_have_a_run(tmp_path):
    folder = write_study(tmp_path / "s", arms=FEW, kept=lambda task, name, lr, seed: name != "gallop-0.1")
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', page_of(report(folder)), re.DOTALL)
    assert legends
    assert all("lora" in legend and "gallop" not in legend for legend in legends)


@pytest.mark.parametrize(("low", "high"), [(0.11, 0.19), (0.2, 0.9), (0.004, 0.3), (1e-4, 30)])
def test_a_logarithmic_axis_has_numbers_however_short_it_is(low, high):
    shown = figures.panel("x", lambda axes: (axes.plot([1, 2], [low, high]), figures._logarithmic(axes.yaxis)))
    numbers = {float(text) for text in re.findall(r">([\d.]+(?:e-?\d+)?)<", shown.svg)}
    assert sum(low <= number <= high and number not in (1.0, 2.0) for number in numbers) >= 2


def test_a_study_that_recorded_little_is_reported(tmp_path):
    folder = write_study(tmp_path / "s", arms=[arm("gallop", 0.1), arm("lora", kind="baseline")])
    (folder / "base.json").unlink()
    for path in (folder / "cells").iterdir():
        kept = json.loads(path.read_text())
        for key in ("changes", "antidotes", "curve", "cost", "update_norm", "best_step", "selection", "indices"):
            del kept[key]
        kept["validation"]["loss"] = float("nan")
        put(path, kept)
    found = report(folder)
    assert found["figures"] == ["id-ood"]
    assert any("base" in warning for warning in found["warnings"])


# In a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with Browser() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(browser, written, width, scheme):
    browser.look(width, scheme)
    browser.open(written["report"])
    assert browser.complaints() == []
    assert [url.split("/")[-1] for url in browser.requests()] == ["index.html"]
    assert browser.value("document.documentElement.scrollWidth") <= width
    boxes = browser.value(
        "Array.from(document.querySelectorAll('.panel svg')).map(e => {"
        "const b = e.getBoundingClientRect(), drawn = Array.from(e.querySelectorAll('path, use'));"
        "return {figure: e.closest('figure').id, x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height,"
        "marks: drawn.filter(p => p.getBBox().width + p.getBBox().height > 0 && !p.closest('defs')).length}})"
    )
    for box in boxes:
        assert box["width"] > 150
        assert box["height"] > 60
        assert box["x"] + box["width"] <= width
        assert box["marks"] > 8, box  # more than axes
    assert list(dict.fromkeys(box["figure"] for box in boxes)) == [f"figure-{name}" for name in FIGURES]
    firsts = {box["figure"]: {key: box[key] for key in ("x", "y", "width", "height")} for box in reversed(boxes)}
    for first in firsts.values() if width == 1280 else ():
        assert colours(browser.picture(clip=first)) > 8  # paper alone would be one
    paper, ink = (browser.value(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color"))
    assert (brightness(paper) > brightness(ink)) == (scheme == "light")


COLUMN = """Array.from(document.querySelectorAll('#table-summary tbody tr')).map(
    row => row.className === 'group' ? 'group' : row.cells[%d].textContent)"""


def test_a_click_on_a_column_sorts_each_group(browser, written):
    browser.look(1280, "light")
    browser.open(written["report"])
    heads = browser.value(
        "Array.from(document.querySelectorAll('#table-summary th[tabindex]')).map(h => h.textContent)"
    )
    for at, sign in ((heads.index("ID"), 1), (heads.index("ID"), -1), (heads.index("arm"), 1)):
        before = browser.value(COLUMN % at)
        browser.value(f"document.querySelectorAll('#table-summary th[tabindex]')[{at}].click()")
        after = browser.value(COLUMN % at)
        for old, new in zip(groups(before), groups(after), strict=True):
            key = (lambda cell: float(cell.split()[0])) if heads[at] == "ID" else str.casefold
            assert new == sorted(old, key=key, reverse=sign < 0) or heads[at] == "arm"
            assert sorted(new) == sorted(old)
    assert browser.complaints() == []


def groups(cells):
    """The cells between rows that begin a group."""
    found = [[]]
    for cell in cells:
        if cell == "group":
            found.append([])
        else:
            found[-1].append(cell)
    return found


def test_text_in_figures_can_be_told_from_the_paper(browser, written):
    for scheme in ("light", "dark"):
        browser.look(1280, scheme)
        browser.open(written["report"])
        paper = brightness(browser.value("getComputedStyle(document.body).backgroundColor"))
        fills = browser.value(
            "Array.from(document.querySelectorAll('svg.drawing text')).map(e => getComputedStyle(e).fill)"
        )
        assert len(fills) > 100
        assert min(abs(brightness(fill) - paper) for fill in set(fills)) > 60


OVERLAPPING = """Array.from(document.querySelectorAll('%s svg')).flatMap(svg => {
    const boxes = Array.from(svg.querySelectorAll('text')).map(e => [e.textContent, e.getBoundingClientRect()]);
    return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([_, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > a.height / 3).map(([other]) => [name, other]))})"""


def test_names_of_baselines_do_not_lie_on_one_another(browser, tmp_path):
    alike = [arm(f"lora{i}", kind="baseline") for i in range(6)]  # of accuracies that differ by little
    found = report(write_study(tmp_path / "s", arms=[*FEW[:2], arm("random", 0.01), *alike]))
    browser.look(1280, "light")
    browser.open(found["report"])
    for i in range(6):
        assert f">lora{i}</text>" in page_of(found)
    assert browser.value(OVERLAPPING % "#figure-density") == []


def test_a_run_has_a_page_with_its_curves_and_places(browser, model_folder, choice_file, tmp_path):
    record = train(TrainConfig(model=str(model_folder), data=choice_file, validation=choice_file, eval_every=3, steps=6,
                               batch_size=8, density=0.05, lr=1e-2, output=str(tmp_path / "run")))  # fmt: skip
    found = write_report(ReportConfig(folder=[str(tmp_path / "run")], output=str(tmp_path / "page")))
    assert found["left_out"] == {}
    with (tmp_path / "page" / "data" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert next(float(row["loss"]) for row in rows if row["loss"]) == pytest.approx(record["first_loss"])
    assert min(float(row["validation_loss"]) for row in rows if row["validation_loss"]) == record["validation_loss"]
    with (tmp_path / "page" / "data" / "modules.csv").open() as file:
        assert sum(int(row["entries"]) for row in csv.DictReader(file)) == record["trained"]
    browser.look(390, "dark")
    browser.open(found["report"])
    assert browser.complaints() == []
    assert browser.value("document.documentElement.scrollWidth") <= 390
    assert f"{record['trained']:,}" in page_of(found)


@pytest.mark.parametrize("form", ["completion", "choices", "chat", "text"])
def test_a_run_keeps_a_few_answers_of_before_and_after_for_its_page(model_folder, tmp_path, form):
    rows = {
        "completion": {"prompt": "ab|<i>", "completion": " c"},
        "choices": {"prompt": "ab|<i>", "choices": [" d", " c"], "answer": 1},
        "chat": {"messages": [{"role": "user", "content": "ab|<i>"}, {"role": "assistant", "content": " c"}]},
        "text": {"text": "ab|<i> c"},
    }
    data, run = write_lines(tmp_path / "d.jsonl", [rows[form]] * 4), tmp_path / "run"
    config = TrainConfig(model=str(model_folder), data=data, validation=data, steps=2, density=0.05, output=str(run),
                         no_audit=True, lr=0.3)  # fmt: skip
    train(config, afterwards=keep_answers)
    if form == "text":
        assert not (run / ANSWERS).exists()
        return
    found = json.loads((run / ANSWERS).read_text())["examples"]
    assert len(found) == 3
    asked = {"chat": "user: ab|<i>"}.get(form, "ab|<i>")
    assert {(each["prompt"], each["wanted"]) for each in found} == {(asked, " c")}
    prompt = [{"role": "user", "content": "ab|<i>"}] if form == "chat" else "ab|<i>"
    answers = generate(str(model_folder), prompt, str(run), base=True, new_tokens=32, raw=True, dtype="float32")
    assert (found[0]["base"], found[0]["trained"]) == tuple(texts[0] for texts in answers.by.values())
    page = page_of(write_report(ReportConfig(folder=[str(run)], output=str(tmp_path / "page"))))
    assert "Before and after" in page
    assert "ab|&lt;i&gt;" in page
    train(replace(config, overwrite=True, answers=0), afterwards=keep_answers)
    assert not (run / ANSWERS).exists()


def test_an_adapter_alone_has_a_page_and_nothing_is_told_of_a_training(tmp_path):
    model = sparsify(tiny_llama(), "random", 0.05)
    save(model, tmp_path / "a")
    found = write_report(ReportConfig(folder=[str(tmp_path / "a")], output=str(tmp_path / "page")))
    assert found["figures"] == ["places"]
    assert "Where the change lies" in page_of(found)
    assert "The adapter changes nothing" in page_of(found)
    with pytest.raises(FinepointError, match="holds no study"):
        write_report(ReportConfig(folder=[str(tmp_path)], output=str(tmp_path / "other")))


def test_the_browser_of_these_tests_sees_complaints_and_requests(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<img src='missing.png'><script>console.error('no'); throw Error('x')</script>")
    browser.open(tmp_path / "bad.html")
    assert len(browser.complaints()) >= 2
    assert len(browser.requests()) == 2


def brightness(colour):
    red, green, blue = map(float, re.findall(r"[\d.]+", colour)[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue


def colours(png):
    """How many byte values the rows of a PNG hold: few where it shows one plain colour."""
    width, _ = struct.unpack(">II", png[16:24])
    data, at = b"", 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    assert width
    return len(set(zlib.decompress(data)))
