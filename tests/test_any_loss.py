"""Rules score by whatever loss a model returns, and example by example whatever a batch holds: against plain loops."""

import pytest
import torch
from torch import nn

import finepoint
from conftest import random_batches, snapshot, tiny_llama
from families import FAMILIES
from finepoint.choosing.passes import loss_of, row_count, split
from finepoint.choosing.statistics import stream_statistics
from finepoint.errors import FinepointError

pytestmark = pytest.mark.filterwarnings("ignore")  # of models, about kernels that are not installed


def family(name, count=2):
    """A tiny model in float64 and batches of two examples."""
    generator = torch.Generator().manual_seed(0)
    model = FAMILIES[name].build().double().eval()
    return model, [FAMILIES[name].batch(generator) for _ in range(count)]


def statistics(model, batches, need):
    weights = dict(finepoint.target_weights(model))
    return {name: getattr(found, need) for name, found in stream_statistics(model, weights, batches, {need})}


def gradients(model, batch):
    """Of the model's own loss, by plain autograd; 0 where none arrives."""
    weights = dict(finepoint.target_weights(model))
    loss = model(**batch)
    loss = loss["loss"] if not isinstance(loss, tuple) else loss[0]
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


@pytest.mark.parametrize("name", ["clip", "siglip", "blip", "bert (question answering)", "vit", "llava"])
def test_the_gradient_is_that_of_the_loss_that_the_model_returns(name):
    model, batches = family(name)
    before = snapshot(model)
    found = statistics(model, batches, "gradient")
    dense = [gradients(model, batch) for batch in batches]  # of equally many examples each
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, sum(part[key] for part in dense) / len(dense), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert finepoint.select(model, batches, rule="movement", density=0.01, rule_options={"steps": 2}).count


class Answers(nn.Module):
    """A model of another's making: its output has another form."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.form = tiny_llama().double(), form

    def forward(self, **batch):
        output = self.inner(**batch)
        return {"dict": {"loss": output.loss}, "tuple": (output.loss, output.logits), "list of one": output.loss[None],
                "none": {"logits": output.logits}, "named": output}[self.form]  # fmt: skip


@pytest.mark.parametrize("form", ["dict", "tuple", "named"])
def test_outputs_of_any_form_are_understood(form):
    model = Answers(form)
    targets = "inner.model.layers.*.weight"
    weights = dict(finepoint.target_weights(model, targets))
    found = dict(stream_statistics(model, weights, random_batches(1), {"gradient"}))
    expected = torch.autograd.grad(model.inner(**random_batches(1)[0]).loss, list(weights.values()))
    for name, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(found[name].gradient, gradient)
    assert finepoint.select(model, random_batches(1), rule="fisher", density=0.01, targets=targets).count


WRONG = {
    "no loss": (lambda b: {k: v for k, v in b.items() if k != "labels"}, "returns no loss for .* input_ids;"),
    "too much": (lambda b: b | {"inputs_embeds": torch.zeros(4, 9, 16)}, "does not take .* inputs_embeds: You must"),
    "nothing": (lambda b: {}, "holds no tensor, only nothing"),
    "pieces of nobody": (lambda b: b | {"pixel_values": torch.zeros(7, 3)}, "pixel_values of shape .* whose"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_batch_without_a_loss_is_one_line(case):
    change, message = WRONG[case]
    batches = [change(batch) for batch in random_batches(1)]
    with pytest.raises(FinepointError, match=message) as error:
        finepoint.select(tiny_llama(), batches, rule="fisher", density=0.01)
    assert "\n" not in str(error.value)


def test_squares_of_single_examples_are_refused_for_a_loss_over_pairs():
    model, batches = family("clip")
    with pytest.raises(FinepointError, match="loss over pairs"):
        finepoint.select(model, batches, rule="fisher", density=0.01)


def packed():
    """A batch of two examples whose pictures have 16 and 4 pieces, and the two alone."""
    model, _ = family("qwen2_vl")
    generator = torch.Generator().manual_seed(1)
    config = model.config
    alone = []
    for side in (4, 2):
        pieces, tokens = side * side, side * side // 4
        ids = torch.randint(3, 50, (1, 10), generator=generator)
        ids[0, 1 : 1 + tokens] = config.image_token_id
        kinds = (ids == config.image_token_id).long()
        width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        alone.append({
            "input_ids": ids, "labels": ids.masked_fill(ids == config.image_token_id, -100), "mm_token_type_ids": kinds,
            "pixel_values": torch.randn(pieces, width, generator=generator, dtype=torch.float64),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        })  # fmt: skip
    return model, {key: torch.cat([one[key] for one in alone]) for key in alone[0]}, alone


def test_pictures_packed_into_one_row_of_pieces_go_with_their_example():
    model, batch, alone = packed()
    assert row_count(batch) == 2
    for part, expected in zip(split(batch), alone, strict=True):
        assert all(torch.equal(part[key], value) for key, value in expected.items())
    found = statistics(model, [batch], "squared_gradient")
    dense = []
    for one in alone:
        labels = int((one["labels"][:, 1:] != -100).sum())
        dense.append({name: (labels * gradient) ** 2 for name, gradient in gradients(model, one).items()})
    for name, square in found.items():
        torch.testing.assert_close(square, (dense[0][name] + dense[1][name]) / 2, rtol=1e-9, atol=1e-14)


def inputs_of(model, examples):
    """The norm of every linear layer's inputs over all tokens, by a loop of its own."""
    sums = dict.fromkeys(finepoint.target_weights(model), 0.0)

    def watch(name):
        def see(module, args):
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            sums[name] = sums[name] + (x * x).sum(0)

        return see

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name)) for name in sums
    ]
    with torch.no_grad():
        for example in examples:
            model(**example)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def assert_norms(model, batches, examples):
    found = statistics(model, batches, "input_norm")
    for name, norm in inputs_of(model, examples).items():
        torch.testing.assert_close(found[name].view(-1), norm, rtol=1e-9, atol=1e-12)


def test_wanda_runs_the_decoder_of_a_t5_on_its_own_labels_without_padding():
    model, _ = family("t5")
    a, b = torch.arange(5, 13)[None], torch.arange(20, 25)[None]
    one, two = torch.arange(30, 36)[None], torch.arange(40, 48)[None]
    padded = {
        "input_ids": torch.cat([a, torch.cat([b, torch.zeros(1, 3).long()], 1)]),
        "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        "labels": torch.cat([torch.cat([one, torch.full((1, 2), -100)], 1), two]),
    }
    shifted = [torch.cat([torch.tensor([[2]]), x[:, :-1]], 1) for x in (one, two)]  # from the decoder's start token
    alone = [{"input_ids": x, "decoder_input_ids": y} for x, y in zip((a, b), shifted, strict=True)]
    assert_norms(model, [padded], alone)
    inputs = torch.cat([torch.cat([shifted[0], torch.zeros(1, 2).long()], 1), shifted[1]])
    mask = torch.tensor([[1] * 6 + [0] * 2, [1] * 8])
    given = padded | {"decoder_input_ids": inputs, "decoder_attention_mask": mask}
    assert_norms(model, [given], alone)


def test_wanda_runs_whisper_and_models_of_pictures():
    model, batches = family("whisper", 1)
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    decoder = torch.cat([start, batches[0]["labels"][:, :-1]], 1)
    lengths = (batches[0]["labels"] != -100).sum(1)  # padding follows
    alone = [{"input_features": sound[None], "decoder_input_ids": ids[None, :length]}
             for sound, ids, length in zip(batches[0]["input_features"], decoder, lengths, strict=True)]  # fmt: skip
    assert_norms(model, batches, alone)
    model, batch, alone = packed()
    assert_norms(model, [batch], [{key: value for key, value in one.items() if key != "labels"} for one in alone])


@pytest.mark.parametrize("name", ["vit", "clip", "whisper"])
def test_sparsify_takes_batches_of_pictures_and_sounds(name):
    model, batches = family(name)
    before, chosen = snapshot(model), finepoint.select(model, batches, rule="gradient", density=0.01)
    finepoint.sparsify(model, "gradient", 0.01, data=batches, whole=())
    trained = finepoint.tuner_of(model).entries
    assert {name: entries.indices.tolist() for name, entries in trained.items()} == {
        name: indices.tolist() for name, indices in chosen.items() if len(indices)
    }
    optimizer = torch.optim.SGD([delta for delta in model.parameters() if delta.requires_grad], lr=0.1)
    loss_of(model, batches[0]).backward()
    optimizer.step()
    finepoint.unload(model)
    total = 0
    for name, weight in snapshot(model).items():
        moved = (weight != before[name]).flatten().nonzero().flatten().tolist()
        assert set(moved) <= set(chosen.get(name, torch.empty(0)).tolist())
        total += len(moved)
    assert total


def test_a_parameter_without_a_dimension_is_chosen_like_any_other(tmp_path):
    model, batches = family("clip")
    chosen = finepoint.select(model, batches, rule="gradient", density=1.0, targets="logit_scale")
    assert chosen["logit_scale"].tolist() == [0]
    with finepoint.SparseTuner(model, chosen) as tuner:
        tuner.entries["logit_scale"].delta.data.fill_(0.5)
        tuner.adapter().save(tmp_path / "a")
        tuner.revert_()
    before = model.logit_scale.item()
    with finepoint.SparseAdapter.load(tmp_path / "a").applied(model):
        assert model.logit_scale.item() == pytest.approx(before + 0.5)
    assert model.logit_scale.item() == before
