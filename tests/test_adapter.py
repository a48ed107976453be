import copy
import json
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import finepoint
from conftest import assert_same_bits, random_batches, snapshot, tiny_llama
from finepoint.adapters.adapter import SparseAdapter, applied_to
from finepoint.adapters.bases import verify
from finepoint.adapters.change import Change
from finepoint.adapters.entries import checksum, moved
from finepoint.adapters.format import TENSORS, from_gaps, to_gaps
from finepoint.adapters.inspection import facts, heat_map, place
from finepoint.errors import FinepointError


def trained(model, store="delta", density=0.1, seed=0, full=(), targets="all"):
    """An adapter of a few real steps, and the bits of the trained model; the model is left at the base."""
    indices = finepoint.select(model, rule="random", density=density, targets=targets, seed=seed)
    tuner = finepoint.SparseTuner(model, indices)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=3e-2)
    for batch in random_batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = tuner.adapter(store, full, {"rule": "random"})
    weights = {name: value for name, value in snapshot(model).items() if not name.startswith("finepoint")}
    tuner.revert_()
    tuner.close()
    return adapter, weights


@pytest.mark.parametrize("store", ["delta", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_gives_the_trained_bits_and_revert_the_base(store, dtype):
    model = tiny_llama(dtype)
    base = snapshot(model)
    adapter, expected = trained(model, store)
    assert_same_bits(base, snapshot(model))
    adapter.apply(model)
    assert_same_bits(expected, snapshot(model))
    assert any(not torch.equal(value, base[name]) for name, value in snapshot(model).items())
    adapter.revert(model)
    assert_same_bits(base, snapshot(model))


def test_a_thousand_swaps_leave_no_trace():
    model = tiny_llama(torch.bfloat16)
    base = snapshot(model)
    first, second = trained(model)[0], trained(model, "value", seed=1)[0]
    for i in range(1000):
        with (first if i % 2 else second).applied(model):
            pass
    assert_same_bits(base, snapshot(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_reverted_by_the_same_adapter(copied):
    model = tiny_llama(torch.bfloat16)
    base = snapshot(model)
    adapter, expected = trained(model, density=0.01)
    other, _ = trained(model, density=0.01, seed=1)
    adapter.apply(model)
    clone = copied(model)
    with pytest.raises(FinepointError, match="not applied to this model"):
        other.revert(clone)
    assert_same_bits(expected, snapshot(clone))
    adapter.revert(clone)
    assert_same_bits(base, snapshot(clone))
    assert_same_bits(expected, snapshot(model))


def test_an_exception_inside_applied_reverts():
    model = tiny_llama(torch.bfloat16)
    base = snapshot(model)
    adapter, _ = trained(model)
    with pytest.raises(KeyError), adapter.applied(model):
        raise KeyError
    assert_same_bits(base, snapshot(model))


def test_a_model_in_training_takes_no_adapter(llama):
    adapter, _ = trained(llama)
    chosen = finepoint.select(llama, rule="random", density=0.1, targets="all", seed=3)
    with finepoint.SparseTuner(llama, chosen):
        assert set(finepoint.target_weights(llama, "all")) == set(dict(tiny_llama().named_parameters()))
        with pytest.raises(FinepointError, match="close its SparseTuner"):
            adapter.apply(llama)
    adapter.apply(llama)


def test_disjoint_adapters_stack_and_come_off_in_any_order():
    model = tiny_llama()
    base = snapshot(model)
    a, _ = trained(model)
    chosen = finepoint.select(model, rule="random", density=0.1, targets="all", exclude=[a], seed=4)
    with finepoint.SparseTuner(model, chosen) as tuner:
        for delta in tuner.parameters():
            delta.data.fill_(0.25)
        b = tuner.adapter()
        tuner.revert_()
    a.apply(model)
    b.apply(model)
    a.revert(model)
    with_b = snapshot(model)
    b.revert(model)
    assert_same_bits(base, snapshot(model))
    b.apply(model)
    assert_same_bits(with_b, snapshot(model))


def test_overlapping_adapters_are_refused(llama):
    a, b = trained(llama)[0], trained(llama, seed=1)[0]
    a.apply(llama)
    with pytest.raises(FinepointError, match="not those of the base model"):
        b.apply(llama)
    a.revert(llama)
    with pytest.raises(FinepointError, match="nothing to revert"):
        a.revert(llama)


@pytest.mark.parametrize("store", ["delta", "value"])
def test_load_of_save_is_the_same_bit_for_bit(tmp_path, store):
    adapter, _ = trained(tiny_llama(torch.bfloat16), store, full=["model.norm.weight"], density=0.5)
    adapter.save(tmp_path / "a")
    again = SparseAdapter.load(tmp_path / "a")
    assert_same_adapter(adapter, again)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "finepoint.safetensors", "finepoint_config.json", "README.md",
    }  # fmt: skip
    config = json.loads((tmp_path / "a" / "finepoint_config.json").read_text())
    assert config["format_version"] == 4
    assert config["info"]["rule"] == "random"
    again.save(tmp_path / "b")
    assert (tmp_path / "a" / "finepoint.safetensors").read_bytes() == (
        tmp_path / "b" / "finepoint.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("structure", ["row", "column"])
def test_a_row_or_a_column_is_one_number_in_the_file(structure, compact, tmp_path):
    model = tiny_llama(torch.bfloat16)
    selection = finepoint.select(model, rule="random", density=0.3, structure=structure)
    with finepoint.SparseTuner(model, selection) as tuner, torch.no_grad():
        for delta in tuner.parameters():
            delta.normal_()
        adapter = tuner.adapter()
    folder = adapter.save(tmp_path / "a", compact=compact)
    assert_same_adapter(adapter, SparseAdapter.load(folder))
    file = folder / "finepoint.safetensors"
    assert json.loads((folder / "finepoint_config.json").read_text())["format_version"] == 5
    lines = 0
    for name, tensor in load_file(file).items():
        assert name.endswith((f".{structure}s", ".value"))
        lines += tensor.numel() if name.endswith("s") else 0
    with safe_open(file, "pt") as opened:
        held = sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118 - not a dict
    assert held == 2 * adapter.count + 4 * lines  # two bytes an entry
    rewrite(folder, lambda t: [part.__setitem__(0, 9999) for key, part in t.items() if key.endswith("s")], None)
    with pytest.raises(FinepointError, match="not ascending and unique|lies outside the weight"):
        SparseAdapter.load(folder)
    adapter.save(folder, overwrite=True)
    rewrite(folder, lambda t: t.update({key: part[1:].clone() for key, part in t.items() if key.endswith("s")}), None)
    with pytest.raises(FinepointError, match="rows or columns, .* entries announced"):
        SparseAdapter.load(folder)


def assert_same_adapter(a, b):
    assert a.info == b.info
    assert list(a.changes) == list(b.changes)
    for name, change in a.changes.items():
        other = b.changes[name]
        assert (change.shape, change.dtype, change.kind, change.base) == (
            other.shape, other.dtype, other.kind, other.base,
        )  # fmt: skip
        assert torch.equal(change.indices, other.indices)
        assert other.indices.dtype == torch.int64
        assert change.numbers.dtype == other.numbers.dtype
        assert torch.equal(change.numbers, other.numbers)


@st.composite
def adapters(draw):
    changes = {}
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        size = torch.Size(shape).numel()
        chosen = draw(st.sets(st.integers(0, size - 1), min_size=1))
        dtype = draw(st.sampled_from(["float32", "bfloat16", "float64"]))
        kind = draw(st.sampled_from(["delta", "value", "full"]))
        indices = torch.tensor(sorted(chosen)) if kind != "full" else torch.empty(0, dtype=torch.long)
        numbers = torch.randn(shape if kind == "full" else (len(indices),), dtype=torch.float64)
        wide = torch.float64 if dtype == "float64" else torch.float32
        numbers = numbers.to(wide if kind == "delta" else getattr(torch, dtype))
        changes[f"layer.{i}.weight"] = Change(shape, dtype, kind, indices, numbers, "" if kind == "full" else "abc")
    return SparseAdapter(changes, {"note": draw(st.text())})


@settings(max_examples=50, deadline=None)
@given(adapters())
def test_any_adapter_survives_the_file(tmp_path_factory, adapter):
    folder = adapter.save(tmp_path_factory.mktemp("adapter") / "a")
    assert_same_adapter(adapter, SparseAdapter.load(folder))


def test_a_file_costs_eight_or_six_bytes_an_entry(tmp_path):
    for store, each in (("delta", 8), ("value", 6)):
        adapter, _ = trained(tiny_llama(torch.bfloat16), store, density=0.9)
        folder = adapter.save(tmp_path / store)
        header = struct.unpack("<Q", (folder / "finepoint.safetensors").read_bytes()[:8])[0]
        size = (folder / "finepoint.safetensors").stat().st_size - 8 - header
        assert size == adapter.count * each


def test_nothing_is_overwritten_unasked(tmp_path, llama):
    adapter, _ = trained(llama)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(FinepointError, match="not empty; choose another --output or give --overwrite"):
        adapter.save(folder)
    adapter.save(folder, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "mine"


# A wrong base, and damaged files: an error that names the weight, and a model left alone.


def changed_model(change):
    model = tiny_llama()
    change(model)
    return model


def nudge(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-3)


WRONG_MODELS = {
    "values": (lambda: changed_model(nudge), "up_proj.weight: its values are not those of the base"),
    "seed": (lambda: tiny_llama(seed=5), "its values are not those of the base"),
    "dtype": (lambda: tiny_llama(torch.bfloat16), "bfloat16 in the model, float32 in the adapter; load it as float32"),
    "names": (lambda: changed_model(lambda m: m.model.layers.pop(1)), "model.layers.1.*: the model has no such weight"),
    "shape": (lambda: changed_model(lambda m: setattr(m.model.norm, "weight", torch.nn.Parameter(torch.ones(8)))),
              r"model.norm.weight: shape \(8,\) in the model, \(16,\) in the adapter"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_MODELS)
def test_a_wrong_base_is_refused_and_left_alone(wrong):
    make, message = WRONG_MODELS[wrong]
    adapter, _ = trained(tiny_llama(), density=0.9)
    model = make()
    before = snapshot(model)
    with pytest.raises(FinepointError, match=message):
        adapter.apply(model)
    assert_same_bits(before, snapshot(model))
    assert "_finepoint_applied" not in model.__dict__ or not model._finepoint_applied


def rewrite(folder, change_tensors=None, change_config=None):
    path = folder / "finepoint.safetensors"
    tensors = load_file(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    config = json.loads(header["__metadata__"]["finepoint"])
    if change_tensors:
        change_tensors(tensors)
    if change_config:
        change_config(config)
    save_file(tensors, path, {"finepoint": json.dumps(config)})


NAME = "model.embed_tokens.weight"
DAMAGE = {
    "descending": (lambda t: t.update({f"{NAME}.indices": t[f"{NAME}.indices"].flip(0)}), None, "ascending and unique"),
    "negative": (lambda t: t[f"{NAME}.indices"].__setitem__(0, -1), None, "outside the weight"),
    "too large": (lambda t: t[f"{NAME}.indices"].__setitem__(-1, 2**30), None, "outside the weight"),
    "nan": (lambda t: t[f"{NAME}.delta"].__setitem__(0, float("nan")), None, "not finite"),
    "short": (lambda t: t.update({f"{NAME}.delta": t[f"{NAME}.delta"][1:].clone()}), None, "indices, numbers of shape"),
    "dtype": (lambda t: t.update({f"{NAME}.delta": t[f"{NAME}.delta"].half()}), None, "delta is stored as"),
    "no indices": (lambda t: t.pop(f"{NAME}.indices"), None, "indices is missing"),
    "no delta": (lambda t: t.pop(f"{NAME}.delta"), None, "delta is missing"),
    "stranger": (lambda t: t.update({"stranger": torch.ones(1)}), None, "holds 'stranger'"),
    "count": (None, lambda c: c["weights"][NAME].update(count=1), "entries announced"),
    "kind": (None, lambda c: c["weights"][NAME].update(kind="pickle"), "kind 'pickle'"),
    "shape": (None, lambda c: c["weights"][NAME].update(shape=[2**60, 2**60]), "not a list of sizes"),
    "type": (None, lambda c: c["weights"][NAME].update(dtype="complex64"), "dtype 'complex64'"),
    "checksum": (None, lambda c: c["weights"][NAME].update(base_checksum=None), "checksum of the base"),
    "version": (None, lambda c: c.update(format_version=6), "format version 6; this finepoint reads 1, 2, 3, 4, 5"),
    "weights": (None, lambda c: c.update(weights=[1]), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    change_tensors, change_config, message = DAMAGE[damage]
    adapter, _ = trained(tiny_llama(), density=0.5)
    folder = adapter.save(tmp_path / "a")
    rewrite(folder, change_tensors, change_config)
    with pytest.raises(FinepointError, match=message):
        SparseAdapter.load(folder)


def test_truncated_or_foreign_files_are_refused(tmp_path):
    folder = trained(tiny_llama())[0].save(tmp_path / "a")
    path = folder / "finepoint.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FinepointError, match="cannot read"):
            SparseAdapter.load(folder)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(FinepointError, match="was not written by finepoint"):
        SparseAdapter.load(folder)
    with pytest.raises(FinepointError, match="not an adapter folder"):
        SparseAdapter.load(tmp_path / "nowhere")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = tiny_llama()
    old, new = trained(model)[0], trained(model, seed=3)[0]
    folder = old.save(tmp_path / "a")
    import finepoint.adapters.format as format_

    def break_off(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(format_, "save_file", break_off)
    with pytest.raises(KeyboardInterrupt):
        new.save(folder, overwrite=True)
    assert_same_adapter(old, SparseAdapter.load(folder))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_verify_inspect_and_map():
    model = tiny_llama()
    base = snapshot(model)
    adapter, _ = trained(model, density=0.2)
    found = verify(adapter, model)
    assert found["entries"] == adapter.count == facts(adapter)["entries"]
    assert 0 < found["changed"] <= found["entries"]
    assert_same_bits(base, snapshot(model))
    drawing = heat_map(adapter)
    assert "down_proj" in drawing
    assert "@" in drawing
    assert place("model.layers.12.mlp.up_proj.weight") == ("12", "up_proj")
    assert place("lm_head.weight") == ("lm_head", "-")


def test_moved_rounds_once_in_the_deltas_precision():
    base = torch.tensor([1.0, -0.0, 3.0]).bfloat16()
    delta = torch.tensor([2**-9, 0.0, 1e-9])
    found = moved(base, delta)
    assert found.dtype == torch.bfloat16
    assert torch.signbit(found[1])
    assert found[0] == (torch.tensor(1.0) + 2**-9).bfloat16()


def test_the_checksum_is_the_same_in_every_dtype_that_holds_the_values():
    values = torch.randn(10).bfloat16()
    assert checksum(values) == checksum(values.float()) == checksum(values.double())
    assert checksum(values) != checksum(values.flip(0))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 70_000), st.integers(0, 2**33)), unique=True))
def test_gaps_give_back_the_indices(positions):
    indices = torch.tensor(sorted(positions), dtype=torch.int64)
    gaps = to_gaps(indices)
    assert gaps.dtype in (torch.uint8, torch.uint16)
    assert torch.equal(from_gaps(gaps), indices)


@pytest.mark.parametrize("indices", [[0], [254], [255], [256], [0, 255], [0, 510, 511], [65534, 65535, 131070], []])
def test_gaps_at_the_edges_of_their_width(indices):
    indices = torch.tensor(indices, dtype=torch.int64)
    assert torch.equal(from_gaps(to_gaps(indices)), indices)


def test_gaps_take_one_byte_at_one_per_cent_and_two_at_one_per_mille():
    for density, width in ((1e-2, torch.uint8), (1e-3, torch.uint16)):
        indices = (torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) < density).nonzero()[:, 0]
        gaps = to_gaps(indices)
        assert gaps.dtype == width
        assert gaps.nbytes <= 1.1 * width.itemsize * len(indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compact_file_loads_bit_for_bit_and_is_smaller(tmp_path, dtype):
    adapter, _ = trained(tiny_llama(dtype), "auto")
    adapter.save(tmp_path / "plain")
    adapter.save(tmp_path / "compact", compact=True)
    back = SparseAdapter.load(tmp_path / "compact")
    for name, change in adapter.changes.items():
        assert change.kind == ("value" if dtype == torch.bfloat16 else "delta")
        assert torch.equal(back.changes[name].indices, change.indices)
        assert_same_bits({name: back.changes[name].numbers}, {name: change.numbers})
        assert back.changes[name].base == change.base
    sizes = [
        sum(tensor.nbytes for tensor in load_file(tmp_path / at / TENSORS).values()) for at in ("plain", "compact")
    ]
    entry = torch.finfo(dtype).bits // 8
    assert sizes[0] == adapter.count * (4 + entry)
    assert sizes[1] <= adapter.count * (1.1 + entry)


def test_damaged_gaps_are_refused(tmp_path):
    adapter, _ = trained(tiny_llama())
    adapter.save(tmp_path / "a", compact=True)
    path = tmp_path / "a" / TENSORS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(iter(adapter))
    gaps = tensors[f"{name}.gaps"]
    for damaged in (gaps[:-1], torch.zeros_like(gaps), torch.full_like(gaps, 254), gaps.to(torch.int32)):
        save_file(tensors | {f"{name}.gaps": damaged.contiguous()}, path, metadata)
        with pytest.raises(FinepointError, match=name):
            SparseAdapter.load(tmp_path / "a")


@pytest.mark.parametrize("kind", ["delta", "value", "full"])
def test_an_adapter_goes_in_and_out_as_often_as_one_likes(kind):
    model = tiny_llama(torch.bfloat16)
    base = snapshot(model)
    with finepoint.SparseTuner(model, finepoint.select(model, density=0.1), audit=False) as tuner:
        for parameter in tuner.parameters():
            parameter.data.normal_()
        tuner.follow_()
        whole = list(tuner.entries) if kind == "full" else []
        adapter = tuner.adapter("auto" if kind == "full" else kind, full=whole)
        trained = {name: values for name, values in snapshot(model).items() if name in base}
        tuner.revert_()
    with adapter.alternating(model) as switch:
        for on in (False, True, True, False, False, True):
            switch(on)
            assert_same_bits(snapshot(model), trained if on else base)
    assert_same_bits(base, snapshot(model))
    with pytest.raises(ZeroDivisionError):
        _break_off(adapter, model)
    assert_same_bits(base, snapshot(model))
    assert not applied_to(model)


def _break_off(adapter, model):
    with adapter.alternating(model) as switch:
        switch(False)
        raise ZeroDivisionError
