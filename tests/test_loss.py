import copy

import pytest
import torch
from transformers import Cohere2Config, Cohere2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from conftest import VOCABULARY, assert_same_bits, random_batches, snapshot, tiny_gemma, tiny_llama
from finepoint.data.batches import Collator, Packer, Row
from finepoint.training import loss as module
from finepoint.training.loss import LOSSES, completion_loss, examples_of, log_likelihoods, plain_head
from finepoint.tuner.tuner import SparseTuner

MODELS = {"llama": tiny_llama, "llama-untied": lambda dtype: tiny_llama(dtype, tied=False), "gemma": tiny_gemma}


@pytest.fixture(params=[1, 3, 10**6], ids=["one position", "three positions", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", request.param)
    return request.param


def reference_loss(model, batch):
    """The definition, in the model's own precision: all logits, each label predicted by the position before it."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def gradients(loss, parameters):
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_equal_loss_and_gradients(model, batch, parameters):
    parameters = list(parameters)
    ours, whole = completion_loss(model, batch), reference_loss(model, batch)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(**batch).loss.double(), ours, rtol=1e-5, atol=1e-5)  # computed in float32
    expected = gradients(whole, parameters)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    # A factor behind the loss, such as that of gradient accumulation, reaches every gradient.
    for found, gradient in zip(gradients(ours * 0.5, parameters), expected, strict=True):
        torch.testing.assert_close(found, gradient / 2, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_full_training_has_the_same_loss_and_gradients(name, chunk):
    model = MODELS[name](torch.float64)
    for batch in random_batches():
        assert_equal_loss_and_gradients(model, batch, model.parameters())


@pytest.mark.parametrize("target", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_sparse_tuner_has_the_same_loss_and_gradients(target, chunk):
    model = tiny_llama(torch.float64, tied=False)
    with SparseTuner(model, {target: torch.arange(0, 384, 3)}) as tuner:
        assert_equal_loss_and_gradients(model, random_batches()[0], tuner.parameters())


def test_a_sparse_tuner_of_a_tied_head_has_the_same_loss_and_gradients(chunk):
    model = tiny_llama(torch.float64)
    with SparseTuner(model, {"model.embed_tokens.weight": torch.arange(0, VOCABULARY * 16, 5)}) as tuner:
        assert_equal_loss_and_gradients(model, random_batches()[0], tuner.parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21 asks for it
def test_lora_has_the_same_loss_and_gradients_also_on_the_head(chunk):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(torch.float64, tied=False), config).double().eval()
    assert plain_head(model) is not None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 6
    assert_equal_loss_and_gradients(model, random_batches()[0], trained)


def test_the_head_sees_labelled_positions_only_and_one_chunk_at_a_time(monkeypatch):
    model, batch = tiny_llama(), random_batches(rows=4, tokens=9)[0]
    sizes = []
    model.lm_head.register_forward_hook(lambda m, args, output: sizes.append(output.numel() // VOCABULARY))
    monkeypatch.setattr(module, "CHUNK", 3)
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    completion_loss(model, batch)
    sizes.clear()
    completion_loss(model, batch).backward()
    assert max(sizes) == 3
    assert sum(sizes) == labelled  # nothing is computed twice
    sizes.clear()
    model(**batch)
    assert sizes == [4 * 9]  # negative control: the model's own loss


def test_without_gradients_the_loss_is_the_same(chunk):
    model, batch = tiny_llama(torch.float64), random_batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(completion_loss(model, batch), reference_loss(model, batch), rtol=1e-12, atol=0)


def test_labels_of_the_last_positions_and_a_number_to_divide_by(chunk):
    model, batch = tiny_llama(torch.float64), random_batches()[0]
    trimmed = {"input_ids": batch["input_ids"], "labels": batch["labels"][:, -6:], "logits_to_keep": 6}
    count = int((batch["labels"] != -100).sum())
    expected = reference_loss(model, batch)
    torch.testing.assert_close(completion_loss(model, trimmed), expected)
    torch.testing.assert_close(completion_loss(model, trimmed, 2 * count), expected / 2)


def softcapped():
    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, head_dim=4, initializer_range=0.2,
                              final_logit_softcapping=2.0)  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def scaled():
    torch.manual_seed(0)
    config = Cohere2Config(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, logit_scale=0.25,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return Cohere2ForCausalLM(config).eval()


class Shifted(LlamaForCausalLM):
    """Changes its logits without saying so in its configuration."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits *= 1.01
        return output


def shifted():
    plain = tiny_llama()
    model = Shifted(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("make", [softcapped, scaled, shifted])
def test_models_that_change_their_heads_output_keep_their_own_loss(make, chunk):
    model, batch = make(), random_batches()[0]
    assert plain_head(model) is None
    assert torch.equal(completion_loss(model, batch), model(**batch).loss)
    rows, columns = torch.tensor([0, 0, 3]), torch.tensor([-1, -2, -9])
    tokens = torch.tensor([5, 6, 7])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    expected = logits.log_softmax(-1)[rows, columns, tokens]
    torch.testing.assert_close(
        log_likelihoods(model, {"input_ids": batch["input_ids"]}, rows, columns, tokens), expected
    )


def test_log_likelihoods_of_plain_models_are_those_of_all_logits(model, chunk):
    assert plain_head(model) is model.get_output_embeddings()
    ids = random_batches()[0]["input_ids"]
    rows, columns = torch.tensor([0, 0, 3, 3]), torch.tensor([-1, -2, -9, -9])
    tokens = torch.tensor([5, 6, 7, 8])
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)[rows, columns, tokens]
    found = log_likelihoods(model, {"input_ids": ids}, rows, columns, tokens)
    torch.testing.assert_close(found, expected)


def dense_weights(name, logits, labels, rows):
    """What each label's cross-entropy is multiplied with, by the papers' formulas on whole distributions."""
    p = logits.softmax(-1)
    chosen = p[torch.arange(len(labels)), labels]
    if name == "dft":
        return chosen
    if name == "talr":
        means = sorted(float(-chosen[rows == row].log().mean()) for row in rows.unique())
        return (chosen ** (1 / means[(len(means) - 1) // 2])).clamp(min=0.01)
    kept = p.sort(-1, descending=True).values[:, :20]
    kept = kept / kept.sum(-1, keepdim=True)
    return -(kept * kept.log()).sum(-1) / 3


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "nll"])
@pytest.mark.parametrize("make", [tiny_llama, softcapped, scaled])
def test_losses_that_weigh_tokens_are_those_of_the_papers(name, make, chunk):
    model, batch = make().double(), random_batches()[0]
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    rows = (labels != -100).nonzero()[:, 0]
    logits, labels = logits[labels != -100], labels[labels != -100]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weights = dense_weights(name, logits.detach(), labels, rows)
    expected = (weights * losses).mean()
    found = completion_loss(model, batch, measure=LOSSES[name].measure)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert not torch.isclose(found, losses.mean(), rtol=1e-3)  # negative control
    parameters = list(model.parameters())
    for one, other in zip(gradients(found, parameters), gradients(expected, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_talr_knows_the_examples_that_share_a_row(chunk):
    model = tiny_llama(torch.float64)
    texts = [3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14, 15], [16, 17, 3]
    rows = [Row(ids, [-100, -100, *ids[2:]]) for ids in texts]
    collator = Collator(0, positions=True, trims=True)
    packed = Packer(collator, model.config.hidden_size)(rows)
    assert len(packed["input_ids"]) < len(rows)
    found, alone = (completion_loss(model, batch, measure=LOSSES["talr"].measure) for batch in (packed, collator(rows)))
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=0)
    # Negative control: of whole rows the median is another.
    whole = {name: part for name, part in packed.items() if name != "position_ids"}
    assert len(examples_of(packed).unique()) > len(examples_of(whole).unique())


def test_no_label_counts_for_less_than_a_hundredth_in_talr():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    labels, median = torch.tensor([1, 1]), torch.tensor(0.5, dtype=torch.float64)
    losses = -logits[torch.arange(2), labels]
    found = LOSSES["talr"].measure(logits, labels, median)
    torch.testing.assert_close(found, losses * torch.stack([torch.tensor(0.01).double(), (-losses[1] * 2).exp()]))


def test_looking_at_a_model_leaves_it_as_it_was():
    model = tiny_llama().train()
    model(**random_batches()[0]).loss.backward()
    before, state = snapshot(model), torch.get_rng_state()
    gradients = {name: copy.deepcopy(parameter.grad) for name, parameter in model.named_parameters()}
    assert plain_head(model) is model.lm_head
    assert_same_bits(before, snapshot(model))
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())
    assert all(child.training for child in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
