"""DPO and GRPO: their rows, rewards and trainers of TRL's, and what is measured before and after."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Protocol

import torch

from finepoint.alignment.resolve import REWARDS as REWARDS  # its former place, and that of the rewards
from finepoint.alignment.resolve import WHOLE, reward_named
from finepoint.alignment.resolve import exact as exact
from finepoint.alignment.resolve import line as line
from finepoint.alignment.resolve import number as number
from finepoint.alignment.settings import AlignConfig
from finepoint.data.batches import context_length
from finepoint.data.examples import (
    Choices,
    Completion,
    Example,
    Pair,
    Preference,
    answers_of,
    read_examples,
    read_pairs,
)
from finepoint.data.sources import name_of
from finepoint.data.tokens import (
    around,
    asking,
    encode_answers,
    encode_preferences,
    encode_prompts,
    last_of,
    refuse_beyond,
    warn_of_truncation,
    without_special,
)
from finepoint.errors import FinepointError
from finepoint.evaluation.generation import warn_of_long_references
from finepoint.evaluation.scoring import choice_likelihoods, token_log_likelihoods
from finepoint.huggingface.reference import Reference
from finepoint.training.trainer import SparseCheckpoints
from finepoint.training.writing import written


class Alignment(Protocol):
    """What a run of `finepoint align` asks of its method."""

    def read(self, data: Any, need: bool = False) -> list[Any]:
        """The rows of a file; `need`: its columns are to be those that are named."""

    def examples(self, rows: Sequence[Any]) -> list[Example]:
        """What a rule that looks at gradients scores on."""

    def trainer(self, model: Any, tokenizer: Any, rows: Sequence[Any], reference: Reference, arguments: Any) -> Any:
        """TRL's trainer, with one model in memory; its checkpoints ask for its attribute `tuner`."""

    def measure(self, model: Any, tokenizer: Any, rows: Sequence[Any]) -> "Measured":
        """How good the model is on the rows, as it stands."""


@dataclass(frozen=True)
class Measured:
    """Means over rows, and the numbers of each row behind them."""

    means: dict[str, float]
    rows: list[float]


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (arXiv:2305.18290): chosen answers become likelier than rejected ones."""

    config: AlignConfig

    def read(self, data: Any, need: bool = False) -> list[Preference]:
        return read_pairs(data, self.config.columns, self.config.seed, need)

    def examples(self, rows: Sequence[Preference]) -> list[Example]:
        return [answers_of(pair)[0] for pair in rows]

    def trainer(
        self, model: Any, tokenizer: Any, rows: Sequence[Preference], reference: Reference, arguments: Any
    ) -> Any:
        from trl import DPOConfig, DPOTrainer

        class SparseDPOTrainer(SparseCheckpoints, DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
                return dataset  # in tokens already, by our contract and not by TRL's

        limit = context_length(model, self.config.max_length)
        encoded = self._encoded(model, tokenizer, rows, limit, limit // 4)
        encoded = [(p, c[: limit - len(p)], r[: limit - len(p)]) for p, c, r in encoded]
        given = DPOConfig(**arguments, beta=beta_of(self.config), max_length=limit, truncation_mode="keep_end")
        return SparseDPOTrainer(
            model, reference, given, processing_class=asking(tokenizer, model),
            train_dataset=dataset({"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in encoded),
        )  # fmt: skip

    def _encoded(
        self, model: Any, tokenizer: Any, rows: Sequence[Preference], limit: int, least: int = 1
    ) -> list[tuple[list[int], list[int], list[int]]]:
        """Tokens of prompts and both answers; a prompt loses its beginning where it does not fit with the longer, but
        keeps its `least`."""
        encoded = encode_preferences(tokenizer, rows, model)
        warn_of_truncation([len(p) + max(len(c), len(r)) for p, c, r in encoded], limit, "pair")
        front, _ = around(tokenizer)  # which stays, where TRL would cut it off
        return [(last_of(p, max(1, least, limit - max(len(c), len(r))), front), c, r) for p, c, r in encoded]

    def measure(self, model: Any, tokenizer: Any, rows: Sequence[Preference]) -> Measured:
        """`accuracy`: share of pairs whose chosen answer is the likelier; `margin`: by how much, in nats, on average.

        Summed over the answer's tokens, without an end token (of a conversation with what ends the turn). The rows are
        the margins.
        """
        limit = context_length(model, self.config.max_length)
        texts = [Choices(pair.prompt, (pair.chosen, pair.rejected), 0, where=pair.where)
                 for pair in rows if isinstance(pair, Pair)]  # fmt: skip
        scored = choice_likelihoods(model, tokenizer, texts, limit) if texts else self._scored(
            model, tokenizer, rows, limit)  # fmt: skip
        margins = [chosen - rejected for chosen, rejected in scored]
        return Measured({"accuracy": mean(m > 0 for m in margins), "margin": mean(margins)}, margins)

    def _scored(self, model: Any, tokenizer: Any, rows: Sequence[Preference], limit: int) -> list[list[float]]:
        """The log-likelihood of both answers of pairs of conversations."""
        encoded = self._encoded(model, tokenizer, rows, limit)
        for pair, (_, *answers) in zip(rows, encoded, strict=True):
            if (longest := max(map(len, answers))) > limit:
                raise FinepointError(f"{pair.place}an answer has {longest} tokens, and the model is given {limit} at "
                                     "most; shorten it, or raise --max-length")  # fmt: skip
        requests = [(prompt, answer) for prompt, *answers in encoded for answer in answers]
        sums = iter([float(found.sum()) for found in token_log_likelihoods(model, tokenizer, requests, limit)])
        return [[next(sums), next(sums)] for _ in rows]


@dataclass(frozen=True)
class GRPO:
    """Group relative policy optimisation (arXiv:2402.03300): answers better than their group's mean become likelier."""

    config: AlignConfig

    def read(self, data: Any, need: bool = False) -> list[Completion]:
        rows = read_examples(data, self.config.columns, self.config.seed, need)
        if not isinstance(rows[0], Completion):
            raise FinepointError(
                f'{name_of(data)}: grpo compares answers with a reference; expected {{"prompt", "completion"}}'
            )
        return rows  # type: ignore[return-value]

    def examples(self, rows: Sequence[Completion]) -> list[Example]:
        return list(rows)

    def trainer(
        self, model: Any, tokenizer: Any, rows: Sequence[Completion], reference: Reference, arguments: Any
    ) -> Any:
        from trl import GRPOConfig, GRPOTrainer

        if self.config.reward in WHOLE:
            warn_of_long_references(tokenizer, encode_answers(tokenizer, rows), self.config.new_tokens)

        class SparseGRPOTrainer(SparseCheckpoints, GRPOTrainer):
            def _tokenize_prompts(self, prompts: list[str]) -> Any:
                ids = encode_prompts(tokenizer, [Completion(prompt, "") for prompt in prompts])
                return ids, *super()._tokenize_prompts(prompts)[1:]

        given = GRPOConfig(
            **arguments, beta=0.0, num_generations=self.config.generations, temperature=self.config.temperature,
            max_completion_length=self.config.new_tokens,
        )  # fmt: skip
        refuse_beyond(model, tokenizer, encode_prompts(tokenizer, rows), rows)
        # Not by its own name: TRL calls what the model writes the completion.
        asked = dataset({"prompt": row.prompt, "reference": without_special(tokenizer, row.completion)} for row in rows)
        trainer = SparseGRPOTrainer(model, self._rewards(), given, train_dataset=asked,
                                    processing_class=asking(tokenizer, model))  # fmt: skip
        # With beta given above, TRL would have loaded a second model.
        trainer.beta = beta_of(self.config)
        trainer.ref_model = reference if trainer.beta else None
        return trainer

    def _rewards(self) -> Any:
        reward = reward_named(self.config.reward)

        def rewards(completions: list[str], reference: list[str], **_: Any) -> list[float]:
            return [float(reward(answer, right)) for answer, right in zip(completions, reference, strict=True)]

        return rewards

    def measure(self, model: Any, tokenizer: Any, rows: Sequence[Completion]) -> Measured:
        """`reward`: the mean reward of what the model writes greedily. The rows are the rewards."""
        reward = reward_named(self.config.reward)
        limit = context_length(model, self.config.max_length)
        needed = [len(ids) for ids in encode_answers(tokenizer, rows)]
        answers = written(model, tokenizer, encode_prompts(tokenizer, rows), limit, self.config.new_tokens,
                          needed=needed)  # fmt: skip
        references = [without_special(tokenizer, row.completion) for row in rows]
        found = [float(reward(answer.text, right)) for answer, right in zip(answers, references, strict=True)]
        return Measured({"reward": mean(found)}, found)


METHODS: dict[str, Callable[[AlignConfig], Alignment]] = {"dpo": DPO, "grpo": GRPO}


def beta_of(config: AlignConfig) -> float:
    """The strength of the pull towards the reference; the methods' customary ones where none is given."""
    if config.beta is not None:
        return config.beta
    return 0.1 if config.method == "dpo" else 0.0


def dataset(rows: Iterable[dict[str, Any]]) -> Any:
    """Rows as TRL takes them."""
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def on_cpu() -> bool:
    """Whether training will be on the CPU."""
    return not torch.cuda.is_available()
