"""What numbers may do: become NaN, vanish in bfloat16, go in and out of a model, depend on the number of threads."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import finepoint
from conftest import assert_same_bits, bits, random_batches, snapshot, tiny_llama, write_lines
from distributed_worker import together
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.adapter_set import AdapterSet
from finepoint.adapters.combining import merge
from finepoint.adapters.scaling import scaled
from finepoint.cli import main
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig
from test_adapter import trained

# --- NaN and infinity


def poisoned(model, value):
    """One forward and backward pass whose gradient is not finite."""
    (model(**random_batches()[0]).loss * value).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "fused", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_torch_optimizer_carries_what_is_not_finite_into_the_weights(value, optimizer, dtype):
    model = tiny_llama(dtype)
    chosen = finepoint.select(model, rule="random", density=0.1, targets="all")
    with finepoint.SparseTuner(model, chosen) as tuner:
        make = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
            "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
        }[optimizer]
        steps = make(tuner.parameters())
        model(**random_batches()[0]).loss.backward()
        steps.step()
        steps.zero_grad()
        good = snapshot(model)
        poisoned(model, value)
        with pytest.raises(FinepointError, match=r"the gradient of model\..* is not finite; the step was not taken"):
            steps.step()
        assert_same_bits(good, snapshot(model))
        steps.zero_grad()
        model(**random_batches()[0]).loss.backward()
        steps.step()  # and training may go on
        assert all(bool(value.isfinite().all()) for value in snapshot(model).values())
        tuner.revert_()


def test_without_the_guard_the_weights_would_be_lost():
    """The negative control: the same on an ordinary parameter."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), float("nan"))
    torch.optim.SGD([parameter], lr=0.1).step()
    assert parameter.isnan().all()


def test_the_guard_looks_at_no_other_optimizer():
    """One that steps something else, while a tuner is open, is not stopped by the tuner's gradients, nor by its own."""
    model = tiny_llama()
    with finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.1)):
        poisoned(model, float("nan"))
        other = torch.nn.Parameter(torch.ones(2))
        other.grad = torch.full((2,), float("nan"))
        torch.optim.SGD([other], lr=0.1).step()


def test_a_gradient_scaler_skips_its_step_as_ever():
    """Fused optimizers are told of what was found and leave the step out themselves."""
    model = tiny_llama()
    with finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.1)) as tuner:
        steps = torch.optim.AdamW(tuner.parameters(), lr=1e-2, fused=True)
        poisoned(model, float("inf"))
        steps.grad_scale, steps.found_inf = None, torch.ones(())
        before = snapshot(model)
        steps.step()
        assert_same_bits(before, snapshot(model))
        tuner.revert_()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, at):
        return {key: value[at % 4] for key, value in random_batches()[at // 4].items()}


class Poisoned(Trainer):
    """The stock Trainer, with a loss that becomes NaN in the third step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_stock_trainer_stops_with_the_last_good_weights(tmp_path, clip):
    model = finepoint.sparsify(tiny_llama(torch.bfloat16), rule="random", density=0.1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, max_grad_norm=clip, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = Poisoned(model=model, args=arguments, train_dataset=Rows())
    with pytest.raises(FinepointError, match="is not finite; the step was not taken"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(bool(value.isfinite().all()) for value in snapshot(model).values())
    assert finepoint.tuner_of(model).changed() > 0
    finepoint.save(model, tmp_path / "a")
    assert SparseAdapter.load(tmp_path / "a").count
    finepoint.unload(model, revert=True)


def in_ddp(number):
    """A step of a loop under DDP in which one process alone has a loss that is NaN."""
    model = tiny_llama()
    tuner = finepoint.SparseTuner(model, finepoint.select(model, rule="random", density=0.1))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    steps = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    before = snapshot(model)
    loss = wrapped(**random_batches()[distributed.rank()]).loss
    (loss * float("nan") if distributed.rank() == number else loss).backward()
    try:
        steps.step()
    except FinepointError as error:
        return str(error), all(torch.equal(bits(before[k]), bits(v)) for k, v in snapshot(model).items())
    return "no error", False


def test_under_ddp_all_processes_stop_at_the_same_step():
    for said, same in together(2, in_ddp, 1):
        assert "is not finite; the step was not taken" in said
        assert same


# --- what bfloat16 loses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_updates_that_vanish_are_counted(dtype):
    model = tiny_llama(dtype)
    base = snapshot(model)
    chosen = finepoint.select(model, rule="random", density=0.2)
    with finepoint.SparseTuner(model, chosen) as tuner:
        assert tuner.vanished() == 0
        expected = 0
        with torch.no_grad():
            for name, delta in tuner.trained().items():
                delta.copy_(torch.linspace(-1e-3, 1e-3, len(delta)) + 1e-5)
                before = base[name].view(-1)[chosen[name]]
                after = (before.float() + delta).to(dtype)
                expected += int(((after == before) & (delta != 0)).sum())
        assert tuner.vanished() == expected
        assert tuner.changed() + tuner.vanished() == tuner.count
        assert (expected > 0) == (dtype == torch.bfloat16)
        tuner.revert_()


def test_a_run_says_how_many_updates_vanished(tmp_path, model_folder, capsys):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "c"}] * 8)
    line = (f"train --model {model_folder} --data {data} --rule random --density 0.3 --steps 2 --lr 1e-3 "
            f"--dtype bfloat16 --output {tmp_path / 'a'}")  # fmt: skip
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "moved too little for their dtype and hold the base's value" in said
    config = TrainConfig(model=str(model_folder), data=data, rule="random", density=0.3, steps=2, lr=1e-3,
                         dtype="float32", output=str(tmp_path / "b"))  # fmt: skip
    assert train(config)["vanished"] == 0


# --- a thousand cycles


def adapters_of(model):
    """Adapters in all forms, and the pieces that cycles are made of."""
    whole = trained(model, "value", density=0.1, full=["model.norm.weight"])[0]
    first, second = (trained(model, store, density=0.1, seed=seed)[0] for store, seed in (("delta", 1), ("value", 2)))
    chosen = finepoint.select(model, rule="random", density=0.1, targets="all", exclude=[first, second], seed=7)
    with finepoint.SparseTuner(model, chosen) as tuner:
        for delta in tuner.parameters():
            delta.data.uniform_(-0.1, 0.1)
        apart = tuner.adapter("delta")
        tuner.revert_()
    return whole, first, second, apart


def cycle(model, adapters, together_, draw, folder):
    """One thing that a user does with adapters, after which the model should be the base."""
    _, first, second, apart = adapters
    one = draw.choice(adapters)
    match draw.randrange(8):
        case 0:
            one.apply(model)
            one.revert(model)
        case 1:
            some = draw.choice([first, second])
            some.apply(model)
            apart.apply(model)
            for each in draw.choice([(some, apart), (apart, some)]):
                each.revert(model)
        case 2:
            for name in draw.choices(["first", "second", "whole"], k=3):
                together_.set(name)
            together_.disable()
        case 3:
            with together_.using([draw.choice(["first", "second"]), "apart"]):
                pass
        case 4:
            how = draw.choice(["sum", "mean", "ties", "dare", "first"])
            with merge([first, second, apart], how=how, model=model).applied(model):
                pass
        case 5:
            with scaled(one, model, draw.choice([0.0, 0.3, 1.0, -2.0])).applied(model):
                pass
        case 6:
            try:
                with one.applied(model):
                    raise KeyError
            except KeyError:
                pass
        case 7:
            one.save(folder, overwrite=True, compact=draw.random() < 0.5)
            with SparseAdapter.load(folder).applied(model):
                pass


def cycles(model, count, folder, seed=0):
    base = snapshot(model)
    adapters = adapters_of(model)
    assert_same_bits(base, snapshot(model))
    together_ = AdapterSet(model)
    for name, adapter in zip(("whole", "first", "second", "apart"), adapters, strict=True):
        together_.add(name, adapter)
    draw = random.Random(seed)
    for _ in range(count):
        cycle(model, adapters, together_, draw, folder)
    changed = sum(int((bits(base[name]) != bits(value)).sum()) for name, value in snapshot(model).items())
    with adapters[0].applied(model):
        assert any(not torch.equal(base[name], value) for name, value in snapshot(model).items())  # the control
    return changed


def test_a_hundred_random_cycles_change_no_bit(tmp_path):
    assert cycles(tiny_llama(torch.bfloat16), 100, tmp_path / "a") == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_thousand_random_cycles_change_no_bit(dtype, tmp_path):
    assert cycles(tiny_llama(dtype), 1000, tmp_path / "a") == 0


# --- threads


def middling():
    """Large enough for torch and for our kernels to share the work out among threads."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_threads(count, work):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def a_short_run(density):
    model = middling()
    batches = [{"input_ids": (ids := torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(i))),
                "labels": ids} for i in range(2)]  # fmt: skip
    chosen = finepoint.select(model, rule="random", density=density, targets="all")
    with finepoint.SparseTuner(model, chosen) as tuner:
        steps = torch.optim.SGD(tuner.parameters(), lr=1e-2)  # Adam would divide noise by noise
        for batch in batches:
            model(**batch).loss.backward()
            steps.step()
            steps.zero_grad()
        return torch.cat([delta.detach().clone() for delta in tuner.parameters()])


@pytest.mark.parametrize("density", [0.002, 0.2])
def test_the_number_of_threads_changes_the_order_of_sums_and_nothing_else(density):
    one = with_threads(1, lambda: a_short_run(density))
    again = with_threads(1, lambda: a_short_run(density))
    two = with_threads(2, lambda: a_short_run(density))
    assert torch.equal(one, again)  # one number of threads: bit for bit
    assert float((one != 0).double().mean()) > 0.5  # but for tokens that do not occur
    size = float((one - two).norm() / one.norm())
    print(f"relative difference of the deltas between 1 and 2 threads: {size:.1e}")
    # Float32 sums of some thousand terms: 2^-24 each, grown by the few layers they pass through.
    assert size < 1e-5


def test_choosing_with_two_threads_differs_at_most_where_scores_are_equal_up_to_rounding():
    model = middling()
    ids = torch.randint(512, (8, 128), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    one, two = (
        with_threads(n, lambda: finepoint.select(model, batches, rule="gradient", density=0.01)) for n in (1, 2)
    )
    assert one.count == two.count
    differing = sum(int((~torch.isin(one[name], two[name])).sum()) for name in one if name in two)
    assert differing <= one.count * 1e-3
