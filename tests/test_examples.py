"""The examples run in their quick form: a tiny model, a few steps; and say what they promise."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "01_fine_tune.py": r"the base is back, bit for bit",
    "02_merge_and_take_out.py": r"without movies = words alone; bit for bit",
    "03_compare_rules.py": r"gallop and gradient share [\d,]+ of \d+ entries; by chance",
    "live_policy.py": r"5 versions sent; largest difference of log-probabilities 0\.0\n",
    "loop.py": r"step 4: loss [\d.]+\n[\d,]+ of [\d,]+ weights differ from the base",
}


def test_every_script_is_tested():
    elsewhere = {"common.py", "serve.py"}  # the server has test_serving.py
    assert {path.name for path in EXAMPLES.glob("*.py")} - elsewhere == set(PROMISES)


# That with two processes takes longest: the other one imports all anew.
@pytest.mark.parametrize("script", [pytest.param(script, marks=[pytest.mark.slow] * (script == "live_policy.py"))
                                    for script in PROMISES])  # fmt: skip
def test_a_script_keeps_its_promise(script, warm, given, tmp_path):
    done = warm.run("python", EXAMPLES / script, "--model", given / "my-model", "--data", given, "--steps", "4",
                    "--limit", "8", "--output", tmp_path, folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(PROMISES[script], done.stdout)


def test_the_notebook_runs_and_draws(given, tmp_path, monkeypatch):
    monkeypatch.setenv("FINEPOINT_EXAMPLE_MODEL", str(given / "my-model"))
    monkeypatch.setenv("FINEPOINT_EXAMPLE_DATA", str(given / "vader"))
    notebook = nbformat.read(EXAMPLES / "where_do_rules_choose.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    drawn = [html for html in shown if "<svg" in html]  # an old rich leaves an empty box where a progress bar was
    assert drawn[0].count("<svg") == 4
    assert "by chance" in outputs[-1].text


def test_the_notebook_for_colab_trains_and_answers(given, tmp_path, monkeypatch):
    monkeypatch.setenv("FINEPOINT_EXAMPLE_MODEL", str(given / "my-model"))
    notebook = nbformat.read(EXAMPLES / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data["text/html"] for output in told if "text/html" in output.get("data", {})]
    assert any("<th>base</th><th>adapters/support</th>" in html for html in shown)
    assert (tmp_path / "support-adapter.zip").stat().st_size > 0


def test_what_the_notebook_shows_names_no_machine():
    text = (EXAMPLES / "where_do_rules_choose.ipynb").read_text()
    assert '"stderr"' not in text
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
