"""Kinds of model: what a batch, a step and an adapter mean is the same for all of them, or they are refused."""

import json
from contextlib import nullcontext

import pytest
import torch
import transformers as t

import finepoint
from conftest import assert_same_bits, snapshot, tiny_llama, write_lines
from finepoint.adapters.adapter import SparseAdapter
from finepoint.adapters.inspection import facts
from finepoint.data.batches import IGNORED, Collator, Row
from finepoint.errors import FinepointError
from finepoint.evaluation.evaluate import evaluate_config
from finepoint.evaluation.scoring import class_logits, token_log_likelihoods
from finepoint.evaluation.settings import EvalConfig
from finepoint.exchange.formats import export
from finepoint.models.loading import class_order, load_model
from finepoint.selection.passes import counts_every_label
from finepoint.selection.statistics import stream_statistics
from finepoint.training.context import prepare
from finepoint.training.loss import completion_loss
from finepoint.training.run import train
from finepoint.training.settings import TrainConfig
from finepoint.training.writing import written
from test_loss import softcapped

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 140, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


def built(config, factory=t.AutoModelForCausalLM, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return factory.from_config(config, **kwargs).to(dtype).eval()


def classifier(config, dtype=torch.float32):
    config.num_labels = 3
    return built(config, t.AutoModelForSequenceClassification, dtype)


@pytest.mark.parametrize("kind", ["llama", "gemma", "llama classifier", "bert classifier"])
def test_the_batches_of_a_step_weigh_by_their_labels_however_it_is_split(kind):
    """Models that take the number of labels of a step, and models that do not."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (8, 6), generator=generator)
    labels = torch.where(torch.rand(8, 6, generator=generator) < 0.5, ids, -100)
    if "classifier" in kind:
        config = t.LlamaConfig(**SMALL) if "llama" in kind else t.BertConfig(**SMALL)
        model, labels = classifier(config, torch.float64), ids[:, 0] % 3
        count = 8
    else:
        model = tiny_llama(torch.float64) if kind == "llama" else softcapped().double()
        count = int((labels[:, 1:] != -100).sum())
    expected = model(input_ids=ids, labels=labels).loss
    for sizes in ([8], [2, 2, 2, 2], [1] * 8, [5, 3]):
        parts = zip(ids.split(sizes), labels.split(sizes), strict=True)
        batches = [{"input_ids": ids, "labels": labels} for ids, labels in parts]
        found = sum(completion_loss(model, batch, count) for batch in batches if (batch["labels"] != -100).any())
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("baseline", [None, "full", "lora"])
def test_loss_and_gradient_of_a_classifiers_step_do_not_depend_on_accumulation(tmp_path, model_folder, baseline):
    rows = [{"text": f"{'ab' * n} {c}", "label": c} for n, c in enumerate("xyxyyxyx", 1)]
    data, found = write_lines(tmp_path / "rows.jsonl", rows), []
    for size, times in ((8, 1), (2, 4), (1, 8)):
        config = TrainConfig(model=str(model_folder), data=data, output=str(tmp_path / f"{size}"), baseline=baseline,
                             batch_size=size, accumulation=times, steps=1, warmup=0, dtype="float64")  # fmt: skip
        record = train(config)
        log = (tmp_path / f"{size}" / "log.jsonl").read_text().splitlines()
        found.append((record["loss"], next(row["grad_norm"] for row in map(json.loads, log) if "grad_norm" in row)))
    assert found[0][1] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def folder_of(path, model, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


DECODERS = {
    "gpt-neo, window 8": t.GPTNeoConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, window_size=8,
                                        attention_types=[[["global", "local"], 1]], max_position_embeddings=140,
                                        intermediate_size=24, initializer_range=0.3),
    "rwkv": t.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16,
                         intermediate_size=24),
    "recurrent gemma": t.RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, num_key_value_heads=1, lru_width=16,
                                              attention_window_size=8, head_dim=4),
    "bloom": t.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.3),
    "roberta decoder": t.RobertaConfig(**SMALL, is_decoder=True),
    "phi 3, long rope": t.Phi3Config(**SMALL, num_key_value_heads=2, original_max_position_embeddings=10, rope_scaling={
        "rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [3.0, 7.0],
        "original_max_position_embeddings": 10}),
}  # fmt: skip
ROWS = [torch.randint(4, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 17, 30)]


@pytest.mark.parametrize("name", DECODERS)
def test_batches_choices_and_generation_give_what_each_example_gives_alone(name, tokenizer):
    model = built(DECODERS[name])
    rows = [Row(ids, [IGNORED] * 3 + ids[3:]) for ids in ROWS]
    collator = Collator.of(model, tokenizer, ROWS)
    assert (collator.side == "none") == (name == "phi 3, long rope")
    labels = sum(len(ids) - 3 for ids in ROWS)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([r.ids]), labels=torch.tensor([r.labels])).loss for r in rows]
        expected = sum(loss * (len(ids) - 3) for loss, ids in zip(alone, ROWS, strict=True)) / labels
        found = sum(completion_loss(model, batch, labels) for batch in collator.batches(rows, 4))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    prompt = ROWS[3][:20]  # longer than any window
    requests = [(prompt, ROWS[3][20:28]), (prompt, ROWS[2][:9]), (prompt, ROWS[1][:1]), (ROWS[0][:2], ROWS[0][2:])]
    for (context, answer), values in zip(requests, token_log_likelihoods(model, tokenizer, requests, 140), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + answer])).logits[0].log_softmax(-1)
        own = logits[len(context) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(values, own, rtol=1e-4, atol=1e-4)
    together = [answer.text for answer in written(model, tokenizer, ROWS[:3], 140, 4)]
    assert together == [written(model, tokenizer, [ids], 140, 4)[0].text for ids in ROWS[:3]]


ENCODERS = {
    "bert": t.BertConfig(**SMALL), "roberta": t.RobertaConfig(**SMALL), "xlnet": t.XLNetConfig(
        vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=24, initializer_range=0.3),
    "t5": t.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, pad_token_id=0,
                     eos_token_id=2, decoder_start_token_id=0),
    "fnet": t.FNetConfig(**SMALL), "gpt2": t.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=140,
                                                        pad_token_id=0, initializer_range=0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_a_classifier_gives_every_row_of_a_batch_what_it_gives_alone(name, tokenizer):
    model = classifier(ENCODERS[name])
    rows = [[1, *ids, 2] for ids in ROWS]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    collator = Collator.of(model, tokenizer)
    batches = [[row] for row in rows] if collator.side == "none" else [rows]
    assert (collator.side == "none") == (name == "fnet")  # Fourier transforms mix all there is
    torch.testing.assert_close(torch.cat([class_logits(model, batch, collator) for batch in batches]), alone)


@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_a_model_that_sees_later_tokens_is_no_language_model(name, tokenizer):
    with pytest.raises(FinepointError, match="is no causal language model"):
        Collator.of(built(ENCODERS[name]), tokenizer)
    decoder = built(t.BertConfig(**SMALL, is_decoder=True))
    assert Collator.of(decoder, tokenizer).causal  # negative control


@pytest.mark.parametrize("kind", ["t5", "bart", "bert without a head"])
def test_checkpoints_that_hold_no_language_model_are_refused(kind, tmp_path, tokenizer):
    bart = t.BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24)  # fmt: skip
    model = {"t5": lambda: t.T5ForConditionalGeneration(ENCODERS["t5"]),
             "bart": lambda: t.BartForConditionalGeneration(bart),
             "bert without a head": lambda: t.BertModel(t.BertConfig(**SMALL, is_decoder=True))}[kind]()  # fmt: skip
    folder = folder_of(tmp_path / "m", model, tokenizer)
    with pytest.raises(FinepointError, match="encoder-decoder" if kind != "bert without a head" else "drawn at random"):
        load_model(folder, device="cpu")


def test_weights_that_were_drawn_on_loading_are_stored_and_exported(tmp_path, tokenizer):
    """BERT as a masked language model has no pooler, and its classifier draws one."""
    torch.manual_seed(0)
    folder = folder_of(tmp_path / "bert", t.BertForMaskedLM(t.BertConfig(**SMALL)), tokenizer)
    data = write_lines(
        tmp_path / "rows.jsonl", [{"text": f"{'ab' * n} {c}", "label": c} for n, c in enumerate("xyxy", 1)]
    )
    config = TrainConfig(model=folder, data=data, output=str(tmp_path / "a"), steps=1, density=0.05, seed=3)
    train(config)
    adapter = SparseAdapter.load(tmp_path / "a")
    assert {name for name, change in adapter.changes.items() if change.kind == "full"} == {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # fmt: skip
    model = load_model(folder, labels=adapter.info["labels"], seed=7, device="cpu")
    adapter.apply(model)
    export(folder, str(tmp_path / "a"), "merged", str(tmp_path / "whole"))
    elsewhere = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    ids = torch.tensor([ROWS[2]])
    assert_same_bits(snapshot(model), snapshot(elsewhere))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, elsewhere(input_ids=ids).logits)


def sorted_out(**kwargs):
    config = t.LlamaConfig(**SMALL, num_key_value_heads=2, **kwargs)
    config.architectures = ["LlamaForSequenceClassification"]
    return config


def test_a_base_that_is_a_classifier_keeps_the_order_of_its_labels(tmp_path, tokenizer):
    own = {0: "sport", 1: "money", 2: "art"}
    base = built(sorted_out(id2label=own, label2id={name: i for i, name in own.items()}),
                 t.AutoModelForSequenceClassification)  # fmt: skip
    folder = folder_of(tmp_path / "base", base, tokenizer)
    assert class_order(base.config, ["art", "money", "sport"]) == ["sport", "money", "art"]
    assert class_order(base.config, ["0", "1", "2"]) == ["0", "1", "2"]
    assert class_order(t.LlamaConfig(**SMALL), ["a", "b"]) == ["a", "b"]
    other = load_model(folder, labels=["art", "money", "sport"], device="cpu")  # as earlier adapters have them
    ids = torch.tensor([ROWS[1]])
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, base(input_ids=ids).logits[:, [2, 1, 0]])
    stored = SparseAdapter({}, {"task": "classification", "labels": ["art", "money", "sport"]})
    assert not stored.problems(other)
    assert "in this order" in stored.problems(base)[0]


@pytest.mark.parametrize("named", [{"money": "money", "art": "art"}, {"money": "1", "art": "2"}])
def test_data_with_some_labels_of_a_base_train_its_own_head(tmp_path, tokenizer, named, caplog):
    own = ["sport", "money", "art"]
    config = sorted_out(id2label=dict(enumerate(own)), label2id={name: i for i, name in enumerate(own)})
    base = built(config, t.AutoModelForSequenceClassification)
    folder = folder_of(tmp_path / "base", base, tokenizer)
    rows = [{"text": f"{'ab' * n} c", "label": named[name]} for n, name in enumerate(["art", "money"] * 2, 1)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    train(TrainConfig(model=folder, data=data, output=str(tmp_path / "a"), steps=1, density=0.05, lr=1e-4))
    assert "a classifier of 3 labels, and the data have 2 of them: " in caplog.text
    assert "money" in caplog.text
    adapter = SparseAdapter.load(tmp_path / "a")
    assert adapter.info["labels"] == (own if "art" in named.values() else ["0", "1", "2"])
    head = adapter.changes["score.weight"].numbers
    torch.testing.assert_close(head, base.score.weight, atol=1e-3, rtol=0)  # where it was, in its own order
    found = evaluate_config(EvalConfig(model=folder, adapter=[str(tmp_path / "a")], id=[f"x={data}"]))
    with torch.no_grad():
        right = [own[int(base(input_ids=torch.tensor([tokenizer(row["text"])["input_ids"]])).logits.argmax())]
                 for row in rows]  # fmt: skip
    expected = sum(named.get(name) == row["label"] for name, row in zip(right, rows, strict=True)) / len(rows)
    assert found["base"]["id"]["x"]["accuracy"] == expected


@pytest.mark.parametrize(("kwargs", "labels", "message"), [
    ({"num_labels": 3}, ["a", "b"], r"of 3 labels \(LABEL_0, LABEL_1, LABEL_2\), and the data have 2 \(a, b\)"),
    ({"num_labels": 2}, ["a", "b"], r"of 2 labels \(LABEL_0, LABEL_1\)"),
    ({"num_labels": 2}, ["0", "1", "2"], "of 2 labels .* have 3"),
    ({"num_labels": 2}, ["1", "LABEL_0"], "name them as the base does"),
    ({"num_labels": 1}, ["a", "b"], "for regression"),
    ({"num_labels": 2, "problem_type": "multi_label_classification"}, ["0", "1"], "for multi_label"),
])  # fmt: skip
def test_a_base_that_is_another_classifier_is_refused(kwargs, labels, message):
    with pytest.raises(FinepointError, match=message):
        class_order(sorted_out(**kwargs), labels)


def test_sparsify_trains_and_stores_a_head_that_no_checkpoint_holds(tmp_path):
    model = finepoint.sparsify(classifier(t.LlamaConfig(**SMALL)), "random", 0.01)
    finepoint.save(model, tmp_path / "a")
    adapter = SparseAdapter.load(tmp_path / "a")
    assert adapter.changes["score.weight"].kind == "full"
    assert not adapter.changes_nothing()
    assert finepoint.sparsify(tiny_llama(), "random", 0.01)._finepoint_session.whole == ()  # words need no head


def test_what_is_trained_besides_the_entries_is_not_left_out_of_a_saved_adapter_silently(tmp_path):
    model = finepoint.sparsify(tiny_llama(), "random", 0.01)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(FinepointError, match=r"model\.norm\.weight \(1\)"):
        finepoint.save(model, tmp_path / "a")
    model.model.norm.weight.requires_grad_(False)
    finepoint.save(model, tmp_path / "a")


def test_an_adapter_that_changes_nothing_says_so(tmp_path, caplog):
    for dtype in (torch.float32, torch.bfloat16):  # deltas, and values
        model = finepoint.sparsify(tiny_llama(dtype), "random", 0.01)
        caplog.clear()
        finepoint.save(model, tmp_path / str(dtype))
        assert "changes nothing" in caplog.text
        caplog.clear()
        finepoint.load(tiny_llama(dtype), tmp_path / str(dtype))
        assert "changes nothing" in caplog.text
        caplog.clear()
        model.save_pretrained(tmp_path / "again")  # as a stock trainer does
        assert "changes nothing" in caplog.text
        assert facts(SparseAdapter.load(tmp_path / "again"))["changes"].startswith("nothing")
        entries = next(iter(finepoint.tuner_of(model).entries.values()))
        with torch.no_grad():
            entries.delta.fill_(0.5)
        entries.follow_()
        caplog.clear()
        finepoint.save(model, tmp_path / str(dtype), overwrite=True)
        assert not caplog.text


SEQUENCES = {
    "t5": lambda: t.T5ForConditionalGeneration(ENCODERS["t5"]),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, init_std=0.3, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=2)),
    "masked bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
    "llama": tiny_llama,
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_mean_gradient_weighs_the_labels_that_the_models_own_loss_counts(name):
    torch.manual_seed(0)
    model = SEQUENCES[name]().double().eval()
    generator, batches = torch.Generator().manual_seed(2), []
    for labels in (3, 7, 2):
        ids = torch.randint(4, 60, (2, 9), generator=generator)
        wanted = (
            ids[:, :labels].contiguous() if name in ("t5", "bart") else torch.where(torch.arange(9) < labels, ids, -100)
        )
        batches.append({"input_ids": ids, "labels": wanted})
    first = 1 if name == "llama" else 0
    assert counts_every_label(model, batches) == (first == 0)
    counts = [int((batch["labels"][:, first:] != -100).sum()) for batch in batches]
    weights = dict(list(model.named_parameters())[2:4])
    loss = sum(model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)
    expected = torch.autograd.grad(loss, list(weights.values()))
    found = stream_statistics(model, weights, batches, ["gradient"])
    for (_, statistics), gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(statistics.gradient, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_input_norms_of_an_encoder_decoder_are_those_of_its_own_decoder_inputs(name):
    torch.manual_seed(0)
    model = SEQUENCES[name]().double().eval()
    ids, labels = torch.tensor([ROWS[1], ROWS[1]]), torch.tensor([ROWS[0], [*ROWS[0][:3], -100, -100]])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    at = next(at for at, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "decoder" in at)
    squares = []
    hook = model.get_submodule(at).register_forward_pre_hook(
        lambda module, args: squares.append(args[0].flatten(0, -2).square().sum(0)))  # fmt: skip
    for row, end in ((0, 5), (1, 3)):
        model(input_ids=ids[row : row + 1, : 9 if row == 0 else 6], labels=labels[row : row + 1, :end])
    hook.remove()
    weights = {f"{at}.weight": model.get_parameter(f"{at}.weight")}
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ((_, statistics),) = stream_statistics(model, weights, [batch], ["input_norm"])
    torch.testing.assert_close(statistics.input_norm[0], sum(squares).sqrt())


def test_a_model_that_sees_padding_trains_on_batches_of_one_that_make_up_a_step(tmp_path, tokenizer):
    folder = folder_of(tmp_path / "phi", built(DECODERS["phi 3, long rope"]), tokenizer)
    data = write_lines(tmp_path / "rows.jsonl", [{"prompt": "ab" * n, "completion": " c"} for n in range(1, 9)])
    config = TrainConfig(model=folder, data=data, output=str(tmp_path / "a"), steps=2, batch_size=4, density=0.05)
    assert train(config)["padding"] == 0
    assert (tmp_path / "a" / "log.jsonl").read_text().count('"loss"') == 2


def test_encoders_that_number_positions_by_the_padding_token_are_not_trained_by_the_command(tmp_path, tokenizer):
    data = write_lines(tmp_path / "rows.jsonl", [{"text": "ab", "label": "x"}, {"text": "abc", "label": "y"}])
    for kind, refused in ((t.RobertaForMaskedLM(t.RobertaConfig(**SMALL)), True),
                          (t.BertForMaskedLM(t.BertConfig(**SMALL)), False)):  # fmt: skip
        folder = folder_of(tmp_path / type(kind).__name__, kind, tokenizer)
        config = TrainConfig(model=folder, data=data, output=str(tmp_path / "a"))
        with pytest.raises(FinepointError, match="numbers its positions") if refused else nullcontext():
            prepare(config)


class Normalised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


@pytest.mark.parametrize("how", ["in training mode", "without momentum", "in evaluation mode"])
def test_statistics_that_training_mode_changes_are_told_of_before_and_never_lost_silently(how, tmp_path, caplog):
    model, base = Normalised(), Normalised().eval()
    if how == "without momentum":
        model.norm.momentum = 0.0
    finepoint.sparsify(model, "magnitude-high", 0.5, targets="all").train()
    if how == "in evaluation mode":
        model.norm.eval()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for seed in range(2):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
    assert ("training mode changes norm.running_mean" in caplog.text) == (how != "without momentum")
    if how == "in training mode":
        with pytest.raises(FinepointError, match=r"^norm.running_mean was changed since .* set the layer's momentum"):
            finepoint.save(model, tmp_path / "adapter")
    else:
        finepoint.save(model, tmp_path / "adapter")
        assert torch.equal(finepoint.load(base, tmp_path / "adapter")(x), model.eval()(x))
