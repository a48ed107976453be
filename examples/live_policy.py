"""GRPO whose answers another process writes, with a model of its own that follows the trainer's to the bit.

The trainer sends the exact values of what it trains after each step of the optimizer; the generator takes them between
two requests. Requests and answers go through pipes, as JSON. Needs pip install 'finepoint[trl]'.

    python examples/live_policy.py [--steps 20] (some minutes on two cores)
"""

import json
import os
import subprocess
import sys
from itertools import chain

import torch

import finepoint
from common import options
from finepoint import sync
from finepoint.models import load_model, load_tokenizer


def log_probabilities(model, tokenizer, prompts, completions):
    """Of each token of the completions, under the model as it is: one list a completion."""
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        found = model(**batch).logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    starts = [len(prompt) - 1 for prompt in prompts]
    return [found[i, start : start + len(completion)].tolist()
            for i, (start, completion) in enumerate(zip(starts, completions, strict=True))]  # fmt: skip


def generate_forever(model_name, address):
    """The other process: takes the newest values, answers, and so on until its stdin closes."""
    model, tokenizer = load_model(model_name), load_tokenizer(model_name)
    with sync.Receiver(model, address) as receiver:
        for line in sys.stdin:
            request = json.loads(line)
            receiver.wait(request["version"])  # on policy: these weights and no older ones
            torch.manual_seed(request["seed"])
            batch = tokenizer.pad({"input_ids": request["prompts"]}, padding_side="left", return_tensors="pt")
            written = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=request["new_tokens"],
                                     pad_token_id=tokenizer.pad_token_id)  # fmt: skip
            written = written[:, batch["input_ids"].shape[1] :].tolist()
            completions = [cut(row, tokenizer.eos_token_id) for row in written]
            found = log_probabilities(model, tokenizer, request["prompts"], completions)
            print(json.dumps({"version": receiver.version, "completions": completions, "logprobs": found}), flush=True)


def cut(row, end):
    """A completion up to and with its end token."""
    return row[: row.index(end) + 1] if end in row else row


class Generator:
    """The other process, as the trainer sees it."""

    def __init__(self, model_name, address):
        command = [sys.executable, __file__, "--generate", model_name, address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError("the generator is gone")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    from datasets import Dataset

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # a trainer's own generation is what rollout_func replaces
    from trl import GRPOConfig, GRPOTrainer

    given = options(__doc__, steps=20, limit=45)
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    finepoint.sparsify(model, density=1e-3)
    sums = [{"prompt": f"Question: {a} + {b} =\nAnswer:", "answer": str(a + b)} for a in range(10) for b in range(a)]
    sender = sync.Sender(finepoint.tuner_of(model), "127.0.0.1:0")
    generator = Generator(given.model, sender.address)
    gaps, rewards = [], []

    def rollout(prompts, trainer):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        answer = generator.ask(version=sender.version, prompts=ids, seed=trainer.state.global_step, new_tokens=4)
        assert answer["version"] == sender.version
        ours = log_probabilities(model, tokenizer, ids, answer["completions"])
        both = zip(chain(*ours), chain(*answer["logprobs"]), strict=True)
        gaps.append(max(abs(a - b) for a, b in both))
        return {"prompt_ids": ids, "completion_ids": answer["completions"], "logprobs": answer["logprobs"]}

    def right(completions, answer, **_):
        found = [float(text.strip().startswith(wanted)) for text, wanted in zip(completions, answer, strict=True)]
        rewards.append(sum(found) / len(found))
        return found

    arguments = GRPOConfig(
        f"{given.output}/live", max_steps=given.steps, per_device_train_batch_size=8, num_generations=8,
        max_completion_length=4, learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", bf16=False,
        report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = GRPOTrainer(model, right, arguments, train_dataset=Dataset.from_list(sums[: given.limit]),
                          processing_class=tokenizer, rollout_func=rollout,
                          callbacks=[sync.SendEachStep(sender)])  # fmt: skip
    trainer.train()
    generator.close()
    sender.close()
    finepoint.save(model, f"{given.output}/live-policy", overwrite=True)
    half = max(1, len(rewards) // 2)
    print(f"mean reward of the first {half} steps {sum(rewards[:half]) / half:.3f}, "
          f"of the last {half} {sum(rewards[-half:]) / half:.3f}")  # fmt: skip
    print(f"{sender.version} versions sent; largest difference of log-probabilities {max(gaps)}")


if __name__ == "__main__":
    generate_forever(*sys.argv[2:]) if sys.argv[1:2] == ["--generate"] else main()
