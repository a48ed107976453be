"""Whatever the use of a weight, its trained entries are those of dense training, or it is refused by name."""

import copy
import random
from functools import partial

import numpy
import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy, dropout, embedding, linear
from torch.utils.checkpoint import checkpoint

import finepoint
from conftest import random_batches, snapshot, tiny_llama, write_lines
from finepoint.errors import FinepointError
from finepoint.files import read_record
from finepoint.quantised import float_values, quantise_
from finepoint.training.tuner import SparseTuner
from reference import Output, dense_masked_training

WIDTH, VOCABULARY = 6, 11


class Toy(nn.Module):
    """An ordinary little model; those below use `a` and others in ways of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.build()
        self.double()

    def build(self):
        pass

    def middle(self, x):
        return self.b(self.a(x).relu())

    def out(self, x):
        return self.head(x)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        logits = self.out(self.norm(x + self.middle(x)))
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss, logits)


class Functional(Toy):
    def middle(self, x):
        return self.b(linear(x, self.a.weight, self.a.bias).relu())


class ForwardCalled(Toy):
    def middle(self, x):
        return self.b(self.a.forward(x).relu())


class TiedByHand(Toy):
    def out(self, x):
        return x @ self.embed.weight.T + self.head(x)


class AlsoElsewhere(Toy):
    def middle(self, x):
        return self.b(self.a(x).relu()) + linear(x, self.b.weight).tanh()


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.y = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return linear(self.y(x), self.x.weight)


class WithinAChild(Toy):
    def build(self):
        self.child = Child()

    def middle(self, x):
        return self.child(x) + linear(x, self.child.y.weight).tanh()


class OfASibling(Toy):
    def build(self):
        self.child, self.other = Child(), Child()
        self.child.forward = lambda x: linear(x, self.other.x.weight)

    def middle(self, x):
        return self.child(x)


class InAList(Toy):
    def build(self):
        self.list = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2)])
        self.named = nn.ParameterDict({"w": nn.Parameter(torch.randn(WIDTH, WIDTH))})

    def middle(self, x):
        return x @ self.list[0] @ self.list[1] + (x @ self.named["w"]).tanh()


class AttentionOfTorch(Toy):
    def build(self):
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.0)

    def middle(self, x):
        return self.layer(self.attention(x, x, x)[0])


class OtherLayers(Toy):
    def build(self):
        self.both, self.state = nn.Bilinear(WIDTH, WIDTH, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.convolution, self.free = nn.Conv1d(WIDTH, WIDTH, 1), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def middle(self, x):
        return self.both(x, self.state(x)[0]) + self.convolution(x.transpose(1, 2)).transpose(1, 2) @ self.free


class ScaledByAHook(Toy):
    def build(self):
        self.a.register_forward_hook(lambda module, args, output: output * 3)
        self.embed.register_forward_hook(lambda module, args, output: output * 3)
        self.b.register_forward_pre_hook(lambda module, args: (args[0] * 3,))


class ForwardOfItsOwn(Toy):
    def build(self):
        before = self.a.forward
        self.a.forward = lambda x: before(x) * 3
        self.embed.forward = lambda ids: embedding(ids, self.embed.weight) * 3


class DropsWeights(Toy):
    def build(self):
        self.statistics = nn.BatchNorm1d(WIDTH)

    def middle(self, x):
        x = linear(x, dropout(self.a.weight, 0.5, self.training))
        return self.b(self.statistics(x.flatten(0, 1)).view_as(x))


class Normalised(Toy):
    """The weight that is multiplied by is made of others, by a parametrisation or by a hook from before."""

    def build(self):
        nn.utils.parametrizations.weight_norm(self.a)
        self.b = nn.utils.parametrizations.spectral_norm(self.b)


class CountedEmbedding(Toy):
    def build(self):
        self.embed = nn.Embedding(VOCABULARY, WIDTH, scale_grad_by_freq=True)


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.flatten(0, 1).T @ x.flatten(0, 1)


class Fused(Toy):
    def middle(self, x):
        return Kernel.apply(x, self.a.weight) + self.a.bias


class Experts(Toy):
    """Whose way depends on the tokens: the first batch does not come to all."""

    def build(self):
        self.experts = nn.ModuleList([Child() for _ in range(3)])

    def forward(self, input_ids, labels=None):
        self.expert = self.experts[int(input_ids[0, 0]) % 3]
        return super().forward(input_ids, labels)

    def middle(self, x):
        return self.b(self.expert(x))


class Sometimes(Toy):
    """Uses weights, by a function, that the first batch says nothing of."""

    def forward(self, input_ids, labels=None):
        self.uses = int(input_ids[0, 0]) % 3
        return super().forward(input_ids, labels)

    def middle(self, x):
        return linear(x, self.a.weight, self.a.bias) if self.uses else self.b(x)


class Stolen(Toy):
    def build(self):
        self.stolen = [self.a.weight]

    def middle(self, x):
        return self.b(x @ self.stolen[0].T)


class Recomputed(Toy):
    """Checkpoints a function, in which no module is called that the weight belongs to."""

    reentrant = False

    def middle(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    def inner(self, x):
        return self.b(linear(x, self.a.weight).relu())


class RecomputedReentrant(Recomputed):
    reentrant = True


USES = [Toy, Functional, ForwardCalled, TiedByHand, AlsoElsewhere, WithinAChild, OfASibling, InAList, AttentionOfTorch,
        OtherLayers, ScaledByAHook, ForwardOfItsOwn, DropsWeights, Normalised, CountedEmbedding,
        Fused, Experts, Sometimes]  # fmt: skip
REFUSED = [Stolen, Recomputed, RecomputedReentrant]


def steps_for(count=3):
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randint(VOCABULARY, (2, 4, 5), generator=draw) for _ in range(count)]
    for number, batch in enumerate(batches):
        batch[0, 0, 0] = number  # what Experts and Sometimes go by
    return [[{"input_ids": batch[0], "labels": batch[1]}] for batch in batches]


def choice(model, density=0.3):
    """Some entries of every weight, tied ones once."""
    draw = torch.Generator().manual_seed(2)
    return {name: torch.randperm(weight.numel(), generator=draw)[: max(1, int(weight.numel() * density))].sort().values
            for name, weight in model.named_parameters()}  # fmt: skip


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def tuned(model, indices, steps, make_optimizer, **kwargs):
    with SparseTuner(model, indices, **kwargs) as tuner:
        optimizer = make_optimizer(tuner.parameters())
        for number, step in enumerate(steps):
            torch.manual_seed(number)
            for batch in step:
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, tuner


def dense(model, indices, steps, make_optimizer):
    """The reference, with the random state that `tuned` has at each step."""
    random_state = iter(range(len(steps)))
    model.register_forward_pre_hook(lambda *_: torch.manual_seed(next(random_state)) and None)
    model.requires_grad_(True)
    return dense_masked_training(_Whole(model), {f"model.{name}": found for name, found in indices.items()}, steps,
                                 make_optimizer).model  # fmt: skip


class _Whole(nn.Module):
    """Has a gradient for each weight, zeros where nothing comes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        output = self.model(**batch)
        output.loss = output.loss + sum(0 * weight.sum() for weight in self.parameters())
        return output


def assert_equal(found, expected, tolerance=1e-12):
    for (name, one), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, msg=name)
    for (name, one), (_, other) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("make", USES)
def test_any_use_of_a_weight_trains_as_densely(make):
    model, steps = make(), steps_for()
    indices = choice(model)
    expected = dense(make(), indices, steps, sgd)
    found, tuner = tuned(model, indices, steps, sgd)
    assert_equal(found, expected)
    assert tuner.audited.weights | tuner.audited.silent == set(indices)


@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(make):
    model = make()
    before = snapshot(model)
    with pytest.raises(FinepointError, match=r"a\.weight"):
        tuned(model, choice(model), steps_for(), sgd)
    assert not hasattr(model, "finepoint")
    for name, value in snapshot(model).items():
        assert torch.equal(value, before[name])
    # Left out of the targets, the rest trains.
    model, expected = make(), make()
    indices = {name: found for name, found in choice(model).items() if name != "a.weight"}
    dense(expected, indices, steps_for(), sgd)
    found, _ = tuned(model, indices, steps_for(), sgd)
    assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.ones(1, 4))])
def test_a_scripted_part_is_refused_by_name_and_runs_as_it_is(compiled):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), compiled(nn.Linear(4, 4)), nn.Linear(4, 2))

    x, model = torch.randn(5, 3), make()
    for target, given in (("1.weight", model), ("weight", compiled(nn.Linear(4, 4)))):
        with pytest.raises(FinepointError, match=rf"^{target} lies in a module that was scripted or traced"):
            SparseTuner(given, {target: torch.arange(3)})
    make_dense = make()
    make_dense(x).square().sum().backward()
    with SparseTuner(model, {"0.weight": torch.arange(12), "2.weight": torch.arange(8)}) as tuner:
        model(x).square().sum().backward()
        for name, delta in tuner.trained().items():
            assert torch.allclose(delta.grad, make_dense.get_parameter(name).grad.flatten())


class Vmapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return torch.func.vmap(self.a)(x)


def test_weights_that_change_in_the_forward_or_are_used_within_vmap_are_refused_by_name():
    with pytest.raises(FinepointError, match=r"^weight is an embedding with max_norm"):
        SparseTuner(nn.Embedding(4, 3, max_norm=1.0), {"weight": torch.arange(3)})
    model = Vmapped()
    SparseTuner(model, {"a.weight": torch.arange(3)})
    with pytest.raises(FinepointError, match=r"computes with a.weight within a transform of torch.func"):
        model(torch.randn(2, 3))


@pytest.mark.parametrize("make", [Functional, TiedByHand, ForwardOfItsOwn])
def test_without_the_audit_it_would_be_another_model(make):
    """The negative control: what the audit is there for."""
    indices, steps = choice(make()), steps_for()
    expected = dense(make(), indices, steps, sgd)
    found, tuner = tuned(make(), indices, steps, sgd, audit=False)
    assert tuner.audited is None
    with pytest.raises(AssertionError):
        assert_equal(found, expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_factor_of_two_is_seen_in_every_dtype_and_rounding_is_not(dtype):
    for factor, stands_in in ((1, set()), (2, {"a.weight"})):
        model = Toy().to(dtype)
        before = model.a.forward
        if factor == 2:
            model.a.forward = lambda x, before=before: before(x) * 2
        with SparseTuner(model, {"a.weight": torch.arange(5), "b.weight": torch.arange(0, 36, 7)}) as tuner:
            model(**steps_for()[0][0]).loss.backward()
            assert set(tuner.audited.widened) == stands_in
            assert tuner.audited.weights == {"a.weight", "b.weight"}


def test_entries_without_a_gradient_are_asked_at_others():
    """Chosen rows of an embedding that the input does not hold prove nothing about those that it will hold."""
    model = ForwardOfItsOwn()
    rows = torch.arange(10 * WIDTH, 11 * WIDTH)  # of token 10, which no row below has
    with SparseTuner(model, {"embed.weight": rows}) as tuner:
        batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.arange(8).view(2, 4)}
        model(**batch).loss.backward()
        assert set(tuner.audited.widened) == {"embed.weight"}
        assert len(tuner.entries["embed.weight"].indices) == WIDTH


def test_weights_of_which_entries_may_be_chosen_later_are_asked_too():
    indices, steps = choice(Functional()), steps_for()
    model, expected = Functional(), dense(Functional(), {"a.weight": indices["a.weight"]}, steps,
                                          sgd)  # fmt: skip
    tuner = SparseTuner(model, {"b.weight": torch.arange(3)}, ready=["a.weight"])
    model(**steps[0][0]).loss.backward()
    assert set(tuner.audited.widened) == {"a.weight"}
    assert not len(tuner.entries["a.weight"].indices)
    tuner.choose_({"a.weight": indices["a.weight"]})
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for number, (batch,) in enumerate(steps):
        optimizer.zero_grad()
        torch.manual_seed(number)
        model(**batch).loss.backward()
        optimizer.step()
    tuner.close()
    assert_equal(model, expected)


def test_the_model_is_left_as_it_is_found():
    def state(model):
        return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
                [weight.requires_grad for weight in model.parameters()], [weight.grad for weight in model.parameters()],
                [module.training for module in model.modules()], {**snapshot(model)}]  # fmt: skip

    model = DropsWeights().train()
    model.norm.eval()
    with SparseTuner(model, choice(model), audit=False) as tuner:
        before = state(model)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def loss():
            random.random(), numpy.random.rand(), torch.rand(1)
            return model(**steps_for()[0][0]).loss

        tuner.audit_(loss)
        after = state(model)
        assert before[:-1] == after[:-1]
        for name, value in before[-1].items():
            assert torch.equal(value, after[-1][name]), name
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_input_is_left_as_it_is_found():
    class Changing(Toy):
        def forward(self, input_ids, labels=None, cache=None):
            cache.calls += 1
            cache.numbers += 1
            self.given = cache.numbers
            return super().forward(input_ids, labels)

    class Cache:
        def __init__(self):
            self.calls, self.numbers = 0, torch.zeros(3)

    class Lock(Cache):
        def __deepcopy__(self, memo):
            raise TypeError("there is one only")

    for kind, audited in ((Cache, True), (Lock, False)):
        model, cache = Changing(), kind()
        indices = choice(model)
        with SparseTuner(model, indices) as tuner:
            with torch.no_grad():
                model(**steps_for()[0][0], cache=Cache())
            assert tuner.audited is None
            model(**steps_for()[0][0], cache=cache)
            assert cache.calls == 1
            assert torch.equal(cache.numbers, torch.ones(3))
            assert model.given is cache.numbers
            assert (tuner.audited is not None) == audited
            if audited:
                assert tuner.audited.weights == set(indices)


def test_a_tensor_that_is_given_is_not_changed_and_gets_no_gradient():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, more):
            return self.a(x + more["mask"].add_(1))

    model, x, mask = Adding(), torch.randn(3, WIDTH, requires_grad=True), torch.zeros(3, 1)
    with SparseTuner(model, {"a.weight": torch.arange(5)}) as tuner:
        output = model(x, {"mask": mask})
        assert tuner.audited.weights == {"a.weight"}
        assert x.grad is None
        assert torch.equal(mask, torch.ones(3, 1))
        output.sum().backward()
        torch.testing.assert_close(x.grad, model.a.weight.detach().sum(0).expand(3, -1))


def test_a_deep_copy_has_stand_ins_of_its_own():
    model = Functional()
    tuner = SparseTuner(model, choice(model))
    batch = steps_for()[0][0]
    model(**batch).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(**batch).loss.backward()
    for one, other in zip(tuner.parameters(), twin.finepoint.children(), strict=True):
        torch.testing.assert_close(one.grad, other.delta.grad)
        assert one is not other.delta


SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
MAMBA = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
LONGCAT = {"vocab_size": 50, "hidden_size": 16, "num_layers": 1, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 12, "n_routed_experts": 4,
           "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
           "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
WAVLM = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 10, "layerdrop": 0.0,
         "num_buckets": 8, "max_bucket_distance": 16, "mask_time_prob": 0.0}  # fmt: skip
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIGLIP = {"text_config": {**TOWER, "vocab_size": 50, "max_position_embeddings": 16, "projection_size": 16},
          "vision_config": {**TOWER, "image_size": 16, "patch_size": 8}}  # fmt: skip
DEBERTA = {"vocab_size": 50, **TOWER, "relative_attention": True, "max_relative_positions": 8, "position_buckets": 4,
           "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "type_vocab_size": 0}  # fmt: skip
DBRX = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 50,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16}}  # fmt: skip
JAMBA = {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
         "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1}  # fmt: skip
BLOOM = {"vocab_size": 50, "hidden_size": 16, "n_layer": 2, "n_head": 2, "slow_but_exact": True, "pretraining_tp": 2}
FAMILIES = {
    # name: (model, configuration, settings, targets, what stands in around its layer)
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA, "linear", "dt_proj"),
    "falcon-mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", MAMBA, "all", "conv1d"),
    "jamba": ("JambaForCausalLM", "JambaConfig", JAMBA, "all", "dt_proj"),
    "longcat": ("LongcatFlashForCausalLM", "LongcatFlashConfig", LONGCAT, "linear", "router"),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, "all", "dense_4h_to_h"),
    "dbrx": ("DbrxForCausalLM", "DbrxConfig", DBRX, "all", "mlp.w1"),
    "deberta": ("DebertaV2ForSequenceClassification", "DebertaV2Config", DEBERTA, "all", "rel_embeddings"),
    "wavlm": ("WavLMForCTC", "WavLMConfig", WAVLM, "linear", "out_proj"),
    "siglip": ("SiglipModel", "SiglipConfig", SIGLIP, "all", "attention.out_proj"),
}


def family(name):
    kind, settings, shape, targets, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, settings)(**copy.deepcopy(shape))).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 if not weight.any() else weight * 3)
    indices = finepoint.select(model, rule="random", density=0.2, targets=targets, scope="weight").indices
    return model, indices


def family_steps(name):
    draw = torch.Generator().manual_seed(3)

    def batch():
        ids = torch.randint(3, 50, (2, 9), generator=draw)
        sound = torch.randn(2, 400, generator=draw).double()
        image = torch.randn(2, 3, 16, 16, generator=draw).double()
        classes = torch.randint(2, (2,), generator=draw)
        given = {"wavlm": {"input_values": sound, "labels": ids[:, :4] % 9 + 1},
                 "siglip": {"input_ids": ids, "pixel_values": image, "return_loss": True},
                 "deberta": {"input_ids": ids, "labels": classes}}  # fmt: skip
        return given.get(name, {"input_ids": ids, "labels": ids})

    return [[batch()] for _ in range(3)]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_use_weights_elsewhere_train_as_densely(name):
    model, indices = family(name)
    steps = family_steps(name)
    expected = dense(copy.deepcopy(model), indices, steps, lambda p: torch.optim.Adam(p, lr=0.01))
    found, tuner = tuned(model, indices, steps, lambda p: torch.optim.Adam(p, lr=0.01))
    assert_equal(found, expected, 1e-10)
    assert any(FAMILIES[name][4] in weight for weight in tuner.audited.widened)


def test_gradient_checkpointing_finds_the_stand_ins_again():
    model, indices = family("mamba")
    steps = family_steps("mamba")
    expected = dense(copy.deepcopy(model).train(), indices, steps, sgd)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    found, tuner = tuned(model.train(), indices, steps, sgd)
    assert tuner.audited.widened
    assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("audit", [True, False])
def test_a_forward_that_others_put_on_a_module_later_stays(audit):
    """As accelerate does for mixed precision: neither the first input's audit nor the end of the tuner takes it off."""
    model, expected, indices = Toy(), Toy(), choice(Toy())
    [[batch], *_] = steps_for()
    tuner = SparseTuner(model, indices, audit=audit)
    for norm in (model.norm, expected.norm):
        norm.forward = partial(twice, norm.forward)
    for each in (model, expected):
        each(**batch).loss.backward()
    for name, positions in indices.items():
        gradient = expected.get_parameter(name).grad.flatten()[positions]
        torch.testing.assert_close(tuner.trained()[name].grad, gradient, rtol=1e-10, atol=1e-14)
    tuner.close()
    assert torch.equal(model(**batch).logits, expected(**batch).logits)


def twice(forward, x):
    return 2 * forward(x)


def test_an_ordinary_model_needs_one_pass_and_no_stand_in():
    model = tiny_llama()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    indices = finepoint.select(model, rule="random", density=0.1)
    with SparseTuner(model, indices) as tuner:
        assert len(calls) == 1
        assert tuner.audited.facts() == {"audited": len(indices), "stand_ins": [], "not_reached": [],
                                         "seconds": tuner.audited.facts()["seconds"]}  # fmt: skip
        model(**random_batches(1)[0]).loss.backward()
        assert len(calls) == 2
    with SparseTuner(model, indices, audit=False) as tuner:
        assert len(calls) == 2
        assert tuner.audited is None


def test_sparsify_audits_on_the_data_it_scores_on():
    model = tiny_llama()
    batches = random_batches(2)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    finepoint.sparsify(model, "gallop", 0.1, data=batches)
    assert torch.equal(seen[-1], batches[0]["input_ids"])
    assert finepoint.tuner_of(model).audited.weights
    finepoint.unload(model)
    calls = len(seen)
    finepoint.sparsify(model, "random", 0.1, audit=False)
    assert len(seen) == calls
    assert finepoint.tuner_of(model).audited is None


def test_a_run_records_its_audit_unless_told_to_do_without(model_folder, tmp_path, finepoint):
    data = write_lines(
        tmp_path / "d.jsonl", [{"prompt": "ab:", "completion": " cd"}, {"prompt": "b:", "completion": "d"}]
    )
    given = ("train", "--model", model_folder, "--data", data, "--rule", "random", "--density", "0.1", "--steps", "2")
    done = finepoint(*given, "--output", tmp_path / "a")
    assert "audited 14 weights" in done.stderr
    record = read_record(tmp_path / "a" / "run.json")
    assert record["audit"]["audited"] == 14
    assert record["audit"]["stand_ins"] == record["audit"]["not_reached"] == []
    done = finepoint(*given, "--output", tmp_path / "b", "--no-audit")
    assert "audited" not in done.stderr
    assert read_record(tmp_path / "b" / "run.json")["audit"] is None


def test_autocast_that_hides_in_the_forward_is_no_fault():
    """accelerate patches the model's forward, within which half precision rounds more than the weights' dtype does."""
    model = Toy().float()
    before = model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return before(*args, **kwargs)

    model.forward = forward
    with SparseTuner(model, choice(model)) as tuner:
        model(**steps_for()[0][0]).loss.backward()
        assert not tuner.audited.widened
        assert tuner.audited.weights == set(tuner.entries)


class Wide(nn.Module):
    def __init__(self, functional):
        super().__init__()
        torch.manual_seed(0)
        self.functional = functional
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = linear(x, self.a.weight) if self.functional else self.a(x)
        return self.b(x.relu())


@pytest.mark.parametrize("functional", [False, True])
def test_a_quantised_weight_is_asked_at_its_float_values_and_refused_where_it_is_used_elsewhere(functional):
    pytest.importorskip("torchao")
    model, x = Wide(functional), torch.randn(5, 64)
    quantise_(model, "int8", ["a", "b"])
    with torch.no_grad():
        expected = Wide(functional)
        for name in "ab":
            getattr(expected, name).weight.copy_(float_values(getattr(model, name).weight))
    indices = {"a.weight": torch.arange(0, 4096, 7), "b.weight": torch.arange(0, 4096, 5)}
    tuner = SparseTuner(model, indices)
    if functional:
        with pytest.raises(FinepointError, match=r"a\.weight would get another gradient .*off by 100 %"):
            model(x)
        assert not hasattr(model, "finepoint")
        return
    model(x).square().sum().backward()
    expected(x).square().sum().backward()
    assert tuner.audited.weights == set(indices)
    for name, entries in tuner.entries.items():
        dense_gradient = expected.get_parameter(name).grad.flatten()[indices[name]]
        torch.testing.assert_close(entries.delta.grad, dense_gradient, rtol=1e-4, atol=1e-4)
