"""Several processes: the same entries, the same result as one process, k numbers sent, everything written once."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import assert_same_bits, random_batches, snapshot, tiny_gemma, tiny_llama, write_lines
from distributed_worker import together
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.entries import gather, scatter_
from finepoint.errors import FinepointError
from finepoint.runtime import distributed
from finepoint.runtime.files import contents
from finepoint.selection.select import select
from finepoint.selection.settings import SelectConfig
from finepoint.selection.statistics import stream_statistics
from finepoint.selection.targets import target_weights
from finepoint.training.resolve import resumes_together
from finepoint.training.run import choose, train
from finepoint.training.settings import TrainConfig
from finepoint.tuner.tuner import SparseTuner

DENSITY = 0.05
BATCHES = {"count": 5, "rows": 3}  # of which 2 and 3 processes get unequal shares


class Sent(TorchDispatchMode):
    """While active, notes what this process's collectives carry: (name, numbers)."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            numbers = sum(part.numel() for part in tree_leaves(args) if isinstance(part, torch.Tensor))
            self.messages.append((operation._opname, numbers))
        return operation(*args, **(kwargs or {}))


def numbers_of(adapter):
    return {name: (adapter[name], change.numbers) for name, change in adapter.changes.items()}


def assert_equal(found, wanted, exact=True):
    assert found.keys() == wanted.keys()
    for name, (indices, numbers) in wanted.items():
        assert torch.equal(found[name][0], indices), name
        if exact:
            assert torch.equal(found[name][1], numbers), name
        else:
            torch.testing.assert_close(found[name][1], numbers, rtol=1e-4, atol=1e-6)


@pytest.fixture
def config(model_folder, choice_file, tmp_path):
    """Of one process; several get the same examples a step with less accumulation."""
    return TrainConfig(model=str(model_folder), data=choice_file, output=str(tmp_path / "run"), density=DENSITY,
                       rule="gallop", lr=1e-2, steps=5, batch_size=4)  # fmt: skip


# What the processes run. Each returns plain results, which the tests below compare.


def select_and_train(config, sharded, steps_before_breaking=3):
    """A run, the same run broken off and resumed, a run with validation; and what can be said of them."""
    if sharded:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    record = train(config)
    found = {"record": record, "adapter": numbers_of(SparseAdapter.load(config.output))}
    if distributed.is_first():
        lines = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
        found["log"] = [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    whole = replace(config, output=f"{config.output}-whole", save_every=2, indices=config.output,
                    validation=config.data, validation_limit=10, keep="best")  # fmt: skip
    with Sent() as sent:
        train(whole)
    found |= {"sent": sent.messages, "whole": numbers_of(SparseAdapter.load(whole.output))}
    broken = replace(whole, output=f"{config.output}-broken")
    with breaking_off(steps_before_breaking), suppress(KeyboardInterrupt):
        train(broken)
    if distributed.count() == 1 or resumes_together():
        train(replace(broken, resume=True))
        found["resumed"] = numbers_of(SparseAdapter.load(broken.output))
    else:
        with pytest.raises(FinepointError, match=r"transformers 5\.18 or newer"):
            train(replace(broken, resume=True))
        found["resumed"] = found["whole"]
    return found


@contextmanager
def breaking_off(steps):
    from finepoint.training.trainer import SparseTrainer

    step = SparseTrainer.training_step
    done = []

    def breaking(self, *args, **kwargs):
        done.append(1)
        if len(done) > steps:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    SparseTrainer.training_step = breaking
    try:
        yield
    finally:
        SparseTrainer.training_step = step


def statistics_and_selections(sharded):
    """Gradients and chosen entries of a float64 model, in which the order of sums decides nothing."""
    model = sharded_llama(torch.float64) if sharded else tiny_llama(torch.float64)
    before = snapshot(model)
    weights = target_weights(model)
    batches = random_batches(**BATCHES)
    sums = {}
    for need in ("gradient", "squared_gradient"):
        for name, statistics in stream_statistics(model, weights, batches, (need,), memory=0.4):
            sums[need, name] = getattr(statistics, need)
    chosen = {
        rule: dict(select(model, batches, rule=rule, density=DENSITY))
        for rule in ("gallop", "fisher", "random", "snip")
    }
    assert_same_bits(whole(before), whole(snapshot(model)))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    return sums, chosen


def whole(state):
    return {name: distributed.whole(value) for name, value in state.items()}


def sharded_llama(dtype=torch.float32, make=tiny_llama):
    from finepoint.training.context import shard_

    model = make(dtype)
    if distributed.count() > 1:
        shard_(model, "cpu")
    return model


def entries_of_shards():
    """Reading and writing entries of sharded weights, and an adapter put on and taken off them."""
    return [_entries_of(make, dtype) for make in (tiny_llama, tiny_gemma) for dtype in (torch.float32, torch.bfloat16)]


def _entries_of(make, dtype):
    model = sharded_llama(dtype, make)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        assert distributed.is_sharded(weight)
        local, first = distributed.own_rows(weight)
        full = distributed.whole(weight)
        assert torch.equal(local.reshape(-1), full.reshape(-1)[first : first + local.numel()])
        indices = torch.randperm(weight.numel(), generator=generator)[:4].sort().values
        values = torch.randn(4, generator=generator).to(dtype)
        values[0] = -0.0
        scatter_(weight, indices, values)
        full.view(-1)[indices] = values
        assert_same_bits({name: full}, {name: distributed.whole(weight)})
        assert_same_bits({name: values}, {name: gather(weight, indices)})
    before = snapshot(model)
    with SparseTuner(model, select(model, rule="magnitude-low", density=DENSITY)) as tuner:
        for parameter in tuner.parameters():
            nn.init.ones_(parameter)
        adapter = tuner.adapter()
        tuner.revert_()
    assert_same_bits(whole(before), whole(snapshot(model)))
    adapter.apply(model)
    changed = sum(int((distributed.whole(value) != distributed.whole(before[name])).sum())
                  for name, value in snapshot(model).items() if name != "lm_head.weight")  # fmt: skip
    adapter.revert(model)
    assert_same_bits(whole(before), whole(snapshot(model)))
    return changed, adapter.count


WAYS = ("ddp", "tuner on shards", "shards of a tuner's model")


def plain_loops():
    return {(make.__name__, how): plain_loop(make, how) for make in (tiny_llama, tiny_gemma) for how in WAYS}


def plain_loop(make, how):
    """Three steps of AdamW over a tuned model in a loop of one's own, each process on a batch of its own."""
    from torch.distributed.fsdp import fully_shard

    model = make(torch.float64)
    names = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
             "model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"]  # fmt: skip
    several = distributed.count() > 1
    if several and how == "tuner on shards":
        model = sharded_llama(torch.float64, make)
    tuner = SparseTuner(model, {name: torch.arange(0, model.get_parameter(name).numel(), 5) for name in names})
    running = model
    if several and how == "shards of a tuner's model":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    elif several and how == "ddp":
        running = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    share = 2 // distributed.count() if several else 2
    for step in range(3):
        for batch in random_batches(2, seed=step)[distributed.rank() * share :][:share]:
            (running(**batch).loss / share).backward()
        nn.utils.clip_grad_norm_(tuner.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    adapter = tuner.adapter()
    state = {name: distributed.whole(model.get_parameter(name)).clone() for name in names}
    tuner.revert_()
    tuner.close()
    return numbers_of(adapter), state, whole(snapshot(model))


def mistakes(config):
    """The error of each process where something is wrong in one of them or in all."""
    messages = {}

    def attempt(what, work):
        try:
            work()
            messages[what] = None
        except FinepointError as error:
            messages[what] = str(error)

    (Path(config.output) if distributed.is_first() else Path(config.output).parent).mkdir(exist_ok=True)
    if distributed.is_first():
        (Path(config.output) / "precious.txt").write_text("x")
    torch.distributed.barrier()
    attempt("occupied", lambda: train(config))
    attempt("baseline", lambda: train(replace(config, baseline="lora", rule="random", density=None)))
    with poisoned(number=1, step=3):
        attempt("nan", lambda: train(replace(config, output=f"{config.output}-nan")))
    attempt("labels", lambda: select(tiny_llama(), random_batches(2, rows=2 + distributed.rank()), rule="gallop"))

    tuner = SparseTuner(tiny_llama(), {"model.layers.0.mlp.up_proj.weight": torch.arange(3) + distributed.rank()})
    running = nn.parallel.DistributedDataParallel(tuner.model)
    attempt("entries", lambda: running(**random_batches(1)[0]))

    tuner = SparseTuner(tiny_llama(), {"model.layers.0.mlp.up_proj.weight": torch.arange(3)})
    tuner.model.model.layers[0].mlp.up_proj.weight.ds_id = 7  # as DeepSpeed marks what it has partitioned
    attempt("zero3", lambda: tuner.model(**random_batches(1)[0]))

    from torch.distributed.fsdp import FullyShardedDataParallel

    tuner = SparseTuner(tiny_llama(), {"model.layers.0.mlp.up_proj.weight": torch.arange(3)})
    flattened = FullyShardedDataParallel(tuner.model, device_id=torch.device("cpu"), use_orig_params=True)
    attempt("fsdp1", lambda: flattened(**random_batches(1)[0]))
    return messages


@contextmanager
def poisoned(number, step):
    """From the given step on, the loss of one process is not a number."""
    from finepoint.training.trainer import SparseTrainer

    compute = SparseTrainer.compute_loss

    def poisoning(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if distributed.rank() == number and self.state.global_step + 1 >= step else loss

    SparseTrainer.compute_loss = poisoning
    try:
        yield
    finally:
        SparseTrainer.compute_loss = compute


def stock_trainer(folder):
    """transformers.Trainer as it is, over a tuned model."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    rows = [{key: value[row] for key, value in batch.items()} for batch in random_batches(6) for row in range(4)]
    tuner = SparseTuner(model, select(model, rule="magnitude-low", density=DENSITY))
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4, gradient_accumulation_steps=2 // distributed.count(), max_steps=3,
        learning_rate=1e-2, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, seed=0,
    )  # fmt: skip
    with Sent() as sent:
        Trainer(model, arguments, train_dataset=rows).train()
    return numbers_of(tuner.adapter()), sent.messages


# The tests.


@pytest.fixture(scope="module")
def alone():
    """What a piece of work returns in one process; done once for several tests."""
    found = {}

    def run(key, work, *arguments):
        if key not in found:
            (found[key],) = together(1, work, *arguments)
        return found[key]

    return run


HOW_MANY = [("whole", 2), ("whole", 3), ("fsdp2", 2), pytest.param("fsdp2", 3, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("how", "count"), HOW_MANY)
def test_a_run_by_several_processes_is_that_of_one(config, alone, how, count):
    sharded = how == "fsdp2"
    accumulating = replace(config, output=f"{config.output}-alone", accumulation=count)
    one = alone(f"run {count}", select_and_train, accumulating, False, 3 * count)
    found = together(count, select_and_train, config, sharded)
    exact = count == 2  # a half of each of two gradients is exact, a third of three is not
    for process in found:
        assert process["adapter"].keys() == found[0]["adapter"].keys()
        assert_equal(process["adapter"], one["adapter"], exact)
        assert_equal(process["whole"], one["whole"], exact)
        assert_equal(process["resumed"], process["whole"])
        assert process["record"]["changed"] == one["record"]["changed"]
        assert process["record"]["processes"] == count
    assert [step for step, _, _ in found[0]["log"]] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(found[0]["log"], one["log"], rtol=1e-5, atol=0)

    k = one["record"]["trained"]
    sums = [numbers for name, numbers in found[0]["sent"] if name == "allreduce_"]
    steps = [numbers for numbers in sums if numbers == k]
    assert len(steps) == config.steps
    if not sharded:
        # Losses and labels of each evaluation; tokens and places of padding, at the end.
        assert sum(sums) - sum(steps) == 2 * config.steps + 2
        others = sum(numbers for name, numbers in found[0]["sent"] if name != "allreduce_")
        assert others < 20_000  # messages about the run, and the losses that are logged; the model is not sent


def protected(config, sharded):
    if sharded:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    train(config)
    return numbers_of(SparseAdapter.load(config.output))


@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_to_be_kept_is_read_by_several_processes_together(config, tmp_path, sharded):
    """Three texts for two processes, of which one reads the last once more, without its counting twice."""
    texts = [{"text": "hello you there"}, {"text": "abc abc abcd"}, {"text": "bad cab"}]
    config = replace(config, dtype="float64", protect=write_lines(tmp_path / "texts.jsonl", texts))
    alone = replace(config, output=f"{config.output}-alone", accumulation=2)
    (free,) = together(1, protected, replace(alone, output=f"{config.output}-free", protect_strength=0.0), False)
    (one,) = together(1, protected, alone, False)
    found = together(2, protected, config, sharded)
    for numbers in found:
        assert_equal(numbers, found[0])
        assert_equal(numbers, one, exact=False)
    assert any((free[name][1] - numbers).abs().max() > 1e-3 for name, (_, numbers) in one.items())  # it does something


@pytest.mark.parametrize(("how", "count"), HOW_MANY)
def test_scoring_by_several_processes_gives_one_selection(alone, how, count):
    sharded = how == "fsdp2"
    sums, chosen = alone("scoring", statistics_and_selections, False)
    # Under FSDP2 the loss is scaled before its backward pass; it is a float32 number, whatever the weights are.
    rtol, atol = (1e-3, 1e-7) if sharded else (1e-10, 1e-14)
    for other_sums, other_chosen in together(count, statistics_and_selections, sharded):
        assert chosen.keys() == other_chosen.keys()
        for rule, indices in chosen.items():
            assert indices.keys() == other_chosen[rule].keys()
            assert all(torch.equal(indices[name], other_chosen[rule][name]) for name in indices), rule
        for key, wanted in sums.items():
            torch.testing.assert_close(other_sums[key], wanted, rtol=rtol, atol=atol)


def test_entries_of_sharded_weights():
    """Gemma's norms over 4 numbers leave the third process none."""
    for found in together(3, entries_of_shards):
        assert len(found) == 4
        assert all(changed == count > 0 for changed, count in found)


def test_a_loop_of_ones_own_equals_one_process():
    (one,) = together(1, plain_loops)
    for found in together(2, plain_loops):
        for way, (adapter, state, base) in one.items():
            assert any(not torch.equal(state[name], base[name]) for name in state)  # it trained
            numbers, weights, reverted = found[way]
            assert adapter.keys() == numbers.keys()
            for name in adapter:
                torch.testing.assert_close(numbers[name][1], adapter[name][1], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(weights[name], state[name], rtol=1e-9, atol=1e-12)
            assert_same_bits(base, reverted)


def test_a_mistake_is_the_mistake_of_all(config):
    first, second = together(2, mistakes, config)
    for found in (first, second):
        assert "not empty; choose another --output" in found["occupied"]
        assert "baseline 'lora' trains in one process" in found["baseline"]
        assert "is not finite at step 3; the adapter of step 2 is in" in found["nan"]
        assert "of the scoring examples of process 1 is not that of process 0" in found["labels"]
        assert "the choice of entries of process 1 is not that of process 0" in found["entries"]
        assert "FSDP1 flattens weights" in found["fsdp1"]
        assert "ZeRO-3 takes the weights apart" in found["zero3"]
    kept = SparseAdapter.load(f"{config.output}-nan")
    assert all(torch.isfinite(change.numbers).all() for change in kept.changes.values())


def test_the_launchers_words_for_what_cannot_be_done_are_refused():
    with pytest.raises(FinepointError, match="FSDP1 .* --fsdp_version 2"):
        distributed.refuse_unfit({"ACCELERATE_USE_FSDP": "true"})
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"}
    with pytest.raises(FinepointError, match="ZeRO-3 .* use FSDP2"):
        distributed.refuse_unfit(deepspeed | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})
    with pytest.raises(FinepointError, match="ZeRO-1 and ZeRO-2 .* without DeepSpeed"):
        distributed.refuse_unfit(deepspeed | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    distributed.refuse_unfit({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})


def others(config, classes):
    """A stock Trainer, a selection alone, a classifier."""
    found = {"stock": stock_trainer(f"{config.output}-stock")}
    settings = {"model": config.model, "data": config.data, "density": DENSITY, "dtype": "float64"}
    found["selection"] = dict(choose(SelectConfig(output=f"{config.output}-selection", **settings)))
    found["files"] = sorted(contents(Path(f"{config.output}-selection")))
    train(replace(config, data=classes, accumulation=2 // distributed.count()))
    found["classifier"] = numbers_of(SparseAdapter.load(config.output))
    return found


def test_stock_trainer_select_and_classifier(config, tmp_path):
    rows = [{"text": f"{a}{b} is {'good' if a < 'e' else 'bad'}", "label": "pos" if a < "e" else "neg"}
            for a in "abcdefgh" for b in "abcdefgh"]  # fmt: skip
    classes = write_lines(tmp_path / "labels.jsonl", rows)
    (one,) = together(1, others, replace(config, output=f"{config.output}-alone"), classes)
    for found in together(2, others, config, classes):
        numbers, sent = found["stock"]
        assert_equal(numbers, one["stock"][0])
        k = sum(len(indices) for indices, _ in numbers.values())
        assert [size for name, size in sent if name == "allreduce_" and size == k] == [k] * 3
        # Besides, DDP asks which parameters took part (a number each), and sends the model once as it begins.
        assert all(size in (k, len(numbers)) for name, size in sent if name == "allreduce_")
        assert max(size for name, size in sent if name == "broadcast_") < 10_000

        assert all(torch.equal(found["selection"][name], one["selection"][name]) for name in one["selection"])
        assert found["files"] == one["files"]
        assert_equal(found["classifier"], one["classifier"], exact=False)


RULES = """
import os, signal
from torch import Tensor

def raises(weight: Tensor) -> Tensor:
    if os.environ["RANK"] == "1":
        raise RuntimeError("this rule has broken down")
    return weight.abs()

def dies(weight: Tensor) -> Tensor:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return weight.abs()
"""


def launch(launcher, config, tmp_path, *flags):
    """`finepoint train` by two processes of a real launcher."""
    (tmp_path / "breaking.py").write_text(RULES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", *launcher, port, "-m", "finepoint", "train", "--model", config.model,
         "--data", config.data, "--output", config.output, "--density", "0.05", "--steps", "3", "--batch-size", "4",
         *flags],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port")  # fmt: skip


def test_a_killed_process_ends_the_job(config, tmp_path):
    done = launch(TORCHRUN, config, tmp_path, "--rule", "breaking:dies")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert not (tmp_path / "run" / "finepoint.safetensors").exists()


@pytest.mark.slow
def test_a_process_that_raises_ends_the_job_with_its_error(config, tmp_path):
    done = launch(TORCHRUN, config, tmp_path, "--rule", "breaking:raises")
    assert done.returncode != 0
    assert "this rule has broken down" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_one_process_speaks_and_a_mistake_is_no_traceback(config, tmp_path, launcher):
    done = launch(launcher, config, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert done.stderr.count("entries chosen") == 1
    assert SparseAdapter.load(config.output).count == json.loads(done.stdout)["trained"]
    done = launch(launcher, config, tmp_path)
    assert done.returncode != 0
    assert "finepoint train: " in done.stderr
    assert "is not empty; choose another --output" in done.stderr
    assert "finepoint/training" not in done.stderr  # no traceback of ours; the launcher prints its own
