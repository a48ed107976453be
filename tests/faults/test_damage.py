"""Files that were cut short: found out, named in one line, and passed over where another can take their place."""

import shutil
import time

import pytest
from desk import COMMANDS, EXPORT, Desk, results

CUTS = (lambda size: 0, lambda size: size // 2, lambda size: size - 1)


@pytest.fixture(scope="module")
def desk(warm, given, tmp_path_factory):
    return Desk(warm, given, tmp_path_factory.mktemp("desk"))


def cut(path, keep):
    with path.open("rb+") as file:
        file.truncate(keep(path.stat().st_size))


def changed(words, flag, value):
    """A command line with another value for a flag."""
    words = [*words, flag, value] if flag not in words else list(words)
    words[words.index(flag) + 1] = value
    return words


def killed_after(desk, folder, name, file):
    """A command that was killed as soon as a file was there."""
    place = desk.place(folder)
    started = desk.warm.start(*COMMANDS[name].line, folder=place, said=place / "said")
    until = time.time() + 60
    while not (place / "out" / file).exists() and time.time() < until:
        time.sleep(0.002)
    started.kill()
    assert started.wait() is None
    return place


def test_a_damaged_checkpoint_is_passed_over(desk, tmp_path):
    place = killed_after(desk, tmp_path / "x", "train", "checkpoints/checkpoint-6/sealed.json")
    shutil.copytree(place / "out", tmp_path / "kept")
    files = sorted(path.name for path in (tmp_path / "kept" / "checkpoints" / "checkpoint-6").iterdir())
    assert {"deltas.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sealed.json"} <= set(files)
    for number, file in enumerate(files):
        shutil.rmtree(place / "out")
        shutil.copytree(tmp_path / "kept", place / "out")
        cut(place / "out" / "checkpoints" / "checkpoint-6" / file, CUTS[number % 3])
        assert "checkpoint-6 is passed over" in desk.finish(place, "train")


def test_a_checkpoint_of_other_settings_is_refused(desk, tmp_path):
    place = killed_after(desk, tmp_path / "x", "train", "checkpoints/checkpoint-4/sealed.json")
    words = (*COMMANDS["train"].line[1:], "--resume")
    for more, message in ((("--seed", "3"), "was trained with seed 0, not 3"), (("--lr", "0.1"), "lr 0.01, not 0.1"),
                          (("--data", "few.jsonl"), "was trained with other examples")):  # fmt: skip
        said = desk.run(place, changed(words, *more), status=(2,))
        assert message in said.splitlines()[-1], said
    desk.finish(place, "train")


def test_a_log_that_was_torn_goes_on(desk, tmp_path):
    place = killed_after(desk, tmp_path / "x", "train", "checkpoints/checkpoint-6/sealed.json")
    cut(place / "out" / "log.jsonl", CUTS[2])
    with (place / "out" / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    desk.finish(place, "train")
    steps = [line.split(",")[0] for line in (place / "out" / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [f'{{"step": {step}' for step in range(1, 9)]


def test_a_file_that_was_cut_short_is_named_in_one_line(desk, tmp_path):
    place = desk.place(tmp_path / "x")
    desk.run(place, COMMANDS["train"].line[1:])
    shutil.copytree(place / "out", place / "kept")
    more_steps = changed(COMMANDS["train"].words, "--steps", "10")
    readers = [("merge", "kept", "a", "--output", "m", "--overwrite"), ("inspect", "kept"),
               (*EXPORT, "kept", "--format", "merged", "--output", "e", "--overwrite"),
               (*more_steps, "--output", "kept", "--resume")]  # fmt: skip
    for keep in CUTS:
        cut(place / "kept" / "finepoint.safetensors", keep)
        for words in readers:
            said = desk.run(place, words, status=(2,)).splitlines()
            assert "finepoint.safetensors" in said[-1], said
        shutil.rmtree(place / "kept")
        shutil.copytree(place / "out", place / "kept")
    assert not (place / "m").exists()
    assert not (place / "e").exists()


@pytest.mark.faults
def test_a_study_with_a_file_cut_short_says_so_or_ends_the_same(desk, tmp_path):
    place = desk.place(tmp_path / "x")
    desk.run(place, COMMANDS["compare"].line[1:])
    shutil.copytree(place / "out", place / "kept")
    cells = results(place / "out" / "cells")
    files = sorted(path.relative_to(place / "out") for path in (place / "out").rglob("*") if path.is_file())
    files = [file for file in files if file.name not in ("README.md", "finepoint_config.json")]  # for people
    told = 0
    for number, file in enumerate(files):
        for path in (place / "out" / "cells").glob("*s1.json"):
            path.unlink()  # so that there is something left to do
        if (place / "out" / file).exists():
            cut(place / "out" / file, CUTS[number % 3])
        said = desk.run(place, COMMANDS["compare"].line[1:], status=(0, 1, 2))
        if cells_of(place) != cells:
            assert any(file.name in line for line in said.splitlines()), (file, said)
            told += 1
        shutil.rmtree(place / "out")
        shutil.copytree(place / "kept", place / "out")
    assert 3 < told < len(files)


def cells_of(place):
    try:
        return results(place / "out" / "cells")
    except AssertionError:
        return None  # a torn file is still there
