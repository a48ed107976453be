"""A draw of columns with more than its share of the model's few large inputs is told of, and no other."""

import pytest
import torch

import finepoint
from conftest import random_batches, tiny_llama, write_lines
from finepoint.cli import main
from finepoint.selection.input_norms import input_norms
from finepoint.selection.large_inputs import large_inputs, warn_of_large_inputs
from finepoint.selection.targets import target_weights

LAYER, INPUT = "model.layers.1.mlp.down_proj.weight", 3


def with_a_large_input():
    """A model of which one input, of a layer's down projection, is far larger than the others."""
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(LAYER.replace("down_proj.weight", "up_proj")).weight[INPUT] *= 300
    return model


def column_of(model, name, column):
    rows, columns = model.get_parameter(name).shape
    return {name: torch.arange(rows) * columns + column}


def has_it(chosen):
    return LAYER in chosen and INPUT in chosen[LAYER] % 24


def dense(model, indices, batches):
    """The same, of whole matrices: what every entry multiplies, squared, summed over all tokens."""
    seen = {}
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    handles = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name in indices
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    held = usual = 0.0
    for name, chosen in indices.items():
        squares = torch.cat([x.flatten(0, -2) for x in seen[name]]).double().square().sum(0)
        matrix = squares.expand(model.get_parameter(name).shape)
        held += matrix.reshape(-1)[chosen].sum().item()
        usual += len(chosen) * matrix.mean().item()
    return held / usual


@pytest.mark.parametrize("structure", ["entry", "column", "row"])
def test_it_is_what_whole_matrices_say(structure):
    model, batches = with_a_large_input(), random_batches()
    batches = [{"input_ids": batch["input_ids"]} for batch in batches]
    chosen = finepoint.select(model, rule="random", density=0.2, structure=structure, seed=1)
    norms = input_norms(model, target_weights(model), batches)
    shapes = {name: model.get_parameter(name).shape for name in chosen}
    found = large_inputs(chosen, shapes, norms)
    assert found.times == pytest.approx(dense(model, chosen, batches), rel=1e-5)
    if structure == "row":
        assert found.times == pytest.approx(1)
    alone = large_inputs(column_of(model, LAYER, INPUT), shapes | {LAYER: model.get_parameter(LAYER).shape}, norms)
    assert (alone.weight, alone.input, alone.share) == (LAYER, INPUT, 1.0)
    assert alone.times > 10


def test_it_is_told_of_the_column_that_has_it_alone(caplog):
    model, batches = with_a_large_input(), random_batches()
    warn_of_large_inputs(model, column_of(model, LAYER, INPUT + 1), batches)
    assert not caplog.text
    warn_of_large_inputs(model, column_of(model, LAYER, INPUT), batches)
    assert f"100 % of it in input {INPUT} of {LAYER}" in caplog.text
    caplog.clear()
    others = {"model.embed_tokens.weight": torch.tensor([5]), "model.norm.weight": torch.tensor([0])}
    warn_of_large_inputs(model, others, batches)  # a weight without inputs: nothing is known, nothing said
    assert not caplog.text


def test_a_run_says_so_where_a_draw_is_unlucky_and_nothing_holds_it(model_folder, tmp_path, capsys):
    model = with_a_large_input()
    with torch.no_grad():  # its column is the largest, too, which is no chance
        model.get_parameter(LAYER)[:, INPUT] *= 30
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in model_folder.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    data = write_lines(tmp_path / "d.jsonl", [{"text": f"a b c {at}"} for at in range(4)])
    asked = ["train", "--model", str(folder), "--data", str(data), "--steps", "1", "--batch-size", "2",
             "--overwrite", "--output", str(tmp_path / "o")]  # fmt: skip
    has, hasnt = (
        next(seed for seed in range(200) if there(finepoint.select(model, density=0.05, structure="column", seed=seed)))
        for there in (has_it, lambda chosen: not has_it(chosen))
    )
    columns = ["--structure", "column"]
    for seed, more, told in ((has, columns, True), (hasnt, columns, False), (has, [], False),
                             (has, [*columns, "--protect", str(data)], False),
                             (has, [*columns, "--rule", "gallop"], False),
                             (has, [*columns, "--rule", "magnitude-high"], False)):  # fmt: skip
        assert main([*asked, "--density", "0.05", *more, "--seed", str(seed)]) == 0
        assert ("by chance the columns" in capsys.readouterr().err) == told, more
        if more == [*columns, "--rule", "magnitude-high"]:
            assert has_it(finepoint.SparseAdapter.load(tmp_path / "o"))
