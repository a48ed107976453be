"""Every command in a process of its own, on real files: what a user sees, and the exit status."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from itertools import product

import pytest
import torch

from conftest import write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.cli import COMMANDS, command_named, main
from finepoint.cli.options import parse
from finepoint.cli.refusals import refuse_at_once
from finepoint.errors import FinepointError
from finepoint.evaluation.settings import EvalConfig
from finepoint.models.names import stored_weights, words_of
from finepoint.selection.patterns import refuse_unmatched
from finepoint.selection.settings import SelectConfig
from finepoint.training.settings import PlanConfig, TrainConfig


@pytest.fixture(scope="module")
def trained(finepoint, model_folder, tmp_path_factory):
    """An adapter made through the command line, with its data."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [{"prompt": f"{a}{b}:", "choices": [" x", " yy"], "answer": int(a > "d")} for a in "abcdefgh" for b in "ab"]
    data = write_lines(folder / "data.jsonl", rows)
    text = write_lines(folder / "text.jsonl", [{"text": "hello you"}, {"text": "abc"}])
    done = finepoint("train", "--model", model_folder, "--data", data, "--output", folder / "a", "--density", "0.1",
                     "--steps", "4", "--lr", "0.01", "--json")  # fmt: skip
    return {"folder": folder, "data": data, "text": text, "adapter": folder / "a", "record": json.loads(done.stdout)}


def test_help_of_every_command_lists_every_flag(finepoint):
    overview = finepoint("--help").stdout
    for command in COMMANDS:
        assert command in overview
        shown = finepoint(command, "--help").stdout
        config = command_named(command).config
        for field in fields(config):
            line = next(line for line in shown.splitlines() if f"--{field.name.replace('_', '-')} " in line)
            assert len(line.split("(")[0].split(maxsplit=1)) == 2, f"{command}: {field.name} is not explained"


def test_a_reader_that_stops_early_meets_no_traceback():
    command = [sys.executable, "-m", "finepoint", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything is written, as after `| head -1`
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_rule_is_found_in_the_folder_where_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "near_rule.py").write_text("def score(weight): return weight")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as in the installed command
    assert main(["plan", "--model", "llama-3-8b", "--rule", "near_rule:score", "--tokens", "8", "--json"]) == 0


def test_train_prints_one_json_object_and_logs_elsewhere(trained):
    record = trained["record"]
    assert record["trained"] == SparseAdapter.load(trained["adapter"]).count
    for key in ("trained", "adapter_bytes", "seconds", "peak_bytes", "changed", "steps", "last_loss"):
        assert record[key] > 0


def test_train_for_people(finepoint, trained, model_folder):
    done = finepoint("train", "--model", model_folder, "--data", trained["data"], "--output", trained["folder"] / "b",
                     "--count", "50", "--steps", "2", "--rule", "sparta")  # fmt: skip
    assert "trained 50 entries for 2 steps" in done.stdout
    assert "entries chosen in" in done.stderr


def test_eval_has_the_promised_keys(finepoint, trained, model_folder):
    output = trained["folder"] / "scores.json"
    done = finepoint("eval", "--model", model_folder, "--adapter", trained["adapter"], "--id", f"own={trained['data']}",
                     "--ood", f"other={trained['data']}", "--ood", f"third={trained['data']}",
                     "--probe", f"text={trained['text']}", "--output", output, "--json")  # fmt: skip
    found = json.loads(done.stdout)
    assert found == json.loads(output.read_text())
    assert {"accuracy", "accuracy_normalised", "stderr", "n"} <= set(found["base"]["id"]["own"])
    assert set(found["base"]["ood"]) == {"other", "third"}
    assert set(found["base"]["probe"]["text"]) == {"nll", "stderr", "tokens"}
    adapted = found["adapters"][str(trained["adapter"])]
    assert set(adapted["ood_change"]) == set(adapted["forget_ratio"]) == {"other", "third"}
    assert set(adapted["probe_change"]) == {"text"}
    table = finepoint(
        "eval", "--model", model_folder, "--adapter", trained["adapter"], "--id", f"own={trained['data']}"
    )
    assert "id own" in table.stdout
    finepoint("eval", "--model", model_folder, "--id", f"a={trained['data']}", "--output", output, status=2)


def test_select_inspect_verify_rules(finepoint, trained, model_folder):
    folder = trained["folder"] / "s"
    arguments = ["--model", model_folder, "--rule", "magnitude-low", "--targets", "v,o", "--density", "0.2"]
    arguments += ["--structure", "column"]
    chosen = json.loads(finepoint("select", *arguments, "--output", folder, "--json").stdout)
    assert chosen["chosen"] == SparseAdapter.load(folder).count
    shown = finepoint("inspect", folder).stdout
    assert re.search(r"structure\W+column\b", shown)
    assert re.search(r"targets\W+v,o\b", shown)
    facts = json.loads(finepoint("inspect", trained["adapter"], "--json").stdout)
    assert facts["entries"] == trained["record"]["trained"]
    assert "down_proj" in finepoint("inspect", trained["adapter"]).stdout
    verified = json.loads(finepoint("verify", "--model", model_folder, trained["adapter"], "--json").stdout)
    assert verified["reverted"] is True
    rules = json.loads(finepoint("rules", "--json").stdout)
    assert rules["gallop"]["source"] == "GaLLoP, arXiv:2510.19778"
    assert rules["random"]["also"] == ["sparta"]
    assert rules["baselines"]["mofo"] == {
        "formula": "every weight; a step moves the largest |momentum| of each tensor",
        "source": "MoFO, arXiv:2407.20999", "options": {"share": 0.15}, "lr": 3e-5,
    }  # fmt: skip
    table = finepoint("rules").stdout
    assert "|mean g|" in table
    assert "random-half" in table
    assert "drop-grow:FRACTION" in table
    assert "2401.16405" in rules["schedules"]["drop-grow:FRACTION"]["source"]


def test_a_baseline_is_trained_and_evaluated(finepoint, trained, model_folder, tmp_path):
    done = finepoint("train", "--model", model_folder, "--data", trained["data"], "--output", tmp_path / "b",
                     "--baseline", "lora", "--baseline-options", "rank=2", "--steps", "3", "--json")  # fmt: skip
    assert json.loads(done.stdout)["config"]["baseline_options"] == {"rank": 2}
    done = finepoint("eval", "--model", model_folder, "--adapter", tmp_path / "b", "--id", f"x={trained['data']}",
                     "--scale", "0.5", "--json")  # fmt: skip
    assert list(json.loads(done.stdout)["adapters"]) == [str(tmp_path / "b"), f"{tmp_path / 'b'} x 0.5"]


def test_an_adapter_goes_out_and_comes_back(finepoint, trained, model_folder, tmp_path):
    adapter = ["--model", model_folder, "--adapter", trained["adapter"]]
    out = json.loads(finepoint("export", *adapter, "--format", "merged", "--output", tmp_path / "m", "--json").stdout)
    assert out["entries"] == trained["record"]["trained"]
    assert out["bytes"] > out["rounded"] == 0
    pair = ["extract", "--base", model_folder, "--tuned", tmp_path / "m"]
    found = json.loads(finepoint(*pair, "--all", "--output", tmp_path / "all", "--json").stdout)
    assert found["entries"] == found["changed"] == sum(row["kept"] for row in found["weights"])
    assert found["lossless"] is True
    top = finepoint(*pair, "--density", "0.01", "--output", tmp_path / "top", "--compact").stdout
    assert "% of the change" in top
    assert "down_proj" in top
    finepoint("verify", "--model", model_folder, tmp_path / "top")
    text = finepoint("export", adapter[-1], *adapter[:-2], "--format", "shira", "--output", tmp_path / "shira").stdout
    assert "fill what the layout asks for" in text
    back = ["--model", model_folder, "--output"]
    finepoint("import", tmp_path / "shira", *back, tmp_path / "b")
    same = json.loads(
        finepoint("import", "--from", "shira", tmp_path / "shira", *back, tmp_path / "c", "--json").stdout
    )
    assert same["entries"] == trained["record"]["trained"]
    finepoint("verify", "--model", model_folder, tmp_path / "b")


def test_a_yaml_file_gives_the_flags_and_a_flag_overrides_it(finepoint, trained, model_folder, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model: {model_folder}\ndata: {trained['data']}\noutput: {tmp_path / 'y'}\ndensity: 0.2\nsteps: 3\nlr: 1e-2\n"
        "targets:\n  '*.v_proj': 0.5\n  '*.o_proj': 0.25\nrule_options: {epsilon: 1e-4}\n"
    )
    config = parse(TrainConfig, "train", ["--config", str(path), "--steps", "5", "--overwrite"])
    assert (config.steps, config.lr, config.density, config.overwrite) == (5, 0.01, 0.2, True)
    assert config.targets == {"*.v_proj": 0.5, "*.o_proj": 0.25}
    assert config.rule_options == {"epsilon": 1e-4}
    path.write_text("model: m\noutput: o\nlearning_rate: 3\n")
    done = finepoint("train", "--config", path, status=2)
    assert "learning_rate" in done.stderr


def test_spellings():
    config = parse(
        EvalConfig, "eval", ["--model", "m", "--id", "a=x", "b=y", "--id", "c=z", "--adapter", "p", "--json"]
    )
    assert config.id == ["a=x", "b=y", "c=z"]
    assert config.adapter == ["p"]
    assert config.json is True
    train = ["--model", "m", "--output", "o"]
    assert parse(TrainConfig, "train", [*train, "--targets", "v,o"]).targets == "v,o"
    assert parse(TrainConfig, "train", [*train, "--targets", "*.v_proj", "*.o_proj"]).targets == [
        "*.v_proj",
        "*.o_proj",
    ]
    assert parse(TrainConfig, "train", [*train, "--targets", "*.v_proj=0.1,*.o_proj=0.2"]).targets == {
        "*.v_proj": 0.1, "*.o_proj": 0.2,
    }  # fmt: skip
    assert parse(TrainConfig, "train", [*train, "--targets", '{"*.v_proj": 0.01}']).targets == {"*.v_proj": 0.01}
    assert parse(TrainConfig, "train", [*train, "--rule-options", "epsilon=1e-6"]).rule_options == {"epsilon": 1e-6}
    assert parse(TrainConfig, "train", [*train, "--scoring-examples", "0.1"]).scoring_examples == 0.1
    assert parse(TrainConfig, "train", [*train, "--refresh", "every:5"]).refresh == "every:5"
    several = parse(TrainConfig, "train", [*train, "--refresh", "drop-grow:0.2", "every:5", "--dropped", "keep"])
    assert (several.refresh, several.dropped) == (["drop-grow:0.2", "every:5"], "keep")
    assert parse(TrainConfig, "train", [*train, "--overwrite", "false", "--resume"]).overwrite is False
    assert parse(PlanConfig, "plan", ["--model", "m", "--padded", "off", "--protect-steps", "on"]).padded is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "x"], "--density: expected float or 'auto', got x"),
        (["--scope", "galaxy"], "'global', 'weight', 'layer'"),
        (["--stepz", "3"], "there is no flag --stepz; did you mean --steps?"),
        (["--learning-rate", "3"], "there is no flag --learning-rate; did you mean --lr?"),
        (["--lr", "1", "--lr", "2"], "--lr is given twice"),
        (["--seed", "x"], "option --seed: expected int, got x"),
        (["--rule-options", "epsilon"], "option --rule-options: expected name=value pairs, got epsilon"),
        (["--zzz"], "there is no flag --zzz; `finepoint train --help` lists the flags"),
        (["--dtype", "fp16"], "option --dtype: expected one of 'auto', 'float32', "),
        (["--steps"], "--steps needs a value"),
        (["--steps", "3", "4"], "'4' belongs to no flag"),
        (["stray"], ""),
    ],
)
def test_flags_that_cannot_be_read(arguments, message):
    with pytest.raises(FinepointError) as error:
        parse(
            TrainConfig, "train", ["--model", "m", "--output", "o", *arguments] if arguments != ["stray"] else ["stray"]
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ouput: x\n", "there is no key 'ouput'; did you mean output?"),
        ("- a\n- b\n", "the file of --config must hold `flag: value` lines"),
        ("steps: many\n", "c.yaml:1: steps: expected int, got many"),
    ],
)
def test_files_of_flags_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(FinepointError) as error:
        parse(TrainConfig, "train", ["--model", "m", "--output", "o", "--config", str(tmp_path / "c.yaml")])
    assert message in str(error.value)


def test_the_users_mistakes_are_one_line_and_exit_status_2(finepoint, trained, model_folder, tmp_path):
    train = ["train", "--model", model_folder, "--data", trained["data"], "--output", tmp_path / "o"]
    export = ["export", "--model", model_folder, "--adapter", trained["adapter"], "--output", tmp_path / "o"]
    extract = ["extract", "--base", model_folder, "--output", tmp_path / "o"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": }\n')
    for arguments, message in (
        (["trainn"], "did you mean 'train'"),
        ([*train, "--rule", "galop"], "did you mean 'gallop'"),
        ([*train, "--density", "7"], "density is 7.0"),
        ([*train, "--targets", "q_prj"], "close names: "),
        ([*train[:4], bad, *train[5:]], "bad.jsonl, line 2: not JSON"),
        (["train", "--data", trained["data"], "--output", tmp_path / "o"], "--model must be given"),
        (["train"], "--model and --output must be given"),
        (["train", "--model", trained["adapter"], *train[3:]], "it holds an adapter: name the model"),
        (["train", "--model", "no/such-model", *train[3:]], "cannot load model 'no/such-model'"),
        (["train", "--model", "smolm2", *train[3:]], "did you mean 'smollm2'? --model takes a folder, a hub id"),
        (["train", "--model", tmp_path, *train[3:]], "is not a model folder"),
        ([*train[:-1], trained["adapter"]], "is not empty; choose another --output or give --overwrite"),
        (["inspect", tmp_path / "nowhere"], "is not an adapter folder"),
        (["inspect", f"{trained['adapter']}/finepoint.safetensors"], "is a file; give the folder that it is in"),
        (["eval", "--model", model_folder], "nothing to evaluate on"),
        (["data", "nonesuch", "--output", tmp_path / "d"], "vader"),
        ([*export, "--format", "gguf"], "convert_hf_to_gguf.py"),
        ([*export, "--format", "onnx"], "the formats: merged, gguf, gguf-patch, shira, s"),
        ([*export[:2], "no/such-model", *export[3:], "--format", "merged"], "cannot fetch model 'no/such-model'"),
        ([*export[:-1], trained["adapter"], "--format", "merged"], "is not empty"),
        ([*extract, "--tuned", model_folder], "either --density"),
        ([*extract, "--tuned", model_folder, "--all", "--density", "0.1"], "either --density"),
        ([*extract, "--tuned", model_folder, "--all"], "no change to extract"),
        (["import", model_folder, "--model", model_folder, "--output", tmp_path / "o"], "holds neither"),
    ):  # fmt: skip
        done = finepoint(*arguments, status=2)
        assert message in done.stderr, done.stderr


@pytest.mark.parametrize(("command", "flags"), [
    ("eval", {"--max-length": -3, "--limit": 0, "--new-tokens": 0, "--generate": -1}),
    ("train", {"--max-length": 0, "--validation-limit": 0, "--seed": -1, "--epochs": 0, "--clip": -1.0}),
    ("select", {"--max-length": -1, "--seed": 2**32}),
    ("align", {"--temperature": 0, "--validation-limit": 0, "--steps": 0}),
])  # fmt: skip
def test_numbers_that_no_run_could_have_are_one_line(command, flags, capsys):
    given = ["--model", "m", *(["--output", "o", "--data", "d.jsonl"] if command != "eval" else [])]
    given += ["--method", "grpo"] if command == "align" else []
    for flag, value in flags.items():
        assert main([command, *given, flag, str(value)]) == 2
        name = flag.removeprefix("--").replace("-", "_")
        assert capsys.readouterr().err.startswith(f"finepoint {command}: {name} is {value}")


@pytest.mark.parametrize("command", ["select", "train", "plan", "sequence"])
@pytest.mark.parametrize("density", ["0", "7"])
def test_a_density_that_is_no_share_is_refused_before_anything_is_loaded(command, density):
    code = ("import sys; from finepoint.cli import main; status = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(status)")  # fmt: skip
    given = ["--model", "nowhere", "--output", "nothing", "--density", density]
    given += {"plan": given[2:4], "sequence": ["--tasks", "{}"]}.get(command, ["--data", "nowhere.jsonl"])
    given = [part for part in given if command != "plan" or part not in ("--output", "nothing")]
    done = subprocess.run([sys.executable, "-c", code, command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"density is {float(density)}; it is a share of the target entries, in (0, 1]" in done.stderr


# Mistakes that can be seen without torch, and how they are told.
AT_ONCE = [
    (["select", "--rule", "grdient"], "unknown rule 'grdient'; did you mean 'gradient'?"),
    (["select", "--rule", "gallop", "--rule-options", "epsilom=1"], "rule 'gallop' has no option 'epsilom'"),
    (["train", "--rule", "abs(q"], "rule 'abs(q' is no formula: '(' was never closed"),
    (["plan", "--rule", "none-such"], "unknown rule 'none-such'"),
    (["train", "--data", "nowhere.jsonl"], "cannot read nowhere.jsonl: No such file or directory"),
    (["train", "--validation", "nowhere.parquet"], "cannot read nowhere.parquet: No such file or directory"),
    (["select", "--protect", "nowhere.jsonl"], "cannot read nowhere.jsonl: No such file or directory"),
    (["eval", "--id", "a=nowhere.jsonl"], "cannot read nowhere.jsonl: No such file or directory"),
    (["train", "--model", "./nowhere"], "there is no folder ./nowhere; --model takes"),
    (["train", "--model", "smolm2"], "there is no model 'smolm2'; did you mean 'smollm2'? --model takes a"),
    (["eval", "--model", "Gemma3-270M"], "there is no model 'Gemma3-270M'; did you mean 'gemma3-270m'?"),
    (["plan", "--model", "nowhere.gguf"], "there is no file nowhere.gguf"),
    (["chat", "--adapter", "nowhere"], "nowhere is not an adapter folder: it has no finepoint.safetensors"),
    (["inspect", "nowhere"], "nowhere is not an adapter folder: it has no finepoint.safetensors"),
    (["train", "--targets", "q_porj"], "no weight matches 'q_porj'; close names: q_proj"),
    (["select", "--targets", "v,*.mlp.gate_up"], "no weight matches '*.mlp.gate_up'"),
    (["train", "--indices", "other", "--within", "columns:.1"], "--indices trains the entries of other as they are; "
                                                                "leave out --within"),
    (["train", "--indices", "other", "--density", ".1"], "--indices trains the entries of other as they are; leave"),
    (["train", "--indices", "other", "--count", "3"], "--indices trains the entries of other as they are; leave out"),
    (["train", "--indices", "other", "--rule", "gallop"], "--indices trains the entries of other as they are; leave"),
    (["align", "--method", "dpo", "--indices", "other", "--targets", "v"], "--indices trains the entries of other as"),
    (["train", "--indices", "other", "--structure", "row"], "--indices trains the entries of other as they are; leave"),
    (["train", "--indices", "other", "--refresh", "every:2", "--count", "3"], "other is not an adapter folder: it has"),
    (["train", "--device", "cuda"], "there is no flag --device; a GPU that torch finds is used"),
    (["train", "--baseline", "lorra"], "unknown baseline 'lorra'; did you mean 'lora'? known baselines: full"),
    (["train", "--baseline", "lora", "--baseline-options", "rnk=8"], "baseline 'lora' has no option 'rnk'"),
    (["train", "--baseline-options", "rank=8"], "baseline_options are given without a baseline"),
    (["train", "--baseline", "full", "--density", "0.1"], "density is for choosing entries, which baseline 'full'"),
    (["train", "--protect", "there.jsonl", "--protect-by", "ancor"], "no protection 'ancor'; did you mean 'anchor'?"),
    (["train", "--protect-by", "kl"], "--protect-by kl reads what is to be kept; give --protect FILE"),
    (["train", "--loss", "nl"], "no loss 'nl'; did you mean 'nll'? the losses: nll, dft, eaft, talr"),
    (["train", "--structure", "colum"], "structure is 'colum'; it is entry, row, column"),
    (["select", "--within", "columns:3"], "within is 'columns:3'; it is columns:SHARE"),
    (["plan", "--structure", "block:16"], "structure is 'block:16'; it is entry, row, column"),
    (["plan", "--protect-by", "x"], "no protection 'x'; the protections: anchor"),
    (["train", "--refresh", "evry:3"], "refresh is 'evry:3'; give every:N"),
    (["select", "--density", "0.1", "--count", "3"], "both density 0.1 and count 3 are given"),
    (["select", "--scoring-memory", "3"], "scoring_memory is 3.0; it is a share of the weights, in (0, 1]"),
    (["select", "--rule", "gain"], "rule 'gain' looks at what is to be kept; give text of it by --protect"),
    (["train", "--exclude", "folder"], "folder is not an adapter folder: it has no finepoint.safetensors"),
    (["train", "--indices", "./nowhere"], "./nowhere is not an adapter folder: it has no finepoint.safetensors"),
    (["train", "--output", "folder"], "folder is not empty; choose another --output or give --overwrite"),
    (["train", "--output", "folder", "--resume"], "folder has no checkpoint to go on from; start afresh with"),
    (["align", "--method", "dpo", "--resume"], "made has no checkpoint to go on from; start afresh with --overwrite"),
    (["align", "--method", "grpo", "--reward", "nmber"], "unknown reward 'nmber'; did you mean 'number'?"),
    (["align", "--method", "dpo", "--baseline", "full"], "align compares chosen entries with lora or dora"),
    (["eval", "--id", "there.jsonl"], "--id 'there.jsonl': expected NAME=FILE, e.g. id=test.jsonl"),
    (["eval", "--adapter", "folder", "--id", "a=there.jsonl"], "folder is not an adapter folder"),
    (["eval", "--limit", "3"], "there is nothing to evaluate on; give --id, --ood or --probe NAME=FILE"),
    (["merge", "folder", "--how", "smu"], "there is no way to merge called 'smu'; did you mean 'sum'? there are: sum"),
    (["merge", "--output", "made"], "there is nothing to merge; give adapter folders"),
    (["export", "folder", "--format", "gguff", "--output", "made"], "no format 'gguff'; did you mean 'gguf'?"),
    (["export", "folder", "--format", "shira", "--output", "made"], "folder is not an adapter folder"),
    (["extract", "--base", "./nowhere", "--tuned", "t", "--output", "made"], "there is no folder ./nowhere"),
    (["watch", "folder"], "folder holds no run; give the --output of finepoint train or align"),
    (["compare", "--arms", '[{"baseline": "lorra"}]'], "unknown baseline 'lorra'; did you mean 'lora'?"),
    (["compare", "--arms", '[{"rule": "random", "train": {"loss": "x"}}]'], "arm 'random-0.001': no loss 'x'"),
    (["compare", "--probes", '{"news": "nowhere.jsonl"}'], "cannot read nowhere.jsonl: No such file or directory"),
    (["sequence", "--ways", "lora", "--rates", "lorra=1"], "unknown way 'lorra'; did you mean 'lora'?"),
]  # fmt: skip
WITHOUT_MODEL = ("inspect", "merge", "extract", "watch")
LIGHTLY = """
import contextlib, io, json, sys
from finepoint.cli import main
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        status = main(words)
    print(json.dumps([status, said.getvalue(), sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))]))
"""


def completed(given, model_folder):
    """The command line with what else it must be given."""
    task = {"train": "there.jsonl", "test": "there.jsonl"}
    more = {} if given[0] in WITHOUT_MODEL else {"--model": str(model_folder)}
    if given[0] in ("select", "train", "align"):
        more |= {"--output": "made", "--data": "there.jsonl"}
    if given[0] in ("compare", "sequence"):
        tasks = {"a": task | {"validation": "there.jsonl"}} if given[0] == "compare" else {"a": task, "b": task}
        more |= {"--output": "made", "--tasks": json.dumps(tasks)}
    more |= {"--arms": '[{"rule": "random"}]'} if given[0] == "compare" else {}
    return given + [word for flag, value in more.items() if flag not in given for word in (flag, value)]


def test_a_mistake_that_can_be_seen_without_torch_is_refused_without_it(tmp_path, model_folder):
    """Time is not measured: what takes seconds is what must not have been imported."""
    (tmp_path / "there.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("no adapter")
    asked = json.dumps([completed(given, model_folder) for given, _ in AT_ONCE])
    done = subprocess.run([sys.executable, "-c", LIGHTLY], input=asked, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for (given, told), line in zip(AT_ONCE, done.stdout.splitlines(), strict=True):
        status, said, heavy = json.loads(line)
        assert (status, heavy) == (2, []), (given, said, heavy)
        assert said.startswith(f"finepoint {given[0]}: {told}"), (given, said)
    assert {file.name for file in tmp_path.iterdir()} == {"there.jsonl", "folder"}


def test_targets_that_only_loading_can_decide_are_left_to_it(model_folder, tmp_path):
    """Not refused: what the code names, what the files name, what a model with code of its own may have."""
    names = stored_weights(str(model_folder))
    words = words_of(str(model_folder), names)
    assert "model.layers.0.self_attn.q_proj.weight" in names
    for targets in ("linear", "v,o", "*.v_proj", "model.layers.1.mlp.*", "*.bias", "lm_head", "*layers.[01].*", "*"):
        refuse_unmatched(targets, names, words)
    refuse_unmatched("q_porj", names, set())
    refuse_unmatched("q_porj", [], words)
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    assert words_of(str(tmp_path), names) == set()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))  # made of other models' parts
    assert words_of(str(tmp_path), names) == set()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert stored_weights(str(tmp_path)) == []


@pytest.mark.parametrize("model", ["smollm2", "gemma3-270m", "some/where"])
def test_targets_of_a_model_that_was_never_fetched_are_left_to_loading(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "cache"))
    refuse_at_once("select", SelectConfig(model=model, output="s", rule="magnitude-low", targets="v_proj"))


def test_the_doctor_says_what_is_there_and_what_is_fast(monkeypatch, capsys, tmp_path):
    from finepoint.tuner import doctor
    from finepoint.tuner.kernels import kernel_for, kernels_for
    from finepoint.tuner.kernels.choice import case_of, forget_

    monkeypatch.setattr(doctor, "SHAPE", (24, 12))
    monkeypatch.setenv("FINEPOINT_KERNELS", "measure")
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == version("torch")
    assert found["machine"]["cores"] >= 1
    assert {(row["dtype"], row["entries"]) for row in found["kernels"]} == set(
        product(("float32", "bfloat16"), (*doctor.DENSITIES, *doctor.COLUMNS))
    )
    for row in found["kernels"]:
        assert row["taken"] in row
        assert row["why"]
        assert all(row[name] > 0 for name in row if name not in ("entries", "dtype", "taken", "why"))
    monkeypatch.setenv("FINEPOINT_KERNELS", "fixed")
    forget_()
    assert main(["doctor", "--json"]) == 0
    fixed = {(row["dtype"], row["entries"]): row["taken"] for row in json.loads(capsys.readouterr().out)["kernels"]}
    for dtype in (torch.float32, torch.bfloat16):
        dy, x = (torch.zeros(1, size, dtype=dtype) for size in doctor.SHAPE)
        for name, density in doctor.DENSITIES.items():
            taken = kernels_for(case_of(dy, x))[fixed[str(dtype).removeprefix("torch."), name]]
            assert taken is kernel_for(dy, x, round(density * 24 * 12))
    forget_()
    monkeypatch.setattr(doctor, "numba_kernels", lambda: None)
    monkeypatch.setattr(doctor, "cpu_has_bf16", lambda: False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    if not found["machine"]["GPU"]:
        assert "pip install 'finepoint[cpu]'" in text
        assert "no bfloat16 arithmetic" in text


def test_rules_are_listed_without_torch_once_they_are_known(tmp_path, monkeypatch):
    """What is kept is what was found; a file that is broken, or of other sources, is found again."""
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path))
    code = ("import sys; from finepoint.cli import main; status = main(['rules', '--json']); "
            "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)")  # fmt: skip

    def listed():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return json.loads(done.stdout), done.stderr.strip() == "True"

    (tmp_path / "rules.json").write_text('{"of": 3}')
    first, heavy = listed()
    assert heavy
    assert listed() == (first, False)
    assert first.keys() >= {"random", "gain", "baselines", "schedules"}
