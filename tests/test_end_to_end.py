"""The whole path on the real model and real data, through the command line, as the README tells it."""

import json

import pytest

from conftest import write_lines
from finepoint.data.examples import read_examples

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def vader(finepoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "vader"
    finepoint("data", "vader", "--output", folder)
    return folder


def test_the_recipe_gives_the_counted_rows(vader):
    counts = {path.stem: len(read_examples(path)) for path in vader.glob("*.jsonl")}
    assert counts["amazon"] == 2447
    assert counts["tweets"] == 2607
    assert counts["nyt"] == 1535
    assert counts["movies-validation"] == counts["movies-test"] == 1000
    assert 7100 <= counts["movies-train"] <= 7171
    groups = {
        part: {json.loads(line)["group"] for line in (vader / f"movies-{part}.jsonl").read_text().splitlines()}
        for part in ("train", "validation", "test")
    }
    assert not groups["train"] & (groups["test"] | groups["validation"])
    assert not groups["test"] & groups["validation"]


def test_train_verify_and_evaluate_smollm2(finepoint, vader, tmp_path):
    adapter = tmp_path / "adapter"
    done = finepoint("train", "--model", "smollm2", "--data", vader / "movies-train.jsonl", "--output", adapter,
                     "--rule", "gallop", "--density", "0.001", "--steps", "10", "--batch-size", "8",
                     "--scoring-examples", "16", "--json")  # fmt: skip
    record = json.loads(done.stdout)
    assert record["trained"] == round(0.001 * 106_168_320)
    assert record["changed"] > 0.5 * record["trained"]
    assert record["last_loss"] < record["first_loss"]
    verified = json.loads(finepoint("verify", "--model", "smollm2", adapter, "--json").stdout)
    assert verified["changed"] == record["changed"]

    rows = (vader / "movies-test.jsonl").read_text().splitlines()[::20]  # the file is ordered by label
    few = write_lines(tmp_path / "few.jsonl", map(json.loads, rows))
    done = finepoint("eval", "--model", "smollm2", "--adapter", adapter, "--id", f"movies={few}", "--json")
    found = json.loads(done.stdout)
    assert found["base"]["id"]["movies"]["accuracy"] > 0.6
    adapted = found["adapters"][str(adapter)]["id"]["movies"]
    assert adapted != found["base"]["id"]["movies"]
    assert adapted["accuracy"] > 0.6  # chance is 0.5
