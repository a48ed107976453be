"""The example server: whoever asks gets what the adapter that was named writes, whoever else asks meanwhile."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import finepoint
from conftest import make_tokenizer, tiny_llama

pytest.importorskip("fastapi")
PROMPTS = ("Q: 1 + 2 ?\nA:", "Q: 3 ?", "Q: 12 + 30 + 4 ?\nA:")


@pytest.fixture(scope="module")
def served():
    spec = importlib.util.spec_from_file_location("serve", Path(__file__).parent.parent / "examples" / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    model, tokenizer = tiny_llama().eval(), make_tokenizer()
    tokenizer.padding_side = "left"
    adapters, alone = finepoint.AdapterSet(model), {None: tiny_llama().eval()}
    for seed, name in enumerate(("sums", "words")):
        generator = torch.Generator().manual_seed(seed)
        tuned = finepoint.sparsify(tiny_llama(), "random", 0.2, seed=seed)
        for delta in finepoint.tuner_of(tuned).parameters():
            delta.data = torch.randn(delta.shape, generator=generator)
        adapter = finepoint.tuner_of(tuned).adapter()
        adapters.add(name, adapter)
        alone[name] = finepoint.load(tiny_llama(), adapter).eval()
    from starlette.testclient import TestClient

    server = serve.Server(model, tokenizer, adapters, batch=4)
    return TestClient(serve.application(server, ["sums", "words"])), alone, tokenizer


def by_itself(model, tokenizer, prompt, length):
    ids = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_requests_together_get_what_each_would_get_alone(served):
    client, alone, tokenizer = served
    asked = [(prompt, name, length) for length in (6, 4) for prompt in PROMPTS for name in (None, "sums", "words")]

    def ask(each):
        return client.post("/generate", json={"prompt": each[0], "adapter": each[1], "new_tokens": each[2]}).json()

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, asked))
    expected = [by_itself(alone[name], tokenizer, prompt, length) for prompt, name, length in asked]
    assert [answer["text"] for answer in answers] == expected
    assert [answer["adapter"] for answer in answers] == [name for _, name, _ in asked]
    assert len(set(expected)) > 3  # the adapters do write different things
    assert all(answer["generate_ms"] >= 0 and 1 <= answer["together"] <= 4 for answer in answers)


def test_what_is_not_there_is_said(served):
    client, *_ = served
    assert client.get("/adapters").json() == ["sums", "words"]
    missing = client.post("/generate", json={"prompt": "Q", "adapter": "sum"})
    assert missing.status_code == 404
    assert "no adapter 'sum'; there are sums, words" in missing.json()["detail"]
    assert client.post("/generate", json={"prompt": ""}).status_code == 422
