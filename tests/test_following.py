"""The weights hold base + delta as the deltas are now, whoever changed them and whoever asks.

The reference is a fresh model into which base + delta is written entry by entry, from the deltas alone.
"""

import copy
import gc
import io
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments

import finepoint
from conftest import assert_same_bits, bits, random_batches, snapshot, tiny_llama
from finepoint.adapters.entries import moved
from finepoint.errors import FinepointError
from finepoint.tuner.kernels import all_weights
from finepoint.tuner.tuner import SparseTuner

BATCHES = random_batches(3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PROMPT = torch.arange(4, 10)[None]
NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
INDICES = {name: torch.arange(1, 16, 3) for name in NAMES}


def sparse(dtype=torch.float32, std=0.0):
    model = finepoint.sparsify(tiny_llama(dtype), indices=INDICES)
    torch.manual_seed(1)
    for delta in deltas(model):
        delta.data.normal_(std=std)
    return model


def deltas(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".delta")]


def as_it_should_be(model, given=None):
    """A plain model with base + delta; the deltas are the model's, or given by their names in it."""
    plain = tiny_llama(next(model.parameters()).dtype)
    weights, found = dict(plain.named_parameters()), given or dict(model.named_parameters())
    with torch.no_grad():
        for name, indices in INDICES.items():
            delta, entries = found[f"finepoint.{name.replace('.', '/')}.delta"], weights[name].view(-1)
            entries[indices] = (entries[indices].to(delta.dtype) + delta).to(entries.dtype)
    return plain


def logits(model, batch=BATCHES[0]):
    return model(input_ids=batch["input_ids"]).logits


def seed_noise(model):
    torch.manual_seed(5)
    return [torch.randn_like(delta) for delta in deltas(model)]


def by_numpy(model):
    for delta in deltas(model):
        delta.detach().numpy()[:] = 0.25


def by_vector(model):
    vector = torch.nn.utils.parameters_to_vector(deltas(model))
    torch.nn.utils.vector_to_parameters(vector.detach() + 0.5, deltas(model))


def by_exchange(model):
    for delta, noise in zip(deltas(model), seed_noise(model), strict=True):
        delta.data = noise


def by_copying(model):
    for delta, noise in zip(deltas(model), seed_noise(model), strict=True):
        delta.data.copy_(noise)


def by_a_state_dict(model):
    kept = {name: value + 0.25 for name, value in model.state_dict().items() if name.endswith(".delta")}
    model.load_state_dict(kept, strict=False)


def by_swapping_signs(model):
    """The sum and the norm stay."""
    for delta in deltas(model):
        delta.data.neg_()


def by_clipping_after_a_step(model):
    torch.optim.AdamW(deltas(model), lr=1e-2, fused=True).step()
    for delta in deltas(model):
        delta.data.clamp_(-0.05, 0.05)


@torch.no_grad()
def by_torch_functions(model):
    torch._foreach_mul_(deltas(model), 0.5)


CHANGES = [by_numpy, by_vector, by_exchange, by_copying, by_a_state_dict, by_swapping_signs, by_clipping_after_a_step,
           by_torch_functions]  # fmt: skip


def asked_for_logits(model, plain):
    assert torch.equal(logits(model), logits(plain))


def asked_without_gradients(model, plain):
    with torch.inference_mode():
        assert torch.equal(logits(model), logits(plain))


def asked_for_words(model, plain):
    ways = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(PROMPT, **ways), plain.generate(PROMPT, **ways))


def asked_for_states(model, plain):
    assert torch.equal(model.model(PROMPT).last_hidden_state, plain.model(PROMPT).last_hidden_state)


def asked_for_one_layer(model, plain):
    x = torch.ones(1, 16, dtype=model.dtype)
    assert torch.equal(model.model.layers[0].mlp(x), plain.model.layers[0].mlp(x))


def asked_for_its_state(model, plain):
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def asked_for_a_part_of_its_state(model, plain):
    state = model.model.layers[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.model.layers[0].state_dict().items())


def asked_for_its_adapter(model, plain):
    fresh = tiny_llama(model.dtype)
    finepoint.tuner_of(model).adapter().apply(fresh)
    assert_same_bits(snapshot(plain), snapshot(fresh))


def asked_to_end(model, plain):
    finepoint.unload(model)
    assert_same_bits(snapshot(plain), snapshot(model))


READERS = [asked_for_logits, asked_without_gradients, asked_for_words, asked_for_states, asked_for_one_layer,
           asked_for_its_state, asked_for_a_part_of_its_state, asked_for_its_adapter, asked_to_end]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_asks_gets_base_plus_delta_whoever_changed_it(change):
    for ask in READERS:
        for dtype in (torch.float32, torch.bfloat16):
            model = sparse(dtype, std=0.1)
            logits(model)
            before = torch.cat(deltas(model)).detach().clone()
            for delta in deltas(model):
                delta.grad = torch.ones_like(delta)
            change(model)
            assert not torch.equal(torch.cat(deltas(model)), before)  # negative control
            ask(model, as_it_should_be(model))


def test_a_reference_sees_its_own_weights_and_the_model_its_new_ones():
    model = sparse(std=0.1)
    reference, plain = finepoint.reference(model), as_it_should_be(model)
    by_copying(model)
    assert torch.equal(logits(reference), logits(plain))
    assert torch.equal(logits(model), logits(as_it_should_be(model)))
    assert not torch.equal(logits(model), logits(plain))


class ScheduleFree(torch.optim.Optimizer):
    """Gradients are taken at one point, `y`, and the model is evaluated at another, the mean `x` of all steps."""

    def __init__(self, parameters, lr, beta=0.5):
        super().__init__(parameters, {"lr": lr, "beta": beta})
        self.training, self.steps = True, 0

    def _move(self, training):
        """x = y + (1 - 1 / beta) (z - y), and back: through `.data`, of which no version counter tells."""
        for group in self.param_groups if self.training != training else ():
            for p in group["params"]:
                if "z" in self.state[p]:
                    beta = group["beta"]
                    p.data.lerp_(self.state[p]["z"], 1 - beta if training else 1 - 1 / beta)
        self.training = training

    def train(self):
        self._move(True)

    def eval(self):
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.training
        self.steps += 1
        for group in self.param_groups:
            beta, lr = group["beta"], group["lr"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.data.lerp_(z, 1 / self.steps)
                p.data.add_(p.grad, alpha=lr * (beta * (1 - 1 / self.steps) - 1))
                z.sub_(p.grad, alpha=lr)


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_free_optimizer_saves_the_model_that_the_trainer_evaluated(tmp_path):
    model = sparse()
    rows = [{key: value[i] for key, value in BATCHES[0].items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, eval_strategy="steps", eval_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no", use_cpu=True, lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer, losses = ScheduleFree(deltas(model), lr=0.5), []

    def at_last(trainer, step=Trainer.evaluation_loop):
        def loop(*args, **kwargs):
            found = step(trainer, *args, **kwargs)
            losses.append(found.metrics["eval_loss"])
            expected.append(as_it_should_be(model)(**BATCHES[0]).loss.item())
            return found

        return loop

    expected = []
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, None))
    trainer.evaluation_loop = at_last(trainer)
    trainer.train()
    trainer.evaluate()
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(set(losses[:-1])) == 3
    fresh = tiny_llama()
    finepoint.load(fresh, finepoint.save(model, tmp_path / "adapter"))
    assert fresh(**BATCHES[0]).loss.item() == pytest.approx(losses[-1], rel=1e-6)
    optimizer.train()
    assert fresh(**BATCHES[0]).loss.item() != pytest.approx(model(**BATCHES[0]).loss.item(), rel=1e-4)  # control


def test_an_average_of_the_deltas_is_measured_and_taken_out_again():
    """EMA as most people write it: copied in, measured, copied back, and training goes on."""
    model, untouched = sparse(), sparse()
    averages = [delta.detach().clone() for delta in deltas(model)]
    for each in (model, untouched):
        optimizer = torch.optim.AdamW(deltas(each), lr=1e-2)
        for batch in BATCHES:
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if each is model:
                kept = [delta.data.clone() for delta in deltas(model)]
                for average, delta in zip(averages, deltas(model), strict=True):
                    average.lerp_(delta.data, 0.5)
                    delta.data.copy_(average)
                with torch.no_grad():
                    assert torch.equal(logits(model), logits(as_it_should_be(model)))
                for delta, value in zip(deltas(model), kept, strict=True):
                    delta.data.copy_(value)
    assert_same_bits(snapshot(untouched), snapshot(model))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_of_torchs_is_base_plus_mean_delta(use_buffers):
    model = sparse(torch.bfloat16)
    average = AveragedModel(model, use_buffers=use_buffers)
    for seed in range(3):
        torch.manual_seed(seed)
        for delta in deltas(model):
            delta.data.normal_(std=0.1)
        average.update_parameters(model)
    assert torch.equal(logits(average), logits(as_it_should_be(average.module)))
    assert not torch.equal(logits(average), logits(model))
    fresh = tiny_llama(torch.bfloat16)
    finepoint.tuner_of(average.module).adapter().apply(fresh)
    assert torch.equal(logits(fresh), logits(average))


def test_zeroth_order_training_sees_every_perturbation():
    """MeZO: two forwards, no backward, one set of numbers in place of the other."""
    model, losses, expected = sparse(std=0.1), [], []
    for step in (1, -2, 1):
        torch.manual_seed(3)
        for delta in deltas(model):
            delta.data.add_(torch.randn_like(delta), alpha=0.1 * step)
        losses.append(model(**BATCHES[0]).loss.item())
        expected.append(as_it_should_be(model)(**BATCHES[0]).loss.item())
    assert losses == expected
    assert len(set(losses)) == 3


def test_a_functional_call_computes_with_its_deltas_and_gives_them_their_gradient():
    model, names = sparse(std=0.1), [f"finepoint.{name.replace('.', '/')}.delta" for name in NAMES]
    given = {name: torch.randn_like(model.get_parameter(name)).mul_(0.1).requires_grad_() for name in names}
    loss = functional_call(model, given, (), dict(BATCHES[0])).loss
    plain = as_it_should_be(model, given)
    expected = plain(**BATCHES[0]).loss
    assert loss.item() == expected.item()
    loss.backward()
    expected.backward()
    for name, weight in INDICES.items():
        found = given[f"finepoint.{name.replace('.', '/')}.delta"].grad
        torch.testing.assert_close(found, plain.get_parameter(name).grad.view(-1)[weight])
    assert torch.equal(logits(model), logits(as_it_should_be(model)))  # its own are back


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp itself
def test_transforms_that_no_weight_can_hold_are_refused():
    model = sparse()
    given = {name: value.detach() for name, value in model.named_parameters() if name.endswith(".delta")}

    def loss(given):
        return functional_call(model, given, (), dict(BATCHES[0])).loss

    two = {name: torch.stack([value, value + 1]) for name, value in given.items()}
    for transformed in (lambda: torch.func.vmap(loss)(two), lambda: torch.func.grad(loss)(given),
                        lambda: torch.func.jvp(loss, (given,), (given,))):  # fmt: skip
        with pytest.raises(FinepointError, match="weights can hold one model at a time"):
            transformed()
    assert torch.equal(logits(model), logits(tiny_llama()))


def pickled(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_follows_steps_and_changes_of_its_own_deltas_alone(copied):
    model = sparse(torch.bfloat16, std=0.1)
    by_copying(model)  # and the copy is made before anybody has asked
    clone = copied(model)
    assert torch.equal(logits(clone), logits(as_it_should_be(model)))
    before = snapshot(model)
    optimizer = torch.optim.SGD(deltas(clone), lr=0.5)
    clone(**BATCHES[0]).loss.backward()
    optimizer.step()
    assert_same_bits(snapshot(as_it_should_be(clone)), {n: p for n, p in snapshot(clone).items() if "delta" not in n})
    by_swapping_signs(clone)
    assert torch.equal(logits(clone), logits(as_it_should_be(clone)))
    deltas(clone)[0].grad = torch.full_like(deltas(clone)[0], torch.nan)
    with pytest.raises(FinepointError, match="the gradient of model.embed_tokens.weight is not finite"):
        optimizer.step()
    fresh = tiny_llama(torch.bfloat16)
    finepoint.load(fresh, finepoint.tuner_of(clone).adapter())
    assert torch.equal(logits(fresh), logits(clone))
    finepoint.unload(clone, revert=True)
    assert_same_bits(snapshot(tiny_llama(torch.bfloat16)), snapshot(clone))
    assert_same_bits(before, snapshot(model))


def test_a_step_between_forward_and_backward_is_refused_as_torch_refuses_it():
    for dtype in (torch.float32, torch.bfloat16):
        model = sparse(dtype)
        optimizer = torch.optim.SGD(deltas(model), lr=0.5)
        loss = model(**BATCHES[0]).loss
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = model(**BATCHES[0]).loss
        by_swapping_signs(model)
        logits(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_asking_between_forward_and_backward_changes_nothing():
    found = []
    for asks in (False, True):
        model = sparse(std=0.1)
        loss = model(**BATCHES[0]).loss
        if asks:
            tuner = finepoint.tuner_of(model)
            tuner.adapter(), tuner.changed(), tuner.follow_(), model.state_dict(), logits(model)
            logits(finepoint.reference(model))
        loss.backward()
        found.append(torch.cat([delta.grad for delta in deltas(model)]))
    assert torch.equal(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_weight_is_written_once_a_step_and_no_more(checkpointing, monkeypatch):
    model = sparse().train()
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    optimizer, written = torch.optim.AdamW(deltas(model), lr=1e-2), []
    original = all_weights._write_
    monkeypatch.setattr(all_weights, "_write_", lambda rows, table: (written.extend(rows), original(rows, table)))
    for step in range(1, 4):
        for batch in BATCHES[:2]:
            model(**batch).loss.backward()
        with torch.no_grad():
            logits(model)
        optimizer.step()
        optimizer.zero_grad()
        assert len(written) == step * len(NAMES)
    by_copying(model)
    logits(model)
    logits(model)
    assert len(written) == 4 * len(NAMES)


def test_an_interrupted_forward_leaves_no_weight_behind():
    model = sparse(std=0.1)

    def interrupt(module, args):
        raise KeyboardInterrupt

    for where in (model.model.layers[1], model.model.embed_tokens, model.lm_head):
        handle = where.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        handle.remove()
        by_swapping_signs(model)
        assert torch.equal(logits(model), logits(as_it_should_be(model)))


def broken_by_a_cast(model):
    model.bfloat16()


def broken_by_another_shape(model):
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(2, 3))


def broken_under_the_same_address(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.view(-1)[:6].view(2, 3)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("breaks", [broken_by_a_cast, broken_by_another_shape, broken_under_the_same_address])
def test_a_broken_tuner_stops_its_own_optimizer_before_the_step_and_no_other(breaks, written):
    broken, whole = sparse(std=0.1), sparse(std=0.1)
    if written:
        logits(broken), logits(whole)
    breaks(broken)
    before = [delta.detach().clone() for delta in deltas(broken)]
    for each in (broken, whole):
        for delta in deltas(each):
            delta.grad = torch.ones_like(delta)
    with pytest.raises(FinepointError, match=r"was cast after SparseTuner|is \(2, 3\) with"):
        torch.optim.SGD(deltas(broken), lr=0.5).step()
    assert all(torch.equal(delta, value) for delta, value in zip(deltas(broken), before, strict=True))
    torch.optim.SGD(deltas(whole), lr=0.5).step()
    assert torch.equal(logits(whole), logits(as_it_should_be(whole)))
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.5).step()
    assert parameter.item() == 0.5


def test_a_cast_model_still_computes_and_is_refused_once_its_deltas_change():
    model = sparse(std=0.1)
    logits(model)
    model.bfloat16()
    assert torch.equal(bits(logits(model)), bits(logits(as_it_should_be(sparse(std=0.1)).bfloat16())))
    by_swapping_signs(model)
    with pytest.raises(FinepointError, match="was cast after SparseTuner"):
        logits(model)


def test_deltas_of_another_length_are_refused_and_nothing_is_written():
    model, name = sparse(), f"finepoint.{NAMES[0].replace('.', '/')}.delta"
    with pytest.raises(FinepointError, match=r"with \(3,\) deltas, and was .* with 5"):
        functional_call(model, {name: torch.ones(3)}, (), dict(BATCHES[0]))
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_what_was_trained_in_a_layer_that_the_model_has_no_more_is_not_saved():
    model = sparse(std=0.1)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 24, bias=False)
    with pytest.raises(FinepointError, match=r"model.layers.0.mlp.up_proj.weight is no longer in the model"):
        finepoint.tuner_of(model).adapter()


def test_a_tuner_on_its_own_follows_as_well():
    model = tiny_llama()
    with SparseTuner(model, INDICES):
        by_copying(model)
        for each in (model, copy.deepcopy(model), pickled(model)):
            assert torch.equal(logits(each), logits(as_it_should_be(model)))


def by_load_state_dict(layer, other):
    layer.load_state_dict(other.state_dict())


def by_assigning(layer, other):
    layer.load_state_dict(other.state_dict(), assign=True)


def by_writing(layer, other):
    with torch.no_grad():
        layer.weight.copy_(other.weight)


def by_another_parameter(layer, other):
    layer.weight = torch.nn.Parameter(other.weight.detach().clone())


@pytest.mark.parametrize("write", [by_load_state_dict, by_assigning, by_writing, by_another_parameter])
def test_a_weight_that_is_replaced_in_its_layer_is_known_for_another_base(write):
    model, other = sparse(std=0.1), tiny_llama(seed=5)
    layer = model.model.layers[0].mlp.up_proj
    write(layer, copy.deepcopy(layer))  # its own values, from before the deltas change
    by_swapping_signs(model)
    assert torch.equal(logits(model), logits(as_it_should_be(model)))
    finepoint.tuner_of(model).adapter()
    write(layer, other.model.layers[0].mlp.up_proj)
    logits(model)
    for _ in range(2):
        with pytest.raises(FinepointError, match=r"layers.0.mlp.up_proj.weight was changed since the training began"):
            finepoint.tuner_of(model).adapter()


def test_values_that_are_written_to_the_trained_entries_do_not_stay():
    model = sparse(std=0.1)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.view(-1)[INDICES[NAMES[1]]] += 1
    assert torch.equal(logits(model), logits(as_it_should_be(model)))
    finepoint.tuner_of(model).adapter()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
def test_all_weights_at_once_are_written_and_compared_as_one_by_one(seed, dtypes):
    generator = torch.Generator().manual_seed(seed)
    rows, expected = [], []
    for place, dtype in enumerate(dtypes):
        weight = torch.randn(20, 30, generator=generator).to(dtype)
        weight[0, 0] = -0.0
        if seed % 5 == place:
            weight = weight.T  # not in one piece
        indices = torch.randperm(600, generator=generator)[: (seed + place) % 40].sort().values
        indices = indices.to(torch.int32 if seed % 2 else torch.int64)
        base = weight.reshape(-1)[indices]
        delta = torch.randn(len(indices), generator=generator, dtype=torch.promote_types(dtype, torch.float32))
        delta[::3] = 0
        rows.append(all_weights.Row(weight, indices, base, delta, torch.full_like(delta, torch.nan)))
        after = weight.clone(memory_format=torch.contiguous_format)
        after.view(-1)[indices.long()] = moved(base, delta)
        expected.append(after)
    versions = [row.weight._version for row in rows]
    all_weights.write_(rows)
    for row, after, version in zip(rows, expected, versions, strict=True):
        assert torch.equal(bits(row.weight), bits(after))
        assert torch.equal(bits(row.written), bits(row.delta))
        assert row.weight._version > version  # autograd refuses graphs that have saved it
    pairs = [(row.delta, row.written) for row in rows]
    assert all_weights.same_bits(pairs)
    for row in rows:
        if len(row.delta):
            row.delta[-1] = -row.delta[-1]  # of a zero the sign alone
            assert not all_weights.same_bits(pairs)
            row.delta[-1] = -row.delta[-1]


def test_a_table_is_dropped_with_the_tensors_that_it_knows_once_one_is_exchanged():
    model = sparse(std=0.1)
    logits(model)
    kept = finepoint.tuner_of(model)._deltas
    assert kept.table is not None
    layer = model.model.layers[0].mlp.up_proj
    gone = weakref.ref(layer.weight)
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    logits(model)
    gc.collect()
    assert gone() is None
