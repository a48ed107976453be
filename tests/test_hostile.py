"""Files of strangers: refused in one line with the model untouched, or loaded and then what they were before."""

import ast
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finepoint
from conftest import assert_same_bits, snapshot, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.adapter_set import AdapterSet
from finepoint.adapters.change import Change
from finepoint.adapters.combining import merge
from finepoint.adapters.entries import checksum
from finepoint.adapters.format import TENSORS
from finepoint.adapters.inspection import by_module, facts, heat_map
from finepoint.adapters.peft import load_merged
from finepoint.cli import main
from finepoint.errors import LONGEST, FinepointError, one_line
from finepoint.exchange.formats import export, import_adapter
from hostile import joined, mutations, parts, sealed
from test_adapter import trained

SOURCE = Path(finepoint.__file__).parent
FORMS = {"delta": ("delta", False), "compact value": ("value", True)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each form of the file: a model, its base, the trained bits, and the adapter's folder."""
    found = {}
    for form, (store, compact) in FORMS.items():
        model = tiny_llama(torch.bfloat16)
        base = snapshot(model)
        adapter, expected = trained(model, store, density=0.05, full=["model.norm.weight"])
        folder = adapter.save(tmp_path_factory.mktemp("whole") / "a", compact=compact)
        found[form] = (model, base, expected, folder)
    return found


# --- mutations without end


def assault(model, base, expected, folder, file, forged):
    """Loads a damaged file and does with it what users do; says what came of it, and checks what must hold.

    Only FinepointError may come out. Whatever loads leaves no trace in the model; and unless it is forged, it is what
    it was before it was damaged.
    """
    outcome, said = "refused", ""
    try:
        adapter = SparseAdapter.load(folder)
        facts(adapter), by_module(adapter), heat_map(adapter)
        adapter.save(folder.parent / "again", overwrite=True)
        outcome = "does not fit"
        with adapter.applied(model):
            outcome = "fits"
            now = snapshot(model)
            assert all(bool(value.isfinite().all()) for value in now.values())
            if not forged:
                assert_same_bits(expected, now)
    except FinepointError as error:
        said = str(error)
    assert said == one_line(said)
    assert len(said) < LONGEST + 10
    assert_same_bits(base, snapshot(model))
    return outcome


def count_outcomes(whole, count):
    outcomes = {}
    for model, base, expected, folder in whole.values():
        file = folder / TENSORS
        before = file.read_bytes()
        try:
            for seed, kind, damaged in mutations(before, count // 2):
                forged = seed % 3 == 0
                file.write_bytes(sealed(damaged) if forged else damaged)
                try:
                    outcome = assault(model, base, expected, folder, file, forged and damaged != before)
                except Exception as error:
                    raise AssertionError(f"seed {seed} ({kind})") from error
                key = f"{'forged ' if forged else ''}{kind}: {outcome}"
                outcomes[key] = outcomes.get(key, 0) + 1
        finally:
            file.write_bytes(before)
        assert assault(model, base, expected, folder, file, False) == "fits"
    return outcomes


def test_three_hundred_mutations_are_refused_or_harmless(whole):
    outcomes = count_outcomes(whole, 300)
    assert sum(n for key, n in outcomes.items() if "refused" in key) > 200
    assert any("forged" in key and key.endswith("fits") for key in outcomes)  # the forger gets past the digest


@pytest.mark.slow
def test_ten_thousand_mutations_are_refused_or_harmless(whole):
    outcomes = count_outcomes(whole, 10_000)
    print(json.dumps(outcomes, indent=1, sort_keys=True))


def test_without_the_digest_a_changed_number_would_pass(whole):
    """The negative control: an old file, which has none, lets through another adapter."""
    folder = whole["delta"][3]
    file = folder / TENSORS
    before = file.read_bytes()
    header, data = parts(before)
    config = json.loads(header["__metadata__"]["finepoint"])
    numbers = next(key for key in header if key.endswith(".delta"))
    at = header[numbers]["data_offsets"][0] + 3
    data = data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]  # the sign of a delta
    try:
        file.write_bytes(joined(header, data))
        with pytest.raises(FinepointError, match="is damaged: its digest is not that of what it holds"):
            SparseAdapter.load(folder)
        del config["digest"]
        config["format_version"] = 1
        header["__metadata__"]["finepoint"] = json.dumps(config)
        file.write_bytes(joined(header, data))
        SparseAdapter.load(folder)
    finally:
        file.write_bytes(before)


# --- made by hand


def raw(config, tensors=None, data=b"\0" * 4):
    """A file whose metadata holds this configuration, text or not."""
    tensors = tensors or {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = config if isinstance(config, str) else json.dumps(config)
    return joined({"__metadata__": {"finepoint": text}, **tensors}, data)


def weight(name="w", count=1, shape=(4,), dtype="float32", kind="delta", stored="F32", width=4, **more):
    """A file that announces one weight, with tensors of zeros that fit it."""
    facts = {"shape": list(shape), "dtype": dtype, "kind": kind, "count": count, "base_checksum": "abc"} | more
    tensors = {
        f"{name}.indices": {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]},
        f"{name}.{kind}": {"dtype": stored, "shape": [count], "data_offsets": [4 * count, (4 + width) * count]},
    }
    return {"format_version": 1, "weights": {name: facts}}, tensors, (4 + width) * count


def announced(**given):
    config, tensors, size = weight(**given)
    return raw(config, tensors, b"\0" * size)


def nested(depth):
    return '{"format_version": 4, "weights": {}, "info": ' + "[" * depth + "]" * depth + "}"


PICKLE = pickle.dumps(os.system)
FILES = {
    "a pickle": (PICKLE, "no safetensors file"),
    "a zip": (b"PK\x03\x04" + b"\0" * 60, "no safetensors file"),
    "nothing": (b"", "cannot read"),
    "a header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "no safetensors file"),
    "a header of 17 MB": (struct.pack("<Q", 17 << 20) + b" " * (17 << 20), "header is longer"),
    "deep": (raw(nested(100_000)), "configuration is damaged"),
    "broken": (raw('{"format_version": 4, "weights": '), "configuration is damaged"),
    "a long number": (raw('{"format_version": 4, "weights": {}, "info": ' + "9" * 5000 + "}"), "is damaged"),
    "not a number": (raw('{"format_version": 4, "weights": {}, "info": {"x": NaN}}'), "configuration is damaged"),
    "half a character": (raw({"format_version": 4, "weights": {}, "info": {"x": "\ud800"}}), "is damaged"),
    "null": (raw("null"), "configuration is damaged"),
    "no weight": (raw({"format_version": 4, "weights": {}}), "holds no change at all"),
    "version true": (raw({"format_version": True, "weights": {}}), "format version True"),
    "labels": (raw({"format_version": 1, "weights": {"w": {}}, "info": {"labels": 3}}), r"info: labels"),
    "many labels": (raw({"format_version": 1, "weights": {"w": {}}, "info": {"labels": [""] * 70_000}}), "labels"),
    "an object": (raw({"format_version": 1, "weights": {"w": {}}, "info": {"task": {}}}), r"info: task"),
    "ties": (raw({"format_version": 4, "weights": {"w": {}}, "base": {"tied": [[1]]}}), "weights or base"),
    "a list of dtypes": (announced(dtype=["float32"]), "is none of"),
    "eight-bit floats": (announced(stored="F8_E4M3", width=1), "delta is stored as F8_E4M3"),
    "many dimensions": (announced(shape=(2,) * 9), "not a list of sizes"),
    "positions of 65 bits": (announced(shape=(2**40, 2**40)), "not a list of sizes"),
    "more than the weight": (announced(count=5), "outside the weight"),
    "twice": (announced(count=2), "not ascending and unique"),
    "two checksums": (announced(part_checksums=["a"]), "checksums of parts and one over all"),
    "no count": (announced() and raw(*weight()[:2], b"\0" * 7), "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_made_by_hand_are_refused(tmp_path, kind):
    content, message = FILES[kind]
    (tmp_path / TENSORS).write_bytes(content)
    with pytest.raises(FinepointError, match=message):
        SparseAdapter.load(tmp_path)


NAMES = ("../../etc/passwd", "/etc/passwd", "C:\\windows", "model.layers.9.x", "finepoint", "\x1b[31m", "__class__", "",
         "model", "config.hidden_size", "forward")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_weights_open_no_file_and_change_nothing(tmp_path, name, llama, model_folder, monkeypatch):
    before = snapshot(llama)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / TENSORS).write_bytes(announced(name=name))
    adapter = SparseAdapter.load(tmp_path / "a")
    for use in (adapter.apply, adapter.attach, lambda m: AdapterSet(m).add("x", adapter),
                lambda m: merge([adapter], model=m), lambda m: finepoint.load(m, adapter, trainable=True)):  # fmt: skip
        with pytest.raises(FinepointError, match="the model has no such weight"):
            use(llama)
    with pytest.raises(FinepointError, match="no weight"):
        finepoint.SparseTuner(llama, adapter)
    with pytest.raises(FinepointError):
        export(str(model_folder), str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    merge([adapter]).save(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert len(list((tmp_path / "b").iterdir())) == 3
    assert_same_bits(before, snapshot(llama))


def test_a_forged_classifier_adds_no_tensor_of_its_own_to_an_export(tmp_path, model_folder):
    change = Change((2, 2), "float32", "full", torch.empty(0, dtype=torch.long), torch.ones(2, 2))
    info = {"task": "classification", "labels": ["a", "b"]}
    for name in ("../../evil", "lm_head.bias", "score.weight"):
        SparseAdapter({name: change}, info).save(tmp_path / "a", overwrite=True)
        with pytest.raises(FinepointError, match="nor would its classifier"):
            export(str(model_folder), str(tmp_path / "a"), "merged", str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a loop", "a folder", "nowhere"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / TENSORS
    make = {
        "a pipe": lambda: os.mkfifo(path),
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a loop": lambda: path.symlink_to(path),
        "a folder": path.mkdir,
        "nowhere": lambda: path.symlink_to(tmp_path / "gone"),
    }
    make[kind]()
    with pytest.raises(FinepointError, match="no ordinary file|not an adapter folder|cannot read"):
        SparseAdapter.load(tmp_path)


def test_a_link_is_read_but_never_written_through(tmp_path, whole):
    folder = whole["delta"][3]
    mine = tmp_path / "mine"
    mine.write_bytes((folder / TENSORS).read_bytes())
    kept = mine.read_bytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / TENSORS).symlink_to(mine)
    adapter = SparseAdapter.load(tmp_path / "a")
    SparseAdapter(adapter.changes, {"other": 1}).save(tmp_path / "a", overwrite=True)
    assert mine.read_bytes() == kept
    assert not (tmp_path / "a" / TENSORS).is_symlink()


def peak_kilobytes():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


GIANTS = {
    "indices": (1 << 29, "I32"),
    "gaps": (1 << 30, "U8"),
}


@pytest.mark.parametrize("kind", GIANTS)
def test_a_file_of_holes_that_claims_billions_of_entries_costs_no_memory(tmp_path, kind):
    """The file is really as long as it says, by way of holes that take no room on the disk."""
    count, dtype = GIANTS[kind]
    width = {"I32": 4, "U8": 1}[dtype]
    facts = {"shape": [1 << 30, 64], "dtype": "bfloat16", "kind": "value", "count": count, "base_checksum": "abc"}
    header = {
        "__metadata__": {"finepoint": json.dumps({"format_version": 2, "weights": {"w": facts}})},
        f"w.{kind}": {"dtype": dtype, "shape": [count], "data_offsets": [0, width * count]},
        "w.value": {"dtype": "BF16", "shape": [count], "data_offsets": [width * count, (width + 2) * count]},
    }
    start = joined(header, b"")
    with (tmp_path / TENSORS).open("wb") as file:
        file.write(start)
        try:
            file.truncate(len(start) + (width + 2) * count)
        except OSError:
            pytest.skip("this file system has no files of holes")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_kilobytes()
    with pytest.raises(FinepointError, match="indices are not ascending|unable to mmap"):
        SparseAdapter.load(tmp_path)
    assert peak_kilobytes() - before < 100_000


# --- every way in


@pytest.fixture
def bad(tmp_path, model_folder):
    """Folders of adapters with a wrong index, with a broken header, and of another model."""
    model = tiny_llama()
    adapter, _ = trained(model, density=0.2)
    folder = adapter.save(tmp_path / "good")
    content = (folder / TENSORS).read_bytes()
    header, data = parts(content)
    name = next(key for key in header if key.endswith("embed_tokens.weight.indices"))
    at = header[name]["data_offsets"][0]
    made = {
        "negative": sealed(joined(header, data[:at] + struct.pack("<i", -1) + data[at + 4 :])),
        "cut": content[:-1],
        "pickle": PICKLE,
    }
    for kind, damaged in made.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / TENSORS).write_bytes(damaged)
    trained(tiny_llama(layers=3), density=0.2)[0].save(tmp_path / "stranger")
    data_file = write_lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    return tmp_path, str(model_folder), data_file


COMMANDS = {
    "inspect": "inspect {a}",
    "verify": "verify --model {m} {a}",
    "eval": "eval --model {m} --adapter {a} --id x={d}",
    "merge": "merge {a} {a} --output {o}",
    "merge with a model": "merge {good} {a} --model {m} --output {o}",
    "export": "export --model {m} --adapter {a} --format merged --output {o}",
    "export as a patch": "export --model {m} --adapter {a} --format vllm-patch --output {o}",
    "indices": "train --model {m} --data {d} --indices {a} --output {o} --steps 1",
    "exclude": "select --model {m} --rule random --exclude {a} --output {o}",
    "resume": "train --model {m} --data {d} --output {a} --steps 2 --resume",
    "import": "import {a} --model {m} --output {o}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_in_one_line(bad, command, capsys, tmp_path):
    folder, model, data = bad
    before = Path(model, "model.safetensors").read_bytes()
    kinds = ["negative", "cut", "pickle"]
    if command not in ("inspect", "merge"):
        kinds.append("stranger")
    for kind in kinds:
        line = COMMANDS[command].format(a=folder / kind, good=folder / "good", m=model, d=data, o=folder / "out")
        assert main(line.split()) == 2, kind
        shown = capsys.readouterr()
        assert shown.out == ""
        said = [one for one in shown.err.splitlines() if one.startswith("finepoint ")]
        assert len(said) == 1, shown.err
        assert "Traceback" not in shown.err
        assert not (folder / "out").exists() or not list((folder / "out").iterdir())
    assert Path(model, "model.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_folder):
    """A run of four steps with checkpoints, unsealed as a forger might leave them, and the words that made it."""
    folder = tmp_path_factory.mktemp("run")
    data = write_lines(folder / "d.jsonl", [{"prompt": "ab", "completion": "c"}] * 8)
    line = f"train --model {model_folder} --data {data} --rule random --density 0.1 --save-every 2"
    assert main(f"{line} --steps 4 --output {folder / 'whole'}".split()) == 0
    for seal in folder.glob("whole/checkpoints/*/sealed.json"):
        seal.unlink()
    return folder / "whole", f"{line} --steps 6 --resume --output"


def not_a_number(path):
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, path)


class Evil:
    """What its pickle would do when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


SPOILT = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "junk": lambda path: path.write_bytes(b"\x80\x04junk" * 9),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil(path.parents[3] / "ran"))),
    "an evil archive": lambda path: torch.save(Evil(path.parents[3] / "ran"), path),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ["deltas.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_spoilt_checkpoint_is_not_gone_on_from(tmp_path, run_folder, name, capsys):
    whole, line = run_folder
    spoilt = SPOILT | ({"nan": not_a_number} if name == "deltas.safetensors" else {})
    for how, spoil in spoilt.items():
        shutil.copytree(whole, tmp_path / how / "a")
        file = tmp_path / how / "a" / "checkpoints" / "checkpoint-4" / name
        spoil(file)
        before = (tmp_path / how / "a" / TENSORS).read_bytes()
        assert main([*line.split(), str(tmp_path / how / "a")]) == 2, how
        said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("finepoint ")]
        assert len(said) == 1
        assert name.split(".")[0] in said[0], how
        assert (tmp_path / how / "a" / TENSORS).read_bytes() == before
        assert not (tmp_path / how / "ran").exists()
    shutil.copytree(whole, tmp_path / "fine")
    assert main([*line.split(), str(tmp_path / "fine")]) == 0


def test_a_delta_that_leaves_the_dtypes_range_is_refused(tmp_path):
    model = tiny_llama(torch.float16)
    name = "model.norm.weight"
    base = model.get_parameter(name)
    indices = torch.tensor([0, 3])
    change = Change((16,), "float16", "delta", indices, torch.tensor([1e-3, 1e6]), checksum(base.detach()[indices]))
    adapter = SparseAdapter({name: change})
    before = snapshot(model)
    for use in (adapter.apply, lambda m: AdapterSet(m).add("x", adapter), lambda m: finepoint.load(m, adapter)):
        with pytest.raises(FinepointError, match="too large a number for float16"):
            use(model)
    assert_same_bits(before, snapshot(model))
    model.save_pretrained(tmp_path / "m")
    adapter.save(tmp_path / "a")
    with pytest.raises(FinepointError, match="too large a number for float16"):
        export(str(tmp_path / "m"), str(tmp_path / "a"), "merged", str(tmp_path / "out"))


# --- what others write


def lora(folder, change=None, **config):
    folder.mkdir(exist_ok=True)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{stem}A.weight": torch.ones(2, 16), f"{stem}B.weight": torch.ones(16, 2)}
    if change:
        change(tensors, stem)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


LORAS = {
    "no B": ({"change": lambda t, s: t.pop(f"{s}B.weight")}, "do not go together"),
    "no A": ({"change": lambda t, s: t.pop(f"{s}A.weight")}, "do not go together"),
    "ranks": ({"change": lambda t, s: t.update({f"{s}B.weight": torch.ones(16, 3)})}, "do not go together"),
    "flat": ({"change": lambda t, s: t.update({f"{s}A.weight": torch.ones(16)})}, "do not go together"),
    "nan": ({"change": lambda t, s: t[f"{s}A.weight"].fill_(float("nan"))}, "not finite"),
    "integers": ({"change": lambda t, s: t.update({f"{s}A.weight": torch.ones(2, 16).int()})}, "stored as I32"),
    "eight bits": ({"change": lambda t, s: t.update({f"{s}A.weight": torch.ones(2, 16).to(torch.float8_e5m2)})},
                   "stored as F8_E5M2"),
    "an embedding's": ({"change": lambda t, s: t.update({f"{s}embedding_A": torch.ones(2, 16)})}, "do not go together"),
    "magnitude": ({"change": lambda t, s: t.update({f"{s}magnitude_vector": torch.ones(3)})}, "do not go together"),
    "rank 0": ({"r": 0}, "r is 0"),
    "rank by name": ({"r": "2"}, "r is '2'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is None"),
    "infinite": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "elsewhere": ({"change": lambda t, s: t.update({"../x": torch.ones(1)})}, "has no weight '../x'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LORAS)
def test_damaged_lora_is_refused(tmp_path, kind, llama, model_folder):
    settings, message = LORAS[kind]
    before = snapshot(llama)
    folder = lora(tmp_path / "lora", **settings)
    with pytest.raises(FinepointError, match=message):
        load_merged(folder, llama)
    assert_same_bits(before, snapshot(llama))
    with pytest.raises(FinepointError):
        export(str(model_folder), str(folder), "merged", str(tmp_path / "out"))
    assert load_merged(lora(tmp_path / "whole"), llama).count == 256


def deep(path):
    path.write_text("[" * 100_000)


@pytest.mark.parametrize("spoil", [deep, lambda p: p.write_text("[]"), lambda p: (p.unlink(), os.mkfifo(p))])
def test_a_spoilt_configuration_is_refused(tmp_path, spoil, llama):
    folder = lora(tmp_path / "lora")
    spoil(folder / "adapter_config.json")
    with pytest.raises(FinepointError, match="cannot read|holds no JSON object"):
        load_merged(folder, llama)
    folder = lora(tmp_path / "lora2")
    (folder / "finepoint_config.json").write_text('{"info": 3}')
    with pytest.raises(FinepointError, match="info"):
        load_merged(folder, llama)


SPARSE = {
    "flat numbers": (lambda n, i: (n[0], i), "positions of shape"),
    "a square": (lambda n, i: (n[None], i), "positions of shape"),
    "one position": (lambda n, i: (n, i[..., 0]), "positions"),
    "eight bits": (lambda n, i: (n.to(torch.float8_e4m3fn), i), "changes are stored as"),
    "truth": (lambda n, i: (n, i > 0), "their positions as"),
    "negative": (lambda n, i: (n, i - 100), "outside the weight"),
    "far": (lambda n, i: (n, i + 10**6), "outside the weight"),
    "nan": (lambda n, i: (n * float("nan"), i), "not a finite number"),
    "nan positions": (lambda n, i: (n, i.float() * float("nan")), "too large to be exact"),
    "huge": (lambda n, i: (n * 0 + 1e6, i), "too large a number"),
    "twice": (lambda n, i: (n, i * 0), "occurs twice"),
}


@pytest.mark.parametrize("layout", ["shira", "supertuning", "sparta"])
@pytest.mark.parametrize("kind", SPARSE)
def test_damaged_layouts_of_others_are_refused(tmp_path, kind, layout, model_folder):
    spoil, message = SPARSE[kind]
    model = tiny_llama()
    adapter, _ = trained(model, density=0.1, targets="linear")
    adapter.save(tmp_path / "a")
    export(str(model_folder), str(tmp_path / "a"), layout, str(tmp_path / "theirs"))
    file = next((tmp_path / "theirs").glob("*.safetensors"))
    tensors = load_file(file)
    stem = "model.layers.0.self_attn.q_proj"
    numbers, places = {
        "shira": (f"base_model.model.{stem}.shira_weight", f"base_model.model.{stem}.shira_indices"),
        "supertuning": (f"base_model.model.{stem}.supertuning_values", f"base_model.model.{stem}.supertuning_indices"),
        "sparta": (f"deltas.{stem}.weight", f"indices.{stem}.weight"),
    }[layout]
    assert import_adapter(str(tmp_path / "theirs"), str(model_folder)).count
    tensors[numbers], tensors[places] = (t.contiguous() for t in spoil(tensors[numbers], tensors[places]))
    save_file(tensors, file)
    with pytest.raises(FinepointError, match=message):
        import_adapter(str(tmp_path / "theirs"), str(model_folder), dtype="float16" if kind == "huge" else "auto")


# --- more than 2^31 entries are legitimate


@pytest.mark.parametrize("compact", [False, True])
def test_entries_beyond_two_to_the_31_survive_everything(tmp_path, compact):
    """A weight of 2^31 + 2^17 entries, its memory a file of holes: everything but its forward pass, for real."""
    shape = (65_536, 32_770)
    try:
        with (tmp_path / "memory").open("wb") as file:
            file.truncate(2 * shape[0] * shape[1])
    except OSError:
        pytest.skip("this file system has no files of holes")
    size = shape[0] * shape[1]
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=size, dtype=torch.bfloat16)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight = torch.nn.Parameter(memory.view(shape), requires_grad=False)
    indices = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 7, size - 1])
    with finepoint.SparseTuner(model, {"weight": indices}) as tuner:
        with torch.no_grad():
            tuner.parameters()[0].copy_(torch.arange(1.0, 6))
        tuner.follow_()
        assert memory[indices].tolist() == [1, 2, 3, 4, 5]
        adapter = tuner.adapter("delta")
        tuner.revert_()
    adapter.save(tmp_path / "a", compact=compact)
    again = SparseAdapter.load(tmp_path / "a")
    assert torch.equal(again["weight"], indices)
    with again.applied(model):
        assert memory[indices].tolist() == [1, 2, 3, 4, 5]
        assert memory[[0, 4, 6, 2**31 - 2, 2**31 + 1, size - 2]].tolist() == [0] * 6
    assert memory[indices].tolist() == [0] * 5
    nothing = checksum(torch.zeros(3))
    halves = [Change(shape, "bfloat16", "delta", part, torch.ones(3), nothing) for part in (indices[:3], indices[2:])]
    merged = merge([SparseAdapter({"weight": half}) for half in halves], model=model)
    assert torch.equal(merged["weight"], indices)
    assert merged.changes["weight"].numbers.tolist() == [1, 1, 2, 1, 1]
    facts(merged), heat_map(merged)


def test_positions_beyond_two_to_the_31_on_the_meta_device():
    """Shapes without memory: a stack of experts with 2^33 entries is a target, is cut and is budgeted."""
    from finepoint.selection.select import budgets
    from finepoint.selection.structure import tilings

    model = tiny_llama().to("meta")
    stack = torch.nn.Parameter(torch.empty(128, 8192, 8192, device="meta"))
    model.model.layers[0].mlp.register_parameter("experts", stack)
    weights = finepoint.target_weights(model, "*.experts")
    assert list(weights) == ["model.layers.0.mlp.experts"]
    cut = tilings(model, weights, "column")["model.layers.0.mlp.experts"]
    last = cut.indices(torch.tensor([cut.count - 1]))
    assert int(last[-1]) == 2**33 - 1
    assert cut.tiles(last).tolist() == [cut.count - 1]
    sizes = {name: w.numel() for name, w in weights.items()}
    (budget,) = budgets(model, sizes, {}, density=0.5, count=None, scope="global", targets="*.experts")
    assert budget.k == 2**32
    with finepoint.SparseTuner(model, {"model.layers.0.mlp.experts": torch.tensor([3, 2**33 - 1])}) as tuner:
        entries = tuner.entries["model.layers.0.mlp.experts"]
        assert entries.indices.dtype == torch.int64  # of shape alone: nothing of it can be written


# --- no stranger's code


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "imp", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def confessions(tree):
    """What a module's source does that could run what a file says."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (n.name for n in names if n.name.split(".")[0] in FORBIDDEN_MODULES)
            case ast.ImportFrom(names=[ast.alias("UnpicklingError")]):
                pass  # to say so in words of our own
            case ast.ImportFrom(module=str() as module) if module.split(".")[0] in FORBIDDEN_MODULES:
                yield module
            case ast.Call(func=ast.Name(name)) if name in FORBIDDEN_CALLS:
                yield name
            case ast.Call(func=ast.Attribute(ast.Name("torch"), "load" | "save" as name), keywords=said):
                if "weights_only=True" not in map(ast.unparse, said):
                    yield f"torch.{name}"
            case ast.Call(func=ast.Attribute(ast.Name("yaml"), "load" | "unsafe_load" | "full_load" as name)):
                yield f"yaml.{name}"
            case ast.Call(func=ast.Attribute(ast.Name("os"), "system" | "popen" as name)):
                yield f"os.{name}"
            case ast.keyword("trust_remote_code" | "allow_pickle" | "shell" as name, ast.Constant(True)):
                yield name


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_source_runs_nothing_that_a_file_says(path):
    assert list(confessions(ast.parse(path.read_text()))) == []


def test_the_search_for_such_code_finds_it():
    told = ["import pickle", "from dill import x", "eval('1')", "torch.load(f)", "m(trust_remote_code=True)",
            "yaml.load(f)", "os.system('x')"]  # fmt: skip
    for line in told:
        assert len(list(confessions(ast.parse(line)))) == 1


def test_every_model_and_tokenizer_is_loaded_without_remote_code():
    """`from_pretrained` in our source says so each time: left unsaid, transformers asks on the terminal."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                given = {keyword.arg for keyword in node.keywords}
                assert "trust_remote_code" in given or "source" in ast.unparse(node), f"{path}: {ast.unparse(node)}"


def test_a_repository_with_code_of_its_own_is_refused(tmp_path, model_folder, capsys):
    folder = tmp_path / "repository"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Evil"],
               "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Evil"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]},
                                                              "tokenizer_class": "T"}))  # fmt: skip
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    out = tmp_path / "o"
    lines = [f"select --model {folder} --rule random --output {out}", f"eval --model {folder} --id x={data}",
             f"plan --model {folder} --rule random", f"extract {folder} {folder} --all --output {out}"]  # fmt: skip
    for line in lines:
        assert main(line.split()) == 2
        assert len([one for one in capsys.readouterr().err.splitlines() if one.startswith("finepoint ")]) == 1
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


def test_messages_are_one_line_whatever_a_file_says():
    told = str(FinepointError("a\nb\x1b[31m\u202e\ud800" + "x" * 10_000 + "way out"))
    assert told.startswith("a b\\x1b[31m\\u202e\\ud800")
    assert told.endswith("way out")
    assert len(told) < LONGEST + 100
    assert told.encode().isascii()
