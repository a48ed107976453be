"""Several adapters on one base behind HTTP: each request names the one that is to answer it.

Requests that wait are answered together in one batch, each row with the adapter that it names.
Needs pip install fastapi uvicorn.

    python examples/serve.py --model smollm2 --adapters movies=adapters/movies words=adapters/words
    curl localhost:8000/generate -H 'Content-Type: application/json' \
        -d '{"prompt": "Text: A warm and clever film.\\nSentiment:", "adapter": "movies", "new_tokens": 4}'
"""

import argparse
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

import finepoint
from finepoint.models import load_model, load_tokenizer


class Request(BaseModel):
    """What a client asks; without an adapter the base answers."""

    prompt: str = Field(min_length=1)
    adapter: str | None = None
    new_tokens: int = Field(default=32, ge=1, le=512)


class Server:
    """One model, its adapters, and the requests that wait; one thread of its own asks the model."""

    def __init__(self, model: Any, tokenizer: Any, adapters: finepoint.AdapterSet, batch: int = 8) -> None:
        self.model, self.tokenizer, self.adapters, self.batch = model, tokenizer, adapters, batch
        self.waiting: deque[tuple[Request, Future[dict[str, Any]]]] = deque()
        self.called = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, request: Request) -> dict[str, Any]:
        """Waits for the answer."""
        answer: Future[dict[str, Any]] = Future()
        with self.called:
            self.waiting.append((request, answer))
            self.called.notify()
        return answer.result()

    def _work(self) -> None:
        while True:
            with self.called:
                self.called.wait_for(lambda: self.waiting)
                together = [self.waiting.popleft() for _ in range(min(self.batch, len(self.waiting)))]
            try:
                answers = self._answers([request for request, _ in together])
            except Exception as error:  # the clients get it, and the thread lives on
                for _, answer in together:
                    answer.set_exception(error)
                continue
            for (_, answer), found in zip(together, answers, strict=True):
                answer.set_result(found)

    def _answers(self, requests: list[Request]) -> list[dict[str, Any]]:
        started = time.perf_counter()
        inputs = self.tokenizer([request.prompt for request in requests], return_tensors="pt", padding=True)
        with self.adapters.rows([request.adapter for request in requests]) as model:
            written = model.generate(**inputs.to(model.device), do_sample=False,
                                     max_new_tokens=max(request.new_tokens for request in requests),
                                     pad_token_id=self.tokenizer.pad_token_id)  # fmt: skip
        texts = [self.tokenizer.decode(row[: request.new_tokens], skip_special_tokens=True) for row, request
                 in zip(written[:, inputs["input_ids"].shape[1] :], requests, strict=True)]  # fmt: skip
        told = {"together": len(requests), "generate_ms": (time.perf_counter() - started) * 1e3}
        return [{"text": text, "adapter": request.adapter, **told}
                for text, request in zip(texts, requests, strict=True)]  # fmt: skip


def application(server: Server, names: list[str]) -> FastAPI:
    """The two addresses: /adapters lists, /generate answers."""
    app = FastAPI(title="finepoint adapters")

    @app.get("/adapters")
    def adapters() -> list[str]:
        return names

    @app.post("/generate")
    def generate(request: Request) -> dict[str, Any]:
        if request.adapter is not None and request.adapter not in names:
            raise HTTPException(404, f"no adapter {request.adapter!r}; there are {', '.join(names)}")
        return server.ask(request)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id or smollm2")
    parser.add_argument("--adapters", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    tokenizer.padding_side = "left"  # so that all prompts of a batch end where writing begins
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapters = finepoint.AdapterSet(model)
    folders = dict(each.split("=", 1) for each in given.adapters)
    for name, folder in folders.items():
        adapters.add(name, finepoint.SparseAdapter.load(folder))
    uvicorn.run(application(Server(model.eval(), tokenizer, adapters), list(folders)), port=given.port)


if __name__ == "__main__":
    main()
