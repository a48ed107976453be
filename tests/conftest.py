import copy
import gc
import json
import logging
import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.register_assert_rewrite("desk")
os.environ["FINEPOINT_KERNELS"] = "fixed"  # no test's numbers shall depend on what was fast just now
# None shall wait for a hub either, here or in a process of its own, unless it says so.
huggingface_hub.constants.HF_HUB_OFFLINE = os.environ.setdefault("HF_HUB_OFFLINE", "1") == "1"
torch.set_num_threads(min(2, torch.get_num_threads()))

VOCABULARY = 64
LONG = ("test_plan", "test_compare", "test_baselines", "test_end_to_end", "test_density", "test_refresh",
        "test_quantised", "test_distributed", "test_docs")  # fmt: skip
"""The files that take longest. Run side by side they come first: begun last, they would be waited for."""


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    """What the imports have made stays: no need to look through it whenever a training has garbage collected."""
    gc.collect()
    gc.freeze()


def tiny_llama(dtype=torch.float32, tied=True, seed=0, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gemma(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, sliding_window=8, initializer_range=0.2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).to(dtype).eval()


def random_batches(count=3, rows=4, tokens=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        labels[0, -2:] = -100  # rows of unequal length
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def snapshot(model):
    """All bits of a model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(bits(value), bits(after[name])), name


def assert_same_tensors(folder, other):
    """Two folders hold the same files of tensors, bit for bit."""
    found, wanted = ({file.name: load_file(file) for file in Path(each).glob("*.safetensors")}
                     for each in (folder, other))  # fmt: skip
    assert found.keys() == wanted.keys()
    assert found
    for name in found:
        assert_same_bits(found[name], wanted[name])


@pytest.fixture(autouse=True)
def log_as_it_was():
    """The command line takes finepoint's log for its process; a test shall find it as if none had run before."""
    for name in ("finepoint", "finepoint.training"):
        log = logging.getLogger(name)
        log.handlers.clear()
        log.setLevel(logging.NOTSET)
        log.propagate = True


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture(params=["llama", "llama-untied", "gemma"])
def model(request):
    return {"llama": tiny_llama, "llama-untied": lambda: tiny_llama(tied=False), "gemma": tiny_gemma}[request.param]()


@pytest.fixture
def batches():
    return random_batches()


@pytest.fixture
def twin():
    return copy.deepcopy


def make_tokenizer():
    """A real tokenizer, one token a character, trained on nothing: enough for tiny models."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ .,:!?\n0123456789"
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(characters)}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny model with its tokenizer, on disk like any Hugging Face model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def choice_file(tmp_path):
    """A task a tiny model can learn: the last letter decides."""
    letters = "abcdefgh"
    rows = [
        {"prompt": f"{a}{b}{c}:", "choices": [" yes", " no"], "answer": int(c > "d")}
        for a in letters for b in letters[:4] for c in letters
    ]  # fmt: skip
    return write_lines(tmp_path / "choices.jsonl", rows)


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """A folder with what pages and examples take as given: `my-model`, and small files in place of real data."""
    from documents import prepare

    folder = tmp_path_factory.mktemp("given")
    prepare(folder)
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A process that starts `finepoint` and Python scripts in milliseconds."""
    from warm import Warm

    server = Warm(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def finepoint(warm):
    """Runs a command to its end, with the exit status that is expected."""

    def run(*arguments, status=0):
        done = warm.run("finepoint", *map(str, arguments), folder=Path.cwd(), stderr=subprocess.PIPE,
                        timeout=600)  # fmt: skip
        assert done.returncode == status, done.stderr
        if status:
            assert "Traceback" not in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
            assert done.stdout == ""
        return done

    return run


@pytest.fixture
def ctrl_c():
    """Python's own handler, as in a terminal: where tests run in the background the signal may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what a library that an earlier test used may handle
    yield
    signal.signal(signal.SIGTERM, ended)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "another was left"


@contextmanager
def interrupted_at(batch):
    """Inside, training is broken off by ctrl-C at the given batch, which must happen."""
    from finepoint.training.trainer import SparseTrainer

    step, done = SparseTrainer.training_step, []

    def breaking(self, *args, **kwargs):
        done.append(1)
        if len(done) == batch:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", breaking)
        with pytest.raises(KeyboardInterrupt):
            yield
