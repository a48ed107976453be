"""Rules of other packages: the example is installed with pip as it stands, broken ones are made by hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finepoint.adapters.adapter import SparseAdapter
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.selection.rules import RULES, every_rule, rule_named

EXAMPLE = Path(__file__).parent.parent / "examples" / "finepoint-example-rules"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder on the path that holds the example, installed."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")  # pip builds beside the source
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", folder / "site", folder / "source"], check=True)
    return folder / "site"


def package(site, name, points, code=""):
    """A package as pip leaves it: its metadata, and a module where there is code."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{rule} = {where}" for rule, where in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[finepoint.rules]", *lines]) + "\n")
    if code:
        (site / f"{name}.py").write_text(code)


def finepoint(*arguments, sites=()):
    path = os.pathsep.join([*map(str, sites), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-m", "finepoint", *map(str, arguments)], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})  # fmt: skip


def test_an_installed_package_brings_rules(site, model_folder, choice_file, tmp_path, monkeypatch, capsys):
    done = finepoint("select", "--model", model_folder, "--data", choice_file, "--rule", "row-share", "--rule-options",
                     "power=2", "--density", "0.05", "--output", tmp_path / "s", "--json", sites=[site])  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen = SparseAdapter.load(tmp_path / "s")
    assert chosen.count == json.loads(done.stdout)["chosen"] > 0
    assert chosen.info["rule"] == "row-share"
    with pytest.raises(FinepointError, match="unknown rule 'row-share'"):  # where it is not installed
        rule_named("row-share")
    monkeypatch.syspath_prepend(site)
    with pytest.raises(FinepointError, match="did you mean 'row-share'"):
        rule_named("row-shore")
    assert main(["rules"]) == 0
    assert "plug-in: finepoint-example-rules 0.1.0" in capsys.readouterr().out
    for name in ("row-share", "near-the-mean"):
        RULES.pop(name)


def test_broken_packages_are_named_and_leave_the_others_alone(site, tmp_path, monkeypatch, capsys):
    package(tmp_path, "crashing", {"crash": "crashing:score"}, "raise RuntimeError('no licence\\nfound')")
    package(tmp_path, "absent", {"absent": "absent:score"})
    package(tmp_path, "nameless", {"nameless": "nameless:missing"}, "x = 1")
    package(tmp_path, "number", {"number": "number:x"}, "x = 1")
    package(tmp_path, "greedy", {"greedy": "greedy:score"}, "def score(weight, temperature): return weight")
    package(tmp_path, "wordy", {"wordy": "wordy:score"}, "def score(weight, how='abs'): return weight")
    package(tmp_path, "thief", {"gallop": "thief:score"}, "def score(weight): return weight")
    done = finepoint("rules", "--json", sites=[site, tmp_path])
    assert done.returncode == 0
    rules = json.loads(done.stdout)
    assert rules["row-share"] == {
        "formula": "|mean g|^power / its sum over the entry's row", "source": "",
        "package": "finepoint-example-rules 0.1.0", "options": {"power": 1.0}, "also": [], "needs_data": True,
    }  # fmt: skip
    assert rules["gallop"]["package"] == "finepoint"
    lines = done.stderr.strip().splitlines()
    for expected in (
        "rule 'crash' of crashing 1.0 cannot be imported from crashing:score: RuntimeError: no licence found",
        "rule 'absent' of absent 1.0 cannot be imported from absent:score: ModuleNotFoundError",
        "rule 'nameless' of nameless 1.0 cannot be imported from nameless:missing: AttributeError",
        "rule 'number' of number 1.0: number:x is no function",
        "rule 'greedy' asks for 'temperature'",
        "rule 'wordy' has the option 'how' with default 'abs'",
        "rule 'gallop' of thief 1.0 is hidden by finepoint's own",
    ):
        (line,) = [line for line in lines if expected in line]
        assert "left out: " in line
    assert len(lines) == 7
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["select", "--model", "x", "--output", str(tmp_path / "s"), "--rule", "crash"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("finepoint select: rule 'crash' of crashing 1.0 cannot be imported")
    assert len(shown.splitlines()) == 1


def test_a_name_that_two_packages_offer_must_be_said_in_full(tmp_path, monkeypatch):
    code = "def score(weight): return weight.abs()"
    package(tmp_path, "first_one", {"both": "first_one:score"}, code)
    package(tmp_path, "second_one", {"both": "second_one:score"}, code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FinepointError, match=r"several packages: .*say which: --rule \w+_one:score or \w+_one:score"):
        rule_named("both")
    assert rule_named("second_one:score").package == "second_one"
    rules, problems = every_rule()
    assert len(problems) == 1
    assert "gallop" in [rule.name for rule in rules]
    RULES.pop("second_one:score")


def test_a_rule_of_others_that_fails_while_it_scores_is_named(tmp_path, monkeypatch, llama):
    import finepoint as library

    package(tmp_path, "failing", {"failing": "failing:score", "wrong": "failing:wrong"},
            "def score(weight): return weight[999999]\ndef wrong(weight): return 3")  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FinepointError, match=r"rule 'failing' of failing 1.0 failed on model.layers.0.*: IndexError"):
        library.select(llama, rule="failing")
    with pytest.raises(FinepointError, match="rule 'wrong' gave int for model"):
        library.select(llama, rule="wrong")
    for name in ("failing", "wrong"):
        RULES.pop(name)
