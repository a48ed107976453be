"""kill -9 at random moments: nothing is torn, and the same command goes on to the same bits."""

import random
import shutil
import signal
import time

import pytest
from desk import COMMANDS, Desk

KILLS = {
    "train": 40, "train, keep best": 20, "train, over another": 20, "train, lora": 20, "train, full": 20,
    "train, density auto": 10, "select": 10, "merge": 10, "extract": 5, "export": 15, "export, shira": 5,
    "compare": 15, "sequence": 10, "patch": 10, "patch, in place": 20, "unpatch": 20,
}  # fmt: skip
"""in the slow run, 250 in all"""


@pytest.fixture(scope="module")
def desk(warm, given, tmp_path_factory):
    return Desk(warm, given, tmp_path_factory.mktemp("desk"))


def kill_and_finish(desk, folder, name, kills, seed):
    """Kills a command at random moments, sometimes what goes on from it too, so many times in all."""
    draw = random.Random(f"{name} {seed}")
    command, seconds = COMMANDS[name], desk.undisturbed(name).seconds
    hits = 0
    while hits < kills:
        place = desk.place(folder / "place", name)
        words = command.line[1:]
        while True:
            hit = desk.killed(place, words, draw.uniform(0, seconds))
            hits += hit
            desk.check(place, name)
            if not hit or hits >= kills or draw.random() < 0.7:
                break
            words = (*command.line[1:], *command.after[0])
        desk.finish(place, name)
        shutil.rmtree(place)


@pytest.mark.parametrize(("name", "kills"), [("train", 3), ("export", 1), ("compare", 1), ("patch, in place", 3)])
def test_a_killed_command_can_be_finished(desk, tmp_path, name, kills):
    kill_and_finish(desk, tmp_path, name, kills, seed=0)


@pytest.mark.faults
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_many_times_can_be_finished(desk, tmp_path, name):
    assert sum(KILLS.values()) == 250
    kill_and_finish(desk, tmp_path, name, KILLS[name], seed=1)


@pytest.mark.faults
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_any_moment_is_one_line(desk, tmp_path, name):
    draw = random.Random(name)
    for i in range(4):
        place = desk.place(tmp_path / str(i), name)
        started = desk.warm.start(*COMMANDS[name].line, folder=place, said=place / "said")
        time.sleep(draw.uniform(0.05, desk.undisturbed(name).seconds))
        started.kill(signal.SIGINT)
        status, said = started.wait(), (place / "said").read_text()
        assert status in (0, 130), said
        assert "Traceback" not in said, said
        assert status == 0 or said.splitlines()[-1].startswith(f"finepoint {COMMANDS[name].words[0]}: interrupted")
        desk.check(place, name)
        desk.finish(place, name)
