"""The data recipes on hand-made lines in the form of the real files; real ones are fetched where they can be."""

import gzip
import json
import random
import struct
import zlib
from collections import Counter

import pytest

from finepoint.data.examples import read_examples
from finepoint.data.recipes import generators, texts, wordnet
from finepoint.data.recipes.generators import Pool, distinct, generate
from finepoint.data.recipes.rdata import read_database
from finepoint.data.recipes.table import RECIPES, recipe
from finepoint.data.recipes.texts import excerpts, paragraphs
from finepoint.data.recipes.wordnet import Synset, parse, question, questions, split
from finepoint.errors import FinepointError


def fetched(name, folder):
    """The rows by file of a recipe, where its package can be had."""
    try:
        return recipe(name).write(folder)
    except FinepointError as error:
        if "could not fetch" in str(error) or "no apt-get" in str(error):
            pytest.skip(str(error))
        raise


def groups(path):
    return {json.loads(line)["group"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_every_recipe_says_what_it_is():
    for name, found in RECIPES.items():
        assert all([found.what, found.files, found.licence, found.source]), name
        assert found.writer.startswith("finepoint.data.recipes.")
    assert {"vader", "wordnet", "arithmetic", "boolq", "arc-c", "mmlu"} <= set(RECIPES)


def test_the_command_line_lists_them_and_refuses_others(finepoint, tmp_path):
    listed = json.loads(finepoint("data", "--json").stdout)
    assert list(listed) == list(RECIPES)
    assert listed["wordnet"]["licence"].startswith("WordNet 3.0")
    assert listed["piqa"]["needs_hub"]
    assert not listed["novels"]["needs_hub"]
    for words in (["data"], ["data", "--help"]):
        printed = finepoint(*words).stdout
        assert all(name in printed for name in RECIPES)
    assert "did you mean 'wordnet'? recipes: vader" in finepoint("data", "wordnt", status=2).stderr
    assert "--output is required" in finepoint("data", "wordnet", status=2).stderr


# WordNet

NOUNS = """\
  1 This software and database
00000010 03 n 01 agent 0 000 | that which acts; "an agent"
00000020 03 n 02 wetting_agent 0 wetter 0 002 @ 00000010 n 0000 ;c 00000099 n 0000 | makes liquids spread | or so; "x"
00000030 18 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @i 00000010 n 0000 | an instance
"""


def test_synsets_are_read_with_all_their_words():
    agent, wetting, instance = parse(NOUNS)
    assert agent == Synset("00000010", ("agent",), 'that which acts; "an agent"', "")
    assert wetting.words == ("wetting agent", "wetter")
    assert wetting.hypernym == "00000010"
    assert wetting.clause == "makes liquids spread | or so"
    assert len(instance.words) == 10
    assert instance.hypernym == "", "an instance is no kind"


def family(names, hypernym="h", gloss="defined as {}"):
    return [Synset(f"{hypernym}{i}", (name,), gloss.format(i), hypernym) for i, name in enumerate(names)]


def test_a_question_is_fair_or_not_asked():
    good = family(["alpha", "beta", "gamma", "delta", "epsilon"])
    row = question(good[0], good, random.Random(0))
    assert row["choices"][row["answer"]] == " alpha"
    assert len(set(row["choices"])) == 4
    assert row["prompt"] == "Definition: defined as 0\nWord:"
    told = [Synset("x", ("alpha",), "the Alphas of a thing", "h"), *good[1:]]
    assert question(told[0], told, random.Random(0)) is None, "the answer stands in the definition"
    hinted = [Synset("x", ("omega",), "not beta; beta", "h"), *good]
    assert " beta" not in question(hinted[0], hinted, random.Random(0))["choices"], "excluded by the definition"
    same = [good[0], *(Synset(f"s{i}", (f"word{i}", "alpha"), "d", "h") for i in range(5))]
    assert question(same[0], same, random.Random(0)) is None, "siblings of the same name are right as well"
    assert question(good[0], family(["alpha", "beta", "gamma", "it"]), random.Random(0)) is None, "too few, one short"
    car = family(["car seat", "bench", "stool", "throne", "pew seat", "bus seat"])
    long = [Synset("x", ("alpha beta",), "two words", "h"), *family(["one", "four", "five six", "nine ten", "ten one"])]
    assert question(Synset("x", ("car seat",), "a seat to drive on", "h"), car, random.Random(0)) is None
    assert {len(word.split()) for word in question(long[0], long, random.Random(0))["choices"]} == {2}
    assert question(Synset("x", ("alpha",), "a mark (`", "h"), good, random.Random(0)) is None, "cut inside of brackets"


def many_families(count=400):
    names = ["first", "second", "third", "fourth", "fifth", "sixth"]
    return [
        synset
        for i in range(count)
        for synset in [Synset(f"{i:04}", (f"group{i}",), "", ""), *family(names, f"{i:04}", f"unlike {i} {{}}")]
    ]


def test_wordnet_groups_never_cross_and_the_answer_stands_anywhere(monkeypatch):
    rows = questions(many_families(), 0)
    assert rows == questions(many_families(), 0)
    assert max(Counter(row["group"] for row in rows).values()) == wordnet.PER_GROUP
    places = Counter(row["answer"] for row in rows)
    assert all(0.2 < places[i] / len(rows) < 0.3 for i in range(4)), places
    monkeypatch.setattr(wordnet, "ROWS", {"train": 500, "validation": 60, "test": 120})
    monkeypatch.setattr(wordnet, "without_near_duplicates", lambda rows, held_out, text: rows)  # these are all alike
    parts = split(rows, 0)
    assert {part: len(found) for part, found in parts.items()} == wordnet.ROWS
    train, validation, test = ({row["group"] for row in found} for found in parts.values())
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_real_wordnet(tmp_path):
    assert fetched("wordnet", tmp_path) == {"wordnet-train": 6000, "wordnet-validation": 500, "wordnet-test": 1000}
    assert "Princeton" in (tmp_path / "NOTICE.txt").read_text(encoding="utf-8")
    train, test = groups(tmp_path / "wordnet-train.jsonl"), groups(tmp_path / "wordnet-test.jsonl")
    assert not train & test
    examples = read_examples(tmp_path / "wordnet-train.jsonl")
    places = Counter(example.answer for example in examples)
    assert all(0.23 < places[i] / len(examples) < 0.27 for i in range(4)), places
    for extreme in (max, min):
        found = sum(extreme(e.choices, key=len) == e.choices[e.answer] for e in examples)
        assert 0.2 < found / len(examples) < 0.3, "the length gives the answer away"


# Generators


def drawn(question, answer="1", score=1.0, group=""):
    return {"question": question, "answer": answer, "score": score, "group": group}


def test_questions_are_asked_once_and_only_with_a_sound_answer():
    rows = [drawn("a"), drawn("b", None), drawn("c", score=0.01), drawn("a"), drawn("d", ""), drawn("e")]
    assert [row["question"] for row in distinct(rows)] == ["a", "e"]


def test_generated_parts_share_no_question_and_no_group():
    sizes = {"train": 60, "validation": 10, "test": 20}
    plain = generators.split([drawn(f"{i} =") for i in range(200)], sizes)
    assert {part: len(rows) for part, rows in plain.items()} == sizes
    assert len({row["prompt"] for rows in plain.values() for row in rows}) == 90
    assert plain["train"][0].keys() == {"prompt", "completion"}
    grouped = generators.split([drawn(f"{i} =", group=f"g{i % 30}") for i in range(300)], sizes)
    train, validation, test = ({row["group"] for row in rows} for rows in grouped.values())
    assert not train & validation
    assert not (train | validation) & test


def test_the_real_arithmetic_is_right(tmp_path):
    counts = fetched("arithmetic", tmp_path)
    assert counts == {
        "arithmetic-train": 4000, "arithmetic-validation": 500, "arithmetic-test": 1000,
        "arithmetic-harder": 1000, "arithmetic-terms": 1000, "arithmetic-minus": 1000,
    }  # fmt: skip
    prompts = []
    for name in counts:
        examples = read_examples(tmp_path / f"{name}.jsonl")
        for example in examples:
            sum_ = example.prompt.removeprefix("Question: ").removesuffix(" =\nAnswer:")
            assert f" {eval(sum_)}" == example.completion
        prompts += [example.prompt for example in examples]
    assert len(set(prompts)) == len(prompts)
    train, test = groups(tmp_path / "arithmetic-train.jsonl"), groups(tmp_path / "arithmetic-test.jsonl")
    assert not train & test, "7 + 12 in one part and 12 + 7 in another"


def test_a_generator_that_fails_is_reported(tmp_path):
    fetched("arithmetic", tmp_path)
    with pytest.raises(FinepointError, match="the generators of reasoning-gym==0.1.25 failed: .*nonesuch"):
        generate([Pool("arithmetic.chain_sum", "nonesuch", 1)])


# Novels


def r_text(*items, attributes=b""):
    """A character vector (or list, of packed items) in R's serialisation."""
    kind = 19 if items and isinstance(items[0], bytes) else 16
    body = b"".join(item if isinstance(item, bytes) else r_chars(item) for item in items)
    return struct.pack(">ii", kind | (1 << 9 if attributes else 0), len(items)) + body + attributes


def r_chars(text):
    packed = text.encode()
    return struct.pack(">ii", 9 | 1 << 15, len(packed)) + packed


def r_names(*names):
    return struct.pack(">ii", 2 | 1 << 10, 1) + r_chars("names") + r_text(*names) + struct.pack(">i", 254)


HEADER = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8"


def test_text_comes_out_of_a_data_base_of_r():
    block = HEADER + r_text("EMMA", "", "Émile")
    blocks = b"skip" + struct.pack(">i", len(block)) + zlib.compress(block)
    where = struct.pack(">iiii", 13, 2, 4, len(blocks) - 4)
    index = HEADER + r_text(r_text(where, attributes=r_names("emma")), attributes=r_names("variables"))
    assert read_database(gzip.compress(index), blocks) == {"emma": ["EMMA", "", "Émile"]}
    for bad in (b"", gzip.compress(b"A\n"), gzip.compress(HEADER), gzip.compress(index[:-9])):
        with pytest.raises(FinepointError, match="cannot read R data"):
            read_database(bad, blocks)


def test_excerpts_are_neighbours_without_headings():
    body = " ".join(["word"] * 120)
    lines = [
        "EMMA",
        "",
        "VOLUME I",
        "",
        "CHAPTER I",
        "",
        "It _was_",
        f"so. {body}",
        "",
        "* * *",
        "",
        body,
        "",
        "left over",
    ]
    lines += ["", "Chapter 2", "", body, "", " ".join(["long"] * 500), "", body, "", body, "", "FINIS"]
    found = list(excerpts(paragraphs(lines)))
    assert found == [f"It was so. {body}\n\n{body}", f"{body}\n\n{body}"]


def test_the_real_novels(tmp_path):
    assert fetched("novels", tmp_path) == {"novels": 1961, "novels-other": 555}
    assert groups(tmp_path / "novels-other.jsonl") == {"northangerabbey", "persuasion"}
    texts = [example.text for example in read_examples(tmp_path / "novels.jsonl")]
    assert all(200 <= len(text.split()) <= 600 for text in texts)
    assert not any("CHAPTER" in text or "_" in text for text in texts)


# GSM8K


def test_solutions_lose_their_calculator_marks():
    (row,) = texts.parse(json.dumps({"question": "How many? ", "answer": "2*3=<<2*3=6>>6\n#### 6"}) + "\n")
    assert row == {"prompt": "Question: How many?\nAnswer:", "completion": " 2*3=6\n#### 6"}
