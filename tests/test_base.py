"""A base that is not the adapter's own is refused, in Python and on the command line; its dtype alone may differ."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

import finepoint
from conftest import VOCABULARY, assert_same_bits, make_tokenizer, snapshot, tiny_gemma, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.adapter_set import AdapterSet
from finepoint.adapters.bases import verify
from finepoint.adapters.combining import merge
from finepoint.adapters.fingerprint import differences, form_of
from finepoint.adapters.scaling import scaled
from finepoint.cli import main
from finepoint.errors import FinepointError
from test_adapter import rewrite, trained


def like(model, tied):
    """The same values in a model whose head is tied, or is not."""
    other = tiny_llama(tied=tied, seed=9)
    other.load_state_dict(model.state_dict(), strict=False)
    if not tied:
        with torch.no_grad():
            other.lm_head.weight.copy_(other.model.embed_tokens.weight)
    return other


def resized(model):
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    return model


def renamed(model):
    model.model.blocks = model.model.layers
    del model.model.layers
    return model


BASES = {
    "another checkpoint": (lambda: tiny_llama(seed=5), "its values are not those of the base model"),
    "another dtype": (lambda: tiny_llama(torch.bfloat16), "bfloat16 in the model, float32 in the adapter"),
    "untied": (lambda: like(tiny_llama(), False), "embed_tokens.weight: tied to no other weight in the model, "
               "to lm_head.weight in the adapter's base"),
    "extra tokens": (lambda: resized(tiny_llama()), "(70|embed_tokens.weight: shape \\(70, 16\\))"),
    "another architecture": (lambda: tiny_gemma(), "its values are not those of the base model"),
    "renamed": (lambda: renamed(tiny_llama()), "the model has no such weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter():
    return trained(tiny_llama(), density=0.5)[0]


@pytest.mark.parametrize("base", BASES)
def test_a_wrong_base_is_refused_and_left_alone(base, adapter):
    make, message = BASES[base]
    model = make()
    before = snapshot(model)
    ways = {
        "apply": adapter.apply,
        "attach": adapter.attach,
        "applied": lambda m: adapter.applied(m).__enter__(),
        "set": lambda m: AdapterSet(m).add("a", adapter),
        "merge": lambda m: merge([adapter], model=m),
        "strength": lambda m: scaled(adapter, m, 0.5),
        "train": lambda m: finepoint.load(m, adapter, trainable=True),
        "verify": lambda m: verify(adapter, m),
    }
    for use in ways.values():
        with pytest.raises(FinepointError, match=message):
            use(model)
        assert_same_bits(before, snapshot(model))


def test_tied_and_untied_bases_differ_where_it_matters():
    """Both ways, and only for an adapter that touches the weight."""
    tied, untied = tiny_llama(), like(tiny_llama(), False)
    on_tied, on_untied = trained(tied, density=0.5)[0], trained(untied, density=0.5)[0]
    assert "lm_head.weight" in on_untied
    form = {key: value for key, value in on_tied.base.items() if key != "fingerprint"}
    assert form == {"tied": [["lm_head.weight", "model.embed_tokens.weight"]], "vocabulary": VOCABULARY}
    with pytest.raises(FinepointError, match="tied to lm_head.weight in the model, to no other weight"):
        SparseAdapter({"model.embed_tokens.weight": on_untied.changes["model.embed_tokens.weight"]}, {},
                      on_untied.base).apply(tied)  # fmt: skip
    with pytest.raises(FinepointError, match="adapters 1 and 2 were trained on different bases"):
        merge([on_tied, on_untied])
    linear = trained(tied, density=0.5, targets="linear")[0]
    with linear.applied(untied):
        pass
    assert differences({}, tied, ["model.embed_tokens.weight"]) == []
    assert form_of(torch.nn.Linear(2, 2)) == {"tied": []}


def test_extra_tokens_are_refused_though_no_chosen_weight_has_them():
    adapter = trained(tiny_llama(), density=0.5, targets="linear")[0]
    with pytest.raises(FinepointError, match="the model has 70 token embeddings, the adapter's base 64"):
        adapter.apply(resized(tiny_llama()))


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_known_of_the_base_survives_the_file_and_merging(tmp_path, adapter, compact):
    adapter.save(tmp_path / "a", compact=compact)
    again = SparseAdapter.load(tmp_path / "a")
    assert again.base == adapter.base
    assert merge([again, again], how="first").base == adapter.base
    assert scaled(again, tiny_llama(), 0.5).base == adapter.base
    rewrite(tmp_path / "a", None, lambda c: c.update(base={"tied": [], "vocabulary": 3}))
    with pytest.raises(FinepointError, match="digest"):
        SparseAdapter.load(tmp_path / "a")


# --- the dtype, by name


@pytest.mark.parametrize("store", ["delta", "value"])
@pytest.mark.parametrize(("own", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")])
def test_a_wider_dtype_is_taken_by_name_and_computes_what_was_trained(own, wide, store):
    model = tiny_llama(getattr(torch, own))
    adapter, expected = trained(model, store, full=["model.norm.weight"])
    other = tiny_llama(getattr(torch, own)).to(getattr(torch, wide))
    before = snapshot(other)
    with pytest.raises(FinepointError, match=f"{wide} in the model, {own} in the adapter.*finepoint.in_wider_dtype"):
        adapter.apply(other)
    found = finepoint.in_wider_dtype(adapter, other)
    with found.applied(other):
        assert_same_bits({name: value.to(getattr(torch, wide)) for name, value in expected.items()}, snapshot(other))
    assert_same_bits(before, snapshot(other))
    assert finepoint.in_wider_dtype(adapter, model).changes == adapter.changes  # nothing to widen


def test_a_narrower_dtype_and_every_other_difference_stay_refused(adapter):
    with pytest.raises(FinepointError, match="bfloat16 in the model"):
        finepoint.in_wider_dtype(adapter, tiny_llama(torch.bfloat16))
    half = trained(tiny_llama(torch.bfloat16), density=0.5)[0]
    with pytest.raises(FinepointError, match="float16 in the model does not hold what was trained in bfloat16"):
        finepoint.in_wider_dtype(half, tiny_llama(torch.bfloat16).to(torch.float16))
    for make in (lambda: tiny_llama(seed=5), lambda: resized(tiny_llama(torch.bfloat16).float()),
                 lambda: renamed(tiny_llama())):  # fmt: skip
        with pytest.raises(FinepointError):
            finepoint.in_wider_dtype(half, make())


# --- the command line


def put(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", [name for name in BASES if name != "renamed"])
def test_commands_refuse_a_wrong_base(tmp_path, base, adapter, capsys):
    model = put(BASES[base][0](), tmp_path / "m")
    folder = adapter.save(tmp_path / "a")
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    out = tmp_path / "out"
    lines = {
        "eval": f"eval --model {model} --dtype auto --adapter {folder} --id x={data} --output {out}",
        "merge": f"merge {folder} {folder} --how first --model {model} --output {out}",
        "export": f"export --model {model} --adapter {folder} --format merged --output {out}",
        "patch": f"export --model {model} --adapter {folder} --format vllm-patch --output {out}",
        "verify": f"verify --model {model} {folder}",
        "train": f"train --model {model} --data {data} --indices {folder} --steps 1 --output {out}",
    }
    if base == "another dtype":
        lines["eval"] = lines["eval"].replace("--dtype auto", "--dtype bfloat16 --any-dtype")
        lines["train"] += " --dtype bfloat16"
    for command, line in lines.items():
        assert main(line.split()) == 2, command
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len([one for one in shown.err.splitlines() if one.startswith("finepoint ")]) == 1, shown.err
        assert not out.exists() or not list(out.iterdir())


def test_eval_takes_a_wider_dtype_by_name(tmp_path, capsys):
    model = put(tiny_llama(torch.bfloat16), tmp_path / "m")
    folder = trained(tiny_llama(torch.bfloat16), "auto", density=0.5)[0].save(tmp_path / "a")
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "choices": [" b", " c"], "answer": 0}] * 4)
    line = f"eval --model {model} --dtype float32 --adapter {folder} --id x={data} --json"
    assert main(line.split()) == 2
    assert "--any-dtype" in capsys.readouterr().err
    assert main([*line.split(), "--any-dtype"]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"]


# --- the base as a whole


def one_ulp(model, name="model.layers.1.mlp.up_proj.weight", place=-1, adapter=None):
    """One entry of a weight is the next number; where it is one that the adapter changes, another entry."""
    weight = model.get_parameter(name).data.view(-1)
    free = torch.ones(len(weight), dtype=torch.bool)
    if adapter is not None and name in adapter:
        free[adapter[name]] = False
    at = free.nonzero()[place]
    weight[at] = torch.nextafter(weight[at], weight[at] + 1)
    return model


def further(model):
    model.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(24))
    return model


ELSEWHERE = {
    "first entry": (lambda a: one_ulp(tiny_llama(), place=0, adapter=a), "layers.1.mlp.up_proj.weight: its values"),
    "last entry": (lambda a: one_ulp(tiny_llama(), place=-1, adapter=a), "layers.1.mlp.up_proj.weight: its values"),
    "a weight that is not trained": (lambda a: one_ulp(tiny_llama(), "model.norm.weight"), "model.norm.weight: its"),
    "a further weight": (lambda a: further(tiny_llama()), "up_proj.bias: the adapter's base has no such weight"),
}  # fmt: skip


def ways_into(adapter):
    return {
        "apply": adapter.apply,
        "attach": adapter.attach,
        "applied": lambda m: adapter.applied(m).__enter__(),
        "load": lambda m: finepoint.load(m, adapter),
        "set": lambda m: AdapterSet(m).add("a", adapter),
        "merge": lambda m: merge([adapter], model=m),
        "strength": lambda m: scaled(adapter, m, 0.5),
        "widened": lambda m: finepoint.in_wider_dtype(adapter, m),
        "train": lambda m: finepoint.load(m, adapter, trainable=True),
        "verify": lambda m: verify(adapter, m),
    }


@pytest.fixture(scope="module")
def of_linear():
    return trained(tiny_llama(), density=0.05, targets="linear")[0]


@pytest.mark.parametrize("base", ELSEWHERE)
def test_a_base_that_differs_in_one_entry_that_was_not_chosen_is_refused(base, of_linear, caplog):
    make, message = ELSEWHERE[base]
    model = make(of_linear)
    before = snapshot(model)
    for use in ways_into(of_linear).values():
        with pytest.raises(FinepointError, match=message):
            use(model)
        assert_same_bits(before, snapshot(model))
    taken = finepoint.rebased(of_linear, model)
    assert "1 of its 21 weights" in caplog.text or base == "a further weight"
    with taken.applied(model):
        assert not torch.equal(*(m["model.layers.0.mlp.up_proj.weight"] for m in (before, snapshot(model))))
    assert_same_bits(before, snapshot(model))
    assert merge([taken], model=model).base == taken.base
    with pytest.raises(FinepointError, match="adapters 1 and 2 were trained on different bases: .* differs"):
        merge([of_linear, taken])


@pytest.mark.parametrize("way", ways_into(SparseAdapter({})))
def test_the_base_itself_is_taken_in_every_way(way, of_linear):
    ways_into(of_linear)[way](tiny_llama())


def test_rebased_overlooks_no_chosen_entry(of_linear):
    for make in (lambda: tiny_llama(seed=5), lambda: resized(tiny_llama()), lambda: tiny_llama(torch.bfloat16)):
        model = make()
        with pytest.raises(FinepointError, match="does not fit"):
            finepoint.rebased(of_linear, model).apply(model)


def test_what_is_applied_already_is_no_other_base(of_linear):
    """Adapters that share no entry stack as ever: beneath them lies the base."""
    model = tiny_llama()
    base = snapshot(model)
    norms, _ = trained(model, density=0.5, targets=["model.norm.weight", "model.embed_tokens.weight"])
    switch = AdapterSet(model)
    switch.add("norms", norms)
    for put, back in ((norms.apply, norms.revert), (lambda m: switch.set("norms"), lambda m: switch.set(None))):
        put(model)
        of_linear.apply(model)
        back(model)
        of_linear.revert(model)
        assert_same_bits(base, snapshot(model))


def test_a_new_head_is_no_part_of_the_base(tmp_path):
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels = 3
    model = LlamaForSequenceClassification(config)
    adapter, _ = _head(model, tmp_path)
    torch.nn.init.normal_(model.score.weight)  # drawn anew
    adapter.check(model)
    one_ulp(model, adapter=adapter)
    with pytest.raises(FinepointError, match="up_proj.weight: its values"):
        adapter.check(model)


def _head(model, folder):
    finepoint.sparsify(model, density=0.05, rule="random", whole=["score.weight"])
    finepoint.save(model, folder / "c")
    finepoint.unload(model, revert=True)
    return SparseAdapter.load(folder / "c"), model


@pytest.mark.parametrize("flag", [False, True])
def test_commands_refuse_one_other_entry_and_take_it_by_name(tmp_path, of_linear, flag, capsys):
    model = put(one_ulp(tiny_llama(), adapter=of_linear), tmp_path / "m")
    folder = of_linear.save(tmp_path / "a")
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "choices": [" b", " c"], "answer": 0}] * 4)
    out = tmp_path / "out"
    lines = {
        "eval": f"eval --model {model} --dtype float32 --adapter {folder} --id x={data}",
        "merge": f"merge {folder} {folder} --how first --model {model} --output {out}",
        "export": f"export --model {model} --adapter {folder} --format merged --output {out}/m",
        "patch": f"export --model {model} --adapter {folder} --format vllm-patch --output {out}/p",
        "verify": f"verify --model {model} {folder}",
    }
    for command, line in lines.items():
        assert main([*line.split(), *(["--any-base"] if flag else [])]) == (0 if flag else 2), command
        told = capsys.readouterr().err
        assert flag or ("up_proj.weight" in told and "--any-base" in told), told


def test_what_is_known_of_the_base_goes_wherever_a_change_goes(tmp_path, of_linear):
    known = of_linear.base["fingerprint"]
    assert SparseAdapter.load(of_linear.save(tmp_path / "a")).base["fingerprint"] == known
    base, tuned = put(tiny_llama(), tmp_path / "base"), tiny_llama()
    with of_linear.applied(tuned):
        put(tuned, tmp_path / "tuned")
    extracted, _ = finepoint.extract(str(base), str(tmp_path / "tuned"))
    assert extracted.base == of_linear.base
    finepoint.export(str(base), str(tmp_path / "a"), "vllm-patch", str(tmp_path / "patch"))
    assert json.loads((tmp_path / "patch" / "patch.json").read_text())["fingerprint"] == known
    finepoint.export(str(base), str(tmp_path / "a"), "sparta", str(tmp_path / "sparta"))
    assert finepoint.import_adapter(str(tmp_path / "sparta"), str(base)).base == of_linear.base


def test_an_adapter_that_does_not_know_its_base_as_a_whole_is_read_and_says_so_once(tmp_path, of_linear, caplog):
    replace(of_linear, base={}).save(tmp_path / "old")
    for _ in range(2):
        adapter = SparseAdapter.load(tmp_path / "old")
    assert caplog.text.count("knows its base by the values at its entries alone") == 1
    with adapter.applied(one_ulp(tiny_llama(), adapter=of_linear)):
        pass
    assert verify(adapter, tiny_llama())["base"] == "entries"
    assert verify(of_linear, tiny_llama())["base"] == "whole"


# --- weights that are replaced meanwhile


def other_values(model, how):
    other = tiny_llama(seed=5)
    if how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif how == "copy_":
        for name, weight in model.named_parameters():
            weight.data.copy_(other.get_parameter(name))
    else:
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(other.model.layers[0].mlp.up_proj.weight.data)


@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "another parameter"])
@pytest.mark.parametrize("on", [False, True])
def test_nothing_of_one_model_is_written_into_another(of_linear, how, on):
    model = tiny_llama()
    switch = AdapterSet(model)
    switch.add("a", of_linear)
    if on:
        switch.set("a")
    other_values(model, how)
    before = snapshot(model)
    with pytest.raises(FinepointError, match=r"weight does not hold what the adapters lie on: the weights were repl"):
        switch.set(None if on else "a")
    assert_same_bits(before, snapshot(model))


@pytest.mark.parametrize("how", ["load_state_dict", "copy_", "another parameter"])
def test_revert_and_unload_refuse_replaced_weights(of_linear, how):
    model = tiny_llama()
    finepoint.load(model, of_linear)
    other_values(model, how)
    before = snapshot(model)
    for back in (of_linear.revert, finepoint.unload):
        with pytest.raises(FinepointError, match="does not hold what the adapter wrote: the weights were replaced"):
            back(model)
        assert_same_bits(before, snapshot(model))


def test_a_set_looks_at_all_weights_where_something_was_written(of_linear):
    model = tiny_llama()
    switch = AdapterSet(model)
    switch.add("a", of_linear)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    with pytest.raises(FinepointError, match=r"norm.weight does not hold"):
        switch.set("a")
    with torch.no_grad():
        model.model.norm.weight[3] -= 1
    switch.set("a")


def test_none_is_the_base(of_linear):
    model = tiny_llama()
    base = snapshot(model)
    switch = AdapterSet(model)
    switch.add("a", of_linear)
    switch.set("a")
    with switch.using(None):
        assert_same_bits(base, snapshot(model))
    assert switch.active == ("a",)
    switch.set(None)
    assert switch.active == ()
    assert_same_bits(base, snapshot(model))


def test_an_adapter_loaded_by_its_path_is_taken_out_again(tmp_path, of_linear):
    model = tiny_llama()
    base = snapshot(model)
    place = str(of_linear.save(tmp_path / "a"))
    for back in (finepoint.unload, SparseAdapter.load(place).revert):
        finepoint.load(model, place)
        for again in (lambda: finepoint.load(model, place), lambda: finepoint.load(model, place, trainable=True)):
            with pytest.raises(FinepointError, match="the adapter is applied to the model already"):
                again()
        other = SparseAdapter.load(place)
        for change in other.changes.values():
            change.numbers.add_(1)
        with pytest.raises(FinepointError, match="does not fit this model.*another adapter is applied to it"):
            finepoint.load(model, other)
        back(model)
        assert_same_bits(base, snapshot(model))
    with pytest.raises(FinepointError, match="not in training"):
        finepoint.unload(model)


# --- a model in training


def moving(model, density=0.05):
    finepoint.sparsify(model, "random", density)
    for delta in finepoint.tuner_of(model).parameters():
        torch.nn.init.normal_(delta.data, std=0.1)
    finepoint.tuner_of(model).follow_()
    return model


def test_the_state_of_another_base_is_refused_and_its_own_taken():
    model = moving(tiny_llama())
    before = snapshot(model)
    for other in (tiny_llama(seed=5), one_ulp(tiny_llama(), "model.norm.weight"), moving(tiny_llama(seed=5))):
        with pytest.raises(FinepointError, match="of the state dict is not that of the base in training"):
            model.load_state_dict(other.state_dict(), strict=False)
        assert_same_bits(before, snapshot(model))
    twin = moving(tiny_llama())
    model.load_state_dict(twin.state_dict())
    model(input_ids=torch.tensor([[3, 4]]))
    assert_same_bits(snapshot(twin), snapshot(model))
    finepoint.unload(model, revert=True)
    assert_same_bits(snapshot(tiny_llama()), snapshot(model))


def unfrozen_for_a_step(model, weight):
    weight.requires_grad_(True)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    torch.optim.SGD([weight], lr=0.1).step()
    weight.requires_grad_(False)


def past_autograd(model, weight):
    weight.data += 1


@pytest.mark.parametrize(
    ("change", "name"),
    [(unfrozen_for_a_step, "model.norm.weight"), (unfrozen_for_a_step, "model.layers.0.mlp.up_proj.weight"),
     (past_autograd, "model.norm.weight"), (past_autograd, "model.layers.0.mlp.up_proj.weight")],
)  # fmt: skip
def test_what_was_changed_beside_the_entries_is_not_saved_without_a_word(tmp_path, change, name):
    model = moving(tiny_llama())
    finepoint.save(model, tmp_path / "a")
    change(model, model.get_parameter(name))
    with pytest.raises(FinepointError, match=f"{name} was changed since the training began"):
        finepoint.save(model, tmp_path / "b")
    with pytest.raises(FinepointError, match=f"{name} was changed since the training began"):
        finepoint.unload(model, revert=True)


@pytest.mark.parametrize("how", ["load", "set"])
def test_what_is_trained_over_an_applied_adapter_lies_on_the_base_beneath(tmp_path, how):
    finepoint.save(moving(tiny_llama()), tmp_path / "a")
    a = SparseAdapter.load(tmp_path / "a")
    model = tiny_llama()
    if how == "load":
        finepoint.load(model, a)
    else:
        switch = AdapterSet(model)
        switch.add("a", a)
        switch.set("a")
    finepoint.sparsify(model, "random", 0.01, seed=9, exclude=[a])
    for delta in finepoint.tuner_of(model).parameters():
        delta.data += 0.1
    finepoint.save(model, tmp_path / "b")
    trained = snapshot(finepoint.unload(model))
    other = finepoint.load(finepoint.load(tiny_llama(), a), tmp_path / "b")
    assert_same_bits(trained, snapshot(other))
    assert_same_bits(snapshot(tiny_llama()), snapshot(finepoint.unload(other)))
    assert finepoint.merge([a, SparseAdapter.load(tmp_path / "b")]).fingerprint == a.fingerprint


@pytest.mark.parametrize("choose", [False, True])
def test_the_reference_stays_what_it_was_whatever_is_chosen_later(choose):
    model = tiny_llama()
    ids = torch.arange(5, 21)[None]
    finepoint.sparsify(model, "random", 0.05, refreshable=True)
    tuner = finepoint.tuner_of(model)
    for delta in tuner.parameters():
        torch.nn.init.normal_(delta.data, std=0.1)
    tuner.follow_()
    expected = model(input_ids=ids).logits.detach()
    reference = finepoint.reference(model)
    for keep in (True, False) if choose else ():
        tuner.choose_(finepoint.select(model, rule="random", density=0.05, seed=3 + keep), keep=keep)
    for delta in tuner.parameters():
        torch.nn.init.normal_(delta.data, std=0.3)
    tuner.follow_()
    now = model(input_ids=ids).logits.detach()
    assert torch.equal(reference(input_ids=ids).logits, expected)
    assert torch.equal(model(input_ids=ids).logits, now)
    assert not torch.equal(now, expected)


def test_a_run_is_not_resumed_on_another_base(tmp_path, capsys):
    base, other = put(tiny_llama(), tmp_path / "m"), put(one_ulp(tiny_llama(), "model.norm.weight"), tmp_path / "o")
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    line = f"train --data {data} --rule random --density 0.05 --save-every 1 --output {tmp_path / 'run'} --model "
    assert main([*line.split(), str(base), "--steps", "1"]) == 0
    assert main([*line.split(), str(other), "--steps", "2", "--resume"]) == 2
    assert "was trained on another base model: model.norm.weight is not the same" in capsys.readouterr().err
    assert main([*line.split(), str(base), "--steps", "2", "--resume"]) == 0


@pytest.mark.parametrize("baseline", ["lora", "rosa"])
def test_factors_trained_here_know_their_base(tmp_path, capsys, baseline):
    data = write_lines(tmp_path / "x.jsonl", [{"prompt": "a b", "completion": " c d"}] * 2)
    for name, model in (("base", tiny_llama()), ("other", one_ulp(tiny_llama(), "model.norm.weight"))):
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    own, other, folder = (str(tmp_path / name) for name in ("base", "other", "a"))
    chosen = ["--density", "0.05", "--rule", "random"] if baseline == "rosa" else []
    assert main(["train", "--model", own, "--data", data, "--baseline", baseline, *chosen, "--steps", "1",
                 "--output", folder]) == 0  # fmt: skip
    into = ["--output", str(tmp_path / "m"), "--overwrite"]
    commands = (["eval", "--adapter", folder, "--probe", f"x={data}"],
                ["export", "--adapter", folder, "--format", "merged", *into])  # fmt: skip
    for command in commands:
        assert main([*command, "--model", own]) == 0
        capsys.readouterr()
        assert main([*command, "--model", other]) == 2
        assert "model.norm.weight" in capsys.readouterr().err
        if baseline == "lora":
            assert main([*command, "--model", other, "--any-base"]) == 0
    config = tmp_path / "a" / "finepoint_config.json"
    if baseline == "lora":
        config.write_text(json.dumps({"info": json.loads(config.read_text())["info"]}))  # as earlier ones were
        assert main([*commands[0], "--model", other]) == 0
        assert "does not know its base" in capsys.readouterr().err


def test_a_stock_trainers_deltas_are_refused_on_another_base(tmp_path):
    model = moving(tiny_llama())
    model.save_pretrained(tmp_path / "checkpoint")
    kept = load_file(tmp_path / "checkpoint" / "model.safetensors")
    other = one_ulp(tiny_llama(), "model.norm.weight")
    finepoint.sparsify(other, indices={name: model.finepoint[name.replace(".", "/")].indices.long()
                                       for name in finepoint.tuner_of(model).entries})  # fmt: skip
    before = snapshot(other)
    with pytest.raises(FinepointError, match=r"trained on another base: model.norm.weight differs"):
        other.load_state_dict(kept, strict=False)
    assert_same_bits(before, snapshot(other))
    with pytest.raises(FinepointError, match="what they say of their base cannot be read"):
        other.load_state_dict(kept | {"finepoint.fingerprint": torch.tensor([3], dtype=torch.uint8)}, strict=False)
    model.load_state_dict(kept, strict=False)
    with pytest.raises(FinepointError, match=r"model.norm.weight"):
        finepoint.load(one_ulp(tiny_llama(), "model.norm.weight"), tmp_path / "checkpoint", trainable=True)
