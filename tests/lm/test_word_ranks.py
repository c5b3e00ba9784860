"""Ranks by shared words against BM25 as its definition says it, document by document and word by word."""

import math
import re

import numpy as np
import pytest

from trak_fast.lm.word_ranks import WordRanks


def plain_scores(texts: list[str], query: str) -> list[float]:
    """Computes BM25 (k1 = 1.5, b = 0.75) in plain loops."""
    documents = [re.findall(r"[^\W_]+", text.lower()) for text in texts]
    average = sum(len(words) for words in documents) / len(documents)
    scores = []
    for words in documents:
        parts = []
        for word in re.findall(r"[^\W_]+", query.lower()):
            holders = sum(word in other for other in documents)
            rarity = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            count = words.count(word)
            if count:
                parts.append(rarity * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(words) / average)))
        scores.append(math.fsum(parts))
    return scores


def order_of(scores: list[float]) -> list[int]:
    """Orders rows from the best; sums that differ by rounding only are equal."""
    return sorted(range(len(scores)), key=lambda row: (-round(scores[row], 9), row))


@pytest.mark.parametrize("words", [12, 300])
def test_ranks_are_those_of_bm25_computed_word_by_word(rng: np.random.Generator, words: int) -> None:
    names = [f"w{number}" for number in range(words)]
    frequency = 1 / np.arange(1, words + 1)
    frequency /= frequency.sum()

    def draw(length: int) -> str:
        return " ".join(rng.choice(names, length, p=frequency))

    texts = [draw(int(rng.integers(0, 30))) for _ in range(150)]
    ranks = WordRanks(texts)
    for _ in range(10):
        query = draw(int(rng.integers(1, 12)))
        found = ranks.ranks(query)
        assert found.dtype == np.int64
        expected = np.empty(len(texts), np.int64)
        expected[order_of(plain_scores(texts, query))] = np.arange(1, len(texts) + 1)
        np.testing.assert_array_equal(found, expected)


def test_words_are_letters_and_digits_of_any_script_in_small_or_capital_letters() -> None:
    texts = ["nothing", "the ŁÓDŹ, of old", "snake_case", "число 42!", "ΣΟΦΟΣ", "\ud800 \x00 \U0001f600"]
    ranks = WordRanks(texts)
    for row, query in [(1, "łódź?"), (2, "CASE"), (3, "(Число)"), (3, "42"), (4, "σοφοσ".upper())]:
        assert ranks.ranks(query)[row] == 1, query


def test_equal_documents_are_ranked_in_the_order_of_their_rows() -> None:
    texts = ["b a", "c", "a b", "a b", "d", "B, A"]
    assert WordRanks(texts).ranks("a b").tolist() == [1, 5, 2, 3, 6, 4]


@pytest.mark.parametrize("query", ["", "…", "unknown words only"])
def test_a_query_without_a_known_word_leaves_the_order_of_rows(query: str) -> None:
    assert WordRanks(["one", "two", ""]).ranks(query).tolist() == [1, 2, 3]


@pytest.mark.parametrize("texts", [[], [""], ["", "!"]])
def test_documents_without_words_are_ranked_too(texts: list[str]) -> None:
    assert WordRanks(texts).ranks("word").tolist() == list(range(1, len(texts) + 1))


def test_a_query_adds_no_words() -> None:
    ranks = WordRanks(["one two", "two three"])
    before = ranks.ranks("three").tolist()
    ranks.ranks("entirely new")
    assert ranks.ranks("three").tolist() == before == [2, 1]
