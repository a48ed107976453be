"""After a command a line says the next sensible one: on stderr, never for a program, and it can be typed as it is."""

import json
import shlex
from dataclasses import MISSING, fields

import pytest

from finepoint.cli import COMMANDS, command_named, main
from finepoint.cli.next_step import CONFIG, NEXT, say_next, say_planned
from finepoint.cli.options import parse
from finepoint.runtime.settings import default_of


def plain(command, **given):
    """A command's settings with its defaults, its required texts filled in."""
    config = command_named(command).config
    values = {f.name: default_of(f) for f in fields(config)}
    values = {name: f"my {name}" if value is MISSING else value for name, value in values.items()}
    return type("Config", (), values | given)()


@pytest.mark.parametrize("command", NEXT)
@pytest.mark.parametrize("given", [{}, {"quantise": "nf4", "dtype": "bfloat16"}, {"validation": "v.jsonl"},
                                   {"adapter": ["one"], "name": "vader"}, {"name": ["preview", "d.csv"]}])  # fmt: skip
def test_what_is_said_can_be_typed(command, given, caplog):
    assert command in COMMANDS
    known = {f.name for f in fields(command_named(command).config)}
    with caplog.at_level("INFO", "finepoint"):
        say_next(command, plain(command, output="my output", **{k: v for k, v in given.items() if k in known}))
        said = caplog.messages
        say_next(command, plain(command, json=True))
        assert caplog.messages == said
    for line in said:
        assert line.startswith("next: finepoint ")
        name, *words = shlex.split(line.removeprefix("next: finepoint "))
        parse(command_named(name).config, name, words)


def test_a_classifier_is_measured_and_a_quantised_model_asked_in_a_way_that_it_can_be(tmp_path, caplog):
    (tmp_path / CONFIG).write_text(json.dumps({"info": {"task": "classification"}}))
    with caplog.at_level("INFO", "finepoint"):
        say_next("train", plain("train", output=str(tmp_path)))
        say_next("train", plain("train", output="b", quantise="nf4"))
        say_next("train", plain("train", output="b", validation="v.jsonl"))
        say_next("train", plain("train", output="b"))
        say_next("rules", plain("rules"))
        (tmp_path / "c.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
        say_next("train", plain("train", output="b", data=str(tmp_path / "c.jsonl"), dtype="bfloat16"))
    commands = [line.split()[2] for line in caplog.messages]
    assert commands == ["eval", "generate", "eval", "chat", "eval"]
    assert caplog.messages[-1].endswith("--id test=FILE --dtype bfloat16")
    assert "--id validation=v.jsonl" in caplog.messages[2]


def test_the_command_says_it_on_stderr_and_not_with_json(model_folder, tmp_path, capsys):
    asked = ["plan", "--model", str(model_folder), "--tokens", "8", "--batch-size", "2"]
    assert main(asked) == 0
    said = capsys.readouterr()
    run = f"next: finepoint train --model {model_folder} --data FILE --output DIR"
    assert f"{run} --max-length 8 --batch-size 2\n" in said.err
    assert "next:" not in said.out
    assert main([*asked, "--json"]) == 0
    said = capsys.readouterr()
    assert "next:" not in said.out + said.err
    assert main(["plan", "--model", str(tmp_path)]) == 2
    assert main(["plan", "--model", "gemma-2b", "--tokens", "8", "--batch-size", "1"]) == 0  # a shape alone
    assert "next:" not in capsys.readouterr().err


@pytest.mark.parametrize(("given", "fits", "flags"), [
    ({}, None, ["--max-length", "512"]),
    ({"within": "columns:0.1", "gradient_checkpointing": True}, True, ["--gradient-checkpointing", "--within"]),
    ({"batch_size": 64, "tokens": 4096}, False, ["--fit", "--batch-size", "64", "--max-length", "4096"]),
    ({"protect_by": "kl", "protect_steps": True}, True, ["--protect", "own", "--protect-by", "--protect-steps"]),
])  # fmt: skip
def test_what_follows_a_plan_is_the_run_that_was_planned(given, fits, flags, caplog):
    with caplog.at_level("INFO", "finepoint"):
        say_planned(plain("plan", **given), fits)
    words = shlex.split(caplog.messages[0].removeprefix("next: finepoint train "))
    assert set(flags) <= set(words)
    assert ("--fit" in words) == (fits is False)
    found = parse(command_named("train").config, "train", words)
    assert (found.batch_size, found.max_length) == (given.get("batch_size", 16), given.get("tokens", 512))
