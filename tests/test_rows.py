"""Several adapters within one batch: each row against a model that holds its adapter alone, in place."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import finepoint
from conftest import VOCABULARY, assert_same_bits, random_batches, snapshot, tiny_llama
from finepoint.errors import FinepointError

NAMES = ["a", None, "b", "a", "c"]
EVERYWHERE = ["*proj*", "*embed*"]


def double():
    return tiny_llama(torch.float64)


def biased():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attention_bias=True, mlp_bias=True,
                                         tie_word_embeddings=False, **sizes))  # fmt: skip
    return model.double()


def tuned(make, seed, **choice):
    """An adapter whose entries have moved far."""
    model = finepoint.sparsify(make(), **{"density": 0.05, "seed": seed, "audit": False, **choice})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in finepoint.tuner_of(model).parameters():
            delta.copy_(torch.randn(len(delta), generator=generator) * 0.3)
    return finepoint.tuner_of(model).adapter()


def three(make):
    """Entries anywhere, whole columns of everything (the tied head too), and entries of few layers."""
    return {"a": tuned(make, 0, targets=EVERYWHERE), "b": tuned(make, 1, structure="column", targets=EVERYWHERE),
            "c": tuned(make, 2, targets="mlp")}  # fmt: skip


@pytest.fixture(scope="module")
def adapters():
    return three(double)


def held(make, adapters):
    found = finepoint.AdapterSet(make().eval())
    for name, adapter in adapters.items():
        found.add(name, adapter)
    return found


def models_of(make, adapters):
    return {name: finepoint.load(make(), adapter).eval() for name, adapter in adapters.items()} | {None: make().eval()}


@torch.no_grad()
def alone(models, names, ids):
    """The logits of each row by the model that holds its adapter."""
    return torch.cat([models[name](ids[row : row + 1]).logits for row, name in enumerate(names)])


@pytest.mark.parametrize("make", [double, biased])
@pytest.mark.parametrize("library", [True, False])
def test_each_row_is_what_its_adapter_computes_alone(make, library, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: library)
    found = three(make)
    ids, switch = random_batches(1, rows=5)[0]["input_ids"], held(make, found)
    expected = alone(models_of(make, found), NAMES, ids)
    before = snapshot(switch.model)
    with torch.no_grad(), switch.rows(NAMES) as model:
        together = model(ids).logits
        shorter = model(ids[:, :3]).logits
    assert_same_bits(before, snapshot(switch.model))
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(shorter, together[:, :3], rtol=0, atol=1e-12)
    others = alone(models_of(make, found), NAMES[::-1], ids)
    assert bool(((others - expected).abs().amax((1, 2)) > 0.1)[[0, 1, 3, 4]].all())  # control: it matters whose it is


def test_half_precision_agrees_up_to_its_rounding(adapters):
    def make():
        return tiny_llama(torch.bfloat16)

    found = three(make)
    ids, switch = random_batches(1, rows=5)[0]["input_ids"], held(make, found)
    expected = alone(models_of(make, found), NAMES, ids).float()
    with torch.no_grad(), switch.rows(NAMES) as model:
        together = model(ids).logits.float()
    assert float((together - expected).abs().mean()) < 2**-6 * float(expected.abs().amax())


def test_a_batch_of_one_adapter_is_that_of_its_weights_to_the_bit(adapters):
    ids, switch, models = random_batches(1)[0]["input_ids"], held(double, adapters), models_of(double, adapters)
    for name in ("a", None):
        with torch.no_grad(), switch.rows([name] * 4) as model:
            assert torch.equal(model(ids).logits, models[name](ids).logits)


def test_whole_answers_are_those_of_each_adapter_alone(adapters):
    """With the cache of keys and values, prompts filled up on the left, and beams that change places."""
    switch, models = held(double, adapters), models_of(double, adapters)
    ids = random_batches(1, rows=5)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[4, :1] = 0
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        with switch.rows(NAMES, each=beams) as model:
            together = model.generate(ids, attention_mask=mask, num_beams=beams, **given)
        for row, name in enumerate(NAMES):
            own = ids[row : row + 1, mask[row].bool()]
            written = models[name].generate(own, num_beams=beams, **given)[0, own.shape[1] :]
            assert torch.equal(together[row, ids.shape[1] :][: len(written)], written)


def test_what_was_on_comes_back_and_a_scale_holds_within_a_batch(adapters):
    switch, ids = held(double, adapters), random_batches(1, rows=2)[0]["input_ids"]
    switch.set("c")
    before = snapshot(switch.model)
    with torch.no_grad(), switch.rows(["a", "b"]) as model:
        full = model(ids).logits
    switch.scale("a", 0.0)
    with torch.no_grad(), switch.rows(["a", "b"]) as model:
        none = model(ids).logits
        with pytest.raises(FinepointError, match="in use by this thread"):
            switch.set("a")
    assert switch.active == ("c",)
    assert_same_bits(before, snapshot(switch.model))
    torch.testing.assert_close(none[:1], double()(ids[:1]).logits, rtol=0, atol=1e-12)
    assert torch.equal(none[1], full[1])


def test_a_batch_of_another_size_is_refused_and_nothing_is_left_behind(adapters):
    switch, ids = held(double, adapters), random_batches(1)[0]["input_ids"]
    before = snapshot(switch.model)
    three_for_four = "is given 4 rows, and adapters are named for 3; name one for each"
    with pytest.raises(FinepointError, match=three_for_four), switch.rows(["a", None, "b"]) as model:
        model(ids)
    with pytest.raises(FinepointError, match="named for 2, 3 rows each"), switch.rows(["a", "b"], each=3) as model:
        model(ids)
    for names, each, match in ((["a", "d"], 1, "no adapter 'd'"), (["a", "b"], 0, "each is 0")):
        with pytest.raises(FinepointError, match=match), switch.rows(names, each):
            pass
    assert_same_bits(before, snapshot(switch.model))
    assert not any("forward" in vars(module) for module in switch.model.modules())
    assert torch.equal(switch.model(ids).logits, double()(ids).logits)


def test_weights_that_were_replaced_meanwhile_are_no_base(adapters):
    switch = held(double, adapters)
    with switch.rows(["a", "b"]):
        pass
    weight = switch.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data.view(-1)[adapters["a"]["model.layers.0.mlp.up_proj.weight"][0]] = 7.0
    with pytest.raises(FinepointError, match="the weights were replaced"), switch.rows(["a", "b"]):
        pass
    assert 7.0 in weight


class ByHand(LlamaForCausalLM):
    """Multiplies by the embedding itself where others call their head."""

    def forward(self, input_ids=None, **given):
        states = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return {"logits": states @ self.model.embed_tokens.weight.T}


class Meeting(LlamaForCausalLM):
    """Takes the rows in another order."""

    def forward(self, input_ids=None, **given):
        states = self.model(input_ids=input_ids.flip(0), use_cache=False).last_hidden_state
        return {"logits": self.lm_head(states.flip(0))}


class Turned(LlamaForCausalLM):
    """Has words where others have rows."""

    def forward(self, input_ids=None, **given):
        states = self.model(input_ids=input_ids.T, use_cache=False).last_hidden_state
        return {"logits": self.lm_head(states).transpose(0, 1)}


def seeded(kind, config):
    torch.manual_seed(0)
    return kind(config).double()


@pytest.mark.parametrize(("kind", "targets", "match"), [
    (LlamaForCausalLM, ["model.norm.weight"], "model.norm.weight is used by LlamaRMSNorm, and rows of a batch"),
    (GPT2LMHeadModel, ["*c_attn*"], "c_attn.weight is used by Conv1D, and rows of a batch"),
    (ByHand, ["*embed*"], "in ByHand the rows of a batch cannot be told apart"),
    (Meeting, "linear", "in Meeting the rows of a batch cannot be told apart"),
    (Turned, "linear", "in Turned the rows of a batch cannot be told apart"),
])  # fmt: skip
def test_what_rows_cannot_differ_in_is_refused_in_a_line(kind, targets, match):
    config = double().config
    if kind is GPT2LMHeadModel:
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1,
                            eos_token_id=2)  # fmt: skip

    def make():
        return seeded(kind, config)

    switch = held(make, {"a": tuned(make, 0, targets=targets)})
    before = snapshot(switch.model)
    with pytest.raises(FinepointError, match=match) as caught, switch.rows(["a", None]):
        pass
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; answer each adapter's requests by themselves, with using")
    assert_same_bits(before, snapshot(switch.model))
    assert not any("forward" in vars(module) for module in switch.model.modules())
