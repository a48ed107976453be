"""The quantised file itself is patched: against the package gguf, transformers, and plain dense formulas."""

import json
import shutil
import struct
from contextlib import suppress
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig

import finepoint
import quantised_file
from conftest import assert_same_bits, random_batches, snapshot, tiny_llama
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.exchange.gguf_patch import BESIDE, FILE, Codes, finished, patch_file, unpatch_file
from finepoint.models.gguf import open_gguf
from finepoint.models.grids import FORMS, EntryGrid, changed_bytes, codes_at
from finepoint.models.loading import load_model
from finepoint.runtime.files import PARTIAL
from finepoint.selection.rates import usual_rate
from finepoint.selection.rules import RULES, rule_named
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig

MIXED = {"token": "Q8_0", "blk.0.ffn_down": "Q4_K", "blk.1.ffn_down": "Q6_K", "ffn_gate": "Q4_0", "attn_v": "Q5_0",
         "attn_output": "F16"}  # fmt: skip
ROUNDED = torch.bfloat16


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FINEPOINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def desk(cache, tmp_path_factory):
    """A folder with a file of several formats, an adapter trained on its grid, and one trained beside it."""
    folder = tmp_path_factory.mktemp("desk")
    quantised_file.write_gguf(folder / "base.gguf", **(MIXED | {"attn_output": "Q4_1"}))
    rows = [{"prompt": f"{a} ", "completion": b} for a, b in zip("abcdefgh", "hgfedcba", strict=True)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(settings(folder, "on", on_grid=True, save_every=2))
    train(settings(folder, "off"))
    return folder


def settings(folder, output, **more):
    given = {"model": str(folder / "base.gguf"), "data": str(folder / "words.jsonl"), "output": str(folder / output),
             "rule": "random", "density": 0.05, "lr": 0.02, "steps": 4, "batch_size": 4, "no_audit": True}  # fmt: skip
    return TrainConfig(**(given | more))


@pytest.fixture
def place(desk, tmp_path):
    shutil.copy(desk / "base.gguf", tmp_path / "base.gguf")
    return tmp_path


def read(path):
    """What the package gguf reads: tensor name to numbers, rows first."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).copy()
            for tensor in gguf.GGUFReader(path).tensors}  # fmt: skip


def same(a, b):
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


# --- formats


def blocks(name, count, generator):
    """Random blocks of a format, whose steps and minima are numbers."""
    form = FORMS[name]
    found = generator.integers(0, 256, (count, form.size), dtype=np.uint8)
    for at in (208,) if name == "Q6_K" else (0, 2):
        half = generator.normal(0, 0.1, len(found)).astype(np.float16)
        found[:, at : at + 2] = half[:, None].view(np.uint8)
    return found


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.steps])
def test_codes_are_read_and_written_where_the_package_gguf_reads_them(name):
    generator, type_ = np.random.default_rng(0), gguf.GGMLQuantizationType[name]
    raw, start = blocks(name, 12, generator), 7
    data = np.concatenate([np.zeros(start, np.uint8), raw.reshape(-1)])
    before = gguf.dequantize(raw, type_).reshape(-1)
    at = generator.permutation(len(before))[: len(before) // 2]
    grid = EntryGrid.read(data, FORMS[name], start, at)
    assert same(grid.values(grid.codes).numpy(), before[at])
    new = torch.from_numpy(generator.integers(0, 1 << FORMS[name].width, len(at)))
    np.bitwise_xor.at(data, *changed_bytes(FORMS[name], start, at, (grid.codes ^ new).numpy()))
    after = gguf.dequantize(data[start:].reshape(raw.shape), type_).reshape(-1)
    assert same(after[at], grid.values(new).numpy())
    others = np.setdiff1d(np.arange(len(before)), at)
    assert same(after[others], before[others])
    assert np.array_equal(codes_at(data, FORMS[name], start, at), new.numpy())


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q5_K", "Q6_K"])
def test_an_entry_goes_to_the_nearest_code_of_its_block_and_no_further_than_its_ends(name):
    generator = np.random.default_rng(1)
    data = blocks(name, 4, generator).reshape(-1)
    at = np.arange(4 * FORMS[name].block)
    grid = EntryGrid.read(data, FORMS[name], 0, at)
    every = torch.stack([grid.values(torch.full_like(grid.codes, code)) for code in range(1 << FORMS[name].width)])
    delta = torch.randn(len(at), generator=torch.Generator().manual_seed(0)) * grid.step * 20
    wanted = grid.values(grid.codes) + delta
    nearest = (every - wanted).abs().amin(0)
    for codes in (grid.moved(delta), grid.nearest(wanted)):
        assert torch.allclose((grid.values(codes) - wanted).abs(), nearest, atol=1e-6, rtol=1e-4)
    assert torch.equal(grid.moved(torch.zeros_like(delta)), grid.codes)


def test_a_block_whose_step_is_0_has_nowhere_to_go():
    grid = EntryGrid(torch.tensor([3, 3]), torch.tensor([0.0, 0.5]), None, FORMS["Q4_0"])
    assert grid.moved(torch.tensor([1.0, 1.0])).tolist() == [3, 5]


def test_a_header_says_what_the_package_gguf_reads(desk):
    theirs = gguf.GGUFReader(desk / "base.gguf")
    ours = open_gguf(desk / "base.gguf")
    assert ours.architecture == "llama"
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.type, found.start) == (tensor.tensor_type.name, tensor.data_offset)
        assert found.shape == tuple(tensor.shape.tolist()[::-1])


def test_a_file_that_is_cut_short_or_damaged_is_one_line(desk, tmp_path):
    whole = (desk / "base.gguf").read_bytes()
    generator = np.random.default_rng(0)
    for length in [0, 3, 4, 20, *generator.integers(24, len(whole), 60).tolist(), len(whole) - 40]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(FinepointError, match=r"whole GGUF file"):
            open_gguf(tmp_path / "cut.gguf")
    header = open_gguf(desk / "base.gguf").tensors["token_embd.weight"].start
    for _ in range(300):
        damaged = bytearray(whole)
        at = int(generator.integers(0, header - 8))
        damaged[at : at + 8] = struct.pack("<Q", int(generator.integers(0, 1 << 63)) >> int(generator.integers(0, 60)))
        (tmp_path / "cut.gguf").write_bytes(damaged)
        with suppress(FinepointError):
            open_gguf(tmp_path / "cut.gguf")


# --- an ordinary adapter, snapped


def in_the_file(name, tensors):
    """A weight's tensor in the file, and where each of the weight's entries lies there, flat."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, quantised_file.LAYERS)
    tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
    order = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
    if "attn_q" in tensor.name or "attn_k" in tensor.name:
        # Where each of the file's entries lies in the model's weight.
        heads = quantised_file.HEADS if "attn_q" in tensor.name else quantised_file.KEYS
        order = quantised_file.permuted(order, heads)
    return tensor, np.argsort(order.reshape(-1))


def every_number(data, tensor, at):
    """All numbers that the blocks of these entries can hold: (codes, k)."""
    grid = EntryGrid.read(data, tensor.form, tensor.start, at)
    return torch.stack([grid.values(torch.full_like(grid.codes, code)) for code in range(1 << tensor.form.width)])


def dense(file, adapter):
    """The file's tensors with every changed entry at the nearest of all numbers its block can hold."""
    found, forms = read(file), open_gguf(file).tensors
    data = np.fromfile(file, dtype=np.uint8)
    for name, change in adapter.changes.items():
        tensor, order = in_the_file(name, forms)
        at = order[change.indices.numpy()]
        flat = found[tensor.name].reshape(-1)
        before = torch.from_numpy(flat[at]).to(ROUNDED)
        delta = change.new_values(before).float() - before.float()
        if tensor.type in ("F16", "F32"):
            flat[at] = change.new_values(before).to(torch.float16 if tensor.type == "F16" else torch.float32).float()
            continue
        every = every_number(data, tensor, at)
        steps = (every - (torch.from_numpy(flat[at]) + delta)).abs()
        flat[at] = torch.where(delta == 0, torch.from_numpy(flat[at]), every.gather(0, steps.argmin(0)[None])[0])
    return found


def some_change(path, generator):
    """An adapter over a few entries of every matrix, moved far and near."""
    model = load_model(str(path), "bfloat16")
    indices = {name: torch.randperm(weight.numel(), generator=generator)[:40].sort().values
               for name, weight in model.named_parameters() if weight.ndim == 2}  # fmt: skip
    tuner = finepoint.SparseTuner(model, indices, audit=False)
    with torch.no_grad():
        for delta in tuner.parameters():
            delta.copy_(torch.randn(len(delta), generator=generator) * 0.05)
    return tuner.adapter()


def test_the_patched_file_is_the_dense_model_whose_entries_are_the_nearest_numbers_of_their_blocks(cache, tmp_path):
    path = quantised_file.write_gguf(tmp_path / "base.gguf", **MIXED)
    adapter = some_change(path, torch.Generator().manual_seed(0))
    adapter.save(tmp_path / "a")
    wanted = dense(path, adapter)
    found = patch_file(str(path), str(tmp_path / "a"), str(tmp_path / "copy.gguf"))
    after, before = read(tmp_path / "copy.gguf"), read(path)
    changed = 0
    for name, numbers in after.items():
        assert np.allclose(numbers, wanted[name], rtol=1e-6, atol=1e-9), name
        changed += int((numbers != before[name]).sum())
    assert changed == found["changed"] > 200
    assert 0 < found["lost"] < 1
    # transformers reads the same: the logits are those of a model that was given these numbers.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="copy.gguf", dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))  # fmt: skip
    reference = quantised_file.tiny()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, quantised_file.LAYERS)
    for name, weight in reference.named_parameters():
        stored = names.get_name(name, try_suffixes=(".weight",))
        numbers = after[stored]
        if "attn_q" in stored or "attn_k" in stored:
            heads = quantised_file.HEADS if "attn_q" in stored else quantised_file.KEYS
            order = quantised_file.permuted(np.arange(len(numbers))[:, None], heads).reshape(-1)
            numbers = numbers[np.argsort(order)]
        weight.data.copy_(torch.from_numpy(np.ascontiguousarray(numbers)))
    ids = torch.tensor([[1, 5, 9, 12, 30]])
    assert torch.equal(model.eval()(ids).logits, reference.eval()(ids).logits)


def test_what_moves_by_less_than_half_a_step_is_lost_and_said_to_be(desk, place, caplog):
    model = load_model(str(desk / "base.gguf"), "bfloat16")
    name = "model.layers.0.self_attn.v_proj.weight"
    tuner = finepoint.SparseTuner(model, {name: torch.arange(64)}, audit=False)
    with torch.no_grad():
        tuner.parameters()[0].fill_(2e-3)
        tuner.parameters()[0][0] = 0.3
    tuner.adapter().save(place / "small")
    found = patch_file(str(place / "base.gguf"), str(place / "small"), str(place / "copy.gguf"))
    assert found["changed"] < 10
    with torch.no_grad():
        tuner.parameters()[0].fill_(1e-3)
    tuner.adapter().save(place / "smaller")
    with pytest.raises(FinepointError, match=r"no code of .* changes: all entries of .*smaller have moved by less"):
        patch_file(str(place / "base.gguf"), str(place / "smaller"))
    with torch.no_grad():
        tuner.parameters()[0].fill_(0.015)
        tuner.parameters()[0][:32] = 0.0
        tuner.parameters()[0][0] = 0.05
    tuner.adapter().save(place / "some")
    assert not caplog.text
    assert patch_file(str(place / "base.gguf"), str(place / "some"), str(place / "more.gguf"))["lost"] > 0.5
    assert "most of the change is lost" in caplog.text


# --- trained on the grid


def test_what_was_trained_on_the_grid_is_what_the_patched_file_holds(desk, place):
    found = patch_file(str(place / "base.gguf"), str(desk / "on"))
    assert found["lost"] == 0
    assert found["changed"] > 100
    adapted = load_model(str(desk / "base.gguf"))
    finepoint.SparseAdapter.load(desk / "on").apply(adapted)
    assert_same_bits(snapshot(adapted), snapshot(load_model(str(place / "base.gguf"))))
    off = patch_file(str(desk / "base.gguf"), str(desk / "off"), str(place / "off.gguf"))
    assert off["lost"] > 0.1, "control: trained beside the grid"


def test_training_on_the_grid_resumes_to_the_same_bits(desk, tmp_path):
    shutil.copytree(desk / "on", tmp_path / "on")
    shutil.rmtree(tmp_path / "on" / "checkpoints" / "checkpoint-4")
    (tmp_path / "on" / "run.json").unlink()
    train(
        settings(
            tmp_path,
            "on",
            model=str(desk / "base.gguf"),
            data=str(desk / "words.jsonl"),
            on_grid=True,
            save_every=2,
            resume=True,
        )
    )
    ours, theirs = (load_file(folder / "on" / "finepoint.safetensors") for folder in (tmp_path, desk))
    assert_same_bits(ours, theirs)


def test_training_on_the_grid_is_the_dense_formula_straight_through():
    model, batches = tiny_llama(torch.float32), random_batches(3)
    name, rate = "model.layers.0.mlp.up_proj.weight", 0.5
    at = torch.arange(0, 384, 5)
    base = model.get_parameter(name).detach().to(ROUNDED).float().clone()
    model.get_parameter(name).data.copy_(base)
    step = torch.full((len(at),), 0.05)
    codes = torch.randint(0, 16, (len(at),), generator=torch.Generator().manual_seed(0))
    grid = EntryGrid(codes, step, base.view(-1)[at] - codes.float() * step, FORMS["Q4_1"])
    reference = tiny_llama(torch.float32)
    tuner = finepoint.SparseTuner(model, {name: at}, audit=False)
    tuner.snap_({name: grid})
    optimizer = torch.optim.SGD(tuner.parameters(), rate)
    master = torch.zeros(len(at))
    weight = reference.get_parameter(name)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = (codes + (master / step).round()).clamp(0, 15)
        with torch.no_grad():
            weight.copy_(base)
            weight.view(-1)[at] = (moved * step + grid.minimum).to(ROUNDED).float()
        reference.zero_grad()
        reference(**batch).loss.backward()
        master -= rate * weight.grad.view(-1)[at]
    assert torch.allclose(tuner.parameters()[0], master, rtol=1e-4, atol=1e-6)
    assert 0 < tuner.changed() < len(at)
    assert len(tuner.adapter().changes[name].numbers) == len(at)
    with pytest.raises(FinepointError, match="on a grid are chosen once"):
        tuner.choose_({name: at[:3]})


def test_the_usual_rate_on_the_grid_is_the_one_that_was_measured():
    assert [usual_rate(rule_named("random"), density, on_grid=True) for density in (1e-3, 1e-2)] == [0.03, 0.003]
    assert usual_rate(rule_named("gallop"), 1e-2) == 3e-4
    assert usual_rate(rule_named("abs(g) * min(step, room)"), 1e-2, on_grid=True) == 0.003
    assert usual_rate(rule_named("gain"), 1e-3, on_grid=True) == usual_rate(rule_named("gain"), 1e-3)


# --- in place, and back


def test_a_patch_is_taken_back_bit_for_bit(desk, place):
    path, before = place / "base.gguf", (place / "base.gguf").read_bytes()
    path.chmod(0o600)
    killed = place / f".base.gguf{PARTIAL}"  # what safetensors had begun to write there
    killed.mkdir()
    (killed / ".tmpAbCdEf").write_bytes(b"half")
    patch_file(str(path), str(desk / "on"))
    assert not killed.exists()
    patched = path.read_bytes()
    assert patched != before
    assert len(patched) == len(before)
    assert path.stat().st_mode & 0o777 == 0o600
    unpatch_file(str(path))
    assert path.read_bytes() == before
    # Over a kill between the file's return and the end of the file beside it.
    patch_file(str(path), str(desk / "on"))
    shutil.copy(path.with_name(path.name + BESIDE), place / "kept")
    unpatch_file(str(path))
    shutil.copy(place / "kept", path.with_name(path.name + BESIDE))
    unpatch_file(str(path))
    (place / "kept").unlink()
    assert [each.name for each in place.iterdir()] == ["base.gguf"]
    assert path.read_bytes() == before


def test_a_file_is_known_by_any_link_to_it(desk, place):
    before, link = (place / "base.gguf").read_bytes(), place / "other" / "link.gguf"
    link.parent.mkdir()
    link.symlink_to(place / "base.gguf")
    patch_file(str(link), str(desk / "on"))
    assert link.is_symlink()
    assert [each.name for each in link.parent.iterdir()] == ["link.gguf"]
    with pytest.raises(FinepointError, match=f"is patched with .* already; finepoint unpatch {place / 'base.gguf'}"):
        patch_file(str(place / "base.gguf"), str(desk / "on"))
    unpatch_file(str(place / "base.gguf"))
    assert (place / "base.gguf").read_bytes() == before
    assert [each.name for each in place.iterdir() if each.suffix == BESIDE] == []


def test_an_exported_patch_does_the_same_in_some_hundred_kilobytes(desk, place, monkeypatch):
    path = str(place / "base.gguf")
    patch_file(path, str(desk / "on"), str(place / "copy.gguf"))
    found = finepoint.export(path, str(desk / "on"), "gguf-patch", str(place / "patch"))
    assert found["bytes"] < 6 * found["changed"] + 8000
    patch_file(path, str(place / "patch"))
    assert (place / "base.gguf").read_bytes() == (place / "copy.gguf").read_bytes()
    (place / "base.gguf.finepoint").unlink()
    unpatch_file(path, str(place / "patch"))
    assert (place / "base.gguf").read_bytes() == (desk / "base.gguf").read_bytes()


def test_a_file_that_is_another_or_patched_already_is_refused_and_stays(desk, place):
    path, adapter = place / "base.gguf", str(desk / "on")
    finepoint.export(str(path), adapter, "gguf-patch", str(place / "patch"))
    other = quantised_file.write_gguf(place / "other.gguf", seed=1, **(MIXED | {"attn_output": "Q4_1"}))
    one_bit = bytearray(path.read_bytes())
    one_bit[-1] ^= 1
    (place / "bit.gguf").write_bytes(one_bit)
    for wrong in (other, place / "bit.gguf"):
        before = wrong.read_bytes()
        with pytest.raises(FinepointError, match=r"is not the file that the patch in .*patch was made for"):
            patch_file(str(wrong), str(place / "patch"))
        with pytest.raises(FinepointError, match=r"does not fit"):
            patch_file(str(wrong), adapter)
        with pytest.raises(FinepointError, match="is neither the file that"):
            unpatch_file(str(wrong), str(place / "patch"))
        assert wrong.read_bytes() == before
        assert not wrong.with_name(wrong.name + BESIDE).exists()
    patch_file(str(path), adapter)
    before = path.read_bytes()
    for again in (adapter, str(desk / "off"), str(place / "patch")):
        with pytest.raises(FinepointError, match=r"is patched with .*on already; finepoint unpatch"):
            patch_file(str(path), again)
    with pytest.raises(FinepointError, match="there is no"):
        unpatch_file(str(other))
    assert path.read_bytes() == before
    with pytest.raises(FinepointError, match="exists already"):
        patch_file(str(other), adapter, str(path))
    (place / "base.gguf.finepoint").unlink()
    with pytest.raises(FinepointError, match="is patched with it already"):
        patch_file(str(path), str(place / "patch"))


def test_a_damaged_patch_is_refused_and_the_file_stays(desk, place):
    path, patch = place / "base.gguf", place / "patch"
    finepoint.export(str(path), str(desk / "on"), "gguf-patch", str(patch))
    before, tensors = path.read_bytes(), load_file(patch / FILE)
    told = {"finepoint_gguf_patch": read_metadata(patch / FILE)}
    name = next(key for key in tensors if key.endswith("attn_q.weight.new")).removesuffix(".new")
    flipped = tensors[f"{name}.new"] ^ 1
    longer = torch.cat([tensors[f"{name}.gaps"], torch.ones(1, dtype=tensors[f"{name}.gaps"].dtype)])
    far = tensors[f"{name}.gaps"].clone()
    far[-1] = 254
    cases = {
        "out of range": {f"{name}.new": tensors[f"{name}.new"] + 16},
        "is not what it must be": {f"{name}.new": flipped},
        "positions, ": {f"{name}.gaps": longer}, "do not ascend": {f"{name}.gaps": torch.zeros_like(far)},
        "is damaged: ": {f"{name}.old": tensors[f"{name}.old"][None]},
        "0 positions": {f"{name}.gaps": tensors[f"{name}.gaps"][:0]},
    }  # fmt: skip
    for match, changed in cases.items():
        save_file(tensors | changed, patch / FILE, told)
        with pytest.raises(FinepointError, match=match):
            patch_file(str(path), str(patch))
        assert path.read_bytes() == before
        path.with_name(path.name + BESIDE).unlink(missing_ok=True)
    config = json.loads(told["finepoint_gguf_patch"])
    for wrong, match in (({}, "is no patch of a GGUF file"), (config | {"format_version": 9}, "format version 9"),
                         (config | {"info": {"lost": "much"}}, "what it says of its adapter"),
                         (config | {"before": "0"}, "knows no file")):  # fmt: skip
        save_file(tensors, patch / FILE, {"finepoint_gguf_patch": json.dumps(wrong)})
        with pytest.raises(FinepointError, match=match):
            patch_file(str(path), str(patch))
    assert sorted(each.name for each in place.iterdir()) == ["base.gguf", "patch"]


def read_metadata(path):
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return file.metadata()["finepoint_gguf_patch"]


def test_a_format_without_a_known_grid_is_named(cache, tmp_path):
    path = quantised_file.write_gguf(tmp_path / "base.gguf", ffn_gate="F32", attn="F32")
    file = open_gguf(path)
    at = path.read_bytes().find(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    with path.open("r+b") as whole:
        whole.seek(at)
        whole.write(struct.pack("<I", 11))
    tensor = open_gguf(path).tensors["blk.0.ffn_up.weight"]
    with pytest.raises(FinepointError, match=r"blk.0.ffn_up.weight is Q3_K, whose grid finepoint does not know"):
        _ = tensor.form
    with pytest.raises(FinepointError, match=r"has no tensor blk.0.ffn_up.weight of Q4_1 as the patch knows it"):
        finished(open_gguf(path), {tensor.name: Codes("Q4_1", *np.zeros((3, 1), np.int64))}, {})
    assert file.tensors["blk.0.attn_q.weight"].type == "F32"


def test_a_part_of_a_model_is_no_model(cache, tmp_path, monkeypatch):
    """transformers draws what a file lacks at random."""
    monkeypatch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=8))
    quantised_file.write_gguf(tmp_path / "split.gguf")
    for part in (1, 2, 3):
        with pytest.raises(FinepointError, match="is one of 3 parts of a GGUF file; join them first"):
            load_model(str(tmp_path / f"split-0000{part}-of-00003.gguf"))
    monkeypatch.undo()
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor",
                        lambda self, name, *a, **k: "blk.1.ffn" in name or add(self, name, *a, **k))  # fmt: skip
    monkeypatch.setenv("FINEPOINT_CACHE", str(tmp_path / "cache"))
    quantised_file.write_gguf(tmp_path / "part.gguf")
    with pytest.raises(FinepointError, match="lacks the tensor of model.layers.1.mlp.down_proj.weight .and of 3 oth"):
        load_model(str(tmp_path / "part.gguf"))


def test_a_disk_without_room_leaves_the_file(desk, place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = (place / "base.gguf").read_bytes()
    synced = []
    for last in (1, 2):  # what lies beside the file is written, then the file itself
        monkeypatch.setattr("os.fsync", lambda _, last=last: synced.append(1) or len(synced) < last or full())
        with pytest.raises(FinepointError, match="No space left on device"):
            patch_file(str(place / "base.gguf"), str(desk / "on"))
        assert [each.name for each in place.iterdir()] == ["base.gguf"]
        assert (place / "base.gguf").read_bytes() == before
        assert len(synced) == last
        synced.clear()


@pytest.mark.parametrize(("more", "match"), [
    ({"model": "my-model"}, "my-model has no grid"),
    ({"baseline": "lora"}, "--baseline"),
    ({"quantise": "int8"}, "--quantise"),
    ({"refresh": "every:2"}, "--refresh"),
    ({"store": "delta"}, "--store"),
])  # fmt: skip
def test_what_has_no_grid_is_refused_in_a_line(desk, more, match):
    with pytest.raises(FinepointError, match=match):
        train(settings(desk, "no", on_grid=True, **more))


def test_weights_that_are_floats_in_the_file_have_no_grid(cache, desk, tmp_path):
    path = quantised_file.write_gguf(tmp_path / "base.gguf", attn_output="F16")
    with pytest.raises(FinepointError, match=r"o_proj.weight is F16 in .*base.gguf, which has no grid"):
        train(settings(desk, "no", on_grid=True, model=str(path), targets=["*o_proj*"]))


# --- rules that look at the grid


def scoring(count):
    """Batches of the file's few tokens."""
    return [{key: value.where(value < 0, value % 50) if key != "attention_mask" else value
             for key, value in batch.items()} for batch in random_batches(count)]  # fmt: skip


def test_rules_are_told_the_step_and_the_room_of_every_entry(desk, monkeypatch):
    """Against all numbers that each entry's block can hold, and the file's numbers as the package gguf reads them."""
    path, seen = desk / "base.gguf", []
    model, batches = load_model(str(path), "float32"), scoring(2)

    def look(gradient, grid_step, grid_room):
        seen.append((gradient, grid_step, grid_room))
        return grid_step

    monkeypatch.setitem(RULES, "look", finepoint.register("look", look))
    monkeypatch.setattr("finepoint.selection.on_grid.PIECE", 4000)
    targets = ["*proj*", "*embed*"]
    before = snapshot(model)
    finepoint.select(model, batches, rule="look", density=0.1, targets=targets, gguf=path)
    assert_same_bits(snapshot(model), before)
    tensors, numbers, data = open_gguf(path).tensors, read(path), np.fromfile(path, dtype=np.uint8)
    weights = finepoint.target_weights(model, targets)
    assert len(seen) == len(weights) == 15
    for name, (gradient, step, room) in zip(weights, seen, strict=True):
        tensor, at = in_the_file(name, tensors)
        every, own = every_number(data, tensor, at), torch.from_numpy(numbers[tensor.name].reshape(-1)[at])
        low, high = every.amin(0), every.amax(0)
        near = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(step.reshape(-1), (high - low) / ((1 << tensor.form.width) - 1), **near)
        flat = gradient.reshape(-1)
        wanted = torch.where(flat > 0, own - low, high - own) * (flat != 0)
        torch.testing.assert_close(room.reshape(-1), wanted, **near)
        assert bool((room[gradient != 0] == 0).any())  # some are at the end of their block already


def test_a_formula_chooses_by_what_one_step_of_the_grid_gains(desk):
    path = desk / "base.gguf"
    model, batches, dense = load_model(str(path), "float32"), scoring(2), {}
    for batch in batches:
        model(**batch, num_items_in_batch=sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)).loss.backward()
    data, tensors = np.fromfile(path, dtype=np.uint8), open_gguf(path).tensors
    for name, weight in finepoint.target_weights(model).items():
        tensor, at = in_the_file(name, tensors)
        every, g = every_number(data, tensor, at).sort(0).values, weight.grad.reshape(-1)
        # Of the block's numbers the next one on the side where the loss falls, if there is one.
        own = (every.to(ROUNDED) - weight.detach().reshape(-1).to(ROUNDED)).abs().argmin(0)
        following = (own - g.sign().long()).clamp(0, len(every) - 1)
        dense[name] = (every.gather(0, following[None]) - every.gather(0, own[None]))[0].abs() * g.abs()
    found = finepoint.select(model, batches, rule="abs(g) * min(step, room)", density=0.02, gguf=path)
    scores = torch.cat(list(dense.values()))
    chosen = torch.cat([dense[name][at] for name, at in found.items()])
    assert len(chosen) == round(0.02 * len(scores))
    torch.testing.assert_close(chosen.sort().values, scores.topk(len(chosen)).values.flip(0), rtol=1e-3, atol=1e-9)


def test_a_rule_that_looks_at_the_grid_goes_through_the_commands(desk, capsys):
    rule, file = ["--rule", "abs(g) * min(step, room)"], str(desk / "base.gguf")
    data = ["--data", str(desk / "words.jsonl")]
    assert main(["select", *rule, "--model", file, *data, "--density", "0.01", "--output", str(desk / "gain")]) == 0
    assert main(["plan", *rule, "--model", file, "--tokens", "16", "--batch-size", "2"]) == 0
    capsys.readouterr()
    for more, match in (({"model": "my-model"}, "looks at the grid of a quantised base, and there is none"),
                        ({"refresh": "every:2"}, "looks at the grid chooses once")):  # fmt: skip
        with pytest.raises(FinepointError, match=match):
            train(settings(desk, "no", rule="-step", **more))


def test_where_there_is_no_grid_a_rule_that_looks_at_it_is_refused(desk, tmp_path):
    model, batches = tiny_llama(torch.float32), scoring(1)
    with pytest.raises(FinepointError, match="looks at the grid of a quantised base, and there is none"):
        finepoint.select(model, rule="-step", density=0.1)
    other = quantised_file.write_gguf(tmp_path / "other.gguf", seed=1)
    model = load_model(str(desk / "base.gguf"), "float32")
    with pytest.raises(FinepointError, match=r"the values of .* are not those of .*other.gguf"):
        finepoint.select(model, rule="-step", density=0.1, gguf=other)
    with pytest.raises(FinepointError, match="needs data"):
        finepoint.select(model, rule="room", density=0.1, gguf=desk / "base.gguf")
    with pytest.raises(FinepointError, match="is F32 in .*, which has no grid"):
        finepoint.select(model, batches, rule="room", density=0.1, gguf=desk / "base.gguf", targets=["*norm*"])


def test_the_commands_say_what_they_do(desk, place, capsys):
    assert main(["patch", str(place / "base.gguf"), str(desk / "on"), "--output", str(place / "copy.gguf")]) == 0
    said = capsys.readouterr().out
    assert "codes changed for" in said
    assert "0.0% of the length of the change lost" in said
    assert main(["unpatch", str(place / "copy.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == str(place / "copy.gguf")
    assert (place / "copy.gguf").read_bytes() == (place / "base.gguf").read_bytes()
    assert main(["patch", "smollm2", str(desk / "on")]) == 2
    assert "is finepoint's own copy" in capsys.readouterr().err
    assert main(["patch", "a", "b", "c"]) == 2
    assert "--adapter takes one value, got b c" in capsys.readouterr().err
