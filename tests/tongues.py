"""A family of tokenizers, trained on a few sentences: the ways in which real ones part a text."""

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SENTENCES = [
    "### Instruction:\nSay it again.\n\n### Response:\nIt is the capital of France.\n",
    "Q: is 12 + 30 = 42?\nA: yes, it is.\nQ: and 7?\nA: no, it isn't!\n\n", "user: hello there\nassistant: good day\n",
    "def add(a, b):\n    return a + b\n\nprint(\"hi\")\n", "see https://example.org/a  or   not; naïve café, 東京へ",
    "I don't know what they'll do: x = [1, 2]\n", "Sentiment: positive Sentiment: negative the play playing played",
] * 4  # fmt: skip


def _fast(tokenizer, **more):
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | more
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _around(single, specials=("<s>", "</s>")):
    """What is put around a text, e.g. `<s> $A`."""
    return processors.TemplateProcessing(single=single, special_tokens=[(t, SPECIAL.index(t)) for t in specials])


def _bytes(pattern=None, post=None, normalizer=None, size=420, prefix=False):
    """Byte-level BPE; without a pattern tokens reach over everything, parts of characters included."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL,
                                                                 initial_alphabet=alphabet))  # fmt: skip
    if post:
        tokenizer.post_processor = post
    return tokenizer


def _sentencepiece(pre=None, normalizer=None, post=None):
    """BPE over words that begin with `▁`, other characters as bytes."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if pre:
        raw.pre_tokenizer = pre
    if normalizer:
        raw.normalizer = normalizer
    codes = [f"<0x{i:02X}>" for i in range(256)]
    texts = [line for text in SENTENCES for line in text.encode("ascii", "ignore").decode().split("\n")]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + codes))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])  # fmt: skip
    if post:
        raw.post_processor = post
    return raw


def _unigram():
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    raw.train_from_iterator(SENTENCES, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL,
                                                               unk_token="<unk>"))  # fmt: skip
    return raw


def _wordpiece():
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(cleanup=False)
    raw.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=230, special_tokens=SPECIAL))
    raw.post_processor = _around("<s> $A </s>")
    return raw


MAKERS = {
    "gpt2": lambda: _fast(_bytes(GPT2, processors.ByteLevel(trim_offsets=False))),
    "llama3": lambda: _fast(_bytes(LLAMA3, processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _around("<s> $A", ["<s>"])]))),
    "qwen": lambda: _fast(_bytes(QWEN, normalizer=normalizers.NFC())),
    "bytes over everything": lambda: _fast(_bytes(size=700)),
    "roberta": lambda: _fast(_bytes(None, processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), prefix=True)),
    "appends its end": lambda: _fast(_bytes(GPT2, _around("$A </s>", ["</s>"]))),
    "begins and ends": lambda: _fast(_bytes(QWEN, _around("<s> $A </s>"))),
    "separates": lambda: _fast(_bytes(GPT2, _around("<s> $A <unk>", ["<s>", "<unk>"])), cls_token="<s>",
                               sep_token="<unk>", unk_token=None),
    "metaspace first": lambda: _fast(_sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
                                                    post=_around("<s> $A", ["<s>"]))),
    "metaspace always": lambda: _fast(_sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="always"),
                                                     post=_around("<s> $A </s>"))),
    "llama2": lambda: _fast(_sentencepiece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        post=_around("<s> $A", ["<s>"]))),
    "gemma": lambda: _fast(_gemma()),
    "unigram": lambda: _fast(_unigram()),
    "wordpiece": lambda: _fast(_wordpiece()),
    "slow bytes": lambda: ByT5Tokenizer(),
}  # fmt: skip


def _gemma():
    raw = _sentencepiece(pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"),
                         _around("<s> $A", ["<s>"]))  # fmt: skip
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return raw


# Those that give back every text to the letter; of the others the most that can be asked is what they make of it.
EXACT = {"gpt2", "llama3", "bytes over everything", "appends its end", "begins and ends", "separates", "gemma"}


@cache
def tongue(name):
    return MAKERS[name]()
