"""The recipe on a few hand-made lines in the form of the real files; no text of other people is kept here."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from finepoint.data.recipes.splits import NEAR_DUPLICATE, jaccard, split_by_group, without_near_duplicates, words
from finepoint.data.recipes.vader import TEST_SHARE, Snippet, as_row, documents, parse, rated

LINES = "7_2\t2.5\tSecond &amp; best\r\n7_1\t-0.2\tMeh\r\n9_1\t-1.0\tAwful\ttabbed\r\n9_2\t3\tSECOND &amp; BEST\r\n\r\n"


def test_parsing_keeps_documents_together_where_there_are_any():
    snippets = list(parse("amazon", LINES))
    assert [s.group for s in snippets] == ["amazon-7", "amazon-7", "amazon-9", "amazon-9"]
    assert [s.group for s in parse("tweets", LINES)][:2] == ["tweets-7_2", "tweets-7_1"]
    assert snippets[0].text == "Second & best"
    assert snippets[2].text == "Awful\ttabbed"


def test_only_clear_ratings_stay_and_repeats_go():
    kept = rated(list(parse("amazon", LINES)))
    assert [s.text for s in kept] == ["Second & best", "Awful\ttabbed"]
    assert [as_row(s)["answer"] for s in kept] == [0, 1]
    assert as_row(kept[0])["prompt"] == "Text: Second & best\nSentiment:"


def test_groups_never_cross_splits_and_the_split_is_fixed():
    snippets = [Snippet(f"t{i}", 2.0, f"g{i // 3}", i) for i in range(600)]
    parts = split_by_group(snippets, lambda s: s.group, (TEST_SHARE, TEST_SHARE), 0)
    assert parts == split_by_group(snippets, lambda s: s.group, (TEST_SHARE, TEST_SHARE), 0)
    assert sum(map(len, parts)) == 600
    groups = [{s.group for s in part} for part in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]  # noqa: PT018
    assert all(groups)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8), min_size=1, max_size=12))
def test_near_duplicates_are_found_as_by_comparing_all_pairs(texts):
    snippets = [Snippet(" ".join(text), 2.0, str(i), i) for i, text in enumerate(texts)]
    rows, held_out = snippets[::2], snippets[1::2]
    kept = without_near_duplicates(rows, held_out, lambda s: s.text)
    expected = [
        row for row in rows if all(jaccard(words(row.text), words(other.text)) < NEAR_DUPLICATE for other in held_out)
    ]
    assert kept == expected


def test_documents_are_put_together_in_order():
    found = documents(list(parse("nyt", LINES)))
    assert [row["text"] for row in found] == ["Second & best Meh", "Awful\ttabbed SECOND & BEST"]
    assert Counter(row["group"] for row in found) == {"nyt-7": 1, "nyt-9": 1}
