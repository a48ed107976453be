"""An adapter in vLLM, on the CPU: `make test-vllm`, in an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import finepoint
from conftest import make_tokenizer
from finepoint.errors import FinepointError
from finepoint.exchange import vllm_engine

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
PROMPT = [5, 6, 7, 8, 20, 21, 22, 23, 9, 10, 11, 12, 33, 34, 35, 36, 40]  # longer than a block of the prefix cache
STEPS = 6


def untrained(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0,
                         bos_token_id=1, eos_token_id=2, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make(folder):
    """A base, adapters of it (of linear layers, of norms too, of the tied embedding too), one of another base.

    In a process of its own: vLLM looks through all modules that are imported when it starts, and fails at numba's.
    """
    untrained().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for name, targets, seed in (("a", "linear", 0), ("b", "all", 0), ("tied", "all", 0), ("other", "linear", 1)):
        chosen = finepoint.select(untrained(seed), rule="random", density=0.1, targets=targets, seed=3)
        left_out = "embed_tokens" if name == "b" else " "
        chosen = {weight: indices for weight, indices in chosen.items() if left_out not in weight}
        model = finepoint.sparsify(untrained(seed), indices=chosen)
        generator = torch.Generator().manual_seed(len(name))
        for delta in finepoint.tuner_of(model).parameters():
            delta.data = torch.randn(delta.shape, generator=generator) * 0.3
        finepoint.save(model, folder / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `make` makes."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run([sys.executable, __file__, folder], check=True)
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return folder


def engine_on(folder, **extra):
    from vllm import LLM

    # The format is known by the entry point.
    return LLM(str(folder / "base"), dtype="float32", max_model_len=64, enforce_eager=True, max_num_seqs=4,
               load_format="finepoint", model_loader_extra_config={"adapter": str(folder / "a")} | extra)  # fmt: skip


@pytest.fixture(scope="module")
def served(made):
    return made, engine_on(made)


def asked(engine):
    """What the engine writes greedily, and the log-probability of each token."""
    from vllm import SamplingParams

    (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], use_tqdm=False, sampling_params=SamplingParams(
        max_tokens=STEPS, temperature=0, logprobs=0, ignore_eos=True))  # fmt: skip
    written = answer.outputs[0]
    return list(written.token_ids), [next(iter(step.values())).logprob for step in written.logprobs]


def expected(folder, name):
    """The same of transformers, with the adapter applied."""
    model = untrained()
    if name:
        finepoint.load(model, folder / name)
    return greedy(model)


def greedy(model):
    ids, found = list(PROMPT), []
    with torch.no_grad():
        for _ in range(STEPS):
            found.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1))
            ids.append(int(found[-1].indices))
    return ids[len(PROMPT) :], [float(best.values) for best in found]


def assert_alike(engine, folder, name):
    ids, likelihoods = asked(engine)
    wanted, known = expected(folder, name)
    assert ids == wanted
    assert likelihoods == pytest.approx(known, abs=1e-4)


def test_an_adapter_is_laid_over_the_weights_and_switched_while_the_engine_runs(served):
    folder, engine = served
    assert len({tuple(expected(folder, name)[1]) for name in (None, "a", "b")}) == 3  # or nothing would be tested
    assert_alike(engine, folder, "a")
    for name in (None, "a", "b", "a", None):
        vllm_engine.switch(engine, name and str(folder / name))
        assert_alike(engine, folder, name)


def test_an_engine_whose_weights_are_packed_has_no_model_to_write_to(served):
    with pytest.raises(FinepointError, match=r"weights are packed; make it with .*in_place"):
        vllm_engine.model_of(served[1])


def test_an_adapter_of_another_base_is_refused_and_the_engine_stays_as_it_is(served):
    folder, engine = served
    vllm_engine.switch(engine, str(folder / "a"))
    with pytest.raises(FinepointError, match="not those of the base it was trained on"):
        vllm_engine.switch(engine, str(folder / "other"))
    assert_alike(engine, folder, "a")


def test_an_adapter_of_a_tied_weight_is_not_switched_to(served):
    folder, engine = served
    vllm_engine.switch(engine, str(folder / "b"))
    with pytest.raises(FinepointError, match=r"changes model.embed_tokens.weight, which is tied to lm_head.weight"):
        vllm_engine.switch(engine, str(folder / "tied"))
    assert_alike(engine, folder, "b")


def test_another_dtype_than_the_trained_one_is_refused(served):
    folder, _ = served
    with pytest.raises(FinepointError, match="was trained in float32 and vLLM computes with bfloat16; start it with "):
        vllm_engine.patches_for(str(folder / "a"), str(folder / "base"), torch.bfloat16)


def test_a_weight_that_does_not_come_is_told(served):
    folder, _ = served
    with pytest.raises(FinepointError, match="vLLM did not read"):
        list(vllm_engine.laid_over(iter(()), str(folder / "a"), str(folder / "base"), torch.float32))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
