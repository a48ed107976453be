"""Adapters out of checkpoints and into other layouts: against transformers, PEFT and peft-sparta as they are."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import finepoint
import finepoint.exchange.folded as merged_
from conftest import assert_same_bits, bits, make_tokenizer, random_batches, snapshot, tiny_gemma, tiny_llama
from finepoint.adapters.adapter import SparseAdapter
from finepoint.errors import FinepointError
from finepoint.exchange.checkpoint import INDEX, WHOLE, OtherLayoutError, open_checkpoint
from finepoint.exchange.extract import extract
from finepoint.exchange.formats import export, import_adapter
from finepoint.models.loading import load_model

# PEFT asks transformers for what transformers 5 calls by another name, and makes sparse tensors without a check.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

LINEAR = "q,k,v,o,gate,up,down"


def saved(model, folder, shards=False):
    model.save_pretrained(folder, max_shard_size="4KB" if shards else "1GB")
    make_tokenizer().save_pretrained(folder)
    assert (folder / (INDEX if shards else WHOLE)).is_file()
    return str(folder)


def adapter_of(model, targets="all", density=0.1, store="delta", size=3e-2):
    """An adapter trained for some real steps; the model is left at the base."""
    chosen = finepoint.select(model, rule="random", density=density, targets=targets, seed=0)
    with finepoint.SparseTuner(model, chosen) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=size)
        for batch in random_batches():
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter = tuner.adapter(store, (), {"base_model": "base"})
        tuner.revert_()
    return adapter


def logits(model):
    with torch.no_grad():
        return model(input_ids=random_batches()[0]["input_ids"]).logits


def loaded(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
    ).eval()


# --- the base's files


def test_a_checkpoint_is_read_weight_by_weight(tmp_path, model):
    folder = saved(model, tmp_path / "m", shards=True)
    checkpoint = open_checkpoint(folder)
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert torch.equal(checkpoint.weight(name), weight)
    assert checkpoint.dtype == "float32"


def drop_shard(folder):
    sorted(folder.glob("model-*"))[1].unlink()


def truncate_shard(folder):
    path = sorted(folder.glob("model-*"))[1]
    path.write_bytes(path.read_bytes()[:-3])


def edit_index(change):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def quantise(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))


DAMAGE = {
    "a shard is gone": (drop_shard, "model-00002.*missing"),
    "a shard is cut": (truncate_shard, "cannot read .*model-00002"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "neither model.safetensors nor"),
    "the index is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "cannot read .*index"),
    "the index is empty": (edit_index(dict.clear), "no weight_map"),
    "the index forgets a tensor": (edit_index(lambda names: names.pop("model.norm.weight")), "model.norm.weight"),
    "the index invents a tensor": (
        edit_index(lambda names: names.update(ghost=next(iter(names.values())))), "lists 'ghost', which its shard"
    ),
    "the index leaves the folder": (edit_index(lambda names: names.update(ghost="../x")), "no file of this"),
    "quantised": (quantise, "is quantised"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["export", "extract", "import"])
def test_a_damaged_base_is_refused_and_nothing_written(tmp_path, damage, command):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m", shards=True)
    adapter_of(model, LINEAR).save(tmp_path / "a")
    export(folder, str(tmp_path / "a"), "shira", str(tmp_path / "shira"))
    harm, message = DAMAGE[damage]
    harm(tmp_path / "m")
    calls = {
        "export": lambda: export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out")),
        "extract": lambda: extract(folder, folder, 0.1),
        "import": lambda: import_adapter(str(tmp_path / "shira"), folder),
    }
    with pytest.raises(FinepointError, match=message):
        calls[command]()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "m", "shira"]


# --- extract


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("compact", [False, True])
def test_extract_all_gives_the_tuned_checkpoint_bit_for_bit(tmp_path, dtype, compact):
    base, tuned = tiny_llama(dtype), tiny_llama(dtype)
    with torch.no_grad():
        for i, weight in enumerate(tuned.parameters()):
            if i % 2:
                weight.add_(torch.randn_like(weight) * (torch.rand_like(weight) < 0.2))
        base.model.norm.weight[0], tuned.model.norm.weight[0] = 0.0, -0.0  # equal numbers, other bits
    one, two = saved(base, tmp_path / "base", shards=True), saved(tuned, tmp_path / "tuned")
    adapter, rows = extract(one, two)
    adapter.save(tmp_path / "a", compact=compact)
    adapter = SparseAdapter.load(tmp_path / "a")
    adapter.apply(base)
    assert_same_bits(snapshot(tuned), snapshot(base))
    assert {change.kind for change in adapter.changes.values()} == {"value"}
    assert 0 in adapter["model.norm.weight"]
    assert sum(row["kept"] for row in rows) == adapter.count == adapter.info["changed"]
    assert adapter.info["kept_energy"] == 1
    adapter.revert(base)
    export(one, str(tmp_path / "a"), "merged", str(tmp_path / "merged"))
    assert_same_bits(snapshot(tuned), snapshot(loaded(tmp_path / "merged")))


@pytest.mark.parametrize("density", [1e-3, 0.05, 1.0])
def test_extract_keeps_the_largest_changes_of_the_whole_model(tmp_path, density):
    base, tuned = tiny_gemma(), tiny_gemma(seed=1)
    with torch.no_grad():
        tuned.model.norm.weight[3] = base.model.norm.weight[3]
        tuned.model.layers[0].mlp.up_proj.weight.copy_(base.model.layers[0].mlp.up_proj.weight + 0.25)  # ties
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned", shards=True)
    adapter, rows = extract(*folders, density)
    order = open_checkpoint(folders[0]).tensors
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    change = torch.cat([(after[name] - before[name]).detach().view(-1) for name in order])
    k = round(density * len(change))
    changed = int((change != 0).sum())
    expected = change.abs().sort(descending=True, stable=True).indices[: min(k, changed)]
    starts = dict(
        zip(order, [0, *torch.tensor([before[name].numel() for name in order]).cumsum(0).tolist()], strict=False)
    )
    found = torch.cat([adapter[name] + starts[name] for name in order if name in adapter])
    assert torch.equal(found, expected.sort().values)
    energy = change.double().square()
    assert adapter.info["kept_energy"] == pytest.approx((energy[expected].sum() / energy.sum()).item(), rel=1e-12)
    assert adapter.info["changed"] == changed
    assert sum(row["kept_energy"] for row in rows) == pytest.approx(energy[expected].sum().item(), rel=1e-12)
    adapter.apply(base)
    kept = torch.cat([before[name].detach().view(-1) for name in order])[expected]
    assert torch.equal(kept, torch.cat([after[name].detach().view(-1) for name in order])[expected])


def changed_copy(folder, to, change):
    """A model folder of one file with its tensors changed."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(to / WHOLE)
    change(tensors)
    save_file(tensors, to / WHOLE, {"format": "pt"})
    return str(to)


NORM = "model.norm.weight"
UNLIKE = {
    "missing": (lambda t: t.pop(NORM), f"base has '{NORM}', which .*tuned lacks"),
    "extra": (lambda t: t.update(ghost=torch.ones(1)), "tuned has 'ghost', which .*base lacks"),
    "shape": (lambda t: t.update({NORM: torch.ones(8)}), f"{NORM}: shape"),
    "dtype": (lambda t: t.update({NORM: t[NORM].half()}), f"{NORM}: float32 in .*float16 in .*one dtype"),
    "nan": (lambda t: t[NORM].__setitem__(0, float("nan")), f"{NORM}: a number is not finite"),
    "infinite": (lambda t: t[NORM].__setitem__(0, float("inf")), f"{NORM}: a number is not finite"),
    "untied": (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "stores other values"),
    "equal": (lambda t: None, "no change to extract"),
}


@pytest.mark.parametrize("unlike", UNLIKE)
@pytest.mark.parametrize("density", [None, 0.5])
def test_checkpoints_of_two_models_are_refused_by_name(tmp_path, unlike, density):
    base = saved(tiny_llama(), tmp_path / "base")
    tuned = changed_copy(tmp_path / "base", tmp_path / "tuned", UNLIKE[unlike][0])
    with pytest.raises(FinepointError, match=UNLIKE[unlike][1]):
        extract(base, tuned, density)


def test_copies_of_a_tied_weight_count_once(tmp_path):
    base = saved(tiny_llama(), tmp_path / "base")

    def untie(tensors):
        tensors["model.embed_tokens.weight"][5, 5] += 1
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tuned = changed_copy(tmp_path / "base", tmp_path / "tuned", untie)
    adapter, _ = extract(base, tuned)
    assert {name: adapter[name].tolist() for name in adapter} == {"model.embed_tokens.weight": [5 * 16 + 5]}
    adapter.save(tmp_path / "a")
    back = changed_copy(tmp_path / "base", tmp_path / "doubled", lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()}))  # fmt: skip
    export(back, str(tmp_path / "a"), "merged", str(tmp_path / "merged"))
    assert_same_bits(load_file(tmp_path / "tuned" / WHOLE), load_file(tmp_path / "merged" / WHOLE))


def test_a_density_that_keeps_nothing_or_is_none(tmp_path):
    base, tuned = saved(tiny_llama(), tmp_path / "a"), saved(tiny_llama(seed=1), tmp_path / "b")
    for density in (0.0, -1.0, 1.5, float("nan"), 1e-9):
        with pytest.raises(FinepointError, match="density"):
            extract(base, tuned, density)


def test_a_change_between_classifiers_is_extracted(tmp_path):
    folder = saved(tiny_llama(), tmp_path / "m")
    model = load_model(folder, labels=["no", "yes"], device="cpu")
    base = saved(model, tmp_path / "base")
    with torch.no_grad():
        model.score.weight[0, 3] += 1
        model.model.norm.weight[2] += 1
    extract(base, saved(model, tmp_path / "tuned"))[0].save(tmp_path / "a")
    adapter = SparseAdapter.load(tmp_path / "a")
    back = load_model(base, labels=adapter.info["labels"], device="cpu")
    adapter.apply(back)
    assert_same_bits(snapshot(model), snapshot(back))


def test_names_without_the_models_prefix(tmp_path):
    """Files of older models leave it out, and transformers puts it back."""

    def shorten(tensors):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    model = tiny_llama(tied=False)
    saved(model, tmp_path / "long")
    short = changed_copy(tmp_path / "long", tmp_path / "short", shorten)
    adapter = adapter_of(model, "all")
    adapter.save(tmp_path / "a")
    export(short, str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    with adapter.applied(model):
        assert_same_bits(snapshot(model), snapshot(loaded(tmp_path / "out")))
        tuned = snapshot(model)
    again, _ = extract(short, str(tmp_path / "out"))
    with again.applied(model):
        assert_same_bits(tuned, snapshot(model))


# --- merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("store", ["delta", "value"])
def test_merged_loads_without_finepoint_and_equals_apply(tmp_path, model, dtype, shards, store):
    folder = saved(model.to(dtype), tmp_path / "m", shards)
    model = loaded(folder)  # in half precision `to` has rounded its buffers, which loading has not
    adapter = adapter_of(model, "all", store=store)
    adapter.save(tmp_path / "a")
    found = export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    assert found["rounded"] == found["vanished"] == 0
    back = loaded(tmp_path / "out")
    with adapter.applied(model):
        assert_same_bits(snapshot(model), snapshot(back))
        assert torch.equal(logits(model), logits(back))
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == make_tokenizer().get_vocab()
    if shards:
        for at in ("m", "out"):
            index = json.loads((tmp_path / at / INDEX).read_text())
            assert index["metadata"]["total_size"] == sum(p.nbytes for p in dict(model.named_parameters()).values())


def test_shards_without_a_change_are_copied_byte_for_byte(tmp_path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m", shards=True)
    adapter = adapter_of(model, "v")
    adapter.save(tmp_path / "a")
    export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    changed = 0
    for shard in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            touched = set(file.keys()) & set(adapter)
        same = shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
        assert same == (not touched)
        changed += not same
    assert changed


def test_a_float32_adapter_on_a_bfloat16_base_is_rounded_once_or_kept(tmp_path):
    model = tiny_llama(torch.bfloat16)
    folder = saved(model, tmp_path / "m")
    wide = model.float()
    adapter = adapter_of(wide, "all", size=1e-4)
    adapter.save(tmp_path / "a")
    found = export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "narrow"))
    kept = export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "wide"), dtype="float32")
    assert 0 < found["vanished"] < found["rounded"] <= adapter.count
    assert (kept["rounded"], kept["vanished"]) == (0, 0)
    with adapter.applied(wide):
        assert_same_bits(snapshot(wide), snapshot(loaded(tmp_path / "wide")))
        expected = {name: value.bfloat16() for name, value in snapshot(wide).items()}
    assert_same_bits(expected, snapshot(loaded(tmp_path / "narrow")))


def test_an_adapter_trained_on_a_rounded_base_needs_its_dtype(tmp_path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m")
    narrow = model.bfloat16()
    adapter = adapter_of(narrow, "all")
    adapter.save(tmp_path / "a")
    with pytest.raises(FinepointError, match="give --dtype bfloat16"):
        export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out"), dtype="bfloat16")
    with adapter.applied(narrow):
        assert_same_bits(snapshot(narrow), snapshot(loaded(tmp_path / "out")))


@pytest.mark.parametrize("layout", ["merged", "shira", "supertuning", "vllm-patch", "sparta"])
def test_an_adapter_of_another_base_is_refused_by_name(tmp_path, layout):
    folder = saved(tiny_llama(seed=5), tmp_path / "m")
    adapter_of(tiny_llama(), LINEAR).save(tmp_path / "a")
    with pytest.raises(FinepointError, match="values of model.layers.0.* are not those of the base"):
        export(folder, str(tmp_path / "a"), layout, str(tmp_path / "out"))
    adapter_of(tiny_llama(layers=3), "v").save(tmp_path / "deep")
    with pytest.raises(FinepointError, match="no weight 'model.layers.2|values of model.layers.0"):
        export(folder, str(tmp_path / "deep"), layout, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_without_being_told(tmp_path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m")
    sharded = saved(model, tmp_path / "sharded", shards=True)
    adapter_of(model).save(tmp_path / "a")
    arguments = (str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    export(sharded, *arguments)
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(FinepointError, match="not empty"):
        export(folder, *arguments)
    export(folder, *arguments, overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == [WHOLE]  # no shard of before
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"
    with pytest.raises(FinepointError, match="is the base model itself"):
        export(folder, str(tmp_path / "a"), "merged", folder, overwrite=True)


def test_an_export_that_fails_leaves_no_trace(tmp_path, monkeypatch):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m", shards=True)
    adapter_of(model).save(tmp_path / "a")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(merged_, "save_file", fail)
    with pytest.raises(FinepointError, match="cannot write .*out: no space"):
        export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "m"]


@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_are_merged_as_in_memory(tmp_path, dora):
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = saved(tiny_llama(), tmp_path / "m", shards=True)
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=dora))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    wrapped.save_pretrained(tmp_path / "lora")
    export(folder, str(tmp_path / "lora"), "merged", str(tmp_path / "out"))
    back = loaded(tmp_path / "out")
    with finepoint.adapters.peft.load_merged(tmp_path / "lora", tiny_llama()).applied(model := tiny_llama()):
        assert_same_bits(snapshot(model), snapshot(back))
    expected = logits(PeftModel.from_pretrained(loaded(folder), tmp_path / "lora").eval())
    assert torch.allclose(expected, logits(back), atol=1e-5)
    with pytest.raises(FinepointError, match="PEFT's already"):
        export(folder, str(tmp_path / "lora"), "shira", str(tmp_path / "other"))


def test_a_classifier_is_merged_with_its_head(tmp_path):
    from finepoint.models.loading import new_head

    folder = saved(tiny_llama(torch.bfloat16), tmp_path / "m", shards=True)
    model = load_model(folder, "bfloat16", labels=["no", "yes"], seed=3, device="cpu")
    chosen = finepoint.select(model, rule="random", density=0.05)
    head = {name: torch.arange(model.get_parameter(name).numel()) for name in new_head(model)}
    with finepoint.SparseTuner(model, dict(chosen) | head) as tuner:
        for delta in tuner.parameters():
            delta.data.normal_()
        info = {"task": "classification", "labels": ["no", "yes"]}
        adapter = tuner.adapter("value", new_head(model), info)
        tuner.revert_()
    adapter.save(tmp_path / "a")
    export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert back.config.id2label == {0: "no", 1: "yes"}
    with adapter.applied(model):
        assert_same_bits(snapshot(model), snapshot(back))
    for layout in ("shira", "sparta", "vllm-patch"):
        with pytest.raises(FinepointError, match=r"score\.weight"):
            export(folder, str(tmp_path / "a"), layout, str(tmp_path / "other"))


# Two whose experts are stored one by one, two whose weights have other names in files, one whose router has.
OTHER_LAYOUTS = ["mixtral", "qwen3_moe", "qwen2_5_vl", "gemma3", "vit"]


def changed_entries(model, targets, **info):
    """An adapter of random entries; the model stays the base."""
    chosen = finepoint.select(model, rule="random", density=0.05, targets=targets)
    with finepoint.SparseTuner(model, chosen) as tuner:
        for delta in tuner.parameters():
            delta.data.normal_()
        adapter = tuner.adapter(info=info)
        tuner.revert_()
    return adapter


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_a_model_whose_files_have_another_layout_is_merged_in_memory(tmp_path, family, caplog):
    from families import FAMILIES

    FAMILIES[family].build().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"its": "own"}')
    kind = type(FAMILIES[family].build())
    model = kind.from_pretrained(tmp_path / "m").eval()
    adapter = changed_entries(model, "all")
    adapter.save(tmp_path / "a")
    found = export(str(tmp_path / "m"), str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    assert (found["entries"], found["changed_weights"], found["rounded"]) == (adapter.count, len(adapter), 0)
    assert sum("another layout than its model: all of it is loaded" in line for line in caplog.messages) == 1
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"its": "own"}'
    with adapter.applied(model):
        assert_same_bits(snapshot(model), snapshot(kind.from_pretrained(tmp_path / "out")))
        model.save_pretrained(tmp_path / "by-hand")
    assert_same_bits(load_file(tmp_path / "by-hand" / WHOLE), load_file(tmp_path / "out" / WHOLE))
    with pytest.raises(FinepointError, match="stored|does not store|belongs to none"):
        export(str(tmp_path / "m"), str(tmp_path / "a"), "vllm-patch", str(tmp_path / "other"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merging_in_memory_rounds_as_merging_in_files_does(tmp_path, dtype, monkeypatch):
    folder = saved(tiny_llama(), tmp_path / "m")
    adapter = changed_entries(tiny_llama(), "all")
    adapter.save(tmp_path / "a")
    for name in ("files", "memory"):
        export_as = dtype or "auto"
        if name == "memory":
            monkeypatch.setattr(merged_, "_write_weight_by_weight", another_layout)
        found = export(folder, str(tmp_path / "a"), "merged", str(tmp_path / name), export_as)
        assert found["dtype"] == (dtype or "float32")
    assert_same_bits(load_file(tmp_path / "files" / WHOLE), load_file(tmp_path / "memory" / WHOLE))


def another_layout(*arguments):
    raise OtherLayoutError("as if")


def test_low_rank_factors_are_merged_in_memory_too(tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    folder = saved(tiny_llama(tied=False), tmp_path / "m")
    wrapped = get_peft_model(
        tiny_llama(tied=False), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.normal_()
    wrapped.save_pretrained(tmp_path / "lora")
    export(folder, str(tmp_path / "lora"), "merged", str(tmp_path / "files"))
    monkeypatch.setattr(merged_, "_write_weight_by_weight", another_layout)
    export(folder, str(tmp_path / "lora"), "merged", str(tmp_path / "memory"))
    assert_same_bits(load_file(tmp_path / "files" / WHOLE), load_file(tmp_path / "memory" / WHOLE))


def test_what_files_cannot_hold_or_memory_cannot_is_refused(tmp_path, monkeypatch):
    from families import FAMILIES

    FAMILIES["marian"].build().save_pretrained(tmp_path / "m")  # whose positions are computed, and not stored
    model = type(FAMILIES["marian"].build()).from_pretrained(tmp_path / "m").eval()
    changed_entries(model, "all").save(tmp_path / "a")
    with pytest.raises(FinepointError, match=r"do not hold model\.(en|de)coder\.embed_positions"):
        export(str(tmp_path / "m"), str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    monkeypatch.setattr("finepoint.exchange.folded._memory_left", lambda: 10)
    with pytest.raises(FinepointError, match=r"must be in memory: 0.0 GB, and 0.0 GB are left"):
        export(str(tmp_path / "m"), str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_whose_embedding_is_trained_is_merged_into_a_tied_base(tmp_path, tied):
    from finepoint.models.loading import new_head

    folder = saved(tiny_llama(tied=tied), tmp_path / "m")
    model = load_model(folder, "float32", labels=["no", "yes"], seed=3, device="cpu")
    chosen = finepoint.select(model, rule="random", density=0.05, targets="all")
    head = {name: torch.arange(model.get_parameter(name).numel()) for name in new_head(model)}
    with finepoint.SparseTuner(model, dict(chosen) | head) as tuner:
        for delta in tuner.parameters():
            delta.data.normal_()
        adapter = tuner.adapter("value", new_head(model), {"task": "classification", "labels": ["no", "yes"]})
        tuner.revert_()
    assert "model.embed_tokens.weight" in adapter
    adapter.save(tmp_path / "a")
    export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "out"))
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with adapter.applied(model):
        assert_same_bits(snapshot(model), snapshot(back))


# --- gguf

CONVERTER = """#!{python}
import pathlib, shutil, sys
folder, _, file, _, kind = sys.argv[1:]
if kind == "f16":
    sys.exit("first line\\nno such architecture")
shutil.copyfile(pathlib.Path(folder) / "model.safetensors", file)
"""


def test_gguf_is_left_to_llama_cpps_converter(tmp_path, monkeypatch):
    """With a stand-in that copies what it is given: ours is to merge, call it, and clear away."""
    model = tiny_llama()
    folder = saved(model, tmp_path / "m")
    adapter_of(model).save(tmp_path / "a")
    arguments = (folder, str(tmp_path / "a"), "gguf", str(tmp_path / "out"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(FinepointError, match="needs llama.cpp's converter"):
        export(*arguments)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(python=sys.executable))
    script.chmod(0o755)
    with pytest.raises(FinepointError, match=r"convert_hf_to_gguf\.py failed: no such architecture"):
        export(*arguments, dtype="float16")
    assert not (tmp_path / "out").exists()
    export(*arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    export(*arguments[:2], "merged", str(tmp_path / "merged"))
    assert_same_bits(load_file(tmp_path / "merged" / WHOLE), load_file(tmp_path / "out" / "model.gguf"))


# --- PEFT's sparse layouts


def peft_model(folder, adapter, dtype="auto"):
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded(folder, dtype), adapter).eval()


@pytest.mark.parametrize("layout", ["shira", "supertuning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [LINEAR, "v", "down,o", "lm_head,gate"])
def test_peft_loads_what_is_exported_and_it_comes_back(tmp_path, layout, dtype, targets):
    folder = saved(tiny_llama(dtype, tied=False), tmp_path / "m")
    model = loaded(folder)
    adapter = adapter_of(model, targets, store="auto")
    adapter.save(tmp_path / "a")
    found = export(folder, str(tmp_path / "a"), layout, str(tmp_path / "peft"))
    assert found["entries"] == adapter.count
    back = import_adapter(str(tmp_path / "peft"), folder)
    merged = peft_model(folder, tmp_path / "peft").merge_and_unload()
    with back.applied(model):
        assert torch.equal(logits(peft_model(folder, tmp_path / "peft")), logits(model))
        assert torch.equal(logits(merged), logits(model))
        imported = snapshot(model)
    with adapter.applied(model):
        exported = snapshot(model)
    missed = sum(int((exported[name] != imported[name]).sum()) for name in exported)
    assert missed == found["inexact"]
    if layout == "shira" or dtype == torch.float32:
        assert missed == 0
        assert_same_bits(exported, imported)
    for name, value in exported.items():  # Super-Tuning rounds the change to bfloat16 first: 8 bits of it remain
        assert torch.allclose(value.float(), imported[name].float(), atol=0.1 * 2**-8, rtol=2**-8)


@pytest.mark.parametrize("layout", ["shira", "supertuning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_trained_is_imported(tmp_path, layout, dtype):
    from peft import ShiraConfig, SupertuningConfig, get_peft_model

    folder = saved(tiny_llama(dtype), tmp_path / "m")
    model = loaded(folder)
    modules = ["q_proj", "down_proj"]
    config = {
        "shira": lambda: ShiraConfig(r=2, random_seed=1, target_modules=modules),
        "supertuning": lambda: SupertuningConfig(sparsity=0.9, target_modules=modules),
    }[layout]()
    wrapped = get_peft_model(loaded(folder), config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=3e-2)
    for batch in random_batches():
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "peft")
    adapter = import_adapter(str(tmp_path / "peft"), folder, layout)
    adapter.save(tmp_path / "a")
    with SparseAdapter.load(tmp_path / "a").applied(model):
        assert torch.equal(logits(wrapped.eval()), logits(model))
        assert_same_bits(snapshot(wrapped.merge_and_unload()), snapshot(model))
    other = {"shira": "supertuning", "supertuning": "shira"}[layout]
    with pytest.raises(FinepointError, match=f"not {other}"):
        import_adapter(str(tmp_path / "peft"), folder, other)


def test_budgets_that_differ_by_layer_are_filled_with_zeros(tmp_path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m")
    chosen = finepoint.select(model, rule="random", targets={"q": 0.4, "down": 0.005})
    with finepoint.SparseTuner(model, chosen) as tuner:
        for delta in tuner.parameters():
            delta.data.normal_()
        adapter = tuner.adapter()
        tuner.revert_()
    adapter.save(tmp_path / "a")
    for layout in ("shira", "supertuning"):
        found = export(folder, str(tmp_path / "a"), layout, str(tmp_path / layout))
        assert found["padding"] > 0
        with adapter.applied(model):
            assert torch.equal(logits(model), logits(peft_model(folder, tmp_path / layout)))
        back = import_adapter(str(tmp_path / layout), folder)
        assert {name: back[name].tolist() for name in back} == {name: adapter[name].tolist() for name in adapter}
        for name, change in adapter.changes.items():
            assert torch.equal(bits(back.changes[name].numbers), bits(change.numbers))
            assert back.changes[name].base == change.base


def test_layouts_say_what_they_cannot_hold(tmp_path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m")
    adapter_of(model, "all").save(tmp_path / "all")
    adapter_of(model, "k", density=1.0).save(tmp_path / "dense")
    for layout in ("shira", "supertuning"):
        with pytest.raises(FinepointError, match=r"linear layers only, and model\.embed_tokens"):
            export(folder, str(tmp_path / "all"), layout, str(tmp_path / "out"))
    with pytest.raises(FinepointError, match="r \\(in \\+ out\\) entries"):
        export(folder, str(tmp_path / "dense"), "shira", str(tmp_path / "out"))
    with pytest.raises(FinepointError, match="leave out --dtype"):
        export(folder, str(tmp_path / "all"), "shira", str(tmp_path / "out"), dtype="float32")
    assert not (tmp_path / "out").exists()
    export(folder, str(tmp_path / "dense"), "supertuning", str(tmp_path / "out"))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
HOSTILE = {
    "outside": (lambda t: t[f"{Q}.shira_indices"].__setitem__((0, 0), 16), "outside the weight"),
    "negative": (lambda t: t[f"{Q}.shira_indices"].__setitem__((0, 0), -1), "outside the weight"),
    "twice": (lambda t: t[f"{Q}.shira_indices"].copy_(t[f"{Q}.shira_indices"][:, :1].clone()), "occurs twice"),
    "nan": (lambda t: t[f"{Q}.shira_weight"].__setitem__(0, float("nan")), "not a finite number"),
    "short": (lambda t: t.update({f"{Q}.shira_weight": t[f"{Q}.shira_weight"][1:].clone()}), "for changes of shape"),
    "no indices": (lambda t: t.pop(f"{Q}.shira_indices"), "has no shira_indices"),
    "no numbers": (lambda t: t.pop(f"{Q}.shira_weight"), "no sparse change of a linear layer"),
    "stranger": (lambda t: t.update(stranger=torch.ones(1)), "holds 'stranger'"),
    "three rows": (lambda t: t.update({f"{Q}.shira_indices": torch.ones(3, 64).int()}), "for changes of shape"),
    "no such layer": (
        lambda t: t.update({k.replace("layers.0", "layers.9"): t.pop(k) for k in list(t)}), "leave out model.layers.9"
    ),
    "zeros": (lambda t: [t[key].zero_() for key in t if key.endswith("shira_weight")], "changes nothing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", HOSTILE)
def test_damaged_imports_are_refused_by_name(tmp_path, damage):
    model = tiny_llama()
    folder = saved(model, tmp_path / "m")
    adapter_of(model, "q").save(tmp_path / "a")
    export(folder, str(tmp_path / "a"), "shira", str(tmp_path / "shira"))
    path = tmp_path / "shira" / "adapter_model.safetensors"
    tensors = load_file(path)
    HOSTILE[damage][0](tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(FinepointError, match=HOSTILE[damage][1]):
        import_adapter(str(tmp_path / "shira"), folder)


def test_positions_saved_as_floats_are_read(tmp_path):
    """PEFT writes them so on Windows."""
    model = tiny_llama()
    folder = saved(model, tmp_path / "m")
    adapter = adapter_of(model, "q")
    adapter.save(tmp_path / "a")
    export(folder, str(tmp_path / "a"), "shira", str(tmp_path / "shira"))
    path = tmp_path / "shira" / "adapter_model.safetensors"
    save_file({key: tensor.float() for key, tensor in load_file(path).items()}, path)
    back = import_adapter(str(tmp_path / "shira"), folder)
    with adapter.applied(model):
        expected = snapshot(model)
    with back.applied(model):
        assert_same_bits(expected, snapshot(model))


def test_imports_that_are_something_else(tmp_path):
    folder = saved(tiny_llama(), tmp_path / "m")
    with pytest.raises(FinepointError, match="holds neither"):
        import_adapter(str(tmp_path / "nowhere"), folder)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sparse_deltas.pt").write_bytes(b"")
    with pytest.raises(FinepointError, match="sparse_deltas.pt is a pickle"):
        import_adapter(str(tmp_path / "old"), folder, "sparta")
    (tmp_path / "lora").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FinepointError, match="type 'LORA'"):
        import_adapter(str(tmp_path / "lora"), folder)


# --- peft-sparta


def test_peft_sparta_loads_what_is_exported_and_it_comes_back(tmp_path, model):
    sparta = pytest.importorskip("peft_sparta")
    folder = saved(model.bfloat16(), tmp_path / "m")
    model = loaded(folder)
    adapter = adapter_of(model, "all", store="value")
    adapter.save(tmp_path / "a")
    found = export(folder, str(tmp_path / "a"), "sparta", str(tmp_path / "sparta"))
    assert found == found | {"entries": adapter.count, "inexact": 0}
    theirs = sparta.SpaRTAforCausalLM(str(tmp_path / "sparta"))
    back = import_adapter(str(tmp_path / "sparta"), folder)
    with adapter.applied(model):
        assert torch.equal(logits(model), logits(theirs.base_model))
        assert_same_bits(snapshot(model), weights := snapshot(theirs.base_model))
    with back.applied(model):
        assert_same_bits(weights, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_sparta_trained_is_imported(tmp_path, dtype, capsys):
    sparta = pytest.importorskip("peft_sparta")
    folder = saved(tiny_llama(dtype), tmp_path / "m")
    theirs = sparta.SpaRTA(loaded(folder), sparsity=0.9)
    optimizer = torch.optim.AdamW(list(theirs.parameters()), lr=3e-2)
    for batch in random_batches():
        theirs(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.eval()
    (tmp_path / "sparta").mkdir()
    theirs.save(str(tmp_path / "sparta"), merged=False)
    adapter = import_adapter(str(tmp_path / "sparta"), folder, "sparta")
    model = loaded(folder)
    with adapter.applied(model):
        assert_same_bits(snapshot(theirs.model), snapshot(model))
        assert torch.equal(logits(theirs.model), logits(model))
    assert 0 < adapter.count <= theirs.num_trainable_parameters(printout=False)


# --- sparse patches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", ["delta", "value"])
def test_a_patch_is_applied_to_a_plain_state_dict(tmp_path, model, dtype, store):
    model = model.to(dtype)
    folder = saved(model, tmp_path / "m", shards=True)
    adapter = adapter_of(model, "all", store=store)
    adapter.save(tmp_path / "a")
    found = export(folder, str(tmp_path / "a"), "vllm-patch", str(tmp_path / "patch"))
    state = {}
    for shard in (tmp_path / "m").glob("*.safetensors"):
        state |= load_file(shard)
    tensors = load_file(tmp_path / "patch" / "patch.safetensors")
    for patch in json.loads((tmp_path / "patch" / "patch.json").read_text())["patches"]:
        weight = state[patch["name"]]
        indices, values = tensors.pop(f"{patch['name']}.indices"), tensors.pop(f"{patch['name']}.values")
        assert list(weight.shape) == patch["shape"]
        assert str(weight.dtype) == str(values.dtype) == f"torch.{patch['dtype']}"
        assert indices.dtype == torch.int32
        assert indices.is_contiguous()
        assert len(indices.unique()) == len(indices) == len(values) == patch["count"]
        weight.view(-1).index_copy_(0, indices.long(), values)
    assert not tensors
    assert 0 < found["entries"] <= adapter.count
    with adapter.applied(model):
        weights = snapshot(model)
        assert_same_bits({name: weights[name] for name in state}, state)
