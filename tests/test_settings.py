"""A setting is described once, beside its default; help, schema, resuming and sharing follow from that."""

import inspect
import json
import re
from dataclasses import MISSING, asdict, dataclass, fields

import pytest
import yaml

from finepoint.adapters.combining import METHODS as MERGE_METHODS
from finepoint.alignment.methods import REWARDS
from finepoint.alignment.settings import AlignConfig
from finepoint.baselines.registry import BASELINES
from finepoint.cli import COMMANDS, command_named, main
from finepoint.cli.adapters import ExportConfig, MergeConfig
from finepoint.cli.options import flags, help_text, parse, row
from finepoint.data.sources import SOURCES
from finepoint.errors import FinepointError
from finepoint.exchange.layouts import LAYOUTS, layout_named
from finepoint.runtime.settings import deciding, default_of, json_schema, names, sections, setting, values_of
from finepoint.selection.rules import RULES
from finepoint.studies.settings import CompareConfig, SequenceConfig
from finepoint.studies.sharing import key
from finepoint.studies.study import OWN
from finepoint.training.checkpoints import decisive, refuse_others
from finepoint.training.keep import PROTECTIONS
from finepoint.training.loss import LOSSES
from finepoint.training.settings import PlanConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Dummy(TrainConfig):
    """Train, with settings that nothing else has been told of."""

    grain: float = setting("how fine", 0.5, "selection", "which entries")
    polish: int = setting("how often", 3, "bits", "training")
    colour: str = setting("of the bar", "green", section="everything else")
    further: int = setting("how far", 1, "length", "training")


def config(**settings):
    return Dummy(**{"model": "m", "data": "d", "output": "o"} | settings)


def test_help_and_schema_show_a_new_setting():
    text = help_text(Dummy, "train")
    entries = text.split("which entries:")[1].split("\n\n")[0]
    assert "--grain" in entries
    assert "how fine (default: 0.5)" in entries
    assert json_schema(Dummy, "train")["properties"]["polish"] == {
        "description": "how often", "type": "integer", "default": 3,
    }  # fmt: skip
    assert parse(Dummy, "train", ["--model", "m", "--output", "o", "--grain", "0.25"]).grain == 0.25


class Base:
    def as_json(self):
        return {}


def test_a_resumed_run_has_the_same_bits_and_may_be_carried_further():
    before = decisive(config(), [], Base())
    refuse_others("it", before, decisive(config(colour="red", further=2, output="p", steps=9), [], Base()))
    for change in ({"grain": 0.1}, {"polish": 4}, {"lr": 1.0}, {"batch_size": 2}):
        with pytest.raises(FinepointError, match=next(iter(change))):
            refuse_others("it", before, decisive(config(**change), [], Base()))


def test_arms_share_a_selection_only_where_all_that_decides_it_is_the_same():
    one = key(config(), "statistics", "selection")
    assert key(config(polish=4, colour="red", lr=1.0, output="p"), "statistics", "selection") == one
    for change in ({"grain": 0.1}, {"density": 0.5}, {"quantise": "int8"}, {"seed": 1}):
        assert key(config(**change), "statistics", "selection") != one
    assert key(config(grain=0.1), "statistics") == key(config(), "statistics")


def test_every_setting_is_explained_and_has_its_place():
    for command in COMMANDS:
        known = command_named(command).config
        assert all(meaning and not meaning.endswith(".") for _, meaning, _ in flags(known)), command
        assert sum(len(members) for _, members in sections(known)) == len(fields(known))
        headings = [heading for heading, _ in sections(known)]
        assert headings == [""] or ("" not in headings and len(headings) > 3), command


@pytest.mark.parametrize(
    ("config", "field", "registry"),
    [(TrainConfig, "baseline", BASELINES), (TrainConfig, "protect_by", PROTECTIONS), (TrainConfig, "loss", LOSSES),
     (AlignConfig, "reward", REWARDS), (MergeConfig, "how", MERGE_METHODS), (ExportConfig, "format", LAYOUTS),
     (TrainConfig, "data", SOURCES), (TrainConfig, "protect_strength", PROTECTIONS)],
)  # fmt: skip
def test_help_names_all_that_a_setting_can_be(config, field, registry):
    assert layout_named("merged")  # the formats are found when they are first asked for
    meaning = next(each.metadata["meaning"] for each in fields(config) if each.name == field)
    ours = [name for name, each in registry.items() if "finepoint" in getattr(each, "__module__", "finepoint")]
    assert ours  # tests of the diffs in CONTRIBUTING add some
    assert [name for name in ours if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", meaning)] == []


def test_help_tells_every_strength_of_a_protection():
    meaning = next(each.metadata["meaning"] for each in fields(TrainConfig) if each.name == "protect_strength")
    told = {
        name: float(strength)
        for names, strength in re.findall(r"((?:\w+(?:, | and )?)+?) ([\d.]+)", meaning.removeprefix("how strongly; "))
        for name in re.split(", | and ", names)
    }
    assert told == {name: known.strength for name, known in PROTECTIONS.items()}


def test_no_class_has_more_than_twenty_some_settings_of_its_own():
    for command in COMMANDS:
        for owner in command_named(command).config.__mro__[:-1]:
            assert len(inspect.get_annotations(owner)) <= 24, owner


def test_what_a_run_may_be_told_otherwise():
    free = set(asdict(config())) - set(deciding(config(), "statistics", "selection", "bits", files=False))
    assert free >= {
        "model", "data", "output", "indices", "exclude", "fisher_data", "overwrite", "json", "resume", "steps",
        "epochs", "save_every", "eval_every", "validation", "validation_limit", "keep", "patience", "report_to",
        "store", "compact", "scoring_memory", "no_audit",
    }  # fmt: skip
    assert not free & {"lr", "batch_size", "rule", "density", "protect_strength", "gradient_checkpointing", "grain"}


def test_what_studies_set_by_themselves_and_what_may_grow():
    assert {"model", "data", "lr", "seed", "rule", "density", "indices", "resume"} <= OWN
    assert {each.name for each in fields(TrainConfig)} >= OWN
    assert names(CompareConfig, "length") == ["arms", "train_on", "seeds", "tuning", "keep_adapters"]
    assert set(names(SequenceConfig, "bits")) == {each.name for each in fields(SequenceConfig)} - {
        "output", "overlap", "ways", "json",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_schema_admits_every_default(command, capsys):
    assert main(["schema", command]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["properties"]) == [each.name for each in fields(command_named(command).config)]
    for name, rule in found["properties"].items():
        if "default" in rule:
            kinds = rule.get("anyOf", [rule])
            assert any(admits(kind, rule["default"]) for kind in kinds), name


def admits(kind, value):
    if "enum" in kind:
        return value in kind["enum"]
    python = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None),
              "array": list, "object": dict}[kind["type"]]  # fmt: skip
    return isinstance(value, python)


def test_printed_settings_are_taken_again(tmp_path, capsys):
    arguments = ["--model", "m", "--data", "d", "--output", "o", "--targets", "v,o", "--rule-options", "epsilon=1e-6"]
    assert main_exits(["train", *arguments, "--print-config"]) == 0
    file = tmp_path / "train.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["rule_options"] == {"epsilon": 1e-6}
    assert parse(TrainConfig, "train", ["--config", str(file)]) == parse(TrainConfig, "train", arguments)


def test_printed_tasks_keep_their_order_and_their_letters(tmp_path, capsys):
    tasks = {name: {"train": f"{name}-é.jsonl", "test": "t.jsonl"} for name in ("words", "movies", "arithmetic")}
    config = tmp_path / "tasks.yaml"
    config.write_text(yaml.safe_dump({"tasks": tasks}, sort_keys=False), "utf-8")
    arguments = ["--config", str(config), "--model", "m", "--output", "o", "--rates", "lora=1e-3"]
    assert main_exits(["sequence", *arguments, "--print-config"]) == 0
    (tmp_path / "again.yaml").write_text(printed := capsys.readouterr().out, "utf-8")
    assert "é" in printed
    again = parse(SequenceConfig, "sequence", ["--config", str(tmp_path / "again.yaml")])
    assert list(again.tasks) == list(tasks)  # they are trained in this order
    assert again == parse(SequenceConfig, "sequence", arguments)


def main_exits(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--batch_sise=2", "did you mean --batch-size"), ("--learning_rate", "did you mean --lr"),
     ("--densty=1", "no flag --densty; did you mean --density"), ("--lerning_rate=1", "no flag --lerning_rate; did you "
      "mean --lr"), ("--batch_size=x", "option --batch_size: expected int"), ("--batch_size", "--batch_size needs")],
)  # fmt: skip
def test_unknown_flags_are_spelled_as_given(flag, hint):
    with pytest.raises(FinepointError, match=hint):
        parse(TrainConfig, "train", ["--model", "m", "--output", "o", flag])


@pytest.mark.parametrize(
    ("text", "told"),
    [("model: m\nbatch-size: 2\n", ":2: there is no key 'batch-size'; did you mean batch_size"),
     ("model: m\n\ndensty: 1\n", ":3: there is no key 'densty'; did you mean density"),
     ("model: m\nlerning_rate: 1\n", ":2: there is no key 'lerning_rate'; did you mean lr"),
     ("model: m\nlr: 1\n\nmodel: n\n", ":4: 'model' stands in line 1 too"),
     ("rule_options: {a: 1,\n  a: 2}\n", ":2: 'a' stands in line 1 too"),
     ("model: m\noutput: o\nlr: abc\n", ":3: lr: expected float, got abc"),
     ("model: m\noutput: o\nschedule: liner\n", ":3: schedule: expected one of 'linear', "),
     ("model: m\noutput: o\nmethod: dpo\nbatch_size: 0\n", ":4: batch_size is 0; give at least 1"),
     ("model: [m\nlr: 1\n", "no YAML"), ("- model\n", "must hold `flag: value` lines")],
)  # fmt: skip
def test_unknown_keys_are_told_with_file_and_line(tmp_path, text, told):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(FinepointError) as raised:
        parse(AlignConfig, "align", ["--config", str(file)])
    assert told in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


STUDY = """model: m
output: o
tasks: {words: {train: f, validation: f, test: f}}
arms:
- {rule: random, train: {steps: 3}}
- &same {rule: random,
   density: 0.1}
- {<<: *same, density: 0.2}
train: {steps: 3}
"""


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [("validation: f", "valdation: f", ":3: there is no key 'valdation' in tasks; did you mean validation"),
     ("   density", "   densty", ":7: there is no key 'densty' in arms; did you mean density"),
     ("{<<: *same, density", "{<<: *same, densty", ":8: there is no key 'densty' in arms"),
     ("random, train: {steps", "random, train: {stps", ":5: there is no key 'stps' in train; did you mean steps"),
     ("\ntrain: {steps: 3}", "\ntrain:\n  max_stps: 3", ":10: there is no key 'max_stps' in train; did you")],
)  # fmt: skip
def test_keys_inside_of_a_studys_mappings_are_told_with_file_and_line(tmp_path, right, wrong, told):
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    assert parse(CompareConfig, "compare", ["--config", str(file)]).arms[2] == {"rule": "random", "density": 0.2}
    assert STUDY.count(right) == 1
    file.write_text(STUDY.replace(right, wrong))
    with pytest.raises(FinepointError) as raised:
        parse(CompareConfig, "compare", ["--config", str(file)])
    assert f"{file}{told}" in str(raised.value)


def test_settings_and_rules_print_small():
    assert repr(TrainConfig(model="m", output="o", lr=0.1)) == "TrainConfig(model='m', output='o', lr=0.1)"
    assert "rule=" in repr(AlignConfig(method="dpo", model="m", output="o", rule="gallop"))
    for line, name in zip(repr(RULES).splitlines(), RULES, strict=True):
        assert line.startswith(f"{name}:")
    assert "0x" not in repr(RULES)


@pytest.mark.parametrize(
    ("config", "field", "registry"),
    [(TrainConfig, "baseline", BASELINES), (TrainConfig, "protect_by", PROTECTIONS), (TrainConfig, "loss", LOSSES),
     (PlanConfig, "protect_by", PROTECTIONS), (MergeConfig, "how", MERGE_METHODS), (ExportConfig, "format", LAYOUTS)],
)  # fmt: skip
def test_functions_with_a_decorator_are_the_values_of_a_setting(config, field, registry):
    assert layout_named("merged")
    known = next(each for each in fields(config) if each.name == field)
    ours = [name for name, each in registry.items() if "finepoint" in getattr(each, "__module__", "finepoint")]
    assert sorted(values_of(known)) == sorted(ours)


def test_help_names_every_value_that_is_listed():
    for command in COMMANDS:
        for known in fields(command_named(command).config):
            told = " ".join(row(known))
            assert [value for value in values_of(known) if value not in told] == [], (command, known.name)
    assert "how the learning rate falls afterwards (default: linear; or cosine, constant)" in help_text(Dummy, "train")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_print_config_gives_a_form_to_fill_in(command, capsys, tmp_path):
    assert main_exits([command, "--print-config"]) == 0
    (tmp_path / "form.yaml").write_text(printed := capsys.readouterr().out)
    known = fields(command_named(command).config)
    required = [each.name for each in known if default_of(each) is MISSING]
    assert [line.partition(":")[0] for line in printed.splitlines() if line.endswith("  # required")] == sorted(
        required, key=list(yaml.safe_load(printed)).index
    )
    if required:
        with pytest.raises(FinepointError, match=f"--{required[0]}.* must be given"):
            parse(command_named(command).config, command, ["--config", str(tmp_path / "form.yaml")])
